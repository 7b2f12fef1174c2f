"""The methods as GET /v1/methods lists them: their arguments with defaults and what is allowed."""

from __future__ import annotations

import typing
from typing import Any

from mfm_ray.building import STEERING
from mfm_ray.steering import Unguided

from .resolve import configured
from .schema import SteeringRequest
from .settings import Limits

_DOCS = {
    "gradient": "MFM-G: guided by the gradient of the value, from posterior draws",
    "gradient_free": "MFM-GF: posterior draws weighed by their reward; needs no gradient",
    "dps": "DPS: guided by the reward of the posterior mean",
    "resampling": "each step goes towards a posterior draw, chosen by its reward",
    "search": "MFM-Search: particles go towards the best of their posterior draws",
    "smc": "sequential Monte Carlo: particles are weighed and resampled",
    "best_of_n": "the best of N images that were made unsteered",
    "none": "unsteered",
}
_LIMITS = {"num_draws": "draws", "num_particles": "particles"}


def describe_methods(limits: Limits) -> list[dict[str, Any]]:
    """The entries of GET /v1/methods, the method that requests get by default first."""
    return [_described(name, limits) for name in (*STEERING, "none")]


def _described(name: str, limits: Limits) -> dict[str, Any]:
    return {
        "id": name,
        "object": "method",
        "description": _DOCS[name],
        "takes_rewards": name in STEERING,
        "dynamics": STEERING.get(name, Unguided).default_dynamics,
        "arguments": {key: _argument(key, value, limits) for key, value in configured(name).items()},
    }


def _argument(key: str, default: Any, limits: Limits) -> dict[str, Any]:
    known = SteeringRequest.model_fields.get(key)
    choices = _choices(known.annotation) if known is not None else None
    described = {"default": default, **({"description": known.description} if known and known.description else {})}
    if choices:
        described["enum"] = choices
    if key in _LIMITS:
        described |= {"minimum": 1, "maximum": getattr(limits, _LIMITS[key])}
    return described


def _choices(hint: Any) -> list[str] | None:
    """The texts that a field of a request may be, None where it may be a number too."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if any(typing.get_origin(member) is not typing.Literal for member in members):
        return None
    return [choice for member in members for choice in typing.get_args(member)]
