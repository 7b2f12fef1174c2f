"""Several rewards as one, with their breakdown: a weighted sum, the worst of several; and a reward with a ceiling."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError
from mfm_ray.rewards.reward import RewardError, check_rewards
from mfm_ray.steering import Reward
from mfm_ray.steering.reward_gradient import evaluate


class Combination(nn.Module, ABC):
    """One reward from several weighted ones, each still known by its name.

    rewards: any callables of samples with distinct names. weights: one finite number each, 1 for all when left out.
    Differentiable where all parts are.

    InputError for no rewards, duplicate names, and weights that do not fit. Called, RewardError for a part that
    returns anything but one finite number for each sample, and, where a gradient is taken, for one that has none
    beside others that have: its share would be missing without a word.
    """

    positive_weights: ClassVar[bool]
    composes_gradients: ClassVar[bool] = True

    def __init__(self, *, rewards: Sequence[Reward], weights: Sequence[float] | None = None, name: str) -> None:
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
            self.require_weight(weight, of=f" of reward {own}")
        self.name = name
        self.rewards = dict(zip(names, rewards, strict=True))
        self.weights = dict(zip(names, (float(weight) for weight in weights), strict=True))
        # those that are modules move with .to(device)
        self.modules_among_rewards = nn.ModuleList(r for r in rewards if isinstance(r, nn.Module))

    @property
    def waits_on(self) -> frozenset[str]:
        """Names of what the parts wait for outside of this process (`mfm_ray.engine`)."""
        return frozenset().union(*(getattr(reward, "waits_on", ()) for reward in self.rewards.values()))

    @classmethod
    def require_weight(cls, weight: object, *, of: str = "") -> None:
        """InputError for what cannot be a weight here; `of` names its reward."""
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        if not is_number or (cls.positive_weights and not weight > 0):  # type: ignore[operator]
            bound = " above 0" if cls.positive_weights else ""
            raise InputError(f"weight={weight}{of}: expected a finite number{bound}")

    def forward(self, samples: Tensor) -> Tensor:
        return self.total(self.breakdown(samples))

    def breakdown(self, samples: Tensor) -> dict[str, Tensor]:
        """Each reward's own value, (N,) float32 by name, before its weight. RewardError naming one that misbehaves."""
        values = {
            name: check_rewards(part, name, num_samples=len(samples)) for name, part in self.evaluated(samples).items()
        }
        if samples.requires_grad and torch.is_grad_enabled() and any(part.requires_grad for part in values.values()):
            for name, part in values.items():
                if not part.requires_grad:
                    raise RewardError(f"reward {name}: has no gradient, unlike the other parts of {self.name}")
        return values

    def evaluated(self, samples: Tensor) -> dict[str, Tensor]:
        """What each reward returns, by name, unchecked."""
        return {name: evaluate(reward, samples) for name, reward in self.rewards.items()}

    def total(self, breakdown: dict[str, Tensor]) -> Tensor:
        """The combined reward of a breakdown, (N,), without scoring again."""
        return self.combine(torch.stack([self.weights[name] * values for name, values in breakdown.items()]))

    @abstractmethod
    def combine(self, weighted: Tensor) -> Tensor:
        """(N,) from the weighted values of the parts, (parts, N)."""


class WeightedSum(Combination):
    """r(x) = sum_i weight_i r_i(x). The tilted law is p(x) prod_i exp(r_i)^{weight_i}.

    Arguments and errors as in `Combination`; a weight multiplies its reward as the paper's lambda does, of any sign.
    """

    positive_weights = False

    def __init__(
        self, *, rewards: Sequence[Reward], weights: Sequence[float] | None = None, name: str = "weighted_sum"
    ) -> None:
        super().__init__(rewards=rewards, weights=weights, name=name)

    def combine(self, weighted: Tensor) -> Tensor:
        return weighted.sum(0)


class Minimum(Combination):
    """r(x) = min_i weight_i r_i(x): the worst of several wishes counts, so that none is paid for with another.

    The gradient is that of the smallest part alone, shared evenly among parts that are equally small. Arguments and
    errors as in `Combination`; weights bring the parts to one scale and are above 0, since any other sign would
    reward the worst.
    """

    positive_weights = True

    def __init__(
        self, *, rewards: Sequence[Reward], weights: Sequence[float] | None = None, name: str = "minimum"
    ) -> None:
        super().__init__(rewards=rewards, weights=weights, name=name)

    def combine(self, weighted: Tensor) -> Tensor:
        return weighted.amin(0)


class Thresholded(nn.Module):
    """r(x) = min(reward(x), threshold): good enough is as good as it gets, and above the threshold no gradient pulls.

    All samples above the threshold have equal weight in the tilted law p(x) exp r(x): it keeps p there.

    reward: any callable of samples. threshold: a finite number in the reward's own units. name: the reward's own when
    left out. RewardError for a reward that returns anything but one finite number for each sample.
    """

    composes_gradients: ClassVar[bool] = True

    def __init__(self, *, reward: Reward, threshold: float, name: str | None = None) -> None:
        super().__init__()
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise InputError(f"threshold={threshold}: expected a finite number")
        self.name = name or reward_name(reward)
        self.reward, self.threshold = reward, float(threshold)

    def forward(self, samples: Tensor) -> Tensor:
        values = check_rewards(evaluate(self.reward, samples), self.name, num_samples=len(samples))
        return values.clamp_max(self.threshold)


def reward_name(reward: Reward) -> str:
    """`reward.name`, or for a plain function its own name."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))
