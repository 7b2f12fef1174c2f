"""The closed form of one Gaussian, against the mixture oracle with one component."""

import pytest
import torch
from torch import Tensor

from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap
from mfm_ray.networks.preconditioning import GaussianPreconditioner, GaussianVelocity

SIZE = 3


def moments() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64))
    mean = torch.randn(SIZE, generator=g, dtype=torch.float64)
    return {"mean": mean, "variances": torch.tensor([4.0, 1.0, 0.05]).double(), "basis": basis}


def gaussian() -> GaussianMixture:
    m = moments()
    return GaussianMixture(torch.zeros(1).double(), m["mean"][None], m["variances"][None], m["basis"][None])


def states(s: float, t: float, rows: int = 200) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x1 = gaussian().sample(rows, generator=g)
    e, eps = (torch.randn(rows, SIZE, generator=g, dtype=torch.float64) for _ in range(2))
    return s * x1 + (1 - s) * eps, t * x1 + (1 - t) * e


def closed_form(x_s: Tensor, s: float, u: float, x_t: Tensor, t: float) -> GaussianVelocity:
    p = GaussianPreconditioner(**moments())
    s, u, t = (torch.full((len(x_s),), time) for time in (s, u, t))
    return p(p.rotate(x_s.float()), s, u, y_t=p.rotate(x_t.float()), t=t)


def velocity(x_s: Tensor, s: float, u: float, x_t: Tensor, t: float) -> Tensor:
    p = GaussianPreconditioner(**moments())
    return p.rotate_back(closed_form(x_s, s, u, x_t, t).velocity, x_s)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 0.95])
@pytest.mark.parametrize(("s", "u"), [(0.0, 1.0), (0.0, 0.0), (0.2, 0.6), (0.9, 1.0), (0.999, 0.9995), (1.0, 1.0)])
def test_average_velocities_are_exact(s, u, t):
    """Against 200 Runge-Kutta steps in float64; float32's tolerance."""
    x_s, x_t = states(s, t)
    time = {name: torch.full((len(x_s),), value, dtype=torch.float64) for name, value in (("s", s), ("u", u), ("t", t))}
    oracle = GaussianMixtureFlowMap(gaussian(), num_inner_steps=200)
    exact = oracle.velocity(x_s, time["s"], time["u"], t=time["t"], x_t=x_t)
    torch.testing.assert_close(velocity(x_s, s, u, x_t, t).double(), exact, rtol=1e-4, atol=1e-4)


def test_the_jump_to_the_end_has_the_posterior_covariance():
    """A draw is m + C^(1/2) eps in each principal direction, exactly."""
    p, t = GaussianPreconditioner(**moments()), torch.full((200,), 0.6)
    _, x_t = states(0.0, 0.6)
    eps = torch.randn(200, SIZE, generator=torch.Generator().manual_seed(2))
    zero, one = torch.zeros(200), torch.ones(200)
    draws = p.rotate(eps) + p(p.rotate(eps), zero, one, y_t=p.rotate(x_t.float()), t=t).velocity
    mean = p.rotate(gaussian().posterior(x_t, t.double()).mean().float())
    torch.testing.assert_close(draws, mean + p.posterior_variances(t).sqrt() * p.rotate(eps), rtol=1e-4, atol=1e-5)


CORNERS = [(0, 0, 0), (1, 1, 0.999), (1, 1, 0), (0, 1, 0), (0, 1, 0.999), (0.9999999, 1, 0.5), (1e-7, 2e-7, 1e-7)]


@pytest.mark.parametrize(("s", "u", "t"), [*CORNERS, (0.5, 1, 1), (1, 1, 1)])
def test_every_corner_of_time_is_finite_even_where_the_data_never_vary(s, u, t):
    flat = moments() | {"variances": torch.tensor([4.0, 1.0, 0.0])}
    p, x_s, x_t = GaussianPreconditioner(**flat), *states(s, t)
    s, u, t = (torch.full((len(x_s),), float(time)) for time in (s, u, t))
    found = p(p.rotate(x_s.float()), s, u, y_t=p.rotate(x_t.float()), t=t)
    for name, part in vars(found).items():
        assert torch.isfinite(part).all(), name


@pytest.mark.parametrize(("s", "u", "t"), [(0.5, 0.6, 0.5), *CORNERS])
def test_float32_keeps_its_digits_at_the_corners(s, u, t):
    """Velocity within 2e-3 of float64 on the same float32 inputs: a thousandth of the posterior's size at t = 0.999."""
    single = GaussianPreconditioner(**moments())
    double = GaussianPreconditioner(**moments()).double()
    y_s, y_t = (single.rotate(x.float()) for x in states(s, t))
    times = [torch.full((len(y_s),), float(time)) for time in (s, u, t)]
    coarse = single(y_s, times[0], times[1], y_t=y_t, t=times[2])
    fine = double(y_s.double(), *(x.double() for x in times[:2]), y_t=y_t.double(), t=times[2].double())
    torch.testing.assert_close(coarse.velocity.double(), fine.velocity, rtol=0, atol=2e-3)
    assert (coarse.merged_time.double() - fine.merged_time).abs().max() < 1e-6


@pytest.mark.parametrize(("s", "t"), [(0.01, 0.3), (0.5, 0.5), (0.97, 0.1), (0.6, 0.95)])
def test_what_the_network_sees_has_unit_variance_times_the_squared_correlation(s, t):
    rows = 20_000
    found = closed_form(*(lambda x: (x[0], s, s, x[1], t))(states(s, t, rows)))
    variance, merged_time = torch.tensor([4.0, 1.0, 0.05]), found.merged_time[0]
    correlation = t**2 * variance / (t**2 * variance + (1 - t) ** 2)
    merged = merged_time**2 * variance / (merged_time**2 * variance + (1 - merged_time) ** 2)
    tolerance = 5 * (2 / rows) ** 0.5
    torch.testing.assert_close(found.inner.var(0), torch.ones(SIZE), rtol=tolerance, atol=0)
    torch.testing.assert_close(found.outer.var(0), correlation, rtol=tolerance, atol=0)
    torch.testing.assert_close(found.merged.var(0), merged, rtol=tolerance, atol=0)


def test_the_scale_is_the_standard_deviation_of_the_target():
    """sd(x_1 - eps | J_s, x_t) = sqrt(C) / sqrt(s^2 C + (1 - s)^2) in each direction."""
    s, t = 0.4, 0.3
    x_s, x_t = states(s, t)
    both = gaussian().posterior(x_t, torch.full((200,), t).double()).posterior(x_s, torch.full((200,), s).double())
    exact = both.variances[:, 0].sqrt() / (1 - s)
    torch.testing.assert_close(closed_form(x_s, s, s, x_t, t).scale.double(), exact, rtol=1e-5, atol=0)


def test_at_t_0_the_outer_state_leaves_no_trace():
    x_s, x_t = states(0.4, 0.0)
    found, other = (vars(closed_form(x_s, 0.4, 0.8, x, 0.0)) for x in (x_t, -100 * x_t))
    assert all(torch.equal(found[name], other[name]) for name in found)


def test_autocast_leaves_the_closed_form_in_float32():
    x_s, x_t = states(0.9, 0.99)
    plain = velocity(x_s, 0.9, 1.0, x_t, 0.99)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(velocity(x_s, 0.9, 1.0, x_t, 0.99), plain)
