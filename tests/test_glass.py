import pytest
import torch
from torch import Tensor

from mfm_ray.glass import merge_observations, posterior_velocity
from mfm_ray.networks.gaussian import GaussianMixture


def mixture(dtype: torch.dtype = torch.float64) -> GaussianMixture:
    """Three anisotropic components in the plane."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(3, 2, 2, generator=g, dtype=torch.float64)
    covariances = root @ root.mT + 0.2 * torch.eye(2, dtype=torch.float64)
    means = 2 * torch.randn(3, 2, generator=g, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    return GaussianMixture.from_covariances(weights.log(), means, covariances).to(dtype)


def joint_states(s: Tensor, t: Tensor, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inner and outer states (J_s, x_t) about one clean sample each."""
    g = torch.Generator().manual_seed(seed)
    x1 = mixture().sample(len(s), generator=g)
    e, eps = (torch.randn(len(s), 2, generator=g, dtype=torch.float64) for _ in range(2))
    return s[:, None] * x1 + (1 - s[:, None]) * eps, t[:, None] * x1 + (1 - t[:, None]) * e


def exact(x_s: Tensor, s: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return mixture().posterior(x_t, t).velocity(x_s, s)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def test_the_posterior_velocity_is_the_exact_inner_drift():
    g = torch.Generator().manual_seed(3)
    s, t = (0.001 + 0.998 * torch.rand(400, generator=g, dtype=torch.float64) for _ in range(2))
    x_s, x_t = joint_states(s, t)
    found = posterior_velocity(mixture().velocity, x_s, s, x_t=x_t, t=t)
    assert relative_error(found, exact(x_s, s, x_t, t)) < 1e-12


def test_it_is_exact_near_the_corners():
    for s, t in [(1e-4, 1e-4), (1e-7, 1e-3), (1e-3, 1e-7), (0.9999, 0.999), (0.999, 1e-3), (1e-6, 0.999)]:
        s, t = (torch.full((50,), value, dtype=torch.float64) for value in (s, t))
        x_s, x_t = joint_states(s, t)
        found = posterior_velocity(mixture().velocity, x_s, s, x_t=x_t, t=t)
        assert relative_error(found, exact(x_s, s, x_t, t)) < 1e-9, (s[0], t[0])


def times(value: float, like: Tensor) -> Tensor:
    return torch.full_like(like, value)


def test_its_limits_are_those_of_the_derivation():
    t = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)
    b = mixture().velocity
    x_s, x_t = joint_states(t.flip(0), t)
    at_s_0 = posterior_velocity(b, x_s, times(0, t), x_t=x_t, t=t)
    torch.testing.assert_close(at_s_0, x_t + (1 - t[:, None]) * b(x_t, t) - x_s, rtol=0, atol=2e-14)
    at_s_1 = posterior_velocity(b, x_s, times(1, t), x_t=x_t, t=t)
    torch.testing.assert_close(at_s_1, b(x_s, times(1, t)), rtol=0, atol=2e-14)
    at_t_1 = posterior_velocity(b, x_s, t, x_t=x_t, t=times(1, t))
    torch.testing.assert_close(at_t_1, (x_t - x_s) / (1 - t[:, None]), rtol=1e-13, atol=2e-14)


def test_at_t_0_it_is_the_marginal_velocity_whatever_the_outer_state():
    s = torch.linspace(0, 1, 21, dtype=torch.float64)
    x_s, x_t = joint_states(s, times(0, s))
    found = posterior_velocity(mixture().velocity, x_s, s, x_t=1e6 * x_t, t=times(0, s))
    assert torch.equal(found, mixture().velocity(x_s, s))


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 1e-38), (1e-30, 1e-30)])
def test_no_corner_gives_nan(s, t):
    x = torch.ones(4, 2)
    merged = merge_observations(x, times(s, x[:, 0]), x, times(t, x[:, 0]))
    for part in (merged.state, merged.time, merged.outer, merged.inner, merged.scale):
        assert torch.isfinite(part).all()


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_float32_coefficients_keep_their_digits_however_small_the_times(scale):
    g = torch.Generator().manual_seed(0)
    s, t = scale * torch.rand(500, generator=g), scale * torch.rand(500, generator=g) ** 3
    t = t.clamp_max(0.999)
    x = torch.randn(500, 2, generator=g)
    single = merge_observations(x, s, x, t)
    double = merge_observations(x.double(), s.double(), x.double(), t.double())
    for name in ("time", "outer", "inner", "scale"):
        # relative to the coefficient itself: nothing was lost to cancellation
        torch.testing.assert_close(getattr(single, name).double(), getattr(double, name), rtol=3e-6, atol=1e-30)


def test_the_merged_observation_says_what_both_say():
    """E[x_1 | merged] = E[x_1 | both], by Bayes' rule on the posterior mixture."""
    g = torch.Generator().manual_seed(3)
    s, t = (0.05 + 0.9 * torch.rand(100, generator=g, dtype=torch.float64) for _ in range(2))
    x_s, x_t = joint_states(s, t)
    merged = merge_observations(x_s, s, x_t, t)
    both = mixture().posterior(x_t, t).posterior(x_s, s).mean()
    torch.testing.assert_close(mixture().posterior(merged.state, merged.time).mean(), both, rtol=1e-11, atol=1e-11)
