import pytest
import torch

from mfm_ray.interpolants import LinearInterpolant, expand_time


def states(num=64, *event, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(num, *event, generator=g, dtype=torch.float64) for _ in range(2)]


def test_the_interpolant_runs_from_noise_to_data():
    x0, x1 = states(8, 1, 4, 4)
    path = LinearInterpolant()
    assert torch.equal(path.sample(x0, x1, torch.zeros(8)).x_t, x0)
    assert torch.equal(path.sample(x0, x1, torch.ones(8)).x_t, x1)


def test_its_velocity_is_its_time_derivative():
    x0, x1 = states(16, 3)
    t = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    path = LinearInterpolant()
    derivative = (path.sample(x0, x1, t + 1e-6).x_t - path.sample(x0, x1, t - 1e-6).x_t) / 2e-6
    torch.testing.assert_close(path.sample(x0, x1, t).velocity, derivative, rtol=0, atol=1e-9)
    c = path.coefficients(t)
    recombined = expand_time(c.alpha_dot, x0) * x0 + expand_time(c.beta_dot, x0) * x1
    torch.testing.assert_close(path.sample(x0, x1, t).velocity, recombined, rtol=0, atol=1e-15)


def test_velocity_and_score_convert_there_and_back():
    x, b = states(16, 5)
    t = torch.linspace(0.01, 0.99, 16, dtype=torch.float64)
    path = LinearInterpolant()
    torch.testing.assert_close(path.velocity_from_score(x, path.score(x, b, t), t), b, rtol=1e-12, atol=1e-12)


def test_the_score_is_tweedies():
    x, b = states(16, 5)
    t = torch.linspace(0.01, 0.99, 16, dtype=torch.float64)
    path, time = LinearInterpolant(), torch.linspace(0.01, 0.99, 16, dtype=torch.float64)[:, None]
    tweedie = (time * path.posterior_mean(x, b, t) - x) / (1 - time) ** 2
    torch.testing.assert_close(path.score(x, b, t), tweedie, rtol=1e-10, atol=1e-10)


def test_the_memoryless_schedule_is_the_general_formula_for_alpha_and_beta():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    c = LinearInterpolant().coefficients(t)
    general = c.beta_dot / c.beta * c.alpha**2 - c.alpha_dot * c.alpha
    torch.testing.assert_close(LinearInterpolant().half_diffusion(t), general, rtol=1e-12, atol=1e-14)


def test_the_memoryless_drift_is_the_velocity_plus_half_the_diffusion_times_the_score():
    x, b = states(16, 2)
    t = torch.linspace(0.01, 0.99, 16, dtype=torch.float64)
    path = LinearInterpolant()
    general = b + expand_time(path.half_diffusion(t), x) * path.score(x, b, t)
    torch.testing.assert_close(path.memoryless_drift(x, b, t), general, rtol=1e-12, atol=1e-12)


def test_times_of_another_batch_are_a_programming_error():
    with pytest.raises(AssertionError, match=r"times \(3,\)"):
        expand_time(torch.zeros(3), torch.zeros(4, 2))
