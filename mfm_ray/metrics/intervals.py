"""Means with intervals, and distances in units of the floor that exact samples of the same size have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean of independent values with half the width of its 95 percent interval (normal approximation)."""

    value: float
    half_width: float
    count: int


def mean_with_interval(values: Tensor) -> Mean:
    """Mean of the values (N,); the half width is 0 for a single value, where nothing is known about the spread."""
    flat = values.double().flatten()
    if flat.numel() == 0:
        raise ValueError("mean_with_interval: no values, expected at least one")
    error = float(flat.std()) / math.sqrt(flat.numel()) if flat.numel() > 1 else 0.0
    return Mean(value=float(flat.mean()), half_width=1.96 * error, count=flat.numel())


_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182}
"""Quantiles at 0.975 where the expansion for more degrees of freedom is too rough."""


def by_students_t(mean: Mean) -> Mean:
    """The interval by Student's t in the place of the normal approximation, which is too narrow for few values.

    t = z + (z^3 + z) / 4 n + (5 z^5 + 16 z^3 + 3 z) / 96 n^2 + (3 z^7 + 19 z^5 + 17 z^3 - 15 z) / 384 n^3 with z = 1.96
    and n = count - 1 (Abramowitz and Stegun 26.7.5): within half a percent from n = 4 on. Unchanged for a single value.
    """
    n, z = mean.count - 1, 1.96
    if n < 1:
        return mean
    terms = (z**3 + z) / (4 * n), (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    further = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    t = _STUDENT.get(n, z + sum(terms) + further)
    return replace(mean, half_width=mean.half_width * t / z)


def distance_floor(
    distance: Callable[[Tensor, Tensor], Tensor | float], draw: Callable[[int], Tensor], *, pairs: int = 20
) -> Mean:
    """What a distance says of two sets of the same law: its mean over pairs of independent exact sample sets.

    draw(k) is the exact sample set number k, k = 0 to 2 pairs - 1, of the size that is measured, independent of the
    others and the same at each call (seed it with k); pair i is sets 2i and 2i + 1. One pair varies by half its
    value, so published ratios take at least 20. ValueError for fewer than two pairs, which have no interval.
    """
    if pairs < 2:
        raise ValueError(f"distance_floor: pairs={pairs}, expected at least 2 (20 for a figure to publish)")
    values = [float(distance(draw(2 * pair), draw(2 * pair + 1))) for pair in range(pairs)]
    return mean_with_interval(torch.tensor(values, dtype=torch.float64))


@dataclass(frozen=True)
class OverFloor:
    """A mean distance over the floor, mean over mean, with the ends of its own 95 percent interval over the floor."""

    ratio: float
    lower: float
    upper: float

    def holds(self, bar: float) -> bool:
        """Whether "at most `bar` times the floor" stands: the lower end of the interval does not exceed it."""
        return self.lower <= bar


def over_floor(measured: Mean, floor: Mean) -> OverFloor:
    """The measured mean and its interval in units of the floor's mean; the floor counts as known, hence many pairs.

    ValueError for a floor that is not above 0, such as that of an unbiased squared MMD.
    """
    if not (math.isfinite(floor.value) and floor.value > 0):
        raise ValueError(f"over_floor: a floor of {floor.value}, expected a finite number above 0 to divide by")
    lower, upper = measured.value - measured.half_width, measured.value + measured.half_width
    return OverFloor(ratio=measured.value / floor.value, lower=lower / floor.value, upper=upper / floor.value)
