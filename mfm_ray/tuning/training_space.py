"""The configuration of `jobs.train` or `jobs.finetune` at a point of a sweep."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfm_ray.config import flatten, group_defaults
from mfm_ray.errors import InputError
from mfm_ray.settings import nearest, unknown_key
from mfm_ray.tuning.space import Point


@dataclass(frozen=True)
class Sweepable:
    """What may differ from trial to trial; steps, data and workers are common to all.

    groups: components by name, whose constructors are the schema of their arguments; keys: plain ones, or groups of
    keys.
    """

    groups: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.groups, *self.keys)


_OF_ANY_TRAINING = (
    "zero",
    "seed",
    "global_batch_size",
    "micro_batch_size",
    "warmup_steps",
    "learning_rate_schedule",
    "gradient_clipping",
    "ema_decay",
    "precision",
    "execution",
    "activation_checkpointing",
)
TRAIN = Sweepable(groups=("network", "objective"), keys=("optimizer", "augmentation", *_OF_ANY_TRAINING))
FINETUNE = Sweepable(
    groups=("method", "adapter"), keys=("reward_multiplier", "anchors", "optimizer", *_OF_ANY_TRAINING)
)
PERTURBED = ("optimizer.learning_rate", "gradient_clipping", "objective.", "augmentation.")
"""What may change in the middle of a training: nothing of this is part of a checkpoint."""


def training_settings(common: Mapping[str, Any], point: Point, sweepable: Sweepable = TRAIN) -> dict[str, Any]:
    """The plain configuration of the swept job at a point: groups are chosen first, then their keys are set.

    Another choice of a group keeps what the recipe and the command line changed in it, where it has such a key: as
    `experiment=digits objective=lagrangian` does. InputError for a key that no trial may have of its own; arguments of
    the components are left to their constructors.
    """
    settings, groups = copy.deepcopy(dict(common)), sweepable.groups
    for key, value in sorted(point.items(), key=lambda item: item[0] not in groups):
        place = f"space.{key}"
        group, _, argument = key.partition(".")
        if key in groups:
            settings[group] = _choose(group, value, settings[group], place)
        elif group in groups and argument:
            set_nested(settings[group], argument, value, place)
        elif group in sweepable.keys and key in (known := flatten(settings)) and not isinstance(known[key], Mapping):
            set_nested(settings, key, value, place)
        else:
            raise _unknown(key, settings, sweepable)
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


def _unknown(key: str, settings: Mapping[str, Any], sweepable: Sweepable) -> InputError:
    known = {name: value for name, value in flatten(settings).items() if name.partition(".")[0] in sweepable.all}
    leaves = [
        f"space.{name}" for name, value in known.items() if name in sweepable.groups or not isinstance(value, Mapping)
    ]
    if key in flatten(settings):
        close = nearest(f"space.{key}", leaves)
        hint = f"; did you mean {close}?" if close else ""
        return InputError(f"space.{key}: is common to all trials; expected one of {', '.join(sweepable.all)}{hint}")
    return unknown_key(f"space.{key}", leaves)


def train_words(settings: Mapping[str, Any]) -> list[str]:
    """The words of `jobs.train` that train this again: recipe and components by name, then every key; no place."""
    recipe = [f"experiment={settings['experiment']}", f"data={settings['data']['name']}"]
    path = settings["data"]["path"]
    return [*recipe, *_words(settings, TRAIN.groups, ("data",)), *([] if path is None else [f"data.path={path}"])]


def finetune_words(settings: Mapping[str, Any]) -> list[str]:
    """The words of `jobs.finetune` that tune this again, but for the model; no place."""
    return _words(settings, (*FINETUNE.groups, "reward"), ("model", "preset"))


def _words(settings: Mapping[str, Any], groups: tuple[str, ...], unsaid: tuple[str, ...]) -> list[str]:
    """Components by name, their arguments, then every other key."""
    from mfm_ray.tuning.words import word

    words = [f"{group}={settings[group]['name']}" for group in groups]
    for group in groups:
        words += [f"++{group}.{key}={word(value)}" for key, value in settings[group].items() if key != "name"]
    left_out = (*groups, *unsaid, "experiment", "name", "storage", "resume", "overwrite")
    for key, value in flatten({key: settings[key] for key in settings if key not in left_out}).items():
        if key == "scaling.resources_per_worker":
            words += [f"++{key}.{name}={word(amount)}" for name, amount in value.items()]
        elif not isinstance(value, Mapping) and not key.startswith("scaling.resources_per_worker."):
            words.append(f"{key}={word(value)}")
    return words
