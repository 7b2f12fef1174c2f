"""Figures of quality: distances between laws, selection by reward, classes, diversity, nearness to the training data.

Rewards say how far a sample was pushed, distances and a judge say whether it still is a sample: report them together.
"""

from mfm_ray.metrics.classes import (
    class_confidence,
    class_frequencies,
    class_probabilities,
    classifier_features,
    pmf_distance,
    pmf_floor,
    total_variation,
)
from mfm_ray.metrics.correlation import Correlation, pearson, spearman
from mfm_ray.metrics.distances import (
    NUM_PROJECTIONS,
    frechet_distance,
    gaussian_frechet_distance,
    median_distance,
    rbf_bandwidths,
    sliced_w2,
    squared_mmd,
    wasserstein_1,
    weighted_squared_mmd,
)
from mfm_ray.metrics.diversity import mean_pairwise_distance, vendi_score
from mfm_ray.metrics.features import (
    ClassifierFeatures,
    FeatureExtractor,
    FeatureStatistics,
    InceptionFeatures,
    RawFeatures,
    eight_bit,
)
from mfm_ray.metrics.intervals import Mean, OverFloor, by_students_t, distance_floor, mean_with_interval, over_floor
from mfm_ray.metrics.kernel_distance import kernel_inception_distance, polynomial_squared_mmd
from mfm_ray.metrics.manifold import PrecisionRecall, precision_recall
from mfm_ray.metrics.neighbours import Memorisation, Nearest, memorisation, nearest_neighbours
from mfm_ray.metrics.selection import (
    WeightedMoments,
    best_of_n_probabilities,
    effective_sample_size,
    tilting_weights,
    weighted_moments,
)

__all__ = [
    "NUM_PROJECTIONS",
    "ClassifierFeatures",
    "Correlation",
    "FeatureExtractor",
    "FeatureStatistics",
    "InceptionFeatures",
    "Mean",
    "Memorisation",
    "Nearest",
    "OverFloor",
    "PrecisionRecall",
    "RawFeatures",
    "WeightedMoments",
    "best_of_n_probabilities",
    "by_students_t",
    "class_confidence",
    "class_frequencies",
    "class_probabilities",
    "classifier_features",
    "distance_floor",
    "effective_sample_size",
    "eight_bit",
    "frechet_distance",
    "gaussian_frechet_distance",
    "kernel_inception_distance",
    "mean_pairwise_distance",
    "mean_with_interval",
    "median_distance",
    "memorisation",
    "nearest_neighbours",
    "over_floor",
    "pearson",
    "pmf_distance",
    "pmf_floor",
    "polynomial_squared_mmd",
    "precision_recall",
    "rbf_bandwidths",
    "sliced_w2",
    "spearman",
    "squared_mmd",
    "tilting_weights",
    "total_variation",
    "vendi_score",
    "wasserstein_1",
    "weighted_moments",
    "weighted_squared_mmd",
]
