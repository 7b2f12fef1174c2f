"""The outer process: its times, and one step of it as an ODE or as the memoryless SDE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import LinearInterpolant, expand_time
from mfm_ray.noise import KeyedNoise, Stream


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


class Dynamics(ABC):
    """One step of the outer process from t to t_next, given the drift and its correction."""

    @abstractmethod
    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor, correction: Tensor, noise: KeyedNoise
    ) -> Tensor:
        """The next state, (B, *event)."""


class ProbabilityFlow(Dynamics):
    """Euler step of dx = (b_t + correction) dt. Deterministic; first order."""

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor, correction: Tensor, noise: KeyedNoise
    ) -> Tensor:
        return x + expand_time(t_next - t, x) * (velocity + correction)


class MemorylessDiffusion(Dynamics):
    """A step of the memoryless SDE with the clean sample held at its steered posterior mean.

    m = x + (1 - t)(b + correction), then x_next is drawn from the interpolant's own bridge between x_t and m:

        v = (1 - t)^2 - (t / t')^2 (1 - t')^2 = (1 - t / t') (1 - t + (t / t') (1 - t'))
        mean = (t' v m + (t / t') (1 - t')^2 x) / (1 - t)^2,   variance = v (1 - t')^2 / (1 - t)^2.

    Agrees with Euler-Maruyama to first order (drift 2b - x/t plus twice the correction, sigma^2 = 2(1 - t)/t), and is
    stable for any step, where Euler-Maruyama needs t' - t < 2t.
    """

    def step(
        self, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor, correction: Tensor, noise: KeyedNoise
    ) -> Tensor:
        clean = LinearInterpolant().posterior_mean(x, velocity + correction, t)
        shrink = t / t_next
        variance = (t_next - t) / t_next * ((1 - t) + shrink * (1 - t_next))
        total = (1 - t) ** 2
        mean = (
            expand_time(t_next * variance / total, x) * clean + expand_time(shrink * (1 - t_next) ** 2 / total, x) * x
        )
        z = noise.fold_in(Stream.DIFFUSION).normal(*x.shape[1:]).to(x)
        return mean + expand_time((variance / total).sqrt() * (1 - t_next), x) * z


DYNAMICS: dict[str, type[Dynamics]] = {"ode": ProbabilityFlow, "sde": MemorylessDiffusion}
