"""Adjoint matching with the memoryless noise schedule (Domingo-Enrich et al., arXiv 2409.08861).

Trajectories of the memoryless SDE are drawn with the current drift. The lean adjoint goes back along them through the
frozen model alone,

    a_K = -grad r(x_1),        a_k = (d m_k / d x_k)^T a_{k+1},

m_k the mean of the frozen model's step from t_k to t_{k+1}, and the drift is regressed on b - (1 - t) / t * a_k, which
is b + (sigma_t^2 / 2) grad V_t once the drift is optimal. The adjoint is that of the steps themselves, which are the
sampler's (`dynamics.MemorylessDiffusion`): nothing is lost to discretising it apart.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mfm_ray.dynamics import MemorylessDiffusion, TimeGrid
from mfm_ray.errors import require
from mfm_ray.finetuning.rollout import require_near
from mfm_ray.finetuning.targets import Anchors, Drift, DriftTargets, TuningMethod
from mfm_ray.finetuning.tilt import Tilt
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import LinearInterpolant, expand_time
from mfm_ray.noise import Noise, Stream


class AdjointMatching(TuningMethod):
    """num_steps: of a trajectory. states_per_path: states of each trajectory that are regressed on, drawn at random.

    They are rows in succession, and have the first one's label.
    """

    on_policy = True
    needs_gradient = True
    anchors_are_data = True

    def __init__(self, *, num_steps: int = 25, states_per_path: int = 4) -> None:
        require_at_least_one(num_steps=num_steps, states_per_path=states_per_path)
        require(states_per_path <= num_steps, "states_per_path", states_per_path, f"at most num_steps={num_steps}")
        self.num_steps, self.states_per_path = num_steps, states_per_path
        self.group_rows, self.group_keys = states_per_path, ("states_per_path",)

    def targets(self, tilt: Tilt, anchors: Anchors, noise: Noise, *, drift: Drift | None = None) -> DriftTargets:
        assert drift is not None
        first = torch.arange(0, len(anchors.x1), self.states_per_path, device=anchors.x1.device)
        label = None if anchors.label is None else anchors.label[first]
        times = torch.tensor(TimeGrid().times(self.num_steps), device=anchors.x1.device)
        states, end = _trajectories(drift, label, noise[first], times, like=anchors.x1[first])
        adjoints, rewards = _lean_adjoints(tilt, states, end, times, label)
        picked = _picked_steps(noise[first], self.num_steps, self.states_per_path)
        rows = torch.arange(len(first), device=first.device).repeat_interleave(self.states_per_path)[: len(anchors.x1)]
        steps = picked.flatten()[: len(anchors.x1)]
        x_t, t, adjoint = states[steps, rows], times[steps], adjoints[steps, rows]
        labels = None if label is None else label[rows]
        base = tilt.base_drift(x_t, t, labels)
        return DriftTargets(
            x_t=x_t,
            t=t,
            label=labels,
            target=base - expand_time((1 - t) / t, base) * adjoint,
            weight=torch.ones_like(t),
            reward=rewards[rows].float(),
            effective_share=torch.ones_like(t),
        )


@torch.no_grad()
def _trajectories(
    drift: Drift, label: Tensor | None, noise: Noise, times: Tensor, *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """States (K, B, *event) at the first K times, and the endpoints (B, *event)."""
    dynamics, states = MemorylessDiffusion(), []
    x = noise.fold_in(Stream.START).normal(*like.shape[1:]).to(like)
    for step, (t, t_next) in enumerate(_steps(times, len(x))):
        states.append(x)
        clean = LinearInterpolant().posterior_mean(x, drift(x, t, label).float(), t)
        x = clean if step == len(times) - 2 else dynamics.step(x, clean, t, t_next, noise.fold_in(step))
    return torch.stack(states), require_near(x)


def _lean_adjoints(
    tilt: Tilt, states: Tensor, end: Tensor, times: Tensor, label: Tensor | None
) -> tuple[Tensor, Tensor]:
    """a_k (K, B, *event), and the rewards (B,) of the endpoints."""
    rewards, slope = tilt.reward_and_slope(end)
    adjoint, adjoints = -slope, []
    for step, (t, t_next) in reversed(list(enumerate(_steps(times, len(end))))):
        with torch.enable_grad():
            x = states[step].detach().requires_grad_()
            drift = tilt.flow_map.drift(x, t, label=label, cfg_scale=tilt.drift_cfg_scale)
            clean = LinearInterpolant().posterior_mean(x, drift, t)
            last = step == len(times) - 2
            mean = clean if last else MemorylessDiffusion().transition(x, clean, t, t_next)[0]
            (adjoint,) = torch.autograd.grad(mean, x, grad_outputs=adjoint)
        tilt.calls.drift += len(x)
        tilt.calls.drift_backward += len(x)
        adjoints.append(adjoint)
    return torch.stack(adjoints[::-1]).float(), rewards


def _steps(times: Tensor, rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(t.expand(rows), t_next.expand(rows)) for t, t_next in pairwise(times)]


def _picked_steps(noise: Noise, num_steps: int, count: int) -> Tensor:
    """`count` different steps of each trajectory, (B, count)."""
    order = noise.fold_in(Stream.TIME).spread(num_steps).uniform()
    return order.argsort(dim=1)[:, :count]
