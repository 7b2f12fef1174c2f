"""Distances between the laws of two sample sets: sliced W2, kernel MMD, Fréchet.

Two independent exact sets of finite size have a distance too: `intervals.distance_floor` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfm_ray.metrics.pairwise import rows_of, squared_distances

NUM_PROJECTIONS = 256
_PROJECTION_SEED = 0
_BANDWIDTH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_MEDIAN_ROWS = 1024
_KERNEL_ROWS = 512


def sliced_w2(a: Tensor, b: Tensor, *, num_projections: int = NUM_PROJECTIONS, seed: int = _PROJECTION_SEED) -> Tensor:
    """Sliced 2-Wasserstein distance between two empirical laws of equal size,

        S-W2^2 = E_theta W2^2(theta . a, theta . b),   theta uniform on the unit sphere of the D dimensions,

    over `num_projections` directions (the same ones for the same seed). a, b: (N, D), or (B, N, D) for B pairs at
    once; a scalar or (B,), in the units of the data. Zero for the same set in another order, else at least the floor
    that two independent sets of the same law have.
    """
    if a.shape != b.shape or a.dim() not in (2, 3):
        raise ValueError(f"sliced_w2: shapes {tuple(a.shape)} and {tuple(b.shape)}, expected the same (N, D)")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[-1], num_projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a)
    ordered_a, ordered_b = (torch.sort(x @ directions, dim=-2).values for x in (a, b))
    return (ordered_a - ordered_b).square().mean((-2, -1)).sqrt()


def median_distance(reference: Tensor) -> float:
    """Median Euclidean distance of two different rows of a set (M, *event), in its units.

    Over all pairs of at most 1,024 rows, taken at equal intervals of the set: no chance in it. ValueError for fewer
    than two rows, and where more than half of the pairs coincide, so that there is no scale.
    """
    rows = rows_of(reference, "median_distance", at_least=2)
    chosen = torch.linspace(0, len(rows) - 1, min(len(rows), _MEDIAN_ROWS), dtype=torch.float64).round().long()
    median = float(torch.nn.functional.pdist(rows[chosen]).median())
    if median == 0:
        raise ValueError("median_distance: most rows of the reference coincide, expected samples with a spread")
    return median


def rbf_bandwidths(reference: Tensor) -> list[float]:
    """The scales of `squared_mmd`: 1/4, 1/2, 1, 2 and 4 times the median distance of the reference (M, *event)."""
    median = median_distance(reference)
    return [factor * median for factor in _BANDWIDTH_FACTORS]


def squared_mmd(samples: Tensor, reference: Tensor, *, bandwidths: Sequence[float] | None = None) -> float:
    """Squared maximum mean discrepancy, the unbiased U-statistic (Gretton et al. 2012, eq. 3) of the kernel

        k(x, y) = mean over h of exp(-|x - y|^2 / (2 h^2)),
        MMD^2 = sum_{i != j} k(x_i, x_j) / N(N - 1) + sum_{i != j} k(y_i, y_j) / M(M - 1) - 2 sum_ij k(x_i, y_j) / NM.

    samples: (N, *event), reference: (M, *event), at least two rows each; bandwidths h above 0, those of
    `rbf_bandwidths(reference)` when left out. Give them explicitly where figures of several references are compared.
    At most 2. Under equal laws the mean is exactly 0 and half of the values are negative: the floor of this figure
    is a spread around zero, not a number to take ratios over. float64; blocks of the kernel matrix alone are held.
    ValueError for other shapes and for bandwidths that are none.
    """
    x, y = (rows_of(set_, "squared_mmd", at_least=2) for set_ in (samples, reference))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"squared_mmd: rows of {x.shape[1]} and {y.shape[1]} numbers, expected the same")
    scales = rbf_bandwidths(reference) if bandwidths is None else [float(h) for h in bandwidths]
    if not scales or not all(math.isfinite(h) and h > 0 for h in scales):
        raise ValueError(f"squared_mmd: bandwidths={scales}, expected at least one, all finite and above 0")
    # a common shift changes no distance, and keeps |x|^2 + |y|^2 - 2 xy precise far from the origin
    centre = y.mean(0)
    x, y = x - centre, y - centre
    own = [_sum_over_pairs(set_, scales) / (len(set_) * (len(set_) - 1)) for set_ in (x, y)]
    across = sum(_kernel_sum(squared_distances(part, y), scales) for part in x.split(_KERNEL_ROWS))
    return own[0] + own[1] - 2 * across / (len(x) * len(y))


def weighted_squared_mmd(
    samples: Tensor, weights: Tensor, reference: Tensor, *, bandwidths: Sequence[float] | None = None
) -> Tensor:
    """`squared_mmd` of weighted samples, for several laws on the same samples at once: (W,) from weights (W, N),

        sum_{i != j} w_i w_j k(x_i, x_j) / (1 - sum_i w_i^2) + (reference alone) - 2 sum_ij w_i k(x_i, y_j) / M.

    Equal weights give `squared_mmd` exactly. samples: (N, *event), reference: (M, *event), at least two rows each;
    weights at least 0, normalised here. Unbiased for weights that are independent of where their samples lie;
    noisy as soon as few samples carry the weight. ValueError for other shapes, and where one sample has it all.
    """
    x, y = (rows_of(set_, "weighted_squared_mmd", at_least=2) for set_ in (samples, reference))
    if x.shape[1] != y.shape[1] or weights.dim() != 2 or weights.shape[1] != len(x) or not bool((weights >= 0).all()):
        raise ValueError(
            f"weighted_squared_mmd: samples {tuple(x.shape)}, reference {tuple(y.shape)} and weights "
            f"{tuple(weights.shape)}, expected (N, D), (M, D) and (W, N) of at least 0"
        )
    share = weights.double() / weights.double().sum(1, keepdim=True)
    others = 1 - share.square().sum(1)
    if not bool((others > 0).all()):
        raise ValueError("weighted_squared_mmd: all weight on one sample, expected it on two or more")
    scales = rbf_bandwidths(reference) if bandwidths is None else [float(h) for h in bandwidths]
    centre = y.mean(0)
    x, y = x - centre, y - centre
    own, across = torch.zeros(len(share), dtype=torch.float64), torch.zeros(len(share), dtype=torch.float64)
    for start in range(0, len(x), _KERNEL_ROWS):
        part = slice(start, start + _KERNEL_ROWS)
        rows = torch.arange(len(x))[part]
        kernel = _kernel(squared_distances(x[part], x), scales)
        kernel[rows - start, rows] = 0.0
        own += ((share[:, part] @ kernel) * share).sum(1)
        across += share[:, part] @ _kernel(squared_distances(x[part], y), scales).mean(1)
    return own / others + _sum_over_pairs(y, scales) / (len(y) * (len(y) - 1)) - 2 * across


def wasserstein_1(values: Tensor, reference: Tensor, *, weights: Tensor | None = None) -> float:
    """1-Wasserstein distance of two laws of numbers, the integral of |F_a - F_b|, in the units of the values.

    values: (N,), with weights (N,) of at least 0 (equal ones when left out, normalised here); reference: (M,), equally
    likely. Exact for the two finite laws; two samples of n from one law are apart by about their deviation / sqrt(n).
    """
    a, b = values.double().flatten(), reference.double().flatten()
    if len(a) == 0 or len(b) == 0 or not bool(torch.cat([a, b]).isfinite().all()):
        raise ValueError(f"wasserstein_1: {len(a)} and {len(b)} values, expected at least one each, all finite")
    share = torch.full_like(a, 1 / len(a)) if weights is None else weights.double() / weights.double().sum()
    order = torch.cat([a, b]).argsort(stable=True)
    gap = torch.cat([share, torch.full_like(b, -1 / len(b))])[order].cumsum(0)
    places = torch.cat([a, b])[order]
    return float((gap[:-1].abs() * places.diff()).sum())


def frechet_distance(a: Tensor, b: Tensor, *, weights: Tensor | None = None) -> float:
    """Fréchet distance of the Gaussians with the moments of two sets of features,

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2}),

    which is their squared 2-Wasserstein distance (the form known as FID, there with Inception's features). a: (N, D),
    b: (M, D), at least two rows each; covariances over N - 1, so singular for N <= D, which is fine. Finite sets of
    the same law are about 1/N apart: compare sets of equal size, and with `distance_floor`. float64; at least 0.

    weights: (N,) of at least 0, of the rows of a; its covariance is then over 1 - sum w^2 (of weights that sum to 1).
    """
    x, y = (rows_of(set_, "frechet_distance", at_least=2) for set_ in (a, b))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"frechet_distance: rows of {x.shape[1]} and {y.shape[1]} features, expected the same")
    return gaussian_frechet_distance(*_moments(x, weights), *_moments(y, None))


def gaussian_frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """`frechet_distance` of two Gaussians by their means (D,) and covariances (D, D), float64.

    ValueError for shapes that do not fit and for what is not finite.
    """
    shapes = [tuple(part.shape) for part in (mean_a, covariance_a, mean_b, covariance_b)]
    size = len(mean_a)
    if shapes != [(size,), (size, size), (size,), (size, size)]:
        raise ValueError(f"gaussian_frechet_distance: shapes {shapes}, expected (D,), (D, D), (D,), (D, D)")
    if not all(bool(part.isfinite().all()) for part in (mean_a, covariance_a, mean_b, covariance_b)):
        raise ValueError("gaussian_frechet_distance: NaN or infinity among the moments")
    shift = (mean_a.double() - mean_b.double()).square().sum()
    first, second = covariance_a.double(), covariance_b.double()
    # the singular values of S_a^{1/2} S_b^{1/2} are the eigenvalues of the last root, with no square root of rounding
    cross = torch.linalg.svdvals(_symmetric_root(first) @ _symmetric_root(second)).sum()
    return max(0.0, float(shift + first.trace() + second.trace() - 2 * cross))


def _moments(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of rows (N, D)."""
    if weights is None:
        return rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])
    share = weights.double() / weights.double().sum()
    others = float(1 - share.square().sum())
    if len(share) != len(rows) or bool((share < 0).any()) or not others > 0:
        raise ValueError(f"weights: {len(share)} for {len(rows)} rows, expected one each, at least 0, not all on one")
    mean = share @ rows
    centred = rows - mean
    return mean, (centred * share.unsqueeze(1)).T @ centred / others


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _sum_over_pairs(rows: Tensor, scales: Sequence[float]) -> float:
    """Kernel summed over all ordered pairs of different rows: twice the strict upper triangle."""
    total = 0.0
    for start in range(0, len(rows), _KERNEL_ROWS):
        block = squared_distances(rows[start : start + _KERNEL_ROWS], rows[start:])
        below = torch.ones_like(block, dtype=torch.bool).tril_()
        total += 2 * _kernel_sum(block.masked_fill_(below, math.inf), scales)
    return total


def _kernel(squared: Tensor, scales: Sequence[float]) -> Tensor:
    """Kernel of squared distances, of the same shape."""
    total = torch.zeros_like(squared)
    for h in scales:
        total += torch.exp(squared * (-0.5 / h**2))
    return total / len(scales)


def _kernel_sum(squared: Tensor, scales: Sequence[float]) -> float:
    """Kernel of squared distances, summed; an infinite distance counts 0."""
    return sum(float(torch.exp(squared * (-0.5 / h**2)).sum()) for h in scales) / len(scales)
