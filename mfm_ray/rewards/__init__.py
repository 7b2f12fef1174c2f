"""Rewards: callables from decoded samples in data units (N, *event) to (N,) float32, higher is better."""

from mfm_ray.rewards.analytic import LinearGaussian, MaskedObservation, Symmetry, TargetBrightness, half_mask
from mfm_ray.rewards.classifier import ClassMixture, ClassProbability
from mfm_ray.rewards.combination import Combination, Minimum, Thresholded, WeightedSum
from mfm_ray.rewards.preference import Aesthetic, ClipScore, HPSv2, ImageReward, PickScore
from mfm_ray.rewards.prompt import PromptReward
from mfm_ray.rewards.reward import DifferentiableReward, RewardError, check_rewards

__all__ = [
    "Aesthetic",
    "ClassMixture",
    "ClassProbability",
    "ClipScore",
    "Combination",
    "DifferentiableReward",
    "HPSv2",
    "ImageReward",
    "LinearGaussian",
    "MaskedObservation",
    "Minimum",
    "PickScore",
    "PromptReward",
    "RewardError",
    "Symmetry",
    "TargetBrightness",
    "Thresholded",
    "WeightedSum",
    "check_rewards",
    "half_mask",
]
