"""Metrics against closed forms and brute force."""

import itertools
import math

import pytest
import torch

from mfm_ray import metrics


def test_sliced_w2_of_a_shift_is_the_shift_over_root_d():
    a = torch.randn(4096, 3, generator=torch.Generator().manual_seed(1))
    shift = torch.tensor([3.0, -4.0, 0.0])
    # E (theta . shift)^2 = |shift|^2 / D; 4 standard errors of the mean over 256 directions
    assert metrics.sliced_w2(a, a + shift).item() == pytest.approx(5 / math.sqrt(3), rel=4 * 0.45 / 16)


def test_sliced_w2_ignores_order_and_treats_a_batch_as_pairs():
    a = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(1))
    b = a[:, torch.randperm(64, generator=torch.Generator().manual_seed(2))]
    assert metrics.sliced_w2(a, b).max() < 1e-6
    far = torch.stack([a[0], a[1] + 1])
    batched = metrics.sliced_w2(a, far)
    assert batched[0] == 0
    torch.testing.assert_close(batched[1], metrics.sliced_w2(a[1], far[1]))


def test_sliced_w2_of_two_independent_sets_falls_with_their_size():
    generator = torch.Generator().manual_seed(3)
    small, large = (
        metrics.sliced_w2(torch.randn(n, 4, generator=generator), torch.randn(n, 4, generator=generator)).item()
        for n in (256, 4096)
    )
    assert 2 < small / large < 8  # 1 / sqrt(N), so 4


def test_sliced_w2_refuses_sets_of_different_size():
    with pytest.raises(ValueError, match="shapes"):
        metrics.sliced_w2(torch.zeros(3, 2), torch.zeros(4, 2))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_average_over_all_groups(n):
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.7, -0.2, 5.0])
    exact = torch.zeros(6, dtype=torch.float64)
    groups = list(itertools.combinations(range(6), n))
    for group in groups:
        exact[max(group, key=lambda i: rewards[i].item())] += 1 / len(groups)
    torch.testing.assert_close(metrics.best_of_n_probabilities(rewards, n), exact)


def test_best_of_n_takes_pools_side_by_side_and_stays_finite_for_large_ones():
    rewards = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    probabilities = metrics.best_of_n_probabilities(rewards, 1000)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(probabilities[1], metrics.best_of_n_probabilities(rewards[1], 1000))
    # the largest of 1,000 normal deviates has mean 3.24 and deviation .35
    expected = metrics.weighted_moments(rewards, probabilities).mean
    assert (expected - 3.24).abs().max() < 4 * 0.35 / math.sqrt(4)


@pytest.mark.parametrize("n", [0, 5])
def test_best_of_n_needs_a_pool_that_holds_the_group(n):
    with pytest.raises(ValueError, match=f"n={n}: expected 1 to the 4"):
        metrics.best_of_n_probabilities(torch.zeros(4), n)


def test_tilting_a_normal_pool_by_a_linear_reward_moves_its_mean():
    pool = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    weights = metrics.tilting_weights(0.5 * pool)
    moments = metrics.weighted_moments(pool, weights)
    assert moments.mean.item() == pytest.approx(0.5, abs=0.02)
    assert moments.std.item() == pytest.approx(1.0, abs=0.02)
    # E[w]^2 / E[w^2] = exp(-lambda^2) for a log-normal weight
    assert metrics.effective_sample_size(weights).item() / 200_000 == pytest.approx(math.exp(-0.25), rel=0.02)


def test_effective_sample_size_counts_equal_weights():
    assert metrics.effective_sample_size(torch.ones(7)).item() == 7
    assert metrics.effective_sample_size(torch.tensor([1.0, 0.0, 0.0])).item() == 1


def test_class_figures_of_a_judge_that_reads_the_first_pixels():
    images = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    probabilities = metrics.class_probabilities(lambda x: x, images)
    confidence = metrics.class_confidence(probabilities)
    assert confidence[:3].min() > 0.99
    assert confidence[3].item() == pytest.approx(1 / 3)
    frequencies = metrics.class_frequencies(probabilities[:3])
    torch.testing.assert_close(frequencies, torch.tensor([1 / 3, 2 / 3, 0.0], dtype=torch.float64))
    weighted = metrics.class_frequencies(probabilities[:3], torch.tensor([2.0, 1.0, 1.0]))
    assert metrics.total_variation(frequencies, weighted) == pytest.approx(1 / 6)


def test_an_interval_is_two_standard_errors_wide():
    mean = metrics.mean_with_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean.value == 2.5
    assert mean.half_width == pytest.approx(1.96 * 1.2909944 / 2)
    assert metrics.mean_with_interval(torch.tensor([1.0])).half_width == 0
    with pytest.raises(ValueError, match="no values"):
        metrics.mean_with_interval(torch.zeros(0))
