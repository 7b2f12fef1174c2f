import math

import pytest
import torch

from mfm_ray.networks.gaussian import LinearObservation, isotropic_mixture
from mfm_ray.values import estimate_value, posterior_weights, tilted_mean_shift


def rewards(repeats: int, num_draws: int, *, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Rewards scale * uniform(-1, 1): log-weights of known law."""
    g = torch.Generator().manual_seed(seed)
    return scale * (2 * torch.rand(repeats, num_draws, generator=g, dtype=torch.float64) - 1)


def exact_value(scale: float) -> float:
    """log E exp(scale U), U uniform on (-1, 1)."""
    return math.log(math.sinh(scale) / scale)


def relative_variance(scale: float) -> float:
    """Var(e^r) / E[e^r]^2."""
    return math.exp(exact_value(2 * scale) - 2 * exact_value(scale)) - 1


def test_equal_rewards_are_their_own_value_without_error():
    estimate = estimate_value(torch.full((3, 7), -2.5))
    torch.testing.assert_close(estimate.value, torch.full((3,), -2.5))
    assert (estimate.standard_error < 1e-3).all()
    torch.testing.assert_close(estimate.effective_sample_size, torch.full((3,), 7.0))


def test_one_draw_is_its_reward():
    r = rewards(4, 1)
    estimate = estimate_value(r)
    assert torch.equal(estimate.value, r[:, 0])
    assert torch.equal(estimate.standard_error, torch.zeros(4).double())


def test_huge_rewards_neither_overflow_nor_vanish():
    estimate = estimate_value(torch.tensor([[1e30, -1e30], [-1e30, -1e30]]))
    torch.testing.assert_close(estimate.value, torch.tensor([1e30, -1e30]))
    assert torch.isfinite(estimate.standard_error).all()
    assert estimate.effective_sample_size[0] == 1


def test_a_constant_in_the_reward_shifts_the_value_and_nothing_else():
    r = rewards(5, 16)
    plain, shifted = estimate_value(r), estimate_value(r + 3)
    torch.testing.assert_close(shifted.value, plain.value + 3)
    torch.testing.assert_close(shifted.standard_error, plain.standard_error)


def test_the_estimate_converges_to_the_value():
    estimate = estimate_value(rewards(1, 200_000, scale=2.0))
    assert abs(estimate.value[0] - exact_value(2.0)) < 4 * estimate.standard_error[0]
    assert estimate.standard_error[0] < 0.003


@pytest.mark.parametrize("num_draws", [8, 32, 128])
def test_the_bias_is_jensens(num_draws):
    """E[V_hat] - V = -Var(e^r) / (2 K e^{2V}), up to 4 standard errors and the next order."""
    scale, repeats = 2.0, 200_000 // num_draws * 8
    value = estimate_value(rewards(repeats, num_draws, scale=scale)).value
    predicted = -relative_variance(scale) / (2 * num_draws)
    standard_error = value.std() / math.sqrt(repeats)
    assert abs(value.mean() - exact_value(scale) - predicted) < 4 * standard_error + 2 * predicted**2


@pytest.mark.parametrize("num_draws", [16, 64])
def test_the_standard_error_is_the_standard_deviation_of_repeats(num_draws):
    estimate = estimate_value(rewards(20_000, num_draws, scale=1.0))
    stated, found = estimate.standard_error.square().mean().sqrt(), estimate.value.std()
    assert abs(stated / found - 1) < 0.05


def test_intervals_of_two_standard_errors_cover_the_value_as_often_as_they_say():
    estimate = estimate_value(rewards(20_000, 256, scale=1.0))
    covered = ((estimate.value - exact_value(1.0)).abs() < 2 * estimate.standard_error).double().mean()
    assert abs(covered - 0.9545) < 0.01


def test_the_gradient_is_the_weighted_mean_of_reward_gradients():
    r = rewards(6, 9).requires_grad_()
    (gradient,) = torch.autograd.grad(estimate_value(r).value.sum(), r)
    torch.testing.assert_close(gradient, posterior_weights(r))


def test_the_reweighted_mean_converges_to_the_tilted_posterior_mean():
    mixture = isotropic_mixture(torch.tensor([[-2.0, 0], [2, 1]]).double(), variance=0.5)
    reward = LinearObservation(torch.tensor([1.0, -0.5]).double(), observation=0.5, noise=0.7)
    draws = mixture.sample(200_000, generator=torch.Generator().manual_seed(0)).reshape(100, 2000, 2)
    shift = tilted_mean_shift(draws, reward(draws.flatten(0, 1)).reshape(100, 2000))
    exact = reward.tilt(mixture).mean() - mixture.mean()
    standard_error = shift.std(0) / math.sqrt(100)
    assert ((shift.mean(0) - exact).abs() < 4 * standard_error + 0.005).all()


def test_one_draw_shifts_nothing():
    draws = torch.randn(5, 1, 1, 8, 8)
    assert torch.equal(tilted_mean_shift(draws, torch.randn(5, 1)), torch.zeros(5, 1, 8, 8))


@pytest.mark.parametrize(("num_draws", "kept"), [(1, 0.0), (2, 1 / 2), (4, 3 / 4), (8, 7 / 8)])
def test_weak_rewards_shift_the_mean_by_k_minus_1_over_k_of_what_they_should(num_draws, kept):
    """r = h x_1 with small h and x_1 ~ N(0, 1): the exact shift is h."""
    h, repeats = 0.01, 400_000
    draws = torch.randn(repeats, num_draws, 1, generator=torch.Generator().manual_seed(num_draws)).double()
    ratio = tilted_mean_shift(draws, h * draws[..., 0])[:, 0] / h
    assert abs(ratio.mean() - kept) < 4 * ratio.std() / math.sqrt(repeats) + 1e-3
