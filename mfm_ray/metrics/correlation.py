"""Correlations with their intervals: Pearson's, and Spearman's of the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Correlation:
    """A correlation r of `count` pairs with the ends of its 95 percent interval (Fisher's z), all in [-1, 1]."""

    value: float
    lower: float
    upper: float
    count: int


def pearson(a: Tensor, b: Tensor) -> Correlation:
    """Of pairs (N,) and (N,), N at least 4; tanh(atanh r -+ 1.96 / sqrt(N - 3)).

    Where one side does not vary r is undefined: it is given as 0 with the interval [-1, 1], which claims nothing.
    ValueError for sides that do not pair up, or fewer than four pairs.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 4:
        raise ValueError(f"pearson: sides of shape {tuple(a.shape)} and {tuple(b.shape)}, expected one (N,), N >= 4")
    x, y = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(torch.sqrt(x.square().sum() * y.square().sum()))
    if scale == 0:
        return Correlation(0.0, -1.0, 1.0, len(a))
    r = max(-1.0, min(1.0, float((x * y).sum()) / scale))
    if abs(r) == 1:
        return Correlation(r, r, r, len(a))
    z, half = math.atanh(r), 1.96 / math.sqrt(len(a) - 3)
    return Correlation(r, math.tanh(z - half), math.tanh(z + half), len(a))


def spearman(a: Tensor, b: Tensor) -> Correlation:
    """Rank correlation of pairs (N,) and (N,), N at least 4: `pearson` of the ranks, ties sharing their mean rank.

    The interval is Fisher's with the wider variance 1.06 / (N - 3) that ranks have (Fieller et al. 1957).
    """
    of_ranks = pearson(_ranks(a), _ranks(b))
    if abs(of_ranks.value) == 1 or (of_ranks.lower, of_ranks.upper) == (-1.0, 1.0):
        return of_ranks
    z, half = math.atanh(of_ranks.value), 1.96 * math.sqrt(1.06 / (len(a) - 3))
    return Correlation(of_ranks.value, math.tanh(z - half), math.tanh(z + half), len(a))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 of (N,), float64; equal values share the mean of theirs."""
    _, place, count = values.double().unique(sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() + 1) / 2)[place]
