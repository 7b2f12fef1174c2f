"""What a classifier says of images: class frequencies, confidence, features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ray.networks.classifier import DigitClassifier

_ROWS_AT_ONCE = 4096
_PMF_TOLERANCE = 1e-4


def class_probabilities(classifier: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """p(label | image) of a judge that returns logits, (N, num_classes) float32; images (N, *event) in data units."""
    with torch.no_grad():
        return torch.cat([torch.softmax(classifier(part).float(), dim=1) for part in images.split(_ROWS_AT_ONCE)])


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


def pmf_distance(frequencies: Tensor, wanted: Tensor) -> float:
    """Euclidean distance |p - q| of two probability mass functions (num_classes,): 0 the same, at most sqrt(2).

    ValueError for different shapes, negative entries, and entries that do not sum to 1: normalise weights first.
    """
    p, q = frequencies.double(), wanted.double()
    if p.shape != q.shape or p.dim() != 1:
        raise ValueError(
            f"pmf_distance: shapes {tuple(p.shape)} and {tuple(q.shape)}, expected the same (num_classes,)"
        )
    for pmf in (p, q):
        if not (bool((pmf >= 0).all()) and abs(float(pmf.sum()) - 1) <= _PMF_TOLERANCE):
            raise ValueError(f"pmf_distance: {pmf.tolist()}, expected numbers of at least 0 that sum to 1")
    return float((p - q).norm())


def pmf_floor(wanted: Tensor, count: int, *, repeats: int = 4000, seed: int = 0) -> float:
    """Mean `pmf_distance` of `count` exact multinomial draws of a PMF (num_classes,) from it.

    The square has mean (1 - |w|^2) / count; the mean itself, over `repeats` sets, is a little below its root.
    """
    if count < 1 or repeats < 1:
        raise ValueError(f"pmf_floor: count={count}, repeats={repeats}, expected at least 1")
    p = wanted.double() / wanted.double().sum()
    generator = torch.Generator().manual_seed(seed)
    total, done = 0.0, 0
    while done < repeats:
        sets = min(repeats - done, max(1, _ROWS_AT_ONCE * 64 // count))
        drawn = torch.multinomial(p, sets * count, replacement=True, generator=generator).reshape(sets, count)
        shares = torch.zeros(sets, len(p), dtype=torch.float64)
        shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / count, dtype=torch.float64))
        total, done = total + float((shares - p).norm(dim=1).sum()), done + sets
    return total / repeats


def classifier_features(classifier: DigitClassifier, images: Tensor) -> Tensor:
    """Activations before the last layer, (N, 64) float32 from images (N, C, H, W) in data units.

    Where `distances.frechet_distance` and `diversity.vendi_score` see digits rather than pixels.
    """
    with torch.no_grad():
        return torch.cat([classifier.features(part).float() for part in images.split(_ROWS_AT_ONCE)])
