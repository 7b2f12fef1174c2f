"""How near samples are to the training data: copies, or new members of the same law?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.metrics.pairwise import rows_of, squared_distances

_ROWS_AT_ONCE, _TRAINING_ROWS_AT_ONCE = 512, 4096


@dataclass(frozen=True)
class Nearest:
    """Nearest training member of each of N samples: distance (N,) float64 in data units, index (N,) int64."""

    distance: Tensor
    index: Tensor


def nearest_neighbours(samples: Tensor, training: Tensor) -> Nearest:
    """For each of the samples (N, *event) the Euclidean nearest of the training set (M, *event).

    Blocks of 512 x 4,096 distances alone are held. The distance is taken from the two rows themselves, so a copy has
    exactly 0; among equally near ones any may be named. ValueError for empty sets and different events.
    """
    if samples.shape[1:] != training.shape[1:] or len(training) == 0:
        raise ValueError(
            f"nearest_neighbours: samples {tuple(samples.shape)} and training set {tuple(training.shape)}, expected "
            "(N, *event) and (M, *event) with at least one row each"
        )
    rows = rows_of(samples, "nearest_neighbours")
    # a common shift changes no distance, and keeps their differences precise far from the origin
    centre = rows.mean(0)
    best = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
    index = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for first in range(0, len(training), _TRAINING_ROWS_AT_ONCE):
        known = rows_of(training[first : first + _TRAINING_ROWS_AT_ONCE], "nearest_neighbours") - centre
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            found = squared_distances(rows[part] - centre, known).min(dim=1)
            nearer = found.values < best[part]
            best[part] = torch.where(nearer, found.values, best[part])
            index[part] = torch.where(nearer, found.indices + first, index[part])
    exact = [
        (part - training[chosen].flatten(1).double()).norm(dim=1)
        for part, chosen in zip(rows.split(_ROWS_AT_ONCE), index.split(_ROWS_AT_ONCE), strict=True)
    ]
    return Nearest(distance=torch.cat(exact), index=index)


@dataclass(frozen=True)
class Memorisation:
    """Median distance to the nearest training member, of samples and of held-out data that cannot be copies.

    ratio: samples over held-out; about 1 for fresh samples of the law, towards 0 for copies of the training set.
    """

    samples: float
    heldout: float

    @property
    def ratio(self) -> float:
        return self.samples / self.heldout


def memorisation(samples: Tensor, heldout: Tensor, training: Tensor) -> Memorisation:
    """Compares samples (N, *event) with held-out data (H, *event), both against the training set (M, *event).

    Blurred samples lie near everything and lower the ratio as well: look at the neighbours' pictures beside it.
    ValueError where half of the held-out data are copies of the training set, so that there is no yardstick.
    """
    of_samples, of_heldout = (
        float(nearest_neighbours(set_, training).distance.quantile(0.5)) for set_ in (samples, heldout)
    )
    if of_heldout == 0:
        raise ValueError("memorisation: half of the held-out set are copies of training samples, expected other data")
    return Memorisation(samples=of_samples, heldout=of_heldout)
