"""Posterior draws from the marginal drift alone, by many calls: the GLASS ODE and the memoryless SDE.

Neither needs a meta flow map, only b_t: they are what its one-step draws are compared with. label: classes (B,) of the
states; first_draw: number of the first draw, so that draws can be made in parts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ray.dynamics import MemorylessDiffusion
from mfm_ray.flow_map import FlowMap, require_at_least_one
from mfm_ray.glass import posterior_velocity
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import KeyedNoise, Stream

Progress = Callable[[int], None]
"""Called with the network rows of each step."""


@torch.no_grad()
def glass_draws(
    flow_map: FlowMap,
    x_t: Tensor,
    t: Tensor,
    *,
    num_draws: int,
    num_steps: int,
    generator: KeyedNoise,
    progress: Progress | None = None,
    label: Tensor | None = None,
    cfg_scale: float | None = None,
    first_draw: int = 0,
) -> Tensor:
    """Euler's rule along the GLASS velocity from s = 0 to 1, (B, num_draws, *event); one drift call a step.

    x_t (B, *event) in model space, t (B,) above 0. First order in 1 / num_steps: one step returns the posterior mean
    for every draw. Shares the inner noise of `FlowMap.posterior_draws` at an equal generator.
    """
    require_at_least_one(num_draws=num_draws, num_steps=num_steps)
    x = (
        generator.fold_in(Stream.DRAW)
        .spread(num_draws, first=first_draw)
        .normal(*flow_map.event_shape)
        .to(x_t)
        .flatten(0, 1)
    )
    times, states = t.repeat_interleave(num_draws), x_t.repeat_interleave(num_draws, dim=0)
    drift = _drift(flow_map, label, cfg_scale, num_draws)
    for step in range(num_steps):
        s = torch.full_like(times, step / num_steps)
        x = x + posterior_velocity(drift, x, s, x_t=states, t=times) / num_steps
        if progress is not None:
            progress(len(x))
    return x.unflatten(0, (x_t.shape[0], num_draws))


@torch.no_grad()
def memoryless_draws(
    flow_map: FlowMap,
    x_t: Tensor,
    t: Tensor,
    *,
    num_draws: int,
    num_steps: int,
    generator: KeyedNoise,
    progress: Progress | None = None,
    label: Tensor | None = None,
    cfg_scale: float | None = None,
    first_draw: int = 0,
) -> Tensor:
    """Rollouts of the memoryless SDE from x_t to t = 1 on a uniform grid, (B, num_draws, *event); one call a step.

    Given x_t its end follows p(x_1 | x_t), whatever path led to x_t; first order in 1 / num_steps. Steps are those of
    `MemorylessDiffusion`, which need no smallness at early times as Euler-Maruyama's do.
    """
    require_at_least_one(num_draws=num_draws, num_steps=num_steps)
    rows = generator.fold_in(Stream.DRAW).spread(num_draws, first=first_draw).flatten()
    x, start = x_t.repeat_interleave(num_draws, dim=0), t.repeat_interleave(num_draws)
    interpolant, dynamics = LinearInterpolant(), MemorylessDiffusion()
    drift = _drift(flow_map, label, cfg_scale, num_draws)
    for step in range(num_steps):
        # in the time that is left, so that the last one is 1 exactly
        now, then = (1 - (1 - start) * (1 - edge / num_steps) for edge in (step, step + 1))
        clean = interpolant.posterior_mean(x, drift(x, now), now)
        x = dynamics.step(x, clean, now, then, rows.fold_in(step))
        if progress is not None:
            progress(len(x))
    return x.unflatten(0, (x_t.shape[0], num_draws))


def _drift(
    flow_map: FlowMap, label: Tensor | None, cfg_scale: float | None, num_draws: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The marginal drift b_t(x) for the classes (B,) of the states, each repeated for its draws."""
    labels = None if label is None else label.repeat_interleave(num_draws)
    return lambda x, t: flow_map.drift(x, t, label=labels, cfg_scale=cfg_scale)
