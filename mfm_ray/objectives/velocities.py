"""Where an instantaneous inner velocity comes from: the data, the network itself, or a teacher.

Each source answers v_s(x_s; t, x_t) as a target: (B, *event) float32 without a graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap
from mfm_ray.glass import merge_observations
from mfm_ray.interpolants import expand_time
from mfm_ray.objectives.states import TrainingStates

if TYPE_CHECKING:
    from mfm_ray.objectives.teachers import Teacher


class VelocitySource(ABC):
    """v_s(x_s; t, x_t) as a stop-gradient target.

    everywhere: whether the answer holds at any state, or in expectation at the interpolant J_s alone.
    forward_units: network calls it takes, in units of one call on the batch.
    """

    everywhere: bool = True
    forward_units: float = 0.0

    @abstractmethod
    def __call__(self, flow_map: FlowMap, states: TrainingStates, x_s: Tensor, s: Tensor) -> Tensor: ...


class DataVelocity(VelocitySource):
    """x_1 - eps, whose conditional mean given (J_s, x_t) is the velocity; with guidance when the network is told it:

        x_1 - eps + omega (v(J_s; y, w) - v(J_s; null, 1)),   omega = 1 - 1 / w   (model guidance),

    of which the fixed point is v_null + w (v_y - v_null). At w = 1 nothing is added.
    """

    everywhere = False

    def __call__(self, flow_map: FlowMap, states: TrainingStates, x_s: Tensor, s: Tensor) -> Tensor:
        target = states.x1 - states.inner_noise
        if states.cfg_scale is None or states.label is None:
            return target
        omega = expand_time(1 - 1 / states.cfg_scale, target)
        with torch.no_grad():
            null, one = torch.full_like(states.label, flow_map.num_classes), torch.ones_like(states.cfg_scale)
            guided, free = flow_map.velocity(
                torch.cat([x_s, x_s]),
                torch.cat([s, s]),
                torch.cat([s, s]),
                t=torch.cat([states.t, states.t]),
                x_t=torch.cat([states.x_t, states.x_t]),
                label=torch.cat([states.label, null]),
                cfg_scale=torch.cat([states.cfg_scale, one]),
            ).chunk(2)
        return target + omega * (guided.float() - free.float())


class SelfVelocity(VelocitySource):
    """The network's own diagonal v_{s,s}(x_s; t, x_t)."""

    forward_units = 1.0

    @torch.no_grad()
    def __call__(self, flow_map: FlowMap, states: TrainingStates, x_s: Tensor, s: Tensor) -> Tensor:
        condition = {"label": states.label, "cfg_scale": states.cfg_scale}
        return flow_map.velocity(x_s, s, s, t=states.t, x_t=states.x_t, **condition).float()


class TeacherVelocity(VelocitySource):
    """GLASS: the posterior velocity in closed form from a teacher's marginal velocity b (glass.py)."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.forward_units = teacher.forward_units

    @torch.no_grad()
    def __call__(self, flow_map: FlowMap, states: TrainingStates, x_s: Tensor, s: Tensor) -> Tensor:
        merged = merge_observations(x_s, s, states.x_t, states.t)
        velocity = self.teacher(merged.state, merged.time, label=states.label, cfg_scale=states.cfg_scale)
        return merged.inner_velocity(x_s, states.x_t, velocity.float())
