"""Distances of a trial's samples to held-out data, and what their intervals cover."""

import pytest
import torch

from mfm_ray.errors import InputError
from mfm_ray.metrics import frechet_distance, sliced_w2
from mfm_ray.tuning.heldout import DISTANCES, HeldOut


def normal(count, *, seed, shift=0.0, dimension=3):
    return shift + torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(400) % 2
HELD = HeldOut(normal(400, seed=1), LABELS)


def test_figures_are_those_of_the_metrics():
    samples = normal(100, seed=2, shift=0.5)
    found = HELD.distances(["frechet", "sliced_w2"], samples)
    assert found["frechet"] == frechet_distance(samples, HELD.data)
    assert found["sliced_w2"] == float(sliced_w2(samples.double(), HELD.data[:100].double()))
    assert found["frechet"] > 3 * found["frechet_half_width"] > 0
    assert found == HELD.distances(list(DISTANCES), samples)  # no chance between two calls


def test_a_label_is_compared_with_its_own_class():
    samples = normal(100, seed=2)
    shifted = HeldOut(HELD.data + 10 * LABELS[:, None], LABELS)
    alone = HeldOut(shifted.data[LABELS == 1], LABELS[LABELS == 1])
    assert shifted.distances(["frechet"], samples + 10, label=1) == alone.distances(["frechet"], samples + 10)
    with pytest.raises(InputError, match="label=7: 0 held-out samples, expected at least 2"):
        shifted.distances(["frechet"], samples, label=7)


def test_features_stand_between_data_and_the_frechet_distance():
    held = HeldOut(HELD.data, LABELS, features=lambda rows: rows[:, :1])
    samples = normal(100, seed=2) * torch.tensor([1.0, 5.0, 5.0])
    assert held.distances(["frechet"], samples)["frechet"] < 0.1 < HELD.distances(["frechet"], samples)["frechet"]


@pytest.mark.parametrize("name", list(DISTANCES))
def test_half_widths_are_those_of_repeated_sampling(name):
    """The spread over independent sets of samples, within a factor of two."""
    found = [HELD.distances([name], normal(40, seed=seed, shift=0.4)) for seed in range(2, 32)]
    spread = float(torch.tensor([row[name] for row in found]).std())
    width = sum(row[f"{name}_half_width"] for row in found) / len(found)
    assert 0.5 < width / (1.96 * spread) < 2


def test_a_single_sample_has_no_distance():
    assert HELD.distances(["frechet"], normal(1, seed=2)) == {}
