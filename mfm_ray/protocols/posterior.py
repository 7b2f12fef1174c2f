"""How good one-step posterior draws are: their distance to a fine ODE of the same network, beside its floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.samplers import diagonal_posterior_draws

_ROWS_AT_ONCE = 4096
# One noise source for each independent set of draws.
_FIRST_ODE, _SECOND_ODE, _MAP, _OUTER = 1, 2, 3, 4


@dataclass(frozen=True)
class PosteriorGap:
    """Distances at one time, (contexts,) each, in data units.

    one_step, few_step: sliced W2 of map draws with one and a few steps to draws of the fine ODE; floor: between two
    independent sets of the ODE's draws; mean: of the posterior mean, repeated, to the ODE's draws (what a blurred
    prediction would score).
    """

    time: float
    one_step: Tensor
    few_step: Tensor
    floor: Tensor
    mean: Tensor

    @property
    def ratio(self) -> float:
        """One-step distance over the floor, each summed over contexts first."""
        return float(self.one_step.sum() / self.floor.sum())


@dataclass(frozen=True)
class Contexts:
    """Noisy states x_t (B, *event) in model space of clean samples at one time."""

    x_t: Tensor
    time: float

    @property
    def t(self) -> Tensor:
        return torch.full((self.x_t.shape[0],), self.time)


def noisy_contexts(clean: Tensor, time: float, space: DataSpace, *, seed: int) -> Contexts:
    """Contexts x_t = t x_1 + (1 - t) x_0 of clean samples (B, *event) in data units, noise keyed by (seed, row)."""
    noise = KeyedNoise.for_images(seed, clean.shape[0]).fold_in(Stream.OUTER).fold_in(_OUTER)
    x0 = noise.normal(*clean.shape[1:])
    t = torch.full((clean.shape[0],), time)
    return Contexts(LinearInterpolant().sample(x0, space.to_model_space(clean), t).x_t, time)


def posterior_gap(
    flow_map: FlowMap,
    contexts: Contexts,
    *,
    num_draws: int,
    ode_steps: int,
    few_steps: int = 4,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> PosteriorGap:
    """Draws `num_draws` for each context from the map and twice from the ODE; `progress` gets network calls done."""
    keys = KeyedNoise.for_images(seed, contexts.x_t.shape[0])

    def ode(source: int) -> Tensor:
        return _in_parts(
            lambda part: diagonal_posterior_draws(
                flow_map,
                contexts.x_t[part],
                contexts.t[part],
                num_draws=num_draws,
                generator=keys.fold_in(source)[part],
                num_steps=ode_steps,
            ),
            contexts,
            num_draws,
            lambda contexts_done: progress(2 * contexts_done * num_draws * ode_steps) if progress else None,
        )

    def mapped(steps: int) -> Tensor:
        return _in_parts(
            lambda part: flow_map.posterior_draws(
                contexts.x_t[part],
                contexts.t[part],
                num_draws=num_draws,
                generator=keys.fold_in(_MAP)[part],
                num_steps=steps,
            ),
            contexts,
            num_draws,
            lambda contexts_done: progress(contexts_done * num_draws * steps) if progress else None,
        )

    scale = flow_map.space.data_units_per_model_unit
    references = [ode(_FIRST_ODE), ode(_SECOND_ODE)]
    mean = references[1].mean(1, keepdim=True).expand_as(references[0])
    one, few = mapped(1), mapped(few_steps)
    return PosteriorGap(
        time=contexts.time,
        one_step=scale * _mean_distance(one, references),
        few_step=scale * _mean_distance(few, references),
        floor=scale * _distance(*references),
        mean=scale * _distance(mean, references[0]),
    )


@torch.no_grad()
def gallery_draws(flow_map: FlowMap, contexts: Contexts, *, num_draws: int, seed: int) -> Tensor:
    """One-step posterior draws for pictures, (B, num_draws, *event) in data units, clamped."""
    noise = KeyedNoise.for_images(seed, contexts.x_t.shape[0])
    draws = flow_map.posterior_draws(contexts.x_t, contexts.t, num_draws=num_draws, generator=noise)
    return flow_map.space.clamp(flow_map.space.to_data_units(draws))


def num_calls(*, num_contexts: int, num_draws: int, ode_steps: int, few_steps: int = 4) -> int:
    """Network rows that `posterior_gap` costs at one time."""
    return num_contexts * num_draws * (4 * ode_steps + 1 + few_steps)


@torch.no_grad()
def _in_parts(
    draw: Callable[[slice], Tensor], contexts: Contexts, num_draws: int, done: Callable[[int], None]
) -> Tensor:
    count, at_once = contexts.x_t.shape[0], max(1, _ROWS_AT_ONCE // num_draws)
    parts = []
    for begin in range(0, count, at_once):
        part = slice(begin, min(begin + at_once, count))
        parts.append(draw(part))
        done(part.stop - begin)
    return torch.cat(parts)


def _mean_distance(draws: Tensor, references: Sequence[Tensor]) -> Tensor:
    return torch.stack([_distance(draws, reference) for reference in references]).mean(0)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Sliced W2 of each context's draws, (B,), one context at a time to bound memory."""
    pairs = zip(a.flatten(2), b.flatten(2), strict=True)
    return torch.stack([metrics.sliced_w2(x, y) for x, y in pairs])
