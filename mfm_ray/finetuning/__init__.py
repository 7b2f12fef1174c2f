"""Reward fine-tuning: the drift of a flow map is changed once, where steering would change every sample.

tilt.py states the problem; reward_matching.py is the paper's method, its rivals stand beside it. Each turns anchors
(`chain.py`) into weighted regression targets of the drift (`targets.py`).
"""

from mfm_ray.finetuning.adapters import Adapter, LowRank, WholeNetwork, build_adapter
from mfm_ray.finetuning.adjoint_matching import AdjointMatching
from mfm_ray.finetuning.building import METHODS, build_method
from mfm_ray.finetuning.chain import TiltedChains
from mfm_ray.finetuning.reinforce_adjoint import ReinforceAdjointMatching
from mfm_ray.finetuning.reward_matching import RewardMatching
from mfm_ray.finetuning.reward_weighted import RewardWeightedRegression
from mfm_ray.finetuning.targets import Anchors, DivergedError, DriftTargets, TuningMethod, regression_loss
from mfm_ray.finetuning.tilt import Tilt

__all__ = [
    "METHODS",
    "Adapter",
    "AdjointMatching",
    "Anchors",
    "DivergedError",
    "DriftTargets",
    "LowRank",
    "ReinforceAdjointMatching",
    "RewardMatching",
    "RewardWeightedRegression",
    "Tilt",
    "TiltedChains",
    "TuningMethod",
    "WholeNetwork",
    "build_adapter",
    "build_method",
    "regression_loss",
]
