"""FID, KID, precision and recall of features against closed forms, other libraries, and sets made by hand."""

import itertools

import numpy as np
import pytest
import torch

from mfm_ray.metrics import (
    FeatureStatistics,
    InceptionFeatures,
    RawFeatures,
    eight_bit,
    frechet_distance,
    gaussian_frechet_distance,
    kernel_inception_distance,
    pearson,
    polynomial_squared_mmd,
    precision_recall,
    spearman,
)


def rows(count, dim=5, seed=0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_commuting_gaussians_in_closed_form():
    """Axes in common: |m_a - m_b|^2 + sum (sd_a - sd_b)^2."""
    basis = torch.linalg.qr(rows(4, 4, seed=3).double())[0]
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 4.0, 1.0, 2.0]).double()
    mean = torch.tensor([1.0, 0.0, -2.0, 0.5]).double()
    first, second = (basis @ torch.diag(values) @ basis.T for values in (a, b))
    wanted = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert gaussian_frechet_distance(mean, first, 0 * mean, second) == pytest.approx(wanted, rel=1e-10)


def test_frechet_distance_equals_scipys_formula_and_torchmetrics():
    linalg = pytest.importorskip("scipy.linalg")
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = rows(60, seed=1).double(), rows(80, seed=2, shift=0.3).double() * 1.4
    first, second = np.cov(a.numpy().T), np.cov(b.numpy().T)
    shift = float((a.mean(0) - b.mean(0)).square().sum())
    wanted = shift + float(np.trace(first + second - 2 * linalg.sqrtm(first @ second).real))
    assert FeatureStatistics.of(a).frechet_distance(FeatureStatistics.of(b)) == pytest.approx(wanted, rel=1e-9)

    class Same(torch.nn.Module):
        num_features = 5

        def forward(self, x):
            return x

    metric = fid.FrechetInceptionDistance(feature=Same())
    metric.set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert float(metric.compute()) == pytest.approx(wanted, rel=1e-6)


def test_statistics_of_parts_are_those_of_the_whole():
    whole = rows(301, seed=4, shift=100.0)
    parts = [FeatureStatistics.of(part) for part in whole.split(97)]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    wanted = FeatureStatistics.of(whole)
    assert merged.count == 301
    torch.testing.assert_close(merged.mean, wanted.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, wanted.covariance, rtol=1e-11, atol=1e-11)
    assert merged.frechet_distance(FeatureStatistics.of(rows(50))) == pytest.approx(
        frechet_distance(whole, rows(50)), rel=1e-10
    )


def test_statistics_refuse_what_cannot_be_merged():
    known, unknown = FeatureStatistics.of(rows(5)), FeatureStatistics(torch.zeros(5), torch.eye(5), None)
    with pytest.raises(ValueError, match="unknown number"):
        known.merge(unknown)
    with pytest.raises(ValueError, match="5 and 4 features"):
        known.merge(FeatureStatistics.of(rows(5, 4)))
    with pytest.raises(ValueError, match="NaN"):
        known.frechet_distance(FeatureStatistics(torch.full((5,), torch.nan), torch.eye(5), None))


def test_kid_is_unbiased_over_subsets():
    """The mean over ALL pairs of subsets of a small population is the statistic of the population."""
    a, b = rows(6, 3, seed=5), rows(5, 3, seed=6, shift=0.5)
    pairs = itertools.product(itertools.combinations(range(6), 3), itertools.combinations(range(5), 3))
    values = [polynomial_squared_mmd(a[list(i)], b[list(j)]) for i, j in pairs]
    assert np.mean(values) == pytest.approx(polynomial_squared_mmd(a, b), rel=1e-9)


def test_kid_is_zero_in_the_mean_under_equal_laws_and_the_closed_form_elsewhere():
    """D = 1, x = +-1: E k(x, x') = E (x x' + 1)^3 = 4 with fair signs; against the constant y = 1, k(y, y') = 8."""
    sign = torch.where(torch.rand(400, 60, 1, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    equal = torch.tensor([polynomial_squared_mmd(x[:30], x[30:]) for x in sign]).double()
    assert abs(float(equal.mean())) < 4 * float(equal.std()) / 20
    assert float(equal.min()) < 0 < float(equal.max())
    far = torch.tensor([polynomial_squared_mmd(x, torch.ones(9, 1)) for x in sign]).double()
    assert float(far.mean()) == pytest.approx(4 + 8 - 2 * 4, abs=4 * float(far.std()) / 20)


def test_kid_equals_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = rows(40, 8, seed=7), rows(40, 8, seed=8, shift=0.2)
    assert polynomial_squared_mmd(a, b) == pytest.approx(float(kid.poly_mmd(a.double(), b.double())), rel=1e-9)


def test_kid_of_subsets_is_a_mean_with_an_interval_and_keyed():
    a, b = rows(300, seed=9), rows(200, seed=10)

    def kid(seed):
        generator = torch.Generator().manual_seed(seed)
        return kernel_inception_distance(a, b, generator=generator, subsets=50, subset_size=100)

    assert kid(0) == kid(0) and kid(0) != kid(1)
    assert kid(0).value == pytest.approx(polynomial_squared_mmd(a, b), abs=2 * kid(0).half_width)


def test_precision_and_recall_of_sets_made_by_hand():
    line = torch.arange(10.0).unsqueeze(1)  # its balls (k = 1) have radius 1
    assert vars(precision_recall(line, line, neighbours=1)) == {"precision": 1.0, "recall": 1.0}
    half = line[:5] + 0.25
    found = precision_recall(half, line, neighbours=1)
    assert found.precision == 1.0
    assert found.recall == pytest.approx(0.6)  # 0 to 5 lie within 1 of 0.25 to 4.25
    off = torch.cat([line, torch.full((10, 1), 100.0) + line * 50])
    assert precision_recall(off, line, neighbours=1).precision == 0.5
    assert precision_recall(off, line, neighbours=1).recall == 1.0


def test_copies_are_neighbours_of_each_other_and_no_row_of_itself():
    twice = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    assert precision_recall(torch.tensor([[0.0], [1.0]]), twice, neighbours=1).precision == 0.5
    with pytest.raises(ValueError, match="N >= 4"):
        precision_recall(rows(3), rows(9))


def test_precision_and_recall_over_several_blocks_equal_brute_force(monkeypatch):
    from mfm_ray.metrics import manifold

    a, b = rows(57, 3, seed=11), rows(41, 3, seed=12, shift=0.7)
    whole = precision_recall(a, b)
    monkeypatch.setattr(manifold, "_ROWS_AT_ONCE", 8)
    monkeypatch.setattr(manifold, "_COLUMNS_AT_ONCE", 7)
    assert precision_recall(a, b) == whole
    radii = torch.cdist(b.double(), b.double()).kthvalue(4, dim=1).values  # itself is the first
    inside = (torch.cdist(a.double(), b.double()) <= radii).any(1)
    assert whole.precision == pytest.approx(float(inside.double().mean()))


def test_spearman_sees_order_alone():
    x = rows(30, 1, seed=13).squeeze(1)
    assert spearman(x, x.exp()).value == pytest.approx(1.0) and pearson(x, x.exp()).value < 0.95
    noisy = x + rows(30, 1, seed=14).squeeze(1)
    found = spearman(noisy, x)
    stats = pytest.importorskip("scipy.stats")
    assert found.value == pytest.approx(stats.spearmanr(noisy.numpy(), x.numpy()).statistic, rel=1e-9)
    assert found.lower < found.value < found.upper
    ties = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 3.0])
    other = torch.tensor([1.0, 2.0, 2.0, 5.0, 4.0, 4.0])
    assert spearman(ties, other).value == pytest.approx(stats.spearmanr(ties.numpy(), other.numpy()).statistic)


def test_pictures_are_rounded_to_bytes_and_grey_ones_have_three_channels():
    assert eight_bit(torch.tensor([-0.5, 0.0, 0.5, 0.9999, 2.0])).tolist() == [0, 0, 128, 255, 255]

    class Seen(torch.nn.Module):
        def forward(self, pixels):
            assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
            return pixels.float().mean((2, 3))

    assert InceptionFeatures(Seen())(torch.full((2, 1, 4, 4), 0.2)).tolist() == [[51.0] * 3] * 2
    assert RawFeatures()(torch.zeros(2, 1, 3)).shape == (2, 3)
