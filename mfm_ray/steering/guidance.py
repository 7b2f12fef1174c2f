"""Steering by drift: what is added to the drift so that samples follow p(x) exp r(x) instead of p(x).

The optimal drift of the probability-flow ODE is b_t + (sigma_t^2 / 2) grad V_t with sigma_t^2 / 2 = (1 - t) / t, and
twice that correction in the memoryless SDE. A `Guidance` estimates the correction; in terms of the clean sample that a
state moves towards, the posterior mean is shifted by (1 - t) times it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mfm_ray.dynamics import extrapolate
from mfm_ray.errors import require
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import LinearInterpolant, expand_time
from mfm_ray.steering.calls import Cost
from mfm_ray.steering.draws import AutoDraws, DrawTotals, fewer_draws, most_draws, resolve_draws, total_of_draws
from mfm_ray.steering.limits import (
    RENORMALISATIONS,
    automatic_radius,
    check_renormalise,
    check_scale,
    check_trust_region,
    limit_shift,
)
from mfm_ray.steering.method import Particles, Steering, SteeringContext, Step, mean_over_particles
from mfm_ray.steering.scoring import Reward, draw_and_score, name_of, score_states
from mfm_ray.values import RunningValue, ValueEstimate


@dataclass(frozen=True)
class GuidedDrift:
    """The correction to the ODE drift, (B, *event), and the value estimate it came from (None when unsteered).

    spread: how far a draw of the tilted posterior lies from its mean, (B, *event), where the method has draws.
    """

    correction: Tensor
    value: ValueEstimate | None
    spread: Tensor | None = None


class Guidance(Steering):
    """Steering by drift."""

    @abstractmethod
    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        """Estimate of (sigma_t^2 / 2) grad V_t(x_t), scaled, capped and renormalised as the method says."""

    def steer(self, x_t: Tensor, t: Tensor, context: SteeringContext) -> tuple[Tensor, GuidedDrift]:
        """The drift b_t (B, *event) and its correction."""
        velocity = base_drift(x_t, t, context)
        return velocity, self.guide(x_t, t, velocity, context)

    def advance(self, particles: Particles, t: Tensor, t_next: Tensor, context: SteeringContext) -> Step:
        x = particles.rows
        velocity, guided = self.steer(x, t, context)
        clean = LinearInterpolant().posterior_mean(x, velocity + guided.correction, t)
        memory = None
        if context.second_order:
            memory = (t, LinearInterpolant().posterior_mean(x, velocity, t))
            if particles.memory is not None:
                t_previous, previous = particles.memory
                clean = clean + extrapolate(memory[1], previous, t_previous, t, t_next)
        if context.dynamics.random and guided.spread is not None:
            # Towards a draw of the tilted posterior, not its mean: a step of the SDE then keeps the posterior's own
            # spread, which the mean loses, the more the longer the step is.
            clean = clean + guided.spread
        moved = context.dynamics.step(x, clean, t, t_next, context.noise)
        diagnostics = {name: mean_over_particles(particles, row) for name, row in _diagnose(guided, velocity).items()}
        return Step(Particles(particles.like(moved), particles.log_weights, memory), diagnostics)


@torch.no_grad()
def base_drift(x_t: Tensor, t: Tensor, context: SteeringContext) -> Tensor:
    """b_t(x_t), counted."""
    context.calls.drift += x_t.shape[0]
    return context.flow_map.drift(x_t, t, label=context.label, cfg_scale=context.cfg_scale)


class Unguided(Guidance):
    """No steering: the correction is zero."""

    default_dynamics = "ode"

    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        return GuidedDrift(correction=torch.zeros_like(x_t), value=None)

    def cost(self) -> Cost:
        return Cost(per_step=1)


ESTIMATORS = {"mixed": 2, "pathwise": 1}
"""Of the value's gradient from posterior draws: the power of the weights with which it passes through the draws."""


@dataclass(frozen=True)
class GradientGuidance(Guidance):
    """MFM-G: the gradient of the value estimate, V_hat = logsumexp_i r(x_1^i) - log K, x_1^i = X_{0,1}(eps_i; t, x).

    With w = softmax(r) and g_i = (dx_1^i / dx)^T grad r(x_1^i), two estimates of one mean, (1 - t) / t * grad E[V_hat]:

        "mixed":     sum_i (w_i - 1/K) x_1^i / (1 - t) + (1 - t) / t * sum_i w_i^2 g_i
        "pathwise":  (1 - t) / t * sum_i w_i g_i = (1 - t) / t * grad_x V_hat, the paper's

    Both tell how the law of the draws follows x: through their weights, which needs no derivative of anything, or
    through the draws. For any function f, E[f(x_1) (x_1 - E x_1)] t / (1 - t)^2 = E[(dx_1 / dx)^T grad f(x_1)]; with
    f = w_i as a function of draw i alone, whose derivative is w_i (1 - w_i) grad r, the weights carry all but w_i^2 of
    w_i. Pathwise gradients have heavy tails: modes are exchanged by the few draws that cross from one to another, and
    small t divides them by t. Mixed, only the share 1 / (effective sample size) of them is left, and with one draw both
    are the gradient of the reward of a posterior sample. Consistent as num_draws grows.

    Args:
        reward: differentiable, sees unclamped samples in data units.
        num_draws: posterior draws a step, at least 1; "auto" or an `AutoDraws` draws until enough of them count.
        guidance_scale: multiplies the correction last.
        renormalise: "none" samples the tilted law as draws grow; "rescale" gives the correction the norm of the drift
            and "clip" caps it there, after which samples follow no tilted law and only the direction of grad V matters.
        trust_region: cap on the shift of the posterior mean that the gradient of a draw stands for, (1 - t)^2 / t g,
            as a multiple of the posterior's spread: a number, None for no cap, or "auto": 4 / sqrt(num_draws) of mixed
            estimates, whose bias vanishes with the gradient's share, and 4 sqrt(num_draws) of pathwise ones.
        estimator: "mixed" or "pathwise".
        draws_at_once: draws whose graphs are held together, all by default; memory, not the result, depends on it:
            parts are merged exactly, and nothing is computed twice.
    """

    reward: Reward
    num_draws: int | str | AutoDraws = field(kw_only=True)
    guidance_scale: float = field(default=1.0, kw_only=True)
    renormalise: str = field(default="none", kw_only=True)
    trust_region: float | str | None = field(default="auto", kw_only=True)
    draws_at_once: int | None = field(default=None, kw_only=True)
    estimator: str = field(default="mixed", kw_only=True)

    def __post_init__(self) -> None:
        resolve_draws(self.num_draws)
        check_scale(self.guidance_scale)
        check_renormalise(self.renormalise)
        check_trust_region(self.trust_region)
        require(self.estimator in ESTIMATORS, "estimator", self.estimator, f"one of {', '.join(ESTIMATORS)}")
        if self.draws_at_once is not None:
            require_at_least_one(draws_at_once=self.draws_at_once)

    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        total = total_of_draws(self._part, x_t, t, self.num_draws, self.draws_at_once, context)
        assert total.gradient is not None
        correction = expand_time(LinearInterpolant().half_diffusion(t), x_t) * total.gradient
        radius = self._radius(total.value, t, context)
        if radius is not None:
            correction = limit_shift(correction, t, radius=radius)
        if self._power == 2:
            # the drift is never evaluated at t = 1, where this would be 0 / 0
            correction = correction + (total.tilted_mean - total.mean) / expand_time(1 - t, x_t)
        correction = self.guidance_scale * RENORMALISATIONS[self.renormalise](correction, velocity)
        return GuidedDrift(correction, total.value.estimate(), total.spread)

    @property
    def _power(self) -> int:
        """Of the weights that multiply gradients."""
        return ESTIMATORS[self.estimator]

    def _radius(self, value: RunningValue, t: Tensor, context: SteeringContext) -> Tensor | None:
        """The most that gradients may shift the posterior mean, (B,); None without a trust region."""
        if self.trust_region is None:
            return None
        kappa = automatic_radius(value.count, self._power) if self.trust_region == "auto" else float(self.trust_region)
        # squared weights sum to the inverse of the effective sample size
        share = value.effective_sample_size() ** (1 - self._power)
        return (kappa * share).to(t) * context.flow_map.posterior_spread(t)

    @torch.enable_grad()
    def _part(self, x_t: Tensor, t: Tensor, first: int, count: int, context: SteeringContext) -> DrawTotals:
        """Gradient of sum_i w_i^power r_i, weights held, over draws first .. first + count - 1."""
        x = x_t.detach().requires_grad_()
        draws, rewards = draw_and_score(self.reward, x, t, count, context, first_draw=first)
        weights = torch.softmax(rewards.detach(), dim=1) ** self._power
        gradient = reward_gradient(self.reward, (weights * rewards).sum(1), rewards, x, context)
        context.calls.draw_backward += rewards.numel()
        context.calls.reward_backward += rewards.numel()
        return DrawTotals.of(
            draws, rewards, context.noise, first_draw=first, gradient=gradient, gradient_power=self._power
        )

    def cost(self) -> Cost:
        return Cost(per_step=1 + 4 * most_draws(self.num_draws))

    def thriftier(self) -> Steering | None:
        return half_the_draws(self, self.num_draws)


@dataclass(frozen=True)
class GradientFreeGuidance(Guidance):
    """MFM-GF: reweighted posterior mean, no reward gradient.

        correction = (sum_i softmax(r)_i x_1^i - mean_i x_1^i) / (1 - t).

    Consistent as num_draws grows; shrunk by (K - 1) / K for weak rewards, and no steering at all for K = 1.

    Args:
        reward: any callable, sees clamped samples in data units.
        num_draws: posterior draws a step, at least 1; "auto" or an `AutoDraws` draws until enough of them count.
        guidance_scale: multiplies the correction.
        draws_at_once: draws that are held together, all by default; memory, not the result, depends on it.
    """

    reward: Reward
    num_draws: int | str | AutoDraws = field(kw_only=True)
    guidance_scale: float = field(default=1.0, kw_only=True)
    draws_at_once: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        resolve_draws(self.num_draws)
        check_scale(self.guidance_scale)
        if self.draws_at_once is not None:
            require_at_least_one(draws_at_once=self.draws_at_once)

    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        total = total_of_draws(self._part, x_t, t, self.num_draws, self.draws_at_once, context)
        # the drift is never evaluated at t = 1, where this would be 0 / 0
        correction = self.guidance_scale * (total.tilted_mean - total.mean) / expand_time(1 - t, x_t)
        return GuidedDrift(correction, total.value.estimate(), total.spread)

    @torch.no_grad()
    def _part(self, x_t: Tensor, t: Tensor, first: int, count: int, context: SteeringContext) -> DrawTotals:
        draws, rewards = draw_and_score(self.reward, x_t, t, count, context, first_draw=first, clamp=True)
        return DrawTotals.of(draws, rewards, context.noise, first_draw=first)

    def cost(self) -> Cost:
        return Cost(per_step=1 + 2 * most_draws(self.num_draws))

    def thriftier(self) -> Steering | None:
        return half_the_draws(self, self.num_draws)


@dataclass(frozen=True)
class DPS(Guidance):
    """Diffusion posterior sampling: the reward at the posterior mean stands in for the value.

        m = x + (1 - t) b_t(x),   correction = (1 - t) / t * grad_x r(m),

    the gradient taken through the network. Biased wherever the posterior is not narrow against the reward: it raises
    the reward and loses the distribution. The baseline that posterior draws replace.

    Arguments as for `GradientGuidance`, the trust region's "auto" being 4.
    """

    reward: Reward
    guidance_scale: float = field(default=1.0, kw_only=True)
    renormalise: str = field(default="none", kw_only=True)
    trust_region: float | str | None = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale)
        check_renormalise(self.renormalise)
        check_trust_region(self.trust_region)

    @property
    def kappa(self) -> float | None:
        """The trust region as a number, None without one: "auto" is what one draw gets."""
        if self.trust_region == "auto":
            return float(automatic_radius(torch.ones(()), 1))
        return None if self.trust_region is None else float(self.trust_region)

    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        return self.steer(x_t, t, context)[1]

    def steer(self, x_t: Tensor, t: Tensor, context: SteeringContext) -> tuple[Tensor, GuidedDrift]:
        velocity, rewards, gradient = mean_reward_gradient(self.reward, x_t, t, context)
        correction = self.guidance_scale * limited(
            gradient, x_t, t, velocity, context, kappa=self.kappa, renormalise=self.renormalise
        )
        value = RunningValue.of(rewards.unsqueeze(1)).estimate()
        return velocity, GuidedDrift(correction=correction, value=value)

    def cost(self) -> Cost:
        return Cost(per_step=4)


@torch.enable_grad()
def mean_reward_gradient(
    reward: Reward, x_t: Tensor, t: Tensor, context: SteeringContext
) -> tuple[Tensor, Tensor, Tensor]:
    """Drift b_t (B, *event), reward (B,) of the posterior mean, its gradient in x_t (B, *event); one pass for all."""
    x = x_t.detach().requires_grad_()
    velocity = context.flow_map.drift(x, t, label=context.label, cfg_scale=context.cfg_scale)
    rewards = score_states(reward, LinearInterpolant().posterior_mean(x, velocity, t), context)
    gradient = reward_gradient(reward, rewards, rewards, x, context)
    context.calls.drift += x.shape[0]
    context.calls.drift_backward += x.shape[0]
    context.calls.reward_backward += x.shape[0]
    return velocity.detach(), rewards.detach(), gradient


def reward_gradient(reward: Reward, value: Tensor, rewards: Tensor, x: Tensor, context: SteeringContext) -> Tensor:
    """grad_x of the summed values, (B, *event). ValueError naming the reward when it has none, or one that is NaN."""
    if not rewards.requires_grad:
        raise ValueError(f"reward {name_of(reward)}: has no gradient; use one that has, or GradientFreeGuidance")
    gradient = context.differentiate(value.sum(), x)
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(f"reward {name_of(reward)}: its gradient is NaN or infinity")
    return gradient


def limited(
    gradient: Tensor,
    x_t: Tensor,
    t: Tensor,
    velocity: Tensor,
    context: SteeringContext,
    *,
    kappa: float | None,
    renormalise: str,
) -> Tensor:
    """(1 - t) / t times a gradient (B, *event), within the trust region, renormalised."""
    correction = expand_time(LinearInterpolant().half_diffusion(t), x_t) * gradient
    if kappa is not None:
        correction = limit_shift(correction, t, radius=kappa * context.flow_map.posterior_spread(t))
    return RENORMALISATIONS[renormalise](correction, velocity)


def half_the_draws(guidance: Any, num_draws: int | str | AutoDraws) -> Steering | None:
    fewer = fewer_draws(num_draws)
    return None if fewer is None else replace(guidance, num_draws=fewer)


def _diagnose(guided: GuidedDrift, velocity: Tensor) -> dict[str, Tensor]:
    if guided.value is None:
        return {}
    ratio = guided.correction.flatten(1).norm(dim=1) / velocity.flatten(1).norm(dim=1).clamp_min(1e-12)
    return {
        "value": guided.value.value,
        "standard_error": guided.value.standard_error,
        "effective_sample_size": guided.value.effective_sample_size,
        "guidance_ratio": ratio,
    }
