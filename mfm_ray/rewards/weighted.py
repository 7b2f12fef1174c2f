"""Several rewards as one: a weighted sum that keeps its breakdown."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError
from mfm_ray.rewards.reward import check_rewards
from mfm_ray.steering import Reward


class WeightedSum(nn.Module):
    """r(x) = sum_i weight_i r_i(x). The tilted law is p(x) prod_i exp(r_i)^{weight_i}.

    rewards: any callables of samples with distinct names. weights: one finite number each, 1 for all when left out;
    a weight multiplies its reward as the paper's lambda does.

    InputError for no rewards, duplicate names, and weights that do not fit.
    """

    def __init__(
        self, *, rewards: Sequence[Reward], weights: Sequence[float] | None = None, name: str = "weighted_sum"
    ) -> None:
        super().__init__()
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if not rewards:
            raise InputError("rewards: none given, expected at least one")
        if len(weights) != len(rewards):
            raise InputError(f"weights: {len(weights)} given for {len(rewards)} rewards")
        names = [reward_name(reward) for reward in rewards]
        if repeated := [own for own, count in Counter(names).items() if count > 1]:
            raise InputError(f"rewards: the name {repeated[0]!r} occurs more than once, give each its own name=")
        for own, weight in zip(names, weights, strict=True):
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise InputError(f"weight={weight} of reward {own}: expected a finite number")
        self.name = name
        self.rewards = dict(zip(names, rewards, strict=True))
        self.weights = dict(zip(names, (float(weight) for weight in weights), strict=True))
        # those that are modules move with .to(device)
        self.modules_among_rewards = nn.ModuleList(r for r in rewards if isinstance(r, nn.Module))

    def forward(self, samples: Tensor) -> Tensor:
        return self.total(self.breakdown(samples))

    def breakdown(self, samples: Tensor) -> dict[str, Tensor]:
        """Each reward's own value, (N,) float32 by name, before its weight. RewardError naming one that misbehaves."""
        return {
            name: check_rewards(reward(samples), name, num_samples=len(samples))
            for name, reward in self.rewards.items()
        }

    def total(self, breakdown: dict[str, Tensor]) -> Tensor:
        """The weighted sum of a breakdown, (N,), without scoring again."""
        return torch.stack([self.weights[name] * values for name, values in breakdown.items()]).sum(0)


def reward_name(reward: Reward) -> str:
    """`reward.name`, or for a plain function its own name."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))
