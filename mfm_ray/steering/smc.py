"""Sequential Monte Carlo: weighted particles that follow the tilted law, resampled where the weights degenerate.

With potentials psi_k(x) = exp of an estimate of the value V_t(x), proposals q and the base process p, particles carry

    w_k = w_{k-1} p(x_k | x_{k-1}) psi_k(x_k) / (q(x_k | x_{k-1}) psi_{k-1}(x_{k-1})),   psi_K = exp r,

and the weighted particles follow p(x) exp r(x) as their number grows, whatever psi and q are; both decide how fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mfm_ray.dynamics import MemorylessDiffusion, diffusion_noise
from mfm_ray.errors import require
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import LinearInterpolant, expand_time
from mfm_ray.noise import Noise, Stream
from mfm_ray.steering.calls import Cost
from mfm_ray.steering.guidance import DPS, GradientGuidance, Guidance, GuidedDrift, base_drift
from mfm_ray.steering.method import Particles, Steering, SteeringContext, Step
from mfm_ray.steering.scoring import Reward, draw_and_score
from mfm_ray.values import RunningValue


@dataclass(frozen=True)
class Proposal:
    """Of rows (B, ...): the base drift, the correction that proposals add to it (None: none), and log psi (B,)."""

    velocity: Tensor
    correction: Tensor | None
    log_potential: Tensor

    def rows(self, index: Tensor) -> Proposal:
        correction = None if self.correction is None else self.correction[index]
        return Proposal(self.velocity[index], correction, self.log_potential[index])


@dataclass(frozen=True)
class Potential:
    """psi and the proposals that go with it; `calls` a particle and step for num_draws draws."""

    propose: Callable[[SMC, Tensor, Tensor, SteeringContext], Proposal]
    calls: Callable[[int], int]


def _twisted(smc: SMC, x: Tensor, t: Tensor, context: SteeringContext) -> Proposal:
    """TDS: the reward of the posterior mean, proposals along its gradient."""
    return _guided(DPS(smc.reward, trust_region=smc.trust_region), x, t, context)


def _value(smc: SMC, x: Tensor, t: Tensor, context: SteeringContext) -> Proposal:
    """The value estimate of posterior draws, proposals along its gradient."""
    guidance = GradientGuidance(smc.reward, num_draws=smc.num_draws, trust_region=smc.trust_region)
    return _guided(guidance, x, t, context)


def _guided(guidance: Guidance, x: Tensor, t: Tensor, context: SteeringContext) -> Proposal:
    velocity, guided = guidance.steer(x, t, context)
    return Proposal(velocity, guided.correction, _log_potential(guided))


def _log_potential(guided: GuidedDrift) -> Tensor:
    assert guided.value is not None
    return guided.value.value.double()


def _feynman_kac(smc: SMC, x: Tensor, t: Tensor, context: SteeringContext) -> Proposal:
    """The value estimate of posterior draws, base proposals: no reward gradient."""
    velocity = base_drift(x, t, context)
    with torch.no_grad():
        _, rewards = draw_and_score(smc.reward, x, t, smc.num_draws, context, clamp=True)
    return Proposal(velocity, None, RunningValue.of(rewards).estimate(torch.float64).value)


POTENTIALS = {
    "tds": Potential(_twisted, calls=lambda num_draws: 4),
    "feynman_kac": Potential(_feynman_kac, calls=lambda num_draws: 1 + 2 * num_draws),
    "value": Potential(_value, calls=lambda num_draws: 1 + 4 * num_draws),
}
"""By the name `potential` takes: the twisted diffusion sampler, Feynman-Kac steering, and TDS with posterior draws."""


@dataclass(frozen=True)
class SMC(Steering):
    """Sequential Monte Carlo over a population of particles for each image, along the memoryless SDE.

    Consistent as num_particles grows. The image returned is one particle, drawn by its final weight; all particles and
    their weights are in `Samples.particles`.

    Args:
        reward: differentiable for "tds" and "value".
        num_particles: of each image.
        potential: "tds" (reward of the posterior mean, guided proposals), "feynman_kac" (value estimate from draws,
            base proposals, no reward gradient), "value" (value estimate from draws, guided proposals).
        resample_threshold: systematic resampling where the effective sample size falls below this share of the
            particles; log-weights are carried on where it does not. 0 never resamples, 1 always.
        num_draws: posterior draws of each particle at each step, for the potentials that have them.
        trust_region: of the proposals, as for `GradientGuidance`; any value leaves the law as it is.
    """

    reward: Reward
    num_particles: int = field(kw_only=True)
    potential: str = field(default="tds", kw_only=True)
    resample_threshold: float = field(default=0.5, kw_only=True)
    num_draws: int = field(default=1, kw_only=True)
    trust_region: float | str | None = field(default="auto", kw_only=True)

    interacting = True

    def __post_init__(self) -> None:
        require_at_least_one(num_particles=self.num_particles, num_draws=self.num_draws)
        require(self.potential in POTENTIALS, "potential", repr(self.potential), f"one of {', '.join(POTENTIALS)}")
        threshold = self.resample_threshold
        require(0 <= threshold <= 1, "resample_threshold", threshold, "a number from 0 to 1")

    def advance(self, particles: Particles, t: Tensor, t_next: Tensor, context: SteeringContext) -> Step:
        require(
            isinstance(context.dynamics, MemorylessDiffusion), "dynamics", "ode", "sde: SMC weighs random transitions"
        )
        x = particles.rows
        proposal = POTENTIALS[self.potential].propose(self, x, t, context)
        log_weights = particles.log_weights + particles.like(proposal.log_potential)
        log_normaliser = particles.memory if particles.memory is not None else torch.zeros_like(log_weights[:, 0])
        size = effective_particles(log_weights)
        resampled = size < self.resample_threshold * self.num_particles
        total = log_normaliser + log_mean(log_weights)
        value = particles.like(proposal.log_potential).mean(1)
        if bool(resampled.any()):
            first = context.noise[:: self.num_particles]
            index = torch.where(
                resampled.unsqueeze(1), systematic(log_weights, first), torch.arange(log_weights.shape[1]).to(x.device)
            )
            rows = (index + self.num_particles * torch.arange(len(index), device=x.device).unsqueeze(1)).flatten()
            x, proposal = x[rows], proposal.rows(rows)
            log_weights = torch.where(resampled.unsqueeze(1), torch.zeros_like(log_weights), log_weights)
            log_normaliser = torch.where(resampled, total, log_normaliser)
        moved, log_ratio = _move(x, proposal, t, t_next, context)
        log_weights = log_weights + particles.like(log_ratio - proposal.log_potential)
        diagnostics = {
            "value": value.float(),
            "effective_sample_size": size.float(),
            "resampled": resampled.float(),
            "log_normaliser": total.float(),
            "guidance_ratio": particles.like(_ratio(proposal)).mean(1),
        }
        return Step(Particles(particles.like(moved), log_weights, log_normaliser), diagnostics)

    def final_log_weights(self, particles: Particles, rewards: Tensor) -> Tensor:
        return particles.log_weights + rewards.double()

    def choose(self, particles: Particles, rewards: Tensor, noise: Noise) -> Tensor:
        share = torch.softmax(self.final_log_weights(particles, rewards), 1).cumsum(1)
        uniform = noise.fold_in(Stream.RESAMPLE).uniform().double().unsqueeze(1)
        return torch.searchsorted(share, uniform).squeeze(1).clamp_max(self.num_particles - 1)

    def cost(self) -> Cost:
        calls = POTENTIALS[self.potential].calls(self.num_draws)
        return Cost(per_step=calls * self.num_particles, at_end=self.num_particles)

    def thriftier(self) -> Steering | None:
        return replace(self, num_particles=self.num_particles // 2) if self.num_particles > 1 else None


def _move(x: Tensor, proposal: Proposal, t: Tensor, t_next: Tensor, context: SteeringContext) -> tuple[Tensor, Tensor]:
    """The proposed states and log p(x' | x) - log q(x' | x), (B,).

    Base and proposal are Gaussians of the same deviation; the last step has none and follows the base mean.
    """
    dynamics = context.dynamics
    assert isinstance(dynamics, MemorylessDiffusion)
    clean = LinearInterpolant().posterior_mean(x, proposal.velocity, t)
    mean, deviation = dynamics.transition(x, clean, t, t_next)
    noise = diffusion_noise(context.noise, x)
    spread = expand_time(deviation, x)
    if proposal.correction is None:
        return mean + spread * noise, torch.zeros_like(deviation, dtype=torch.float64)
    guided = LinearInterpolant().posterior_mean(x, proposal.velocity + proposal.correction, t)
    last = expand_time(t_next >= 1, x)
    steered = torch.where(last, mean, dynamics.transition(x, guided, t, t_next)[0])
    # x' = steered + spread z, so that log p - log q = -|z + d|^2 / 2 + |z|^2 / 2 with d = (steered - mean) / spread
    shift = ((steered - mean) / torch.where(last, 1.0, spread)).double().flatten(1)
    log_ratio = -(noise.double().flatten(1) * shift).sum(1) - shift.square().sum(1) / 2
    return steered + spread * noise, log_ratio


def _ratio(proposal: Proposal) -> Tensor:
    if proposal.correction is None:
        return torch.zeros_like(proposal.velocity.flatten(1)[:, 0])
    norm = proposal.velocity.flatten(1).norm(dim=1).clamp_min(1e-12)
    return proposal.correction.flatten(1).norm(dim=1) / norm


def effective_particles(log_weights: Tensor) -> Tensor:
    """Effective sample size of log-weights (I, P), (I,)."""
    return (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()


def log_mean(log_weights: Tensor) -> Tensor:
    """log of the mean weight of each image, (I,)."""
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])


def systematic(log_weights: Tensor, noise: Noise) -> Tensor:
    """Systematic resampling: indices (I, P) of log-weights (I, P), from one uniform number an image.

    Particle j is taken floor(P w_j) or ceil(P w_j) times: the least variance of the common schemes, and unbiased.
    """
    num = log_weights.shape[1]
    share = torch.softmax(log_weights, 1).cumsum(1)
    start = noise.fold_in(Stream.RESAMPLE).uniform().double().unsqueeze(1)
    points = (torch.arange(num, device=share.device, dtype=torch.float64) + start) / num
    return torch.searchsorted(share, points).clamp_max(num - 1)
