"""The configuration of `jobs.train` at a point of a sweep."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mfm_ray.config import flatten, group_defaults
from mfm_ray.errors import InputError
from mfm_ray.settings import nearest, unknown_key
from mfm_ray.tuning.space import Point

GROUPS = ("network", "objective")
"""Components by name; their constructors are the schema of their arguments."""
SWEPT = (
    *GROUPS,
    "optimizer",
    "augmentation",
    "zero",
    "seed",
    "global_batch_size",
    "micro_batch_size",
    "warmup_steps",
    "learning_rate_schedule",
    "gradient_clipping",
    "ema_decay",
    "precision",
)
"""Keys, or groups of keys, that may differ from trial to trial. Steps, data and workers are common to all."""
PERTURBED = ("optimizer.learning_rate", "gradient_clipping", "objective.", "augmentation.")
"""What may change in the middle of a training: nothing of this is part of a checkpoint."""


def training_settings(common: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """The plain configuration of `jobs.train` at a point: groups are chosen first, then their keys are set.

    Another choice of a group keeps what the recipe and the command line changed in it, where it has such a key: as
    `experiment=digits objective=lagrangian` does. InputError for a key that no trial may have of its own; arguments of
    network and objective are left to their constructors.
    """
    settings = copy.deepcopy(dict(common))
    for key, value in sorted(point.items(), key=lambda item: item[0] not in GROUPS):
        place = f"space.{key}"
        group, _, argument = key.partition(".")
        if key in GROUPS:
            settings[group] = _choose(group, value, settings[group], place)
        elif group in GROUPS and argument:
            set_nested(settings[group], argument, value, place)
        elif group in SWEPT and key in (known := flatten(settings)) and not isinstance(known[key], Mapping):
            set_nested(settings, key, value, place)
        else:
            raise _unknown(key, settings)
    return settings


def set_nested(values: dict[str, Any], key: str, value: Any, place: str) -> None:
    """Sets a dotted key. InputError, naming the place, where a part of it is no group of keys."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(values.get(part), dict):
            raise InputError(f"{place}: {part} is no group of keys")
        values = values[part]
    values[last] = value


def _choose(group: str, name: str, before: Mapping[str, Any], place: str) -> dict[str, Any]:
    try:
        defaults, old = group_defaults(group, name), group_defaults(group, before["name"])
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    changed = {key: value for key, value in before.items() if key not in old or old[key] != value}
    return {**defaults, **{key: value for key, value in changed.items() if key in defaults}, "name": name}


def _unknown(key: str, settings: Mapping[str, Any]) -> InputError:
    known = {name: value for name, value in flatten(settings).items() if name.partition(".")[0] in SWEPT}
    leaves = [f"space.{name}" for name, value in known.items() if name in GROUPS or not isinstance(value, Mapping)]
    if key in flatten(settings):
        close = nearest(f"space.{key}", leaves)
        hint = f"; did you mean {close}?" if close else ""
        return InputError(f"space.{key}: is common to all trials; expected one of {', '.join(SWEPT)}{hint}")
    return unknown_key(f"space.{key}", leaves)


def train_words(settings: Mapping[str, Any]) -> list[str]:
    """The words of `jobs.train` that train this again: recipe and components by name, then every key; no place."""
    from mfm_ray.tuning.words import word

    words = [f"experiment={settings['experiment']}", f"data={settings['data']['name']}"]
    words += [f"{group}={settings[group]['name']}" for group in GROUPS]
    for group in GROUPS:
        words += [f"++{group}.{key}={word(value)}" for key, value in settings[group].items() if key != "name"]
    for key, value in flatten({key: settings[key] for key in settings if key not in _NOT_SAID}).items():
        if key == "scaling.resources_per_worker":
            words += [f"++{key}.{name}={word(amount)}" for name, amount in value.items()]
        elif not isinstance(value, Mapping) and not key.startswith("scaling.resources_per_worker."):
            words.append(f"{key}={word(value)}")
    if settings["data"]["path"] is not None:
        words.append(f"data.path={settings['data']['path']}")
    return words


_NOT_SAID = (*GROUPS, "experiment", "data", "name", "storage", "resume", "overwrite")
