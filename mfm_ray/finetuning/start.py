"""Where chains of anchors begin: steered samples, which follow the tilted law already, about."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mfm_ray.finetuning.tilt import Tilt
from mfm_ray.samplers import sample
from mfm_ray.steering import GradientFreeGuidance, GradientGuidance, Reward
from mfm_ray.steering.reward_gradient import evaluate, value_and_gradient

_BATCH_ROWS = 512


def steered_samples(
    tilt: Tilt,
    label: Tensor | None,
    *,
    count: int,
    num_steps: int,
    num_draws: int,
    seed: int,
    first_image: int = 0,
) -> Tensor:
    """Samples (count, *event) in model space, steered by MFM-G or, where the reward has no gradient, MFM-GF; counted.

    label: (count,) or None. Image i depends on `seed` and first_image + i alone.
    """
    reward = Multiplied(tilt.reward, tilt.multiplier)
    method = GradientGuidance if has_gradient(tilt) else GradientFreeGuidance
    steering = method(reward, num_draws=num_draws)
    drawn = sample(
        tilt.flow_map,
        num_samples=count,
        steering=steering,
        num_steps=num_steps,
        seed=seed,
        label=label,
        cfg_scale=tilt.cfg_scale,
        batch_size=_BATCH_ROWS,
        first_image=first_image,
    )
    for kind, number in drawn.calls.items():
        setattr(tilt.calls, kind, getattr(tilt.calls, kind) + number)
    assert drawn.states is not None
    return drawn.states


def has_gradient(tilt: Tilt) -> bool:
    """Whether the reward is differentiable, by asking it about one sample."""
    space = tilt.flow_map.space
    device = next(tilt.flow_map.parameters(), torch.zeros(())).device
    sample = space.to_data_units(torch.zeros(1, *space.event_shape, device=device))
    return value_and_gradient(tilt.reward, sample)[1] is not None


class Multiplied:
    """multiplier * reward."""

    composes_gradients: ClassVar[bool] = True

    def __init__(self, reward: Reward, multiplier: float) -> None:
        self.reward, self.multiplier = reward, multiplier

    def __call__(self, samples: Tensor) -> Tensor:
        return self.multiplier * evaluate(self.reward, samples)
