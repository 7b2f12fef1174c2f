"""A trial's settings as the words of `python -m jobs.sample` that make its samples again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mfm_ray.tuning.space import GROUPS

PLAIN = ("seed", "num_steps", "dynamics", "order", "max_nfe", "preset", "label", "cfg_scale")


def sample_words(settings: Mapping[str, Any]) -> list[str]:
    """The group of each component, then all its arguments, then the sampler's own keys; no model, no place."""
    words = [f"{group}={settings[group]['name']}" for group in GROUPS]
    for group in GROUPS:
        words += [f"++{group}.{key}={word(value)}" for key, value in settings[group].items() if key != "name"]
    words += [f"{key}={word(settings[key])}" for key in PLAIN if settings[key] is not None]
    return [*words, *([f"judges={word(settings['judges'])}"] if settings["judges"] else [])]


def word(value: Any) -> str:
    """A value in Hydra's grammar, which wants bare keys in a mapping."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(word, value)) + "]"
    return json.dumps(value)
