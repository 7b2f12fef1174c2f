"""How different the members of one sample set are from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_ray.metrics.distances import median_distance
from mfm_ray.metrics.pairwise import rows_of, squared_distances

_ROWS_AT_ONCE = 512
_KERNELS = ("cosine", "rbf")


def mean_pairwise_distance(samples: Tensor) -> float:
    """Mean Euclidean distance over all pairs of different members of (N, *event), in their units; 0: all the same."""
    rows = rows_of(samples, "mean_pairwise_distance", at_least=2)
    rows = rows - rows.mean(0)
    total = 0.0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = squared_distances(rows[start : start + _ROWS_AT_ONCE], rows[start:])
        total += float(block.sqrt_().triu_(1).sum())
    return 2 * total / (len(rows) * (len(rows) - 1))


def vendi_score(samples: Tensor, *, kernel: str = "cosine", bandwidth: float | None = None) -> float:
    """Effective number of different members of (N, *event), 1 to N (Friedman and Dieng 2023, arXiv 2210.02410):

        exp(- sum_i lambda_i log lambda_i),   lambda the eigenvalues of K / N,   K_ii = 1.

    kernel "cosine": K_ij = x_i . x_j / (|x_i| |x_j|), for features; the rank, at most D, bounds the score.
    kernel "rbf": K_ij = exp(-|x_i - x_j|^2 / (2 bandwidth^2)); bandwidth in the units of the samples, above 0, their
    own `median_distance` when left out. Scores of two sets compare only under one bandwidth, and for one N.

    Time N^3 for rbf, min(N, D)^3 for cosine. ValueError for another kernel, a bandwidth beside cosine or not above
    0, and for a row of zeros, which has no cosine.
    """
    rows = rows_of(samples, "vendi_score")
    if kernel not in _KERNELS:
        raise ValueError(f"vendi_score: kernel={kernel!r}, expected one of {', '.join(_KERNELS)}")
    if bandwidth is not None and (kernel != "rbf" or not bandwidth > 0):
        raise ValueError(f"vendi_score: bandwidth={bandwidth}, expected a number above 0, with kernel='rbf' alone")
    if kernel == "cosine":
        norms = rows.norm(dim=1, keepdim=True)
        if not bool((norms > 0).all()):
            raise ValueError("vendi_score: a row of zeros, which has no direction; use kernel='rbf'")
        unit = rows / norms
        # the smaller of the two Gram matrices: both have the same eigenvalues beside zeros
        gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    else:
        width = median_distance(rows) if bandwidth is None else bandwidth
        rows = rows - rows.mean(0)
        gram = torch.exp(squared_distances(rows, rows) * (-0.5 / width**2)).fill_diagonal_(1.0)
    eigenvalues = torch.linalg.eigvalsh(gram / len(rows)).clamp_min(0)
    return float(torch.special.entr(eigenvalues).sum().exp())
