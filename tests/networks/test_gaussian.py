"""The oracle itself: each closed form against another route to the same number, in float64."""

import math

import pytest
import torch
from torch import Tensor

from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap, LinearObservation, isotropic_mixture


def anisotropic_mixture() -> GaussianMixture:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(3, 2, 2, generator=g, dtype=torch.float64)
    covariances = root @ root.mT + 0.2 * torch.eye(2, dtype=torch.float64)
    means = 2 * torch.randn(3, 2, generator=g, dtype=torch.float64)
    return GaussianMixture.from_covariances(
        torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log(), means, covariances
    )


def noised(mixture: GaussianMixture, times: list[float], *, rows: int = 50, seed: int = 1) -> tuple[Tensor, Tensor]:
    """States x_t of the mixture, `rows` for each time, and the times."""
    g = torch.Generator().manual_seed(seed)
    t = torch.tensor(times, dtype=torch.float64).repeat_interleave(rows)
    x0 = torch.randn(len(t), mixture.dim, generator=g, dtype=torch.float64)
    return LinearInterpolant().sample(x0, mixture.sample(len(t), generator=g), t).x_t, t


def observation() -> LinearObservation:
    return LinearObservation(torch.tensor([1.2, -0.8], dtype=torch.float64), observation=-1.0, noise=0.5)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def test_covariances_come_back_from_their_axes():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    covariances = root @ root.mT
    mixture = GaussianMixture.from_covariances(
        torch.zeros(2).double(), torch.zeros(2, 3, dtype=torch.float64), covariances
    )
    torch.testing.assert_close(mixture.covariances, covariances, rtol=0, atol=1e-14)


def test_the_density_is_torchs():
    mixture = anisotropic_mixture()
    components = torch.distributions.MultivariateNormal(mixture.means, mixture.covariances)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=mixture.log_weights), components
    )
    x = 3 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(mixture.log_prob(x), reference.log_prob(x), rtol=1e-12, atol=1e-12)


def test_samples_have_the_mixtures_moments():
    mixture = anisotropic_mixture()
    n = 50_000
    x = mixture.sample(n, generator=torch.Generator().manual_seed(0))
    covariance = mixture.covariance()
    standard_error = (covariance.diagonal() / n).sqrt()
    assert ((x.mean(0) - mixture.mean()).abs() < 4 * standard_error).all()
    squares = (x - mixture.mean()).square()
    assert ((squares.mean(0) - covariance.diagonal()).abs() < 4 * squares.std(0) / math.sqrt(n)).all()


def test_the_score_is_the_gradient_of_the_log_density():
    mixture = anisotropic_mixture()
    x, t = noised(mixture, [0.0, 0.01, 0.4, 0.99])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_marginal(x, t).sum(), x)
    torch.testing.assert_close(mixture.score(x, t), gradient, rtol=1e-11, atol=1e-11)


def test_velocity_and_score_agree_through_the_interpolant():
    mixture = anisotropic_mixture()
    x, t = noised(mixture, [0.01, 0.1, 0.4, 0.8, 0.99])
    from_score = LinearInterpolant().velocity_from_score(x, mixture.score(x, t), t)
    assert relative_error(from_score, mixture.velocity(x, t)) < 1e-11


def test_the_posterior_is_bayes_rule():
    mixture = anisotropic_mixture()
    x, t = noised(mixture, [0.05, 0.35, 0.9])
    x1 = mixture.sample(len(x), generator=torch.Generator().manual_seed(5))
    log_likelihood = torch.distributions.Normal(t[:, None] * x1, 1 - t[:, None]).log_prob(x).sum(1)
    bayes = mixture.log_prob(x1) + log_likelihood - mixture.log_marginal(x, t)
    torch.testing.assert_close(mixture.posterior(x, t).log_prob(x1), bayes, rtol=1e-10, atol=1e-10)


def test_both_forms_of_the_posterior_covariance_agree():
    mixture = anisotropic_mixture()
    x, t = noised(mixture, [0.35], rows=4)
    s, eye, time = mixture.covariances, torch.eye(2).double(), t[:, None, None, None]
    m = time**2 * s + (1 - time) ** 2 * eye
    short = (1 - time) ** 2 * s @ torch.linalg.inv(m)
    long = s - time**2 * s @ torch.linalg.inv(m) @ s
    torch.testing.assert_close(mixture.posterior(x, t).covariances, short, rtol=0, atol=2e-15)
    torch.testing.assert_close(mixture.posterior(x, t).covariances, long, rtol=0, atol=2e-15)


def test_the_posterior_mean_is_tweedies():
    mixture = anisotropic_mixture()
    x, t = noised(mixture, [0.0, 0.3, 0.9, 0.999])
    tweedie = LinearInterpolant().posterior_mean(x, mixture.velocity(x, t), t)
    torch.testing.assert_close(mixture.posterior(x, t).mean(), tweedie, rtol=1e-12, atol=1e-12)


def test_the_value_function_is_the_log_ratio_of_tilted_and_plain_density():
    """V_t = log p*_t - log p_t + log Z at every t, to 4e-12."""
    mixture, reward = anisotropic_mixture(), observation()
    x, t = noised(mixture, [0.01, 0.1, 0.4, 0.8, 0.99])
    tilted = reward.tilt(mixture)
    log_z = torch.logsumexp(reward.log_evidence(mixture), dim=-1)
    ratio = tilted.log_marginal(x, t) - mixture.log_marginal(x, t) + log_z
    torch.testing.assert_close(reward.value(mixture, x, t), ratio, rtol=0, atol=4e-12)


def test_the_value_is_the_reward_at_t_1_and_constant_at_t_0():
    mixture, reward = anisotropic_mixture(), observation()
    x, t = noised(mixture, [0.0])
    log_z = torch.logsumexp(reward.log_evidence(mixture), dim=-1)
    torch.testing.assert_close(reward.value(mixture, x, t), log_z.expand(len(x)), rtol=0, atol=1e-14)
    torch.testing.assert_close(reward.value(mixture, x, torch.ones_like(t)), reward(x), rtol=1e-12, atol=1e-12)


def test_the_optimal_drift_is_the_drift_plus_half_the_diffusion_times_the_values_gradient():
    """b* - b = (1 - t) / t grad V, with grad V by autograd; relative to b*, 2e-13."""
    mixture, reward = anisotropic_mixture(), observation()
    x, t = noised(mixture, [0.01, 0.1, 0.4, 0.8, 0.99])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.value(mixture, x, t).sum(), x)
    exact = reward.tilt(mixture).velocity(x, t)
    corrected = mixture.velocity(x, t) + ((1 - t) / t)[:, None] * gradient
    assert relative_error(corrected.detach(), exact.detach()) < 2e-13


def test_the_closed_form_of_the_values_gradient_is_autograds():
    """grad V = sum_k pi_k (grad log gamma_k + (rho_k / v_k) (dm_k/dx)^T a)."""
    mixture, reward = anisotropic_mixture(), observation()
    x, t = noised(mixture, [0.35])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.value(mixture, x, t).sum(), x)
    posterior, a, time = mixture.posterior(x, t), reward.direction, t[:, None, None, None]
    inverse = torch.linalg.inv(time**2 * mixture.covariances + (1 - time) ** 2 * torch.eye(2).double())
    summands = torch.softmax(reward.log_evidence(posterior), dim=-1)
    offsets = x[:, None] - t[:, None, None] * mixture.means
    grad_log_gamma = -torch.einsum("bkij,bkj->bki", inverse, offsets) - mixture.score(x, t)[:, None]
    variance = torch.einsum("i,bkij,j->bk", a, posterior.covariances, a) + reward.noise**2
    residual = reward.observation - posterior.means @ a
    pull = torch.einsum("bkij,i->bkj", time * mixture.covariances @ inverse, a)
    closed = (summands[..., None] * (grad_log_gamma + (residual / variance)[..., None] * pull)).sum(1)
    torch.testing.assert_close(closed, gradient, rtol=0, atol=2e-14)


def test_the_posterior_mean_forms_of_the_correction_agree():
    """(1 - t) / t grad V = (E*[x_1 | x] - E[x_1 | x]) / (1 - t)."""
    mixture, reward = anisotropic_mixture(), observation()
    x, t = noised(mixture, [0.01, 0.4, 0.9])
    posterior = mixture.posterior(x, t)
    shift = reward.tilt(posterior).mean() - posterior.mean()
    correction = reward.tilt(mixture).velocity(x, t) - mixture.velocity(x, t)
    torch.testing.assert_close(shift / (1 - t)[:, None], correction, rtol=1e-9, atol=1e-11)


def test_tilting_multiplies_the_density_by_the_exponential_of_the_reward():
    mixture, reward = anisotropic_mixture(), observation()
    x = mixture.sample(100, generator=torch.Generator().manual_seed(0))
    log_z = torch.logsumexp(reward.log_evidence(mixture), dim=-1)
    torch.testing.assert_close(
        reward.tilt(mixture).log_prob(x), mixture.log_prob(x) + reward(x) - log_z, rtol=1e-11, atol=1e-11
    )


def test_the_map_pushes_noise_to_the_posterior():
    """Mean and covariance of 8,000 draws at one state, within 4 standard errors."""
    mixture = isotropic_mixture(torch.tensor([[-3.0, -3], [0, 0], [3, 3]]).double(), variance=0.5)
    flow_map = GaussianMixtureFlowMap(mixture)
    x_t, t = torch.tensor([[0.4, -0.2]]).double(), torch.tensor([0.3]).double()
    draws = flow_map.posterior_draws(x_t, t, num_draws=8_000, generator=torch.Generator().manual_seed(0))[0]
    posterior = mixture.posterior(x_t, t)
    n = len(draws)
    assert ((draws.mean(0) - posterior.mean()[0]).abs() < 4 * draws.std(0) / math.sqrt(n)).all()
    squares = (draws - posterior.mean()).square()
    exact = posterior.covariance()[0].diagonal()
    assert ((squares.mean(0) - exact).abs() < 4 * squares.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize(("t", "bound"), [(0.0, 5e-5), (0.3, 5e-5), (0.9, 5e-5), (0.99, 5e-3)])
def test_the_default_steps_resolve_the_map_to_a_small_part_of_the_posteriors_spread(t, bound):
    mixture = isotropic_mixture(torch.tensor([[-3.0, -3], [0, 0], [3, 3]]).double(), variance=0.5)
    x_t, times = noised(mixture, [t], rows=100)
    noise = torch.randn(100, 2, generator=torch.Generator().manual_seed(2)).double()
    zero, one = torch.zeros(100).double(), torch.ones(100).double()
    coarse, fine = (
        GaussianMixtureFlowMap(mixture, num_inner_steps=steps)(noise, zero, one, t=times, x_t=x_t)
        for steps in (40, 640)
    )
    spread = GaussianMixtureFlowMap(mixture).posterior_spread(times)[0]
    assert float((coarse - fine).norm(dim=1).max() / spread) < bound


def test_short_jumps_do_not_cancel_in_float32():
    mixture = isotropic_mixture(torch.tensor([[-3.0, -3], [0, 0], [3, 3]]), variance=0.5)
    flow_map = GaussianMixtureFlowMap(mixture)
    x_t, t = (part.float() for part in noised(anisotropic_mixture(), [0.3], rows=100))
    s = torch.full((100,), 0.5)
    diagonal = flow_map.velocity(x_t, s, s, t=t, x_t=x_t)
    jump = flow_map.velocity(x_t, s, s + 1e-6, t=t, x_t=x_t)
    torch.testing.assert_close(jump, diagonal, rtol=0, atol=5e-5)
