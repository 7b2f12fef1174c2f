"""The outer process: its times, and how a state moves once its clean sample is chosen.

Every method says which clean sample x_1 the state is to move towards: a posterior mean, steered or not, or a draw. What
remains is how the noise is carried along, and that is the dynamics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import LinearInterpolant, expand_time
from mfm_ray.noise import Noise, Stream


class Grid(Protocol):
    """Outer times of a run."""

    def times(self, num_steps: int) -> list[float]:
        """num_steps + 1 increasing times, from above 0 to exactly 1."""
        ...


@dataclass(frozen=True)
class TimeGrid:
    """Outer times start = t_0 < ... < t_K = 1 with t_k = start + (1 - start) (k / K)^power.

    The start is close to 0, with no cap on (1 - t) / t, and steps are denser early, where the state is decided. The
    law at `start` is taken to be N(0, Id), which it is only as start goes to 0.
    """

    start: float = 0.001
    power: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.start < 1:
            raise ValueError(f"start={self.start}: expected a time in (0, 1)")
        if not 0 < self.power < float("inf"):
            raise ValueError(f"power={self.power}: expected a finite number above 0")

    def times(self, num_steps: int) -> list[float]:
        """num_steps + 1 times. Raises ValueError for num_steps below 1."""
        require_at_least_one(num_steps=num_steps)
        return [self.start + (1 - self.start) * (k / num_steps) ** self.power for k in range(num_steps)] + [1.0]


@dataclass(frozen=True)
class PowerOfLinear:
    """t_k = (start + (1 - start) k / K)^power: the grid of the official tree search."""

    start: float = 0.01
    power: float = 2.5

    def times(self, num_steps: int) -> list[float]:
        require_at_least_one(num_steps=num_steps)
        return [(self.start + (1 - self.start) * k / num_steps) ** self.power for k in range(num_steps)] + [1.0]


@dataclass(frozen=True)
class AdaptedGrid:
    """Times of equal change: what changes is measured once on a pilot run (`samplers.adapt_grid`), not assumed.

    knots: increasing times from the start to 1; change: how much the clean estimate moved between consecutive knots,
    one number less, at least 0 and not all 0. `times` cuts the summed change into equal parts, linear between knots.
    """

    knots: Sequence[float]
    change: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.knots) != len(self.change) + 1 or any(b <= a for a, b in pairwise(self.knots)):
            raise ValueError(f"knots={list(self.knots)}: expected increasing times, one more than changes")
        if self.knots[0] <= 0 or self.knots[-1] != 1 or min(self.change) < 0 or sum(self.change) <= 0:
            raise ValueError(
                "knots, change: expected times in (0, 1] that end at 1, and changes of at least 0, not all 0"
            )

    def times(self, num_steps: int) -> list[float]:
        require_at_least_one(num_steps=num_steps)
        # a trickle everywhere, so that two times never coincide where nothing changed
        change = torch.tensor(self.change, dtype=torch.float64)
        change = change + 1e-3 * change.sum() / len(change)
        reached = torch.cat([change.new_zeros(1), change.cumsum(0)])
        wanted = torch.linspace(0, float(reached[-1]), num_steps + 1, dtype=torch.float64)[1:-1]
        knots = torch.tensor(self.knots, dtype=torch.float64)
        left = (torch.searchsorted(reached, wanted, right=True) - 1).clamp(0, len(change) - 1)
        inside = knots[left] + (wanted - reached[left]) / change[left] * (knots[left + 1] - knots[left])
        return [float(knots[0]), *inside.tolist(), 1.0]


class Dynamics(ABC):
    """How x_t becomes x_t' once its clean sample x_1 is chosen; x_1 itself at t' = 1.

    All three carry p_t to p_t' exactly when x_1 ~ p(x_1 | x_t), whatever the length of the step; with the posterior
    mean in its place each is a first-order step of an ODE or SDE. The same holds for the tilted laws. random: whether
    noise enters.
    """

    random: bool = True

    @abstractmethod
    def step(self, x: Tensor, clean: Tensor, t: Tensor, t_next: Tensor, noise: Noise) -> Tensor:
        """The next state, (B, *event), from x and its clean sample, both (B, *event), at times (B,)."""


class ProbabilityFlow(Dynamics):
    """x_t' = t' x_1 + (1 - t') e with the noise e = (x_t - t x_1) / (1 - t) kept.

    With the posterior mean it is Euler's step of dx = (b_t + correction) dt. Deterministic.
    """

    random = False

    def step(self, x: Tensor, clean: Tensor, t: Tensor, t_next: Tensor, noise: Noise) -> Tensor:
        kept = (1 - t_next) / (1 - t)
        return expand_time(kept, x) * x + expand_time((t_next - t) / (1 - t), x) * clean


class MemorylessDiffusion(Dynamics):
    """x_t' drawn from the interpolant's own bridge between x_t and x_1:

        v = (1 - t)^2 - (t / t')^2 (1 - t')^2 = (1 - t / t') (1 - t + (t / t') (1 - t'))
        mean = (t' v x_1 + (t / t') (1 - t')^2 x) / (1 - t)^2,   variance = v (1 - t')^2 / (1 - t)^2.

    With the posterior mean it agrees with Euler-Maruyama of the memoryless SDE to first order (drift 2b - x/t plus
    twice the correction, sigma^2 = 2(1 - t)/t), and is stable for any step, where Euler-Maruyama needs t' - t < 2t.
    """

    def step(self, x: Tensor, clean: Tensor, t: Tensor, t_next: Tensor, noise: Noise) -> Tensor:
        mean, deviation = self.transition(x, clean, t, t_next)
        return mean + expand_time(deviation, x) * diffusion_noise(noise, x)

    def transition(self, x: Tensor, clean: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, *event) and deviation (B,) of the next state, Gaussian and isotropic."""
        shrink = t / t_next
        variance = (t_next - t) / t_next * ((1 - t) + shrink * (1 - t_next))
        total = (1 - t) ** 2
        mean = (
            expand_time(t_next * variance / total, x) * clean + expand_time(shrink * (1 - t_next) ** 2 / total, x) * x
        )
        return mean, (variance / total).sqrt() * (1 - t_next)


class Renoising(Dynamics):
    """x_t' = t' x_1 + (1 - t') z with fresh noise z: the refinement kernel, which forgets all of x_t but its x_1.

    For clean samples that are draws; with a posterior mean it would lose the posterior's spread at every step.
    """

    def step(self, x: Tensor, clean: Tensor, t: Tensor, t_next: Tensor, noise: Noise) -> Tensor:
        fresh = noise.fold_in(Stream.RENOISE).normal(*x.shape[1:]).to(x)
        return LinearInterpolant().sample(fresh, clean, t_next).x_t


def diffusion_noise(noise: Noise, like: Tensor) -> Tensor:
    """The Brownian increment of a step, (B, *event) standard normal."""
    return noise.fold_in(Stream.DIFFUSION).normal(*like.shape[1:]).to(like)


def extrapolate(mean: Tensor, previous: Tensor, t_previous: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """What to add to the posterior mean for a step of second order, (B, *event); no further network call.

    The mean is taken as linear in l = log(t / (1 - t)), in which the step's exact solution weighs it at half the step:
    (l' - l) / (2 (l - l_prev)) (mean - previous). Zero for the last step, which is infinitely long in l.
    """
    before, now, then = (torch.logit(time.double()) for time in (t_previous, t, t_next))
    share = torch.where(t_next >= 1, 0.0, (then - now) / (2 * (now - before))).to(mean.dtype)
    return expand_time(share, mean) * (mean - previous)


DYNAMICS: dict[str, type[Dynamics]] = {"ode": ProbabilityFlow, "sde": MemorylessDiffusion}
