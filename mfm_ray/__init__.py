"""Meta Flow Maps: train, steer and serve reward-aligned generators. Importing this needs torch and nothing above it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mfm_ray.data_space import DataSpace
from mfm_ray.dynamics import TimeGrid
from mfm_ray.flow_map import FlowMap
from mfm_ray.glass import posterior_velocity
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import Objective, named_objective
from mfm_ray.samplers import Samples, adapt_grid, refine, sample
from mfm_ray.steering import (
    DPS,
    SMC,
    AutoDraws,
    BestOfN,
    GradientFreeGuidance,
    GradientGuidance,
    PosteriorResampling,
    Search,
)
from mfm_ray.values import ValueEstimate, estimate_value

if TYPE_CHECKING:
    from mfm_ray import rewards
    from mfm_ray.pretrained import load_flow_map

__version__ = "0.1.0"

__all__ = [
    "DPS",
    "SMC",
    "AutoDraws",
    "BestOfN",
    "DataSpace",
    "FlowMap",
    "GradientFreeGuidance",
    "GradientGuidance",
    "KeyedNoise",
    "LinearInterpolant",
    "Objective",
    "PosteriorResampling",
    "Samples",
    "Search",
    "TimeGrid",
    "ValueEstimate",
    "adapt_grid",
    "estimate_value",
    "load_flow_map",
    "named_objective",
    "posterior_velocity",
    "refine",
    "rewards",
    "sample",
]


def __getattr__(name: str) -> Any:
    """What needs more than torch is imported when it is first asked for."""
    if name == "load_flow_map":
        from mfm_ray.pretrained import load_flow_map

        return load_flow_map
    if name == "rewards":
        import importlib

        return importlib.import_module("mfm_ray.rewards")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
