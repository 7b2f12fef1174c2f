"""Endpoints of the current drift, for methods that learn from their own samples."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mfm_ray.dynamics import ProbabilityFlow, TimeGrid
from mfm_ray.finetuning.targets import DivergedError, Drift
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import Noise, Stream

_FAR = 1e6
"""No sample of any data is so far out in model space, where data are of the size of one."""


@torch.no_grad()
def ode_endpoints(drift: Drift, label: Tensor | None, noise: Noise, *, like: Tensor, num_steps: int) -> Tensor:
    """Samples (B, *event) of the probability-flow ODE of a drift, in model space; noise of B rows."""
    x = noise.fold_in(Stream.START).normal(*like.shape[1:]).to(like)
    times = TimeGrid().times(num_steps)
    for now, then in pairwise(times):
        t, t_next = torch.full_like(x.flatten(1)[:, 0], now), torch.full_like(x.flatten(1)[:, 0], then)
        clean = LinearInterpolant().posterior_mean(x, drift(x, t, label).float(), t)
        x = ProbabilityFlow().step(x, clean, t, t_next, noise) if then < 1 else clean
    return require_near(x)


def require_near(x: Tensor) -> Tensor:
    """The samples themselves. DivergedError for samples that are not finite, or so far out that the drift ran away."""
    largest = float(x.abs().max())
    if not largest <= _FAR:
        raise DivergedError(f"the tuned drift ran away, its samples reach {largest:.3g} in model space")
    return x
