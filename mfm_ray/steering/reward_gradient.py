"""How a reward's gradient is taken: for each sample by itself, with cotangent one, and scaled afterwards.

One rule for a reward in this process and for one on another machine, which returns values and gradients in one call:
both then give the same numbers to the bit, and the reward's own graph is gone before the network's backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfm_ray.interpolants import expand_time

Evaluate = Callable[[Tensor], Tensor]


def evaluate(reward: Evaluate, samples: Tensor) -> Tensor:
    """reward(samples), (N,); where samples (N, *event) require a gradient, backward gives each its own, scaled.

    A reward whose attribute `composes_gradients` is true is called as it is: it follows the rule for its parts, or
    brings gradients along. What comes back without a gradient, or in another shape, is returned unchanged, for checks
    to name.
    """
    if getattr(reward, "composes_gradients", False) or not (samples.requires_grad and torch.is_grad_enabled()):
        return reward(samples)
    values, gradients = value_and_gradient(reward, samples)
    return values if gradients is None else with_gradient(samples, values, gradients)


def value_and_gradient(reward: Evaluate, samples: Tensor) -> tuple[Tensor, Tensor | None]:
    """Values (N,) and the gradient of each in its own sample, (N, *event); None where the reward has none."""
    with torch.enable_grad():
        inner = samples.detach().requires_grad_()
        values = reward(inner)
        if not isinstance(values, Tensor) or not values.requires_grad or values.shape != samples.shape[:1]:
            return values, None
        (gradients,) = torch.autograd.grad(values.sum(), inner)
    return values.detach(), gradients


def with_gradient(samples: Tensor, values: Tensor, gradients: Tensor) -> Tensor:
    """The values (N,) as a differentiable function of the samples, with gradients (N, *event) known already."""
    result: Tensor = _Known.apply(samples, values, gradients)
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, samples: Tensor, values: Tensor, gradients: Tensor) -> Tensor:
        ctx.save_for_backward(gradients)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return expand_time(cotangents[0].to(gradients), gradients) * gradients, None, None
