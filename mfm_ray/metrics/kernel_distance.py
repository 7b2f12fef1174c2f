"""KID: the unbiased squared MMD of features under a cubic kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfm_ray.metrics.intervals import Mean, mean_with_interval
from mfm_ray.metrics.pairwise import rows_of

_ROWS_AT_ONCE = 2048


def polynomial_squared_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased U-statistic of squared MMD with k(x, y) = (x . y / D + 1)^3, of rows (N, D) and (M, D), float64.

    Bińkowski et al. 2018 (arXiv 1801.01401); 0 in the mean under equal laws, and then negative half of the time.
    ValueError for fewer than two rows and for rows of unequal length.
    """
    x, y = (rows_of(rows, "polynomial_squared_mmd", at_least=2) for rows in (a, b))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"polynomial_squared_mmd: rows of {x.shape[1]} and {y.shape[1]} numbers, expected the same")
    own = [(_kernel_sum(rows, rows) - float(_kernel(rows.square().sum(1), rows))) for rows in (x, y)]
    pairs = [len(rows) * (len(rows) - 1) for rows in (x, y)]
    return own[0] / pairs[0] + own[1] / pairs[1] - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def kernel_inception_distance(
    a: Tensor, b: Tensor, *, generator: torch.Generator, subsets: int = 100, subset_size: int = 1000
) -> Mean:
    """KID of features (N, D) and (M, D): the mean of `polynomial_squared_mmd` over random subsets, with its interval.

    Subsets are drawn without replacement within, independently of each other, and are no larger than either set. The
    interval is of the choice of subsets and narrower than that of new samples; where a subset is all there is of both
    sets, there is one value and no interval. Figures are often quoted times 1,000.
    """
    size = min(subset_size, len(a), len(b))
    if subsets < 1 or size < 2:
        raise ValueError(f"subsets={subsets} of {size} rows: expected at least 1 of at least 2")
    if size == len(a) == len(b):
        subsets = 1  # each would be the same
    values = [
        polynomial_squared_mmd(*(rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in (a, b)))
        for _ in range(subsets)
    ]
    return mean_with_interval(torch.tensor(values, dtype=torch.float64))


def _kernel(products: Tensor, rows: Tensor) -> Tensor:
    return (products / rows.shape[1] + 1).pow(3).sum()


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return math.fsum(float(_kernel(part @ y.T, y)) for part in x.split(_ROWS_AT_ONCE))
