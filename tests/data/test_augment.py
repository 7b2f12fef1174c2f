"""The jitter of training images."""

import pytest
import torch

from mfm_ray.data.augment import AffineJitter
from mfm_ray.data.datasets import digits
from mfm_ray.noise import KeyedNoise

IMAGES = digits().splits["train"].data[:64]
NOISE = KeyedNoise.for_images(0, 64)


def test_no_rate_leaves_images_as_they_are():
    assert AffineJitter(rate=0.0, rotation=0.5, scale=0.5, shift=0.5)(IMAGES, NOISE) is IMAGES


def test_a_rate_is_the_share_of_changed_images():
    jittered = AffineJitter(rate=0.7, rotation=0.1, scale=0.1, shift=0.05)(IMAGES, NOISE)
    changed = (jittered != IMAGES).flatten(1).any(1).float().mean()
    assert abs(float(changed) - 0.7) < 4 * (0.7 * 0.3 / 64) ** 0.5


def test_an_image_depends_on_its_own_noise_row_alone():
    jitter = AffineJitter(rate=1.0, rotation=0.1, scale=0.1, shift=0.05)
    together = jitter(IMAGES, NOISE)
    torch.testing.assert_close(jitter(IMAGES[8:16], NOISE[8:16]), together[8:16], rtol=0, atol=0)


def test_no_reach_changes_nothing_but_rounding():
    jittered = AffineJitter(rate=1.0, rotation=0.0, scale=0.0, shift=0.0)(IMAGES, NOISE)
    torch.testing.assert_close(jittered, IMAGES, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reach", [0.02, 0.05])
def test_shift_is_in_widths_of_the_image(reach):
    dot = torch.zeros(64, 1, 32, 32)
    dot[:, :, 16, 16] = 1.0
    moved = AffineJitter(rate=1.0, rotation=0.0, scale=0.0, shift=reach)(dot, NOISE)
    columns = (moved.sum(2).squeeze(1) * torch.arange(32)).sum(1) / moved.flatten(1).sum(1)
    largest = float((columns - 16).abs().max())
    assert 0.8 * reach * 32 < largest < reach * 32 + 1e-3
