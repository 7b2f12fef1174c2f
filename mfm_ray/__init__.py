"""Meta Flow Maps: train, steer and serve reward-aligned generators. Importing this needs torch and nothing above it."""

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.glass import posterior_velocity
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import KeyedNoise
from mfm_ray.samplers import Samples, TimeGrid, refine, sample
from mfm_ray.steering import BestOfN, GradientFreeGuidance, GradientGuidance
from mfm_ray.values import ValueEstimate, estimate_value

__version__ = "0.1.0"

__all__ = [
    "BestOfN",
    "DataSpace",
    "FlowMap",
    "GradientFreeGuidance",
    "GradientGuidance",
    "KeyedNoise",
    "LinearInterpolant",
    "Samples",
    "TimeGrid",
    "ValueEstimate",
    "estimate_value",
    "posterior_velocity",
    "refine",
    "sample",
]
