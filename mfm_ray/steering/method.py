"""What all steering methods share: particles that a method moves from one outer time to the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mfm_ray.dynamics import Dynamics, ProbabilityFlow
from mfm_ray.flow_map import FlowMap
from mfm_ray.noise import Noise
from mfm_ray.steering.calls import CallCounter, Cost

Differentiate = Callable[[Tensor, Tensor], Tensor]
"""(sum of values, x) to its gradient in x."""


def gradient_of(total: Tensor, x: Tensor) -> Tensor:
    """grad_x of a scalar, of x's shape."""
    (gradient,) = torch.autograd.grad(total, x)
    return gradient


@dataclass(frozen=True)
class SteeringContext:
    """What a method sees of the sampler at one step; rows are (images x particles), image by image.

    noise: of this step, one key a row. dynamics: how a state moves once its clean sample is chosen. second_order: take
    the drift's own change since the last step into account (`dynamics.extrapolate`). differentiate: how gradients are
    taken; an engine that runs many methods at once takes them all in one backward pass.
    """

    flow_map: FlowMap
    noise: Noise
    calls: CallCounter
    label: Tensor | None = None
    cfg_scale: float | None = None
    dynamics: Dynamics = field(default_factory=ProbabilityFlow)
    second_order: bool = False
    differentiate: Differentiate = gradient_of

    def rows(self, index: Tensor) -> SteeringContext:
        """The same step for some of its rows."""
        label = None if self.label is None else self.label[index]
        return replace(self, noise=self.noise[index], label=label)


@dataclass(frozen=True)
class Particles:
    """Particles of I images.

    x: (I, P, *event) in model space; log_weights: (I, P), all zero for methods that do not weight; memory: whatever a
    method carries from step to step.
    """

    x: Tensor
    log_weights: Tensor
    memory: Any = None

    @property
    def rows(self) -> Tensor:
        """States (I * P, *event), image by image."""
        return self.x.flatten(0, 1)

    def like(self, rows: Tensor) -> Tensor:
        """Rows (I * P, ...) as (I, P, ...)."""
        return rows.unflatten(0, self.x.shape[:2])


@dataclass(frozen=True)
class Step:
    """Particles after a step, and its diagnostics, (I,) float32 each."""

    particles: Particles
    diagnostics: dict[str, Tensor]


class Steering(ABC):
    """A way to sample what a reward prefers.

    num_particles: of one image; interacting: whether they have to be moved together.
    """

    num_particles: int = 1
    interacting: bool = False
    default_dynamics: str = "sde"

    @abstractmethod
    def advance(self, particles: Particles, t: Tensor, t_next: Tensor, context: SteeringContext) -> Step:
        """Particles moved from t to t_next, (I * P,) each."""

    @abstractmethod
    def cost(self) -> Cost:
        """Calls of an image; the most, for a method that decides as it goes."""

    @property
    def scored_by(self) -> Any:
        """The reward that the images are scored by, None for a method without one."""
        return getattr(self, "reward", None)

    def thriftier(self) -> Steering | None:
        """The same method with half its draws or particles; None when it has only one of each."""
        return None

    def final_log_weights(self, particles: Particles, rewards: Tensor) -> Tensor | None:
        """Log-weights (I, P) of the finished particles given their rewards (I, P); None: all alike."""
        return None

    def choose(self, particles: Particles, rewards: Tensor, noise: Noise) -> Tensor:
        """The particle (I,) that stands for each image, given rewards (I, P) and noise of I rows."""
        return rewards.argmax(dim=1)


def mean_over_particles(particles: Particles, rows: Tensor) -> Tensor:
    """A diagnostic of rows (I * P,) as one number an image, (I,)."""
    values = particles.like(rows)
    return values[:, 0] if values.shape[1] == 1 else values.mean(1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[i, index[i, ...]] of values (I, P, ...) at indices (I,) or (I, Q)."""
    return values[torch.arange(values.shape[0], device=values.device).reshape(-1, *[1] * (index.ndim - 1)), index]
