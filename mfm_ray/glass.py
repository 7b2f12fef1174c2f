"""The posterior velocity in closed form from a marginal velocity (GLASS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.interpolants import expand_time

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Marginal velocity b_t(x): state (B, *event) and time (B,) to (B, *event)."""


@dataclass(frozen=True)
class JointObservation:
    """Two noisy views of x_1 merged into one, and how a velocity there becomes the inner velocity.

    x = t x_1 + (1 - t) e and J = s x_1 + (1 - s) eps, with independent Gaussian e and eps, tell about x_1 what the
    single state `state` at time `time` tells. With b the marginal velocity there,

        v_s(J; t, x) = outer * x + inner * J + scale * b_time(state).

    `time`, `outer`, `inner`, `scale` are (B,), `state` is (B, *event).
    """

    state: Tensor
    time: Tensor
    outer: Tensor
    inner: Tensor
    scale: Tensor

    def inner_velocity(self, x_s: Tensor, x_t: Tensor, marginal_velocity: Tensor) -> Tensor:
        return (
            expand_time(self.outer, x_t) * x_t
            + expand_time(self.inner, x_s) * x_s
            + expand_time(self.scale, x_s) * marginal_velocity
        )


def merge_observations(x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor) -> JointObservation:
    """Merge the inner state x_s at s and the outer state x_t at t (both (B, *event), times (B,) in [0, 1]).

    With R = hypot(t (1 - s), s (1 - t)), q = (1 - t)(1 - s):

        t* = R / (R + q),     x* = (t (1 - s)^2 x + s (1 - t)^2 J) / (R (R + q)),
        v  = t (1 - s) / (R (R + q)) x - t^2 (1 - s)(R + 1 - t) / (R (R + q)(R + s (1 - t))) J + (1 - t) / (R + q) b.

    No division by 1 - s, and no difference that cancels (the shorter numerator s (1 - t)^2 - t^2 (1 - s) - R (1 - t) of
    J does). Coefficients are products of ratios, none of which underflows, in the precision of the times, which should
    be float32 or better. At t = 0 the outer state says nothing: t* = s, x* = J, v = b_s(J). R vanishes at
    (s, t) = (1, 1) as well, where the velocity is truly singular: keep t below 1.
    """
    radius = torch.hypot(t * (1 - s), s * (1 - t))
    blind = t == 0
    radius = torch.where(blind, torch.ones_like(radius), radius.clamp_min(torch.finfo(radius.dtype).tiny))
    total = radius + (1 - t) * (1 - s)
    from_x, from_j = t * (1 - s) / radius, s * (1 - t) / radius
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    on_x = torch.where(blind, zero, from_x * (1 - s) / total)
    on_j = torch.where(blind, one, from_j * (1 - t) / total)
    inner = -from_x * (t / (radius + s * (1 - t))) * ((radius + (1 - t)) / total)
    return JointObservation(
        state=expand_time(on_x, x_t) * x_t + expand_time(on_j, x_s) * x_s,
        time=torch.where(blind, s, radius / total),
        outer=torch.where(blind, zero, from_x / total),
        inner=torch.where(blind, zero, inner),
        scale=torch.where(blind, one, (1 - t) / total),
    )


def posterior_velocity(velocity: Velocity, x_s: Tensor, s: Tensor, *, x_t: Tensor, t: Tensor) -> Tensor:
    """v_s(x_s; t, x_t) = E[x_1 - eps | J_s = x_s, I_t = x_t] from the marginal velocity b; exact. (B, *event)."""
    merged = merge_observations(x_s, s, x_t, t)
    return merged.inner_velocity(x_s, x_t, velocity(merged.state, merged.time))
