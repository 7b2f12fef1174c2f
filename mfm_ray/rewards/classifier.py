"""Rewards through a classifier p(label | x) on data units."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.rewards.reward import DifferentiableReward, finite_tensor


class _ClassifierReward(DifferentiableReward):
    """Holds its own frozen copy of the classifier, always in eval mode; gradients flow to the samples alone."""

    def __init__(self, *, classifier: DigitClassifier, name: str) -> None:
        super().__init__(name=name, event_shape=classifier.event_shape)
        self.classifier = copy.deepcopy(classifier).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "_ClassifierReward":
        """Never leaves eval mode: a reward is a fixed function."""
        return super().train(False)

    def log_probabilities(self, samples: Tensor) -> Tensor:
        """log p(label | x), (N, num_classes)."""
        own = next(self.classifier.parameters()).dtype
        return torch.log_softmax(self.classifier(samples.to(own)), dim=1)


class ClassProbability(_ClassifierReward):
    """r(x) = log p(label | x), at most 0. Samples then follow p(x) p(label | x): the class, by Bayes' rule.

    classifier: logits from samples in data units. label: 0 to num_classes - 1.
    """

    def __init__(self, *, classifier: DigitClassifier, label: int, name: str = "class_probability") -> None:
        super().__init__(classifier=classifier, name=name)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classifier.num_classes:
            raise InputError(f"label={label}: expected an integer of 0 to {classifier.num_classes - 1}")
        self.label = label

    def log_weight(self, samples: Tensor) -> Tensor:
        return self.log_probabilities(samples)[:, self.label]


class ClassMixture(_ClassifierReward):
    """r(x) = log sum_i w_i p(i | x), over the classes with w_i > 0.

    With a uniform prior over classes and an exact classifier the tilted law has class frequencies w; in general
    proportional to w_c p(c). Bounded above by 0, without bound below.

    weights: one per class, >= 0, not all 0; normalised to sum to 1.
    """

    log_weights: Tensor

    def __init__(self, *, classifier: DigitClassifier, weights: Sequence[float], name: str = "class_mixture") -> None:
        super().__init__(classifier=classifier, name=name)
        given = finite_tensor(weights, name="weights").double()
        if given.shape != (classifier.num_classes,):
            raise InputError(
                f"weights: {given.numel()} numbers, expected one for each of {classifier.num_classes} classes"
            )
        if bool((given < 0).any()) or not bool(given.any()):
            raise InputError(f"weights={given.tolist()}: expected numbers of at least 0, not all 0")
        self.classes = given.nonzero().flatten().tolist()
        self.weights = (given / given.sum()).tolist()
        self.register_buffer("log_weights", (given / given.sum())[self.classes].log().float())

    def log_weight(self, samples: Tensor) -> Tensor:
        joint = self.log_weights.to(samples) + self.log_probabilities(samples)[:, self.classes]
        return torch.logsumexp(joint, dim=1)
