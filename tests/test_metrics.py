"""Metrics against closed forms and brute force."""

import itertools
import math

import pytest
import torch

from mfm_ray import metrics
from mfm_ray.networks.classifier import DigitClassifier


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


@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (16, 2.131), (1000, 1.962)]
)
def test_few_values_have_the_wider_interval_of_students_t(count, quantile):
    mean = metrics.by_students_t(metrics.Mean(value=1.0, half_width=1.96, count=count))
    assert mean.half_width == pytest.approx(quantile, rel=5e-3)
    assert (mean.value, mean.count) == (1.0, count)


def test_a_single_value_has_no_interval_to_widen():
    alone = metrics.mean_with_interval(torch.tensor([1.0]))
    assert metrics.by_students_t(alone) == alone


def normal(count, dim, seed, *, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, dim, generator=generator, dtype=torch.float64) + shift


def expected_kernel(dim, h, variance, shift_squared=0.0):
    """E exp(-|x - y|^2 / 2h^2), x - y ~ N(shift, v I): (h^2 / (h^2 + v))^{D/2} exp(-|shift|^2 / 2(h^2 + v))."""
    return (h**2 / (h**2 + variance)) ** (dim / 2) * math.exp(-shift_squared / (2 * (h**2 + variance)))


def test_mmd_of_two_gaussians_is_the_closed_form():
    dim, widths = 3, [0.7, 1.5, 4.0]
    # N(0, I) against N(shift, 1.5^2 I), |shift|^2 = 0.75
    exact = sum(
        expected_kernel(dim, h, 2.0) + expected_kernel(dim, h, 4.5) - 2 * expected_kernel(dim, h, 3.25, 0.75)
        for h in widths
    ) / len(widths)
    values = metrics.mean_with_interval(
        torch.tensor(
            [
                metrics.squared_mmd(
                    normal(700, dim, 2 * k), normal(600, dim, 2 * k + 1, scale=1.5, shift=0.5), bandwidths=widths
                )
                for k in range(24)
            ]
        )
    )
    standard_error = values.half_width / 1.96
    assert standard_error < 0.03 * exact
    assert abs(values.value - exact) < 4 * standard_error


def test_mmd_is_the_u_statistic_that_brute_force_gives_in_blocks_or_not():
    x, y = normal(1100, 2, 0), normal(530, 2, 1, shift=0.3)  # several blocks, the last ones not full
    total = 0.0
    for h in (0.5, 2.0):
        kernels = [torch.exp(-torch.cdist(a, b).square() / (2 * h**2)) for a, b in ((x, x), (y, y), (x, y))]
        within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
        total += float(within[0] + within[1] - 2 * kernels[2].mean()) / 2
    assert metrics.squared_mmd(x, y, bandwidths=[0.5, 2.0]) == pytest.approx(total, abs=1e-12)
    # images far from the origin, in float32, are the same set
    shifted = [(a.reshape(-1, 1, 2, 1) + 1024).float() for a in (x, y)]
    assert metrics.squared_mmd(*shifted, bandwidths=[0.5, 2.0]) == pytest.approx(total, abs=1e-4)


def test_mmd_has_mean_zero_where_the_laws_are_equal():
    values = torch.tensor([metrics.squared_mmd(normal(64, 2, 2 * k), normal(64, 2, 2 * k + 1)) for k in range(200)])
    mean = metrics.mean_with_interval(values)
    assert abs(mean.value) < 4 / 1.96 * mean.half_width
    assert (values < 0).any()
    # with the diagonals it would be about 2 (1 - E k) / 64: twenty times the error allowed here
    assert 4 / 1.96 * mean.half_width < 0.002


def test_bandwidths_are_a_geometric_set_around_the_median_distance():
    line = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 2, 3
    assert metrics.median_distance(line) == 2
    assert metrics.rbf_bandwidths(line) == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert metrics.squared_mmd(line + 1, line) == metrics.squared_mmd(
        line + 1, line, bandwidths=[0.5, 1.0, 2.0, 4.0, 8.0]
    )
    # |x - y| of two standard normals: sqrt(2) times the median .6745 of |z|; the many rows are thinned
    assert metrics.median_distance(normal(5000, 1, 3)) == pytest.approx(0.9539, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.squared_mmd(torch.zeros(1, 2), torch.zeros(3, 2)),
            r"shape \(1, 2\), expected \(N, D\) with N >= 2",
        ),
        (lambda: metrics.squared_mmd(torch.randn(3, 2), torch.randn(3, 4)), "rows of 2 and 4 numbers"),
        (lambda: metrics.squared_mmd(torch.randn(3, 2), torch.zeros(3, 2)), "most rows of the reference coincide"),
        (lambda: metrics.squared_mmd(torch.randn(3, 2), torch.randn(3, 2), bandwidths=[1.0, 0.0]), "above 0"),
        (lambda: metrics.squared_mmd(torch.randn(3, 2), torch.randn(3, 2), bandwidths=[]), "at least one"),
        (lambda: metrics.squared_mmd(torch.full((3, 2), math.nan), torch.randn(3, 2)), "NaN"),
        (lambda: metrics.frechet_distance(torch.zeros(3, 2), torch.zeros(3, 4)), "rows of 2 and 4 features"),
        (lambda: metrics.frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2)), "N >= 2"),
        (lambda: metrics.distance_floor(metrics.sliced_w2, torch.zeros, pairs=1), "pairs=1, expected at least 2"),
        (lambda: metrics.pmf_distance(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])), "sum to 1"),
        (lambda: metrics.pmf_distance(torch.tensor([1.5, -0.5]), torch.tensor([0.5, 0.5])), "at least 0"),
        (lambda: metrics.pmf_distance(torch.tensor([1.0]), torch.tensor([0.5, 0.5])), "shapes"),
        (lambda: metrics.mean_pairwise_distance(torch.zeros(1, 2)), "N >= 2"),
        (lambda: metrics.vendi_score(torch.zeros(3, 2)), "a row of zeros"),
        (lambda: metrics.vendi_score(torch.randn(3, 2), kernel="linear"), "expected one of cosine, rbf"),
        (lambda: metrics.vendi_score(torch.randn(3, 2), bandwidth=1.0), "with kernel='rbf' alone"),
        (lambda: metrics.vendi_score(torch.randn(3, 2), kernel="rbf", bandwidth=0.0), "above 0"),
        (
            lambda: metrics.nearest_neighbours(torch.zeros(2, 3), torch.zeros(2, 4)),
            r"\(2, 3\) and training set \(2, 4\)",
        ),
        (lambda: metrics.nearest_neighbours(torch.zeros(2, 3), torch.zeros(0, 3)), "at least one row"),
        (lambda: metrics.memorisation(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)), "copies"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def with_moments(mean, covariance, seed, count=200):
    """Samples whose empirical mean and covariance are the given ones."""
    raw = normal(count, len(mean), seed)
    raw = raw - raw.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(raw.T)), raw.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_correlated_gaussians_is_the_closed_form():
    a, b = (torch.tensor(m, dtype=torch.float64) for m in ([[2.0, 0.6], [0.6, 1.0]], [[1.0, -0.5], [-0.5, 3.0]]))
    mean = torch.tensor([3.0, -4.0], dtype=torch.float64)
    # in two dimensions tr M^{1/2} = sqrt(tr M + 2 sqrt(det M)); a and b do not commute
    root = torch.sqrt((a @ b).trace() + 2 * (a @ b).det().sqrt())
    exact = float(25 + a.trace() + b.trace() - 2 * root)
    first, second = with_moments(mean, a, 0), with_moments(torch.zeros(2), b, 1, count=300)
    assert metrics.frechet_distance(first, second) == pytest.approx(exact, rel=1e-10)
    assert metrics.frechet_distance(second, first) == pytest.approx(exact, rel=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_fewer_rows_than_features():
    few = normal(5, 40, 0)
    assert metrics.frechet_distance(few, few.flip(0)) < 1e-10
    assert metrics.frechet_distance(few, few + 1) == pytest.approx(40)
    assert metrics.frechet_distance(few[:, :1], 3 * few[:, :1] - 2 * few[:, :1].mean()) == pytest.approx(
        4 * float(few[:, 0].var())
    )


def test_classifier_features_are_what_the_last_layer_reads():
    torch.manual_seed(0)
    classifier = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    images = torch.rand(5, 1, 8, 8)
    features = metrics.classifier_features(classifier, images)
    assert features.shape == (5, 64)
    assert not features.requires_grad
    torch.testing.assert_close(classifier.layers[-1](features), classifier(images))
    assert "layers.10.weight" in classifier.state_dict()  # published classifiers keep loading


def test_the_floor_is_the_mean_over_pairs_of_independent_sets():
    drawn = []

    def draw(k):
        drawn.append(k)
        return torch.full((2, 1), float(k * k))

    floor = metrics.distance_floor(lambda a, b: (a - b).abs().mean(), draw, pairs=3)
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert floor.value == pytest.approx((1 + 5 + 9) / 3)
    assert floor.count == 3
    assert floor.half_width == pytest.approx(1.96 * 4 / math.sqrt(3))
    assert metrics.distance_floor(metrics.sliced_w2, lambda k: normal(16, 2, k)).count == 20


def test_a_bar_holds_while_the_lower_end_of_the_interval_does_not_exceed_it():
    floor = metrics.Mean(value=0.1, half_width=0.04, count=20)
    over = metrics.over_floor(metrics.Mean(value=0.14, half_width=0.02, count=10), floor)
    assert (over.ratio, over.lower, over.upper) == pytest.approx((1.4, 1.2, 1.6))
    assert over.holds(1.3)
    assert over.holds(over.lower)
    assert not over.holds(1.19)
    with pytest.raises(ValueError, match="a floor of 0.0"):
        metrics.over_floor(floor, metrics.Mean(value=0.0, half_width=1.0, count=20))


def test_pmf_distance_is_euclidean():
    point = torch.tensor([1.0, 0.0, 0.0])
    assert metrics.pmf_distance(point, point) == 0
    assert metrics.pmf_distance(point, torch.tensor([0.0, 0.0, 1.0])) == pytest.approx(math.sqrt(2))
    wanted = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert metrics.pmf_distance(point, wanted) == pytest.approx(math.sqrt(0.25 + 2 / 16))


def test_mean_pairwise_distance_against_the_pairs_themselves():
    assert metrics.mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])) == pytest.approx(20 / 3)
    many = normal(1100, 3, 0, shift=100.0)
    assert metrics.mean_pairwise_distance(many) == pytest.approx(float(torch.nn.functional.pdist(many).mean()))
    assert metrics.mean_pairwise_distance(torch.ones(4, 1, 2, 2)) == 0


def test_vendi_score_counts_different_members():
    orthogonal, same = torch.eye(6) * 3, torch.ones(6, 6)
    assert metrics.vendi_score(orthogonal) == pytest.approx(6)
    assert metrics.vendi_score(same) == pytest.approx(1)
    # two groups, of two and of four alike: the entropy of (1/3, 2/3)
    groups = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 5.0]] * 4)
    entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert metrics.vendi_score(groups) == pytest.approx(math.exp(entropy))
    assert metrics.vendi_score(groups, kernel="rbf", bandwidth=0.1) == pytest.approx(math.exp(entropy))
    assert metrics.vendi_score(orthogonal, kernel="rbf", bandwidth=0.1) == pytest.approx(6)
    assert metrics.vendi_score(same, kernel="rbf", bandwidth=1.0) == pytest.approx(1)
    # two members with k = exp(-1/2): eigenvalues (1 +- k) / 2
    high, low = (1 + math.exp(-0.5)) / 2, (1 - math.exp(-0.5)) / 2
    exact = math.exp(-high * math.log(high) - low * math.log(low))
    assert metrics.vendi_score(torch.tensor([[0.0], [2.0]]), kernel="rbf") == pytest.approx(exact, abs=1e-9)
    assert metrics.vendi_score(torch.tensor([[0.0], [2.0]]), kernel="rbf", bandwidth=2.0) == pytest.approx(exact)


def test_nearest_neighbours_are_found_across_blocks():
    training = normal(9000, 2, 0)
    samples = torch.cat([training[[8999, 4096, 17]], normal(600, 2, 1)])
    found = metrics.nearest_neighbours(samples.reshape(-1, 1, 2), training.reshape(-1, 1, 2))
    brute = torch.cdist(samples, training, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert found.index[:3].tolist() == [8999, 4096, 17]
    assert found.distance[:3].tolist() == [0, 0, 0]  # a copy is a copy, not nearly one
    assert torch.equal(found.index, brute.indices)
    torch.testing.assert_close(found.distance, brute.values)


def test_memorisation_tells_copies_from_new_samples():
    training, heldout = normal(2000, 4, 0), normal(500, 4, 1)
    assert metrics.memorisation(normal(500, 4, 2), heldout, training).ratio == pytest.approx(1, abs=0.1)
    copies = metrics.memorisation(training[:500] + 1e-3, heldout, training)
    assert copies.samples == pytest.approx(2e-3)
    assert copies.ratio < 0.01
    line = torch.arange(3.0)[:, None] * 10
    medians = metrics.memorisation(line + torch.tensor([[1.0], [2.0], [4.0]]), line[:2] + 2, line)
    assert (medians.samples, medians.heldout, medians.ratio) == (2, 2, 1)


def test_frechet_distance_with_weights_is_that_of_the_repeated_rows_up_to_the_divisor():
    rows, other = normal(40, 3, 0), normal(60, 3, 1)
    assert metrics.frechet_distance(rows, other, weights=torch.ones(40)) == pytest.approx(
        metrics.frechet_distance(rows, other), rel=1e-9
    )
    # the mean alone: equal covariances, one set moved to the weighted mean of two clusters
    clusters = torch.tensor([[0.0], [4.0]])
    apart = metrics.frechet_distance(clusters, torch.tensor([[3.0], [3.0]]), weights=torch.tensor([0.25, 0.75]))
    assert apart == pytest.approx(0.25 * 0.75 * 16 / (1 - 0.25**2 - 0.75**2))  # the mean is 3; what is left is spread


def test_frechet_distance_of_a_law_to_itself_by_importance_weights_vanishes_in_the_limit():
    base, tilted = normal(40000, 2, 0), normal(40000, 2, 1)
    tilted[:, 0] += 0.5
    weights = metrics.tilting_weights(0.5 * base[:, 0])  # exp(a x) moves a standard normal by a
    assert metrics.frechet_distance(base, tilted, weights=weights) < 2e-3
    assert metrics.frechet_distance(base, tilted) == pytest.approx(0.25, abs=0.03)
    with pytest.raises(ValueError, match="not all on one"):
        metrics.frechet_distance(base[:2], tilted, weights=torch.tensor([1.0, 0.0]))


def test_weighted_mmd_is_the_plain_one_for_equal_weights_and_sees_through_importance_weights():
    base, tilted = normal(1500, 2, 2), normal(1500, 2, 3)
    tilted[:, 0] += 0.7
    weights = torch.stack([torch.ones(1500), metrics.tilting_weights(0.7 * base[:, 0])])
    plain, tilting = metrics.weighted_squared_mmd(base, weights, tilted).tolist()
    assert plain == pytest.approx(metrics.squared_mmd(base, tilted), rel=1e-9)
    assert plain > 0.02
    assert abs(tilting) < 0.05 * plain
    with pytest.raises(ValueError, match="all weight on one"):
        metrics.weighted_squared_mmd(base[:2], torch.tensor([[1.0, 0.0]]), tilted)
    with pytest.raises(ValueError, match=r"\(W, N\)"):
        metrics.weighted_squared_mmd(base[:2], torch.ones(2), tilted)


def test_wasserstein_1_of_numbers_is_the_area_between_their_distributions():
    a, b = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5.0, 6.0, 8.0])
    assert metrics.wasserstein_1(a, b) == pytest.approx(5.0)
    assert metrics.wasserstein_1(a, a.flip(0)) == 0
    assert metrics.wasserstein_1(torch.tensor([0.0, 1.0]), torch.tensor([1.0])) == pytest.approx(0.5)
    assert metrics.wasserstein_1(a, a[[0, 0, 1, 2]], weights=torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(0)
    with pytest.raises(ValueError, match="all finite"):
        metrics.wasserstein_1(a, torch.tensor([torch.inf]))


def test_the_floor_of_a_pmf_is_the_root_of_its_variance_in_the_limit():
    wanted = torch.tensor([0.0, 1, 0, 1, 0, 2, 0, 2, 0, 4]) / 10
    for count in (100, 1024):
        scale = math.sqrt((1 - float(wanted.square().sum())) / count)
        assert 0.85 * scale < metrics.pmf_floor(wanted, count) < scale  # Jensen
    assert metrics.pmf_floor(torch.tensor([1.0, 0.0]), 10) == pytest.approx(0, abs=1e-12)
