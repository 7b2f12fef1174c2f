"""What distances between sets of pictures look at: features of a network, and their moments made in parts.

A feature extractor takes samples (N, *event) in data units to rows (N, D) float32. Which one decides what a distance
means: figures are only comparable where extractor, resizing and rounding are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mfm_ray.metrics.distances import gaussian_frechet_distance
from mfm_ray.metrics.pairwise import rows_of
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.networks.inception import FidInception


class FeatureExtractor(Protocol):
    """From samples (N, *event) in data units to features (N, D) float32; `name` says of what."""

    name: str

    def __call__(self, samples: Tensor) -> Tensor: ...


def eight_bit(images: Tensor) -> Tensor:
    """Images in [0, 1] as a file holds them, uint8, rounded to the nearest; what lies outside is clamped."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


class InceptionFeatures(nn.Module):
    """The 2,048 pooled features of FID, of pictures rounded to eight bits; grey ones get three equal channels."""

    name = "inception"

    def __init__(self, network: FidInception) -> None:
        super().__init__()
        self.network = network

    def forward(self, samples: Tensor) -> Tensor:
        pixels = eight_bit(samples)
        return self.network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)


class ClassifierFeatures(nn.Module):
    """The 64 features of the class judge beside a model of small pictures."""

    name = "classifier"

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        return self.classifier.features(samples).float()


class RawFeatures(nn.Module):
    """The numbers themselves: for coordinates, and where no network is at hand."""

    name = "raw"

    def forward(self, samples: Tensor) -> Tensor:
        return samples.detach().flatten(1).float()


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean (D,) and scatter sum (x - mean)(x - mean)^T (D, D) of features, float64.

    Made of parts, merged by the formula of Chan et al. (1979) for two sets; in one order of parts the result is the
    same to the bit, whoever made them. count None: of a file that holds mean and covariance alone.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Of rows (N, D), N at least 2; ValueError for fewer, and for NaN and infinities."""
        rows = rows_of(features, "FeatureStatistics", at_least=2)
        mean = rows.mean(0)
        centred = rows - mean
        return cls(mean, centred.T @ centred / (len(rows) - 1), len(rows))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """As if both parts had been one. ValueError for other features, and for parts of unknown size."""
        if self.count is None or other.count is None:
            raise ValueError("merge: statistics of an unknown number of rows, expected parts of known size")
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"merge: {len(self.mean)} and {len(other.mean)} features, expected the same")
        total, gap = self.count + other.count, other.mean - self.mean
        scatter = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        scatter = scatter + torch.outer(gap, gap) * (self.count * other.count / total)
        return FeatureStatistics(self.mean + gap * (other.count / total), scatter / (total - 1), total)

    def frechet_distance(self, other: FeatureStatistics) -> float:
        """Of the two Gaussians with these moments: FID, of Inception's features."""
        return gaussian_frechet_distance(self.mean, self.covariance, other.mean, other.covariance)
