"""Endpoints of the current drift, for methods that learn from their own samples."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mfm_ray.dynamics import ProbabilityFlow, TimeGrid
from mfm_ray.finetuning.targets import Drift
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import Noise, Stream


@torch.no_grad()
def ode_endpoints(drift: Drift, label: Tensor | None, noise: Noise, *, like: Tensor, num_steps: int) -> Tensor:
    """Samples (B, *event) of the probability-flow ODE of a drift, in model space; noise of B rows."""
    x = noise.fold_in(Stream.START).normal(*like.shape[1:]).to(like)
    times = TimeGrid().times(num_steps)
    for now, then in pairwise(times):
        t, t_next = torch.full_like(x.flatten(1)[:, 0], now), torch.full_like(x.flatten(1)[:, 0], then)
        clean = LinearInterpolant().posterior_mean(x, drift(x, t, label).float(), t)
        x = ProbabilityFlow().step(x, clean, t, t_next, noise) if then < 1 else clean
    return x
