"""A small CNN that tells digits apart: for class rewards, and as the judge of steered samples."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError

_POOLED = 4
_BATCH_SIZE = 64
_PEAK_LEARNING_RATE = 3e-3
_EVALUATION_ROWS = 1024
_MAX_DISTORTION = 0.1
_MAX_SHIFT_PIXELS = 0.7
_MAX_NOISE = 0.1  # in data units


class DigitClassifier(nn.Module):
    """Images (N, C, H, W) in data units -> logits (N, num_classes); H and W of at least 8, fewer than 100,000 weights.

    Smooth (GELU, average pooling, no normalisation over the batch), so that its gradient steers well and the score
    of an image does not depend on the images beside it.
    """

    def __init__(self, *, num_classes: int, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(f"num_classes={num_classes}: expected at least 2")
        if len(event_shape) != 3 or min(event_shape[1:]) < 8 or event_shape[0] < 1:
            raise InputError(f"event_shape={list(event_shape)}: expected (channels, height, width) of at least 8x8")
        self.num_classes, self.event_shape = num_classes, tuple(event_shape)
        # large images lose half of each side at the first layer already
        stride = 2 if min(event_shape[1:]) >= 16 else 1
        self.layers = nn.Sequential(
            nn.Conv2d(event_shape[0], 24, kernel_size=3, padding=1, stride=stride),
            nn.GELU(),
            nn.Conv2d(24, 48, kernel_size=3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(48, 48, kernel_size=3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(_POOLED),
            nn.Flatten(),
            nn.Linear(48 * _POOLED**2, 64),
            nn.GELU(),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images - 0.5)

    def features(self, images: Tensor) -> Tensor:
        """Activations before the last layer, (N, 64): what tells digits apart, for distances between sets of them."""
        return self.layers[:-1](images - 0.5)

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments."""
        return {"num_classes": self.num_classes, "event_shape": list(self.event_shape)}


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier in eval mode, its accuracy in [0, 1] on the held-out images, and the seconds training took."""

    classifier: DigitClassifier
    heldout_accuracy: float
    seconds: float


def train_classifier(
    data: Tensor,
    labels: Tensor,
    *,
    heldout_data: Tensor,
    heldout_labels: Tensor,
    num_classes: int,
    seed: int = 0,
    epochs: int = 40,
) -> TrainedClassifier:
    """Trains on images (N, C, H, W) in data units with labels (N,); the same seed gives the same classifier.

    AdamW with a one-cycle learning rate on augmented images; no global random state is touched. Forty epochs of
    digits take about 10 CPU-seconds and gave 0.990 to 0.995 held-out accuracy over four seeds.
    """
    if len(data) == 0 or len(heldout_data) == 0:
        raise InputError("the classifier needs training and held-out images, one of them has no rows")
    if bool((labels < 0).any()) or int(labels.max()) >= num_classes:
        raise InputError(f"labels: expected 0 to {num_classes - 1} for every image the classifier trains on")
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    classifier = _initial_classifier(num_classes, tuple(data.shape[1:]), seed)
    steps = epochs * math.ceil(len(data) / _BATCH_SIZE)
    optimiser = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _PEAK_LEARNING_RATE, total_steps=steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(data), generator=generator).split(_BATCH_SIZE):
                images = augment(data[rows], generator=generator)
                loss = nn.functional.cross_entropy(classifier(images), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    accuracy = heldout_accuracy(classifier.eval(), heldout_data, heldout_labels)
    return TrainedClassifier(classifier.requires_grad_(False), accuracy, time.perf_counter() - started)


def augment(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Each image slightly sheared, turned and scaled, moved by up to 0.7 pixels, and given noise of up to 0.1.

    The noise, of a level of its own for each image, keeps confidence calibrated on samples that are not quite clean.
    """
    count, _, height, width = images.shape
    # affine_grid measures in half widths and half heights
    reach = torch.tensor([[_MAX_DISTORTION, _MAX_DISTORTION, 2 * _MAX_SHIFT_PIXELS / size] for size in (width, height)])
    transform = torch.eye(2, 3) + reach * (2 * torch.rand(count, 2, 3, generator=generator) - 1)
    grid = nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    level = _MAX_NOISE * torch.rand(count, 1, 1, 1, generator=generator)
    return moved + level * torch.randn(moved.shape, generator=generator)


@torch.no_grad()
def heldout_accuracy(classifier: DigitClassifier, data: Tensor, labels: Tensor) -> float:
    """Share of images whose most probable class is their label."""
    predicted = torch.cat([classifier(part).argmax(1) for part in data.split(_EVALUATION_ROWS)])
    return float((predicted == labels).double().mean())


def _initial_classifier(num_classes: int, event_shape: tuple[int, ...], seed: int) -> DigitClassifier:
    """torch's layers take their initial weights from the global generator: fork it, so that the caller's stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitClassifier(num_classes=num_classes, event_shape=event_shape)
