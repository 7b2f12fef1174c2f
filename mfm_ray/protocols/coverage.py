"""Does the standard error of a value estimate tell how wrong it is? Asked where the value is known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.gaussian import GaussianMixture, LinearObservation
from mfm_ray.noise import KeyedNoise
from mfm_ray.values import ValueEstimate, estimate_value

_WIDTH = 2.0
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Coverage:
    """Of value estimates from `draws` draws at one time, over states of the steered law.

    covered: share of the states whose closed-form V_t(x) lies within value +- 2 standard errors; above: share whose
    value lies above that interval, below: beneath it; standard_error, error: root mean squares of what is told and of
    value - V_t(x), in nats; single: share of the states whose effective sample size is below 2: one draw carries
    the weight, and value and error are lower bounds.
    """

    draws: int
    time: float
    states: int
    covered: float
    above: float
    below: float
    standard_error: float
    error: float
    single: float


def value_coverage(
    flow_map: FlowMap,
    mixture: GaussianMixture,
    reward: LinearObservation,
    *,
    draws: Sequence[int],
    times: Sequence[float],
    states: int,
    seed: int,
) -> tuple[Coverage, ...]:
    """One entry for each number of draws and time, at states x_t of the noised tilted law, where steered runs are."""
    tilted = reward.tilt(mixture)
    found = []
    for place, time in enumerate(times):
        generator = torch.Generator().manual_seed(seed + place)
        clean = tilted.sample(states, generator=generator)
        x_t = time * clean + (1 - time) * torch.randn(clean.shape, generator=generator)
        t = torch.full((states,), time)
        exact = reward.value(mixture, x_t, t)
        for count in draws:
            noise = KeyedNoise.for_images(seed, states).fold_in(place).fold_in(count)
            found.append(_covered(_estimate(flow_map, reward, x_t, t, count, noise), exact, count, time))
    return tuple(found)


@torch.no_grad()
def _estimate(
    flow_map: FlowMap, reward: LinearObservation, x_t: Tensor, t: Tensor, count: int, noise: KeyedNoise
) -> ValueEstimate:
    rewards = []
    rows = max(1, _ROWS_AT_ONCE // count)
    for begin in range(0, len(x_t), rows):
        part = slice(begin, begin + rows)
        draws = flow_map.posterior_draws(x_t[part], t[part], num_draws=count, generator=noise[part])
        rewards.append(reward(flow_map.space.to_data_units(draws.flatten(0, 1))).unflatten(0, draws.shape[:2]))
    return estimate_value(torch.cat(rewards))


def _covered(estimate: ValueEstimate, exact: Tensor, draws: int, time: float) -> Coverage:
    error, reach = estimate.value - exact, _WIDTH * estimate.standard_error
    return Coverage(
        draws=draws,
        time=time,
        states=len(exact),
        covered=float((error.abs() <= reach).double().mean()),
        above=float((error < -reach).double().mean()),
        below=float((error > reach).double().mean()),
        standard_error=float(estimate.standard_error.square().mean().sqrt()),
        error=float(error.square().mean().sqrt()),
        single=float((estimate.effective_sample_size < 2).double().mean()),
    )
