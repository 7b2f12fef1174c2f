"""Pearson's correlation with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of `count` pairs with the ends of its 95 percent interval (Fisher's z), all in [-1, 1]."""

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
