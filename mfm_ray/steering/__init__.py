"""Steering: every method of the paper and its rivals, with one calling form.

guidance.py changes the drift (MFM-G, MFM-GF, DPS), selection.py picks among draws (resampling, search, Best-of-N),
smc.py weighs particles. What they share: method.py; the reward's side: scoring.py; draws in parts: draws.py.
"""

from mfm_ray.steering.calls import CallCounter, Cost
from mfm_ray.steering.draws import AutoDraws
from mfm_ray.steering.guidance import DPS, GradientFreeGuidance, GradientGuidance, Guidance, GuidedDrift, Unguided
from mfm_ray.steering.limits import limit_shift
from mfm_ray.steering.method import Particles, Steering, SteeringContext, Step
from mfm_ray.steering.scoring import Reward, draw_and_score, score
from mfm_ray.steering.selection import BestOfN, PosteriorResampling, Search
from mfm_ray.steering.smc import SMC

__all__ = [
    "DPS",
    "SMC",
    "AutoDraws",
    "BestOfN",
    "CallCounter",
    "Cost",
    "GradientFreeGuidance",
    "GradientGuidance",
    "Guidance",
    "GuidedDrift",
    "Particles",
    "PosteriorResampling",
    "Reward",
    "Search",
    "Steering",
    "SteeringContext",
    "Step",
    "Unguided",
    "draw_and_score",
    "limit_shift",
    "score",
]
