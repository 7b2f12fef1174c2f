"""The rewards that digits are steered by, each with its targets made from held-out or training data."""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_ray.data.datasets import Split
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.protocols.comparison import Problem, Target
from mfm_ray.rewards import (
    ClassMixture,
    ClassProbability,
    MaskedObservation,
    Symmetry,
    TargetBrightness,
    WeightedSum,
    half_mask,
)

OBSERVATION_NOISE = 0.1
_BRIGHTER, _DARKER = 4.0, -3.5  # targets, in standard deviations of the training images' brightness
_BRIGHTNESS_SCALE = 0.4  # width around the target, in the same unit
_SYMMETRY_SCALE = 0.1
_MIXTURE = (0, 1, 0, 1, 0, 2, 0, 2, 0, 4)
"""The paper's weights of the classes 0 to 9, in tenths."""
_EXACT_VALUES = 20_000
_THIN = 8


def choose_targets(heldout: Split, count: int, *, seed: int) -> Tensor:
    """Rows of `count` held-out images in an order keyed by the seed, of as many different classes as possible."""
    order = KeyedNoise.for_images(seed, len(heldout)).fold_in(Stream.SPLIT).uniform().argsort()
    labels = heldout.labels[order]
    repeat = torch.stack([(labels[:row] == labels[row]).sum() for row in range(len(order))])
    return order[repeat.argsort(stable=True)[:count]]


def masked_problem(images: Tensor, labels: Tensor, *, seed: int) -> Problem:
    """The upper half of each image (T, C, H, W) seen through Gaussian noise; the lower half is to be filled in.

    Since the noise is really there, a true sample of the posterior explains the observation exactly as well as the
    image itself does: its reward is -chi^2 / 2 with one degree of freedom for each observed pixel.
    """
    mask = half_mask(tuple(images.shape[1:]), "upper")
    noise = KeyedNoise.for_images(seed, len(images)).fold_in(Stream.OUTER).normal(*images.shape[1:])
    observed = mask * (images + OBSERVATION_NOISE * noise)
    targets = tuple(
        Target(
            reward=MaskedObservation(observed=seen, mask=mask, noise=OBSERVATION_NOISE),
            title=f"{int(label)}",
            pictures={"truth": image, "observed": seen},
        )
        for image, label, seen in zip(images, labels, observed, strict=True)
    )
    pixels = float(mask.sum())
    return Problem(
        name="masked",
        title="Fill in the hidden half",
        explanation=(
            f"Only the upper half of a held-out digit is seen, through noise of {OBSERVATION_NOISE:g} (pixels are 0 "
            "to 1). The reward is the log-likelihood of that observation, so that steered samples are plausible "
            "completions."
        ),
        targets=targets,
        exact_reward=(-pixels / 2, (pixels / 2) ** 0.5),
        exact_rewards=half_chi_square(int(pixels)),
    )


def half_chi_square(degrees: int) -> Tensor:
    """Equally likely values of -chi^2 / 2 with that many degrees of freedom, (20000,) float64, sorted."""
    generator = torch.Generator().manual_seed(degrees)
    total = torch.zeros(_EXACT_VALUES, dtype=torch.float64)
    for _ in range(degrees):
        total += torch.randn(_EXACT_VALUES, generator=generator, dtype=torch.float64).square()
    return (-total / 2).sort().values


def symmetry_problem() -> Problem:
    return _single(
        Symmetry(scale=_SYMMETRY_SCALE),
        title="Mirror symmetry",
        explanation=(
            f"Left and right should mirror each other: each pair of pixels may differ by about {_SYMMETRY_SCALE:g}."
        ),
    )


def brightness_problem(train: Split) -> Problem:
    mean, std = _brightness(train)
    target = mean + _BRIGHTER * std
    brightest = float(train.data.flatten(1).mean(1).max())
    return _single(
        TargetBrightness(target=target, scale=_BRIGHTNESS_SCALE * std),
        title="Far too bright",
        explanation=(
            f"The mean pixel should be {target:.2f} ± {_BRIGHTNESS_SCALE * std:.2f}. That is {_BRIGHTER:g} standard "
            f"deviations above the training digits ({mean:.2f} ± {std:.2f}); the brightest of them has {brightest:.2f}."
        ),
    )


def mixture_problem(classifier: DigitClassifier) -> Problem:
    """The paper's mix where there are ten classes; of others the same weights from the front, then none."""
    weights = [float(_MIXTURE[label]) if label < len(_MIXTURE) else 0.0 for label in range(classifier.num_classes)]
    reward = ClassMixture(classifier=classifier, weights=weights)
    parts = ", ".join(f"{100 * share:.0f} % {label}s" for label, share in enumerate(reward.weights) if share)
    return Problem(
        name=reward.name,
        title="A chosen mix of classes",
        explanation=(
            f"A classifier asks for {parts}. Here the mix is the goal, not a high reward: the best single image says "
            "nothing about whether the classes come in the right proportions."
        ),
        targets=(Target(reward, "A chosen mix of classes"),),
        wanted=torch.tensor(reward.weights, dtype=torch.float64),
    )


def combination_problem(classifier: DigitClassifier, train: Split) -> Problem:
    mean, std = _brightness(train)
    target = mean + _DARKER * std
    parts = [
        ClassProbability(classifier=classifier, label=_THIN),
        TargetBrightness(target=target, scale=_BRIGHTNESS_SCALE * std),
    ]
    return _single(
        WeightedSum(rewards=parts, name="combination"),
        title="Two wishes at once",
        explanation=(
            f"It should be an {_THIN}, and its mean pixel {target:.2f}, {-_DARKER:g} standard deviations below the "
            "training digits: a thin one. Rewards add up."
        ),
    )


def _single(reward: Symmetry | TargetBrightness | WeightedSum, *, title: str, explanation: str) -> Problem:
    return Problem(name=reward.name, title=title, explanation=explanation, targets=(Target(reward, title),))


def _brightness(train: Split) -> tuple[float, float]:
    """Mean and standard deviation over images of the mean pixel."""
    means = train.data.flatten(1).mean(1)
    return float(means.mean()), float(means.std())
