"""Tuning methods by the name they carry in a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mfm_ray.errors import refuse_unknown_arguments
from mfm_ray.finetuning.adjoint_matching import AdjointMatching
from mfm_ray.finetuning.reinforce_adjoint import ReinforceAdjointMatching
from mfm_ray.finetuning.reward_matching import RewardMatching
from mfm_ray.finetuning.reward_weighted import RewardWeightedRegression
from mfm_ray.finetuning.targets import TuningMethod

METHODS: dict[str, type[TuningMethod]] = {
    "mfm_ft": RewardMatching,
    "adjoint_matching": AdjointMatching,
    "reinforce_adjoint": ReinforceAdjointMatching,
    "reward_weighted": RewardWeightedRegression,
}


def build_method(method: Mapping[str, Any]) -> TuningMethod:
    """The method that a mapping {"name": ..., **constructor arguments} describes.

    ValueError for an unknown name and for arguments that the constructor refuses, naming both.
    """
    arguments = dict(method)
    name = arguments.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"method.name={name!r}: expected one of {', '.join(sorted(METHODS))}")
    refuse_unknown_arguments(arguments, METHODS[name], group="method")
    try:
        return METHODS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"method={dict(method)}: {error}") from error
