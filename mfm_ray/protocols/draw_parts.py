"""Parts of an evaluation that are posterior draws: from states of one time, by one source.

A part is named `t0.2_mfm_4`: of the map in four steps; `t0.2_glass_4`: of the GLASS ODE; `t0.2_sde`: by rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.protocols.imagenet import CleanRows, device_of, noisy_states
from mfm_ray.protocols.reference_draws import glass_draws, memoryless_draws
from mfm_ray.protocols.values import Estimator

ROLLOUTS = "sde"
# Noise sources: all cheap estimators share one, so that they differ by their draws' law alone.
_CHEAP, _ROLLOUTS = 1, 2


def part_of(t: float, source: str) -> str:
    return f"t{t:g}_{source}"


@dataclass(frozen=True, kw_only=True)
class PosteriorDraws:
    """Draws for the parts of a protocol. times: in their order, whose numbers key the noise."""

    flow_map: FlowMap
    times: Sequence[float]
    estimators: Callable[[float], Sequence[Estimator]]
    rollout_steps: int
    cfg_scale: float | None
    seed: int

    def of(self, part: str, clean: CleanRows, *, first: int, num_draws: int = 1, first_draw: int = 0) -> Tensor:
        """(B, num_draws, *event) in model space, from the noised states of clean rows `first` on."""
        number, t, estimator = next(
            (number, t, estimator)
            for number, t in enumerate(self.times)
            for estimator in (None, *self.estimators(t))
            if part_of(t, ROLLOUTS if estimator is None else estimator.key) == part
        )
        keys = KeyedNoise.for_images(self.seed, len(clean), first=first, device=device_of(self.flow_map))
        keys = keys.fold_in(number)
        x_t = noisy_states(clean.states, t, keys)
        times = torch.full_like(x_t.flatten(1)[:, 0], t)
        if estimator is None:
            return memoryless_draws(
                self.flow_map,
                x_t,
                times,
                num_draws=num_draws,
                num_steps=self.rollout_steps,
                generator=keys.fold_in(_ROLLOUTS),
                label=clean.labels,
                cfg_scale=self.cfg_scale,
                first_draw=first_draw,
            )
        draw = glass_draws if estimator.family == "glass" else _by_the_map
        return draw(
            self.flow_map,
            x_t,
            times,
            num_draws=num_draws,
            num_steps=estimator.steps,
            generator=keys.fold_in(_CHEAP),
            label=clean.labels,
            cfg_scale=self.cfg_scale,
            first_draw=first_draw,
        )


def _by_the_map(
    flow_map: FlowMap,
    x_t: Tensor,
    t: Tensor,
    *,
    num_draws: int,
    num_steps: int,
    generator: KeyedNoise,
    label: Tensor | None,
    cfg_scale: float | None,
    first_draw: int,
) -> Tensor:
    return flow_map.posterior_draws(
        x_t,
        t,
        num_draws=num_draws,
        num_steps=num_steps,
        generator=generator,
        label=label,
        cfg_scale=cfg_scale,
        first_draw=first_draw,
    )
