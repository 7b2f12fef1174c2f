"""Steering by selection: draw clean samples, keep those that the reward prefers, and move towards them.

No reward gradient and no drift: the clean sample that a state moves towards is one of its own posterior draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mfm_ray.dynamics import ProbabilityFlow, Renoising
from mfm_ray.errors import require
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.steering.calls import Cost
from mfm_ray.steering.draws import gumbel
from mfm_ray.steering.guidance import Unguided
from mfm_ray.steering.method import Particles, Steering, SteeringContext, Step, pick
from mfm_ray.steering.scoring import Reward, draw_and_score
from mfm_ray.values import RunningValue, ValueEstimate


@dataclass(frozen=True)
class PosteriorResampling(Steering):
    """Each step moves towards one of its posterior draws, taken with probability softmax(r): draws of the tilted
    posterior p*(x_1 | x_t) by sampling-importance-resampling.

    With such a draw a step is exact whatever its length (`Dynamics`), so that the law's error comes from the number of
    draws alone, O(1 / num_draws), and a handful of steps is enough. Where few draws get a good reward, as with images
    and stiff likelihoods, the gradient methods need far fewer.

    Args:
        reward: any callable, sees clamped samples in data units.
        num_draws: posterior draws a step, at least 1; one draw is no steering.
    """

    reward: Reward
    num_draws: int = field(kw_only=True)

    def __post_init__(self) -> None:
        require_at_least_one(num_draws=self.num_draws)

    def advance(self, particles: Particles, t: Tensor, t_next: Tensor, context: SteeringContext) -> Step:
        x = particles.rows
        with torch.no_grad():
            draws, rewards = draw_and_score(self.reward, x, t, self.num_draws, context, clamp=True)
            index = (rewards.double() + gumbel(context.noise, self.num_draws)).argmax(1)
            moved = context.dynamics.step(x, pick(draws, index), t, t_next, context.noise)
        values = RunningValue.of(rewards).estimate()
        return Step(Particles(particles.like(moved), particles.log_weights), value_diagnostics(values, particles))

    def cost(self) -> Cost:
        return Cost(per_step=2 * self.num_draws)

    def thriftier(self) -> Steering | None:
        return replace(self, num_draws=self.num_draws // 2) if self.num_draws > 1 else None


RESAMPLINGS = ("max_overall", "max_per_particle")
TRANSITIONS = {"stochastic": Renoising, "deterministic": ProbabilityFlow}


@dataclass(frozen=True)
class Search(Steering):
    """MFM-Search: particles move towards the posterior draw with the highest reward (method.md 7.4).

    Greedy, so that monotone transforms of the reward change nothing, and the law is not the tilted one: the reward
    goes up as num_particles and num_draws grow. No gradient, no drift; `dynamics` has no say.

    Args:
        reward: any callable, sees clamped samples in data units.
        num_particles: of each image; the one with the highest reward is returned.
        num_draws: posterior draws of each particle at each step.
        resampling: "max_overall": all particles continue from the best draw of any, and its own state;
            "max_per_particle": each from its own best draw.
        transition: "stochastic" re-noises the draw afresh; "deterministic" keeps the state's own noise, which with
            max_overall makes all particles one.
    """

    reward: Reward
    num_particles: int = field(kw_only=True)
    num_draws: int = field(kw_only=True)
    resampling: str = field(default="max_overall", kw_only=True)
    transition: str = field(default="stochastic", kw_only=True)

    interacting = True

    def __post_init__(self) -> None:
        require_at_least_one(num_particles=self.num_particles, num_draws=self.num_draws)
        require(self.resampling in RESAMPLINGS, "resampling", repr(self.resampling), f"one of {', '.join(RESAMPLINGS)}")
        require(self.transition in TRANSITIONS, "transition", repr(self.transition), f"one of {', '.join(TRANSITIONS)}")

    def advance(self, particles: Particles, t: Tensor, t_next: Tensor, context: SteeringContext) -> Step:
        with torch.no_grad():
            draws, rewards = draw_and_score(self.reward, particles.rows, t, self.num_draws, context, clamp=True)
            draws, by_particle = particles.like(draws), particles.like(rewards)
            x, clean = self._best(particles.x, draws, by_particle)
            dynamics = TRANSITIONS[self.transition]()
            moved = dynamics.step(x.flatten(0, 1), clean.flatten(0, 1), t, t_next, context.noise)
        diagnostics = value_diagnostics(RunningValue.of(rewards).estimate(), particles)
        diagnostics["best_reward"] = by_particle.flatten(1).max(1).values
        return Step(Particles(particles.like(moved), particles.log_weights), diagnostics)

    def _best(self, x: Tensor, draws: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """States and clean samples (I, P, *event) to continue from; draws (I, P, N, *event), rewards (I, P, N)."""
        if self.resampling == "max_per_particle":
            best = rewards.argmax(2)
            return x, pick(draws.flatten(0, 1), best.flatten()).unflatten(0, x.shape[:2])
        best = rewards.flatten(1).argmax(1)
        owner = (best // self.num_draws).unsqueeze(1).expand(x.shape[:2])
        clean = pick(draws.flatten(1, 2), best).unsqueeze(1).expand_as(x)
        return pick(x, owner), clean

    def cost(self) -> Cost:
        return Cost(per_step=2 * self.num_particles * self.num_draws)

    def thriftier(self) -> Steering | None:
        if self.num_particles > 1:
            return replace(self, num_particles=self.num_particles // 2)
        return replace(self, num_draws=self.num_draws // 2) if self.num_draws > 1 else None


@dataclass(frozen=True)
class BestOfN(Steering):
    """Best-of-N: num_particles independent samples, of which the one with the highest reward is returned."""

    reward: Reward
    num_particles: int = field(kw_only=True)

    default_dynamics = "ode"

    def __post_init__(self) -> None:
        require_at_least_one(num_particles=self.num_particles)

    def advance(self, particles: Particles, t: Tensor, t_next: Tensor, context: SteeringContext) -> Step:
        return Unguided().advance(particles, t, t_next, context)

    def cost(self) -> Cost:
        return Cost(per_step=self.num_particles, at_end=self.num_particles)

    def thriftier(self) -> Steering | None:
        return replace(self, num_particles=self.num_particles // 2) if self.num_particles > 1 else None


def value_diagnostics(value: ValueEstimate, particles: Particles) -> dict[str, Tensor]:
    """Value, its standard error and effective sample size of each image, averaged over its particles, (I,)."""
    rows = {
        "value": value.value,
        "standard_error": value.standard_error,
        "effective_sample_size": value.effective_sample_size,
    }
    return {name: particles.like(row).mean(1) for name, row in rows.items()}
