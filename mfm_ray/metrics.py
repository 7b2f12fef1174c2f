"""Figures of quality: distance between laws, rewards of selected samples, class frequencies, confidence of a judge.

Rewards say how far a sample was pushed, distances and a judge say whether it still is a sample: report them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_PROJECTIONS = 256
_PROJECTION_SEED = 0
_ROWS_AT_ONCE = 4096


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


def best_of_n_probabilities(rewards: Tensor, n: int) -> Tensor:
    """Probability that each member of a pool is the one Best-of-n returns, (..., M) float64 from rewards (..., M).

    A group of n is drawn from the pool without replacement and its best member kept; the member of ascending rank i
    (1 to M) is returned with probability C(i - 1, n - 1) / C(M, n). Weighted means under these probabilities are the
    exact averages over all groups, so that one pool serves every n with no choice of groups left to chance.
    """
    pool = rewards.shape[-1]
    if not 1 <= n <= pool:
        raise ValueError(f"n={n}: expected 1 to the {pool} members of the pool")
    rank = torch.arange(1, pool + 1, dtype=torch.float64)
    log_groups = math.lgamma(pool + 1) - math.lgamma(n + 1) - math.lgamma(pool - n + 1)
    held = torch.where(rank >= n, rank, torch.full_like(rank, n))
    log_choices = torch.lgamma(held) - math.lgamma(n) - torch.lgamma(held - n + 1)
    by_rank = torch.where(rank >= n, (log_choices - log_groups).exp(), torch.zeros_like(rank))
    order = rewards.argsort(dim=-1, stable=True)
    return torch.zeros(rewards.shape, dtype=torch.float64).scatter(-1, order, by_rank.expand(rewards.shape))


def tilting_weights(rewards: Tensor) -> Tensor:
    """Weights softmax(r) that turn base samples into the tilted law p(x) exp r(x), (..., M) float64 from (..., M).

    Consistent as the pool grows; see `effective_sample_size` for how much of the pool counts.
    """
    return torch.softmax(rewards.double(), dim=-1)


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of weights (..., M): 1 when one member has it all, M when all are equal."""
    return weights.sum(-1).square() / weights.square().sum(-1)


@dataclass(frozen=True)
class WeightedMoments:
    """Mean and standard deviation under weights."""

    mean: Tensor
    std: Tensor


def weighted_moments(values: Tensor, weights: Tensor) -> WeightedMoments:
    """Moments of values (..., M) under weights (..., M) that sum to one over the last dimension; float64, (...)."""
    values = values.double()
    mean = (weights * values).sum(-1)
    variance = (weights * (values - mean.unsqueeze(-1)).square()).sum(-1)
    return WeightedMoments(mean=mean, std=variance.clamp_min(0).sqrt())


def class_probabilities(classifier: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """p(label | image) of a judge that returns logits, (N, num_classes) float32; images (N, *event) in data units."""
    with torch.no_grad():
        return torch.cat([torch.softmax(classifier(part).float(), dim=1) for part in _parts(images)])


def class_confidence(probabilities: Tensor) -> Tensor:
    """Largest class probability of each image, (...,) from (..., num_classes): near 1 where the judge sees a digit."""
    return probabilities.max(-1).values


def class_frequencies(probabilities: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of images whose most probable class is c, (num_classes,) float64 that sum to one.

    probabilities: (N, num_classes); weights: (N,), equal ones when omitted.
    """
    count, num_classes = probabilities.shape
    weights = torch.full((count,), 1.0 / count, dtype=torch.float64) if weights is None else weights.double()
    frequencies = torch.zeros(num_classes, dtype=torch.float64)
    return frequencies.index_add(0, probabilities.argmax(1), weights / weights.sum())


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the summed absolute difference of two sets of frequencies: 0 the same, 1 disjoint."""
    return float((p.double() - q.double()).abs().sum() / 2)


def _parts(images: Tensor) -> Iterator[Tensor]:
    return iter(images.split(_ROWS_AT_ONCE))
