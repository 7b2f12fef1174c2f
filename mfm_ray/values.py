"""The value function V_t(x) = log E[exp r(x_1) | x_t = x], estimated from posterior draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ValueEstimate:
    """A value and how far to trust it, (B,) float32 each.

    value: logsumexp_i r_i - log K. Consistent; biased downwards by Var(e^r) / (2 K e^{2V}) + O(K^-2) (Jensen).
    standard_error: of `value` in nats, by the delta method; 0 for one draw, where it is unknown. At most 1, which it
        nears when a single draw carries all the weight: the value is then a lower bound, of unknown error.
    effective_sample_size: (sum w)^2 / sum w^2 in [1, K] with w = e^r.
    """

    value: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


def estimate_value(rewards: Tensor) -> ValueEstimate:
    """Value estimate from rewards (B, K) of K posterior draws; differentiable in the rewards through `value`."""
    return RunningValue.of(rewards).estimate(rewards.dtype)


@dataclass(frozen=True)
class RunningValue:
    """What a value estimate needs of the rewards seen so far, so that draws may come in parts; (B,) float64 each.

    first: logsumexp_i r_i; second: logsumexp_i 2 r_i, detached; count: K. In float64, because a stiff reward's
    differences drown in float32's spacing.
    """

    first: Tensor
    second: Tensor
    count: Tensor

    @classmethod
    def of(cls, rewards: Tensor) -> RunningValue:
        """From rewards (B, K)."""
        rewards = rewards.double()
        count = torch.full_like(rewards[:, 0], rewards.shape[1])
        return cls(rewards.logsumexp(1), (2 * rewards.detach()).logsumexp(1), count.detach())

    def merge(self, other: RunningValue) -> RunningValue:
        """As if both parts had been one."""
        return RunningValue(
            torch.logaddexp(self.first, other.first),
            torch.logaddexp(self.second, other.second),
            self.count + other.count,
        )

    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2, (B,) in [1, K]."""
        return torch.minimum((2 * self.first.detach() - self.second).exp().clamp_min(1), self.count)

    def estimate(self, dtype: torch.dtype = torch.float32) -> ValueEstimate:
        size = self.effective_sample_size()
        # relative variance of the mean weight: (K sum w^2 - 1) / (K - 1) for weights that sum to one
        relative = (self.count / size - 1).clamp_min(0) / (self.count - 1).clamp_min(1)
        return ValueEstimate(
            value=(self.first - torch.log(self.count)).to(dtype),
            standard_error=relative.sqrt().to(dtype),
            effective_sample_size=size.to(dtype),
        )


def posterior_weights(rewards: Tensor) -> Tensor:
    """Self-normalised weights softmax_i r_i of the tilted posterior, (B, K)."""
    return torch.softmax(rewards, dim=1)


def tilted_mean_shift(draws: Tensor, rewards: Tensor) -> Tensor:
    """E*[x_1 | x_t] - E[x_1 | x_t] from draws (B, K, *event) and their rewards (B, K), (B, *event).

    The first mean is reweighted by e^r. Consistent; for weak rewards its expectation is (K - 1) / K of the exact
    shift, and it is zero for K = 1.
    """
    weights = posterior_weights(rewards) - 1 / rewards.shape[1]
    return torch.einsum("bk,bk...->b...", weights, draws)
