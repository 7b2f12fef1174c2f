"""What `low`, `medium` and `high` mean on a model: presets of a sweep (`jobs.tune`), in place of the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfm_ray.config import SampleConfig, load_config
from mfm_ray.errors import InputError
from mfm_ray.presets import Preset as SamplerDefaults
from mfm_ray.settings import nearest

QUALITIES = ("low", "medium", "high")
NOT_ASKED = ("reward", "draws_at_once")
"""Arguments of methods that are the server's business."""


@dataclass(frozen=True)
class SteeringPreset:
    """How a trial of a sweep steered. What it made (label, seed) and towards what (its reward) is a request's own.

    method, arguments: as `mfm_ray.building.build_steering` takes them; dynamics None: what the method does best with.
    """

    method: str
    arguments: Mapping[str, Any]
    num_steps: int
    dynamics: str | None = None
    max_nfe: int | None = None
    cfg_scale: float | None = None

    def suits(self, method: str | None, *, any_rewards: bool) -> bool:
        """Whether it answers a request: a trial was measured as a whole, so one of another method says nothing."""
        return self.method == method if method is not None else (self.method != "none") == any_rewards

    def description(self) -> dict[str, Any]:
        """As a request might have said it."""
        stated = {"method": self.method, **self.arguments, "num_steps": self.num_steps}
        further = {"dynamics": self.dynamics, "max_nfe": self.max_nfe, "cfg_scale": self.cfg_scale}
        return {**stated, **{key: value for key, value in further.items() if value is not None}}


def read_presets(
    given: Mapping[str, str] | str | None, models: Mapping[str, Any]
) -> dict[str, dict[str, SteeringPreset]]:
    """Presets by model and quality. given: one `presets.yaml` (path or URI) for all models, or one by model id.

    InputError in one line for an id that is not served, a file that is none, and a trial that no request can ask for.
    """
    if given is None:
        return {}
    places = given if isinstance(given, Mapping) else dict.fromkeys(models, given)
    for name in places:
        if name not in models:
            close = nearest(name, models)
            hint = f"; did you mean {close}?" if close else ""
            raise InputError(f"presets.{name}: no such model is served; expected {', '.join(models)}{hint}")
    files = {place: {quality: read_preset(place, quality) for quality in QUALITIES} for place in set(places.values())}
    return {name: files[place] for name, place in places.items()}


def read_preset(place: str, quality: str) -> SteeringPreset:
    """One preset of a file. InputError as above."""
    source = f"{place}#{quality}"
    try:
        trial = load_config("sample", [f"preset={source}"])
    except InputError as error:
        reason = str(error).removeprefix(f"preset={source}: ").removeprefix(f"preset={place}: ")
        raise InputError(f"presets={source}: {reason}") from error
    assert isinstance(trial, SampleConfig)
    if trial.order != 1:
        raise InputError(f"presets={source}: order={trial.order}: requests are served in steps of order 1")
    if trial.preset is not None:
        raise InputError(f"presets={source}: preset={trial.preset}: a request cannot ask for a sampler's own recipe")
    arguments = {key: value for key, value in trial.steering.items() if key not in ("name", *NOT_ASKED)}
    return SteeringPreset(
        method=str(trial.steering["name"]),
        arguments=arguments,
        num_steps=trial.num_steps or SamplerDefaults().num_steps,
        dynamics=trial.dynamics,
        max_nfe=trial.max_nfe,
        cfg_scale=trial.cfg_scale,
    )
