"""Rows of samples, and the squared distances between them, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(samples: Tensor, metric: str, *, at_least: int = 1) -> Tensor:
    """Samples (N, *event) as float64 rows (N, D); ValueError naming the metric for too few, NaN and infinity."""
    if samples.dim() < 2 or len(samples) < at_least or samples[0].numel() == 0:
        raise ValueError(f"{metric}: samples of shape {tuple(samples.shape)}, expected (N, D) with N >= {at_least}")
    rows = samples.detach().flatten(1).double()
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{metric}: samples hold NaN or infinity")
    return rows


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 by |a|^2 + |b|^2 - 2 ab, (N, M) from (N, D) and (M, D), at least 0.

    Off by rounding, about 1e-16 |a|^2: equal rows may come out a little above 0.
    """
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)
