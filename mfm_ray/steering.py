"""Steering: what is added to the drift so that samples follow p(x) exp r(x) instead of p(x).

The optimal drift of the probability-flow ODE is b_t + (sigma_t^2 / 2) grad V_t with sigma_t^2 / 2 = (1 - t) / t, and
twice that correction in the memoryless SDE. A `Guidance` estimates the correction from posterior draws.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap, require_at_least_one
from mfm_ray.interpolants import expand_time
from mfm_ray.noise import Noise
from mfm_ray.values import ValueEstimate, estimate_value, tilted_mean_shift


class Reward(Protocol):
    """From decoded samples in data units (N, *event) to (N,) float32; higher is better."""

    def __call__(self, samples: Tensor) -> Tensor: ...


@dataclass
class CallCounter:
    """Network and reward calls, in rows, counted where they happen. A backward pass counts as one call of its kind."""

    drift: int = 0
    draw: int = 0
    draw_backward: int = 0
    reward: int = 0
    reward_backward: int = 0

    def total(self) -> int:
        return self.drift + self.draw + self.draw_backward + self.reward + self.reward_backward


@dataclass(frozen=True)
class SteeringContext:
    """What a guidance sees of the sampler at one step; rows are (requests x particles)."""

    flow_map: FlowMap
    noise: Noise
    calls: CallCounter
    label: Tensor | None = None
    cfg_scale: float | None = None


@dataclass(frozen=True)
class GuidedDrift:
    """The correction to the ODE drift, (B, *event), and the value estimate it came from (None when unsteered)."""

    correction: Tensor
    value: ValueEstimate | None


class Guidance(ABC):
    """Steering by drift."""

    @abstractmethod
    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        """Estimate of (sigma_t^2 / 2) grad V_t(x_t), scaled, capped and renormalised as the method says."""


class Unguided(Guidance):
    """No steering: the correction is zero."""

    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        return GuidedDrift(correction=torch.zeros_like(x_t), value=None)


@dataclass(frozen=True)
class GradientGuidance(Guidance):
    """MFM-G: the gradient of the value estimate through the posterior draws.

        V_hat = logsumexp_i r(x_1^i) - log K,   x_1^i = X_{0,1}(eps_i; t, x),   correction = (1 - t) / t * grad_x V_hat.

    Consistent as num_draws grows; with one draw it is the gradient of the reward of a posterior sample.

    Args:
        reward: differentiable, sees unclamped samples in data units.
        num_draws: posterior draws a step, at least 1.
        guidance_scale: multiplies the correction last.
        renormalise: "none" samples the tilted law as draws grow; "rescale" gives the correction the norm of the drift
            and "clip" caps it there, after which samples follow no tilted law and only the direction of grad V matters.
        trust_region: cap on the implied shift of the posterior mean, (1 - t) * correction, as a multiple of the
            posterior's spread: a number, None for no cap, or "auto": 4 sqrt(num_draws), which vanishes as a bias.
    """

    reward: Reward
    num_draws: int = field(kw_only=True)
    guidance_scale: float = field(default=1.0, kw_only=True)
    renormalise: str = field(default="none", kw_only=True)
    trust_region: float | str | None = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        require_at_least_one(num_draws=self.num_draws)
        _check_scale(self.guidance_scale)
        if self.renormalise not in RENORMALISATIONS:
            raise ValueError(f"renormalise={self.renormalise!r}: expected one of {', '.join(RENORMALISATIONS)}")
        _check_trust_region(self.trust_region)

    @property
    def kappa(self) -> float | None:
        """The trust region as a number, None without one."""
        if self.trust_region == "auto":
            return 4.0 * math.sqrt(self.num_draws)
        return None if self.trust_region is None else float(self.trust_region)

    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        value, gradient = self._value_and_gradient(x_t, t, context)
        correction = expand_time((1 - t) / t, x_t) * gradient
        if self.kappa is not None:
            spread = context.flow_map.posterior_spread(t)
            correction = limit_shift(correction, t, radius=self.kappa * spread)
        correction = RENORMALISATIONS[self.renormalise](correction, velocity)
        return GuidedDrift(correction=self.guidance_scale * correction, value=value)

    @torch.enable_grad()
    def _value_and_gradient(self, x_t: Tensor, t: Tensor, context: SteeringContext) -> tuple[ValueEstimate, Tensor]:
        x = x_t.detach().requires_grad_()
        _, rewards = draw_and_score(self.reward, x, t, self.num_draws, context)
        if not rewards.requires_grad:
            raise ValueError(f"reward {_name(self.reward)}: has no gradient; use one that has, or GradientFreeGuidance")
        value = estimate_value(rewards)
        (gradient,) = torch.autograd.grad(value.value.sum(), x)
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"reward {_name(self.reward)}: its gradient is NaN or infinity")
        context.calls.draw_backward += rewards.numel()
        context.calls.reward_backward += rewards.numel()
        detached = ValueEstimate(value.value.detach(), value.standard_error, value.effective_sample_size)
        return detached, gradient


@dataclass(frozen=True)
class GradientFreeGuidance(Guidance):
    """MFM-GF: reweighted posterior mean, no reward gradient.

        correction = (sum_i softmax(r)_i x_1^i - mean_i x_1^i) / (1 - t).

    Consistent as num_draws grows; shrunk by (K - 1) / K for weak rewards, and no steering at all for K = 1.

    Args:
        reward: any callable, sees clamped samples in data units.
        num_draws: posterior draws a step, at least 1.
        guidance_scale: multiplies the correction.
    """

    reward: Reward
    num_draws: int = field(kw_only=True)
    guidance_scale: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        require_at_least_one(num_draws=self.num_draws)
        _check_scale(self.guidance_scale)

    @torch.no_grad()
    def guide(self, x_t: Tensor, t: Tensor, velocity: Tensor, context: SteeringContext) -> GuidedDrift:
        draws, rewards = draw_and_score(self.reward, x_t, t, self.num_draws, context, clamp=True)
        shift = tilted_mean_shift(draws, rewards)
        correction = self.guidance_scale * shift / expand_time(1 - t, x_t).clamp_min(1e-3)
        return GuidedDrift(correction=correction, value=estimate_value(rewards))


@dataclass(frozen=True)
class BestOfN:
    """Best-of-N: num_particles independent unsteered samples, of which the one with the highest reward is returned.

    Owns no drift; the sampler selects at the end. Its law is not the tilted one: it over-optimises as N grows.
    """

    reward: Reward
    num_particles: int = field(kw_only=True)

    def __post_init__(self) -> None:
        require_at_least_one(num_particles=self.num_particles)


def draw_and_score(
    reward: Reward, x_t: Tensor, t: Tensor, num_draws: int, context: SteeringContext, *, clamp: bool = False
) -> tuple[Tensor, Tensor]:
    """Posterior draws (B, K, *event) in model space and their rewards (B, K) float32, counted.

    Raises ValueError when the reward returns the wrong shape or a value that is not finite.
    """
    draws = context.flow_map.posterior_draws(
        x_t, t, num_draws=num_draws, generator=context.noise, label=context.label, cfg_scale=context.cfg_scale
    )
    context.calls.draw += draws.shape[0] * num_draws
    space = context.flow_map.space
    samples = space.to_data_units(draws.flatten(0, 1))
    rewards = score(reward, space.clamp(samples) if clamp else samples)
    context.calls.reward += rewards.numel()
    return draws, rewards.unflatten(0, draws.shape[:2])


def score(reward: Reward, samples: Tensor) -> Tensor:
    """Rewards (N,) float32 of samples (N, *event) in data units, checked.

    Raises ValueError naming the reward for a wrong shape, NaN or infinity: a reward that fails is never a zero.
    """
    rewards = reward(samples)
    name = _name(reward)
    if rewards.shape != samples.shape[:1]:
        raise ValueError(f"reward {name}: returned shape {tuple(rewards.shape)} for {samples.shape[0]} samples")
    rewards = rewards.float()
    if not bool(torch.isfinite(rewards.detach()).all()):
        raise ValueError(f"reward {name}: returned NaN or infinity for a batch of {samples.shape[0]} samples")
    return rewards


def _name(reward: Reward) -> str:
    return getattr(reward, "name", type(reward).__name__)


def limit_shift(correction: Tensor, t: Tensor, *, radius: Tensor) -> Tensor:
    """Shrink corrections (B, *event) so that the posterior mean moves by at most `radius` (B,), keeping directions.

    The shift of E[x_1 | x_t] that an ODE correction stands for is (1 - t) * correction, exactly.
    """
    shift = (1 - t) * _norm(correction)
    return correction * expand_time((radius / shift.clamp_min(1e-20)).clamp_max(1.0), correction)


def _keep(correction: Tensor, velocity: Tensor) -> Tensor:
    return correction


def _rescale(correction: Tensor, velocity: Tensor) -> Tensor:
    return correction * expand_time(_norm(velocity) / (_norm(correction) + 1e-8), correction)


def _clip(correction: Tensor, velocity: Tensor) -> Tensor:
    factor = _norm(velocity) / (_norm(correction) + 1e-8)
    return correction * expand_time(factor.clamp_max(1.0), correction)


RENORMALISATIONS = {"none": _keep, "rescale": _rescale, "clip": _clip}
"""How a correction is brought to the norm of the drift, by the name `renormalise` takes."""


def _norm(x: Tensor) -> Tensor:
    # squares of a stiff reward's gradient leave the range of float32
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).to(x.dtype)


def _check_scale(guidance_scale: float) -> None:
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale={guidance_scale}: expected a finite number of at least 0")


def _check_trust_region(trust_region: float | str | None) -> None:
    if trust_region is None or trust_region == "auto":
        return
    if isinstance(trust_region, str) or not trust_region > 0:
        raise ValueError(f"trust_region={trust_region!r}: expected 'auto', a number above 0, or none")
