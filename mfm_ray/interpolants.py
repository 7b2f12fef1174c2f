"""The linear interpolant between noise and data, and the schedules that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """View times (B,) so that they broadcast against a batch (B, *event)."""
    assert t.ndim == 1 and t.shape[0] == like.shape[0], f"times {tuple(t.shape)} for a batch {tuple(like.shape)}"
    return t.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Coefficients:
    """alpha(t) of the noise, beta(t) of the data and their time derivatives, each (B,)."""

    alpha: Tensor
    beta: Tensor
    alpha_dot: Tensor
    beta_dot: Tensor


@dataclass(frozen=True)
class InterpolantSample:
    """A noised state and its time derivative, both (B, *event)."""

    x_t: Tensor
    velocity: Tensor


class Interpolant(Protocol):
    """I_t = alpha(t) I_0 + beta(t) I_1 with I_0 ~ N(0, Id) and I_1 ~ data, independent."""

    def coefficients(self, t: Tensor) -> Coefficients: ...

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> InterpolantSample: ...


class LinearInterpolant:
    """I_t = (1 - t) I_0 + t I_1, with velocity b_t(x) = E[I_1 - I_0 | I_t = x].

    The conversions below are exact; each says where it is singular. Times are (B,) in [0, 1],
    states, velocities, means and scores are (B, *event).
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(alpha=1 - t, beta=t, alpha_dot=-one, beta_dot=one)

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> InterpolantSample:
        c = self.coefficients(t)
        x_t = expand_time(c.alpha, x1) * x0 + expand_time(c.beta, x1) * x1
        return InterpolantSample(x_t=x_t, velocity=x1 - x0)

    def posterior_mean(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """Tweedie: E[I_1 | I_t = x] = x + (1 - t) b_t(x)."""
        return x_t + expand_time(1 - t, x_t) * velocity

    def score(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = (t b_t(x) - x) / (1 - t); singular at t = 1."""
        time = expand_time(t, x_t)
        return (time * velocity - x_t) / (1 - time)

    def velocity_from_score(self, x_t: Tensor, score: Tensor, t: Tensor) -> Tensor:
        """b_t(x) = x / t + (1 - t) / t * score; singular at t = 0."""
        time = expand_time(t, x_t)
        return x_t / time + (1 - time) / time * score

    def half_diffusion(self, t: Tensor) -> Tensor:
        """Half the memoryless diffusion, sigma_t^2 / 2 = (1 - t) / t, (B,); infinite at t = 0.

        Of all schedules with the right marginals this one alone makes the law of X_1 given X_t the
        posterior p(x_1 | x_t), which is what a meta flow map draws from and a value function averages.
        """
        return (1 - t) / t

    def memoryless_drift(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """Drift of the memoryless SDE, b + (sigma_t^2 / 2) score = 2 b_t(x) - x / t; singular at t = 0."""
        return 2 * velocity - x_t / expand_time(t, x_t)
