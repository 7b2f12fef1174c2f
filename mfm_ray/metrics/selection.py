"""Best-of-n and reweighting over a pool of samples, as exact averages instead of one draw of groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
