"""The value function V_t(x) = log E[exp r(x_1) | x_t = x], estimated from posterior draws."""

from __future__ import annotations

import math
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
    num_draws = rewards.shape[1]
    value = torch.logsumexp(rewards, dim=1) - math.log(num_draws)
    weights = posterior_weights(rewards.detach())
    size = 1 / weights.square().sum(1)
    # relative variance of the mean weight: (K sum w^2 - 1) / (K - 1) for weights that sum to one
    relative = (num_draws / size - 1).clamp_min(0) / max(1, num_draws - 1)
    return ValueEstimate(value=value, standard_error=relative.sqrt(), effective_sample_size=size)


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
