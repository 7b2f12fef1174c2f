"""Reward-weighted regression: flow matching on data that count with their reward (Peters & Schaal 2007).

For x_1 ~ p and x_t = t x_1 + (1 - t) z the loss exp(r(x_1) - c) | b_ft(x_t) - (x_1 - z) |^2 is least at
E[e^r (x_1 - z) | x_t] / E[e^r | x_t], the drift of the tilted law: without bias, without a model's draws and without
the reward's gradient. What it pays is variance: of data that the reward is rare in, few rows carry all the weight.
"""

from __future__ import annotations

import torch

from mfm_ray.errors import require
from mfm_ray.finetuning.reward_matching import uniform_times
from mfm_ray.finetuning.targets import Anchors, Drift, DriftTargets, TuningMethod
from mfm_ray.finetuning.tilt import Tilt
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import Noise, Stream


class RewardWeightedRegression(TuningMethod):
    """Anchors must be data (no chains). Weights are exp(r - log Z), Z the mean of exp r over the base's samples.

    max_time: t is uniform on [1 - max_time, max_time].
    """

    anchors_are_data = True

    def __init__(self, *, max_time: float = 0.998) -> None:
        require(0.5 < max_time < 1, "max_time", max_time, "a number in (0.5, 1)")
        self.max_time = max_time

    def targets(self, tilt: Tilt, anchors: Anchors, noise: Noise, *, drift: Drift | None = None) -> DriftTargets:
        t = uniform_times(noise, self.max_time)
        z = noise.fold_in(Stream.OUTER).normal(*anchors.x1.shape[1:]).to(anchors.x1)
        path = LinearInterpolant().sample(z, anchors.x1, t)
        return DriftTargets(
            x_t=path.x_t,
            t=t,
            label=anchors.label,
            target=path.velocity,
            weight=tilt.relative_weight(anchors.reward),
            reward=anchors.reward.float(),
            effective_share=torch.ones_like(t),
        )
