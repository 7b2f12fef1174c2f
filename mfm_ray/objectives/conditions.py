"""What a flow map must satisfy, one small class a condition.

With J_s the interpolant, X_{s,u} = x + (u - s) v_{s,u} the map and sg the stop-gradient:

    diagonal    v_{s,s}(J_s)                   = sg v_s               v_s from the data or a teacher
    semigroup   v_{s,u}(J_s)                   = sg [g v_{s,w} + (1 - g) v_{w,u}(X_{s,w})],    w = s + g (u - s)
    Lagrangian  v_{s,u} + (u - s) d_u v_{s,u}  = sg v_u(X_{s,u}(J_s))  d/du X_{s,u} is the velocity at its end
    Eulerian    v_{s,u}(J_s)                   = sg [v_s + (u - s) D v_{s,u}]    X_{s,u}(J_s) does not move with s

where D = d_s + v_s . grad_x is the derivative along the inner flow. All four vanish for an exact map.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import expand_time
from mfm_ray.noise import Noise, Stream
from mfm_ray.objectives.states import IntervalTimes, TrainingStates
from mfm_ray.objectives.velocities import DataVelocity, VelocitySource
from mfm_ray.tangents import TangentError, central_difference, pushforward

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_s, s, u) to v_{s,u}(x_s), the condition held fixed."""


@dataclass(frozen=True)
class Residual:
    """prediction - stop-gradient target, (B, *event) float32, and the inner time s it is taken at, (B,)."""

    value: Tensor
    s: Tensor


class Term(ABC):
    """One condition on the flow map.

    forward_units: its cost in forward passes of the batch, a backward pass counting two and a tangent one.
    """

    name: str
    forward_units: float

    @abstractmethod
    def residual(self, flow_map: FlowMap, states: TrainingStates, noise: Noise, step: int) -> Residual: ...

    def active(self, step: int) -> bool:
        """Whether the term counts at this step yet."""
        return True


class DiagonalTerm(Term):
    """Flow matching of the inner velocity: v_{s,s}(J_s; t, x_t) against `velocity`, s ~ U(0, 1).

    From data the minimiser is the conditional mean E[x_1 - eps | J_s, x_t], and the residual keeps the target's own
    variance; from a teacher (GLASS) the target is that mean itself.
    """

    name = "diagonal"

    def __init__(self, velocity: VelocitySource | None = None) -> None:
        self.velocity = velocity or DataVelocity()
        self.forward_units = 3.0 + self.velocity.forward_units

    def residual(self, flow_map: FlowMap, states: TrainingStates, noise: Noise, step: int) -> Residual:
        s = noise.fold_in(Stream.TIME).fold_in(5).uniform()
        x_s = states.inner_state(s)
        target = self.velocity(flow_map, states, x_s, s)
        return Residual(average_velocity(flow_map, states)(x_s, s, s).float() - target, s)


class IntervalTerm(Term):
    """A condition over intervals [s, u] of the inner flow."""

    def __init__(self, times: IntervalTimes | None = None) -> None:
        self.times = times or IntervalTimes()

    def active(self, step: int) -> bool:
        return self.times.active(step)


class SemigroupTerm(IntervalTerm):
    """Progressive self-distillation: one long step equals two short ones, split at a uniform share g.

    No derivative of the network is needed.
    """

    name = "semigroup"
    forward_units = 5.0

    def residual(self, flow_map: FlowMap, states: TrainingStates, noise: Noise, step: int) -> Residual:
        s, u = self.times(noise, step)
        share = noise.fold_in(Stream.SPLIT).uniform()
        x_s, velocity = states.inner_state(s), average_velocity(flow_map, states)
        target = self._target(velocity, x_s, s, u, share)
        return Residual(velocity(x_s, s, u).float() - target, s)

    @torch.no_grad()
    def _target(self, velocity: AverageVelocity, x_s: Tensor, s: Tensor, u: Tensor, share: Tensor) -> Tensor:
        w = s + share * (u - s)
        first = velocity(x_s, s, w).float()
        second = velocity(x_s + expand_time(w - s, x_s) * first, w, u).float()
        part = expand_time(share, x_s)
        return part * first + (1 - part) * second


class LagrangianTerm(IntervalTerm):
    """The end of the map moves with the velocity there: gradients flow through d_u v, so that its graph is kept.

    velocity: at the mapped state, which is no interpolant; the data cannot answer, the network or a teacher can.
    """

    name = "lagrangian"

    def __init__(
        self, velocity: VelocitySource, *, tangent: Tangent | None = None, times: IntervalTimes | None = None
    ) -> None:
        super().__init__(times)
        require(velocity.everywhere, "velocity", type(velocity).__name__, "one that holds at any state")
        self.velocity, self.tangent = velocity, tangent or Tangent()
        self.forward_units = 6.0 + velocity.forward_units

    def residual(self, flow_map: FlowMap, states: TrainingStates, noise: Noise, step: int) -> Residual:
        s, u = self.times(noise, step)
        x_s = states.inner_state(s)
        directions = (torch.zeros_like(x_s), torch.zeros_like(s), torch.ones_like(u))
        average, derivative = self.tangent(flow_map, states, (x_s, s, u), directions, differentiable=True)
        length = expand_time(u - s, x_s)
        target = self.velocity(flow_map, states, x_s + length * average.detach(), u)
        return Residual(average + length * derivative - target, s)


class EulerianTerm(IntervalTerm):
    """The map does not see where on its path it starts. The derivative is part of the target: it keeps no graph.

    velocity: the network's own, a teacher's, or the data's x_1 - eps, which makes it Mean Flow: the target is linear
    in it, so that in expectation nothing changes.
    """

    name = "eulerian"

    def __init__(
        self, velocity: VelocitySource, *, tangent: Tangent | None = None, times: IntervalTimes | None = None
    ) -> None:
        super().__init__(times)
        self.velocity, self.tangent = velocity, tangent or Tangent()
        self.forward_units = 4.0 + velocity.forward_units

    def residual(self, flow_map: FlowMap, states: TrainingStates, noise: Noise, step: int) -> Residual:
        s, u = self.times(noise, step)
        x_s = states.inner_state(s)
        instant = self.velocity(flow_map, states, x_s, s)
        directions = (instant, torch.ones_like(s), torch.zeros_like(u))
        average, derivative = self.tangent(flow_map, states, (x_s, s, u), directions)
        return Residual(average - (instant + expand_time(u - s, x_s) * derivative), s)


class Tangent:
    """The average velocity and its derivative along (x_s, s, u), both (B, *event) float32.

    mode: "exact" is forward mode (tangents.py); "finite_difference" two more evaluations in float32, about 1e-4 off;
    "auto" is exact, and where the network has an operation without a forward derivative it warns once and takes
    differences.
    """

    MODES = ("auto", "exact", "finite_difference")

    def __init__(self, mode: str = "auto") -> None:
        require(mode in self.MODES, "tangent", mode, f"one of {', '.join(self.MODES)}")
        self.mode = mode

    def __call__(
        self,
        flow_map: FlowMap,
        states: TrainingStates,
        point: tuple[Tensor, Tensor, Tensor],
        directions: tuple[Tensor, Tensor, Tensor],
        *,
        differentiable: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if self.mode != "finite_difference":
            try:
                velocity = average_velocity(flow_map, states)
                value, tangent = pushforward(velocity, point, directions, differentiable=differentiable)
                return value.float(), tangent.float()
            except TangentError as error:
                if self.mode == "exact":
                    raise TangentError(f"{error}; objective.tangent=finite_difference does without") from error
                warnings.warn(f"{error}: finite differences are used instead (objective.tangent)", stacklevel=2)
                self.mode = "finite_difference"
        return self._by_differences(flow_map, states, point, directions, differentiable)

    def _by_differences(
        self,
        flow_map: FlowMap,
        states: TrainingStates,
        point: tuple[Tensor, Tensor, Tensor],
        directions: tuple[Tensor, Tensor, Tensor],
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        precise = average_velocity(flow_map.in_full_precision(), states)
        value = average_velocity(flow_map, states)(*point).float()
        with torch.set_grad_enabled(differentiable):
            return value, central_difference(precise, point, directions).float()


def average_velocity(flow_map: FlowMap, states: TrainingStates) -> AverageVelocity:
    """v_{s,u}(x_s) of the flow map at the states' own condition."""

    def velocity(x_s: Tensor, s: Tensor, u: Tensor) -> Tensor:
        condition = {"label": states.label, "cfg_scale": states.cfg_scale}
        return flow_map.velocity(x_s, s, u, t=states.t, x_t=states.x_t, **condition)

    return velocity
