import math

import pytest
import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.noise import KeyedNoise

# torch.func.jvp compiles its decompositions with torch's own deprecated torch.jit.script
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def mixture() -> GaussianMixture:
    return isotropic_mixture(torch.tensor([[-1.5, -1], [0.5, 0], [1, 1.5]], dtype=torch.float64), variance=0.5)


def exact_map(num_inner_steps: int = 100) -> FlowMap:
    return GaussianMixtureFlowMap(mixture(), num_inner_steps=num_inner_steps)


def inner_states(rows: int = 12) -> dict[str, Tensor]:
    """x_s, s, u, t, x_t of `rows` samples, with s < u, the posterior being anything from sharp to broad."""
    g = torch.Generator().manual_seed(0)
    s, length, t = (torch.rand(rows, generator=g, dtype=torch.float64) for _ in range(3))
    s, t = 0.9 * s, 0.05 + 0.75 * t
    x1 = mixture().sample(rows, generator=g)
    e, eps = (torch.randn(rows, 2, generator=g, dtype=torch.float64) for _ in range(2))
    x_s, x_t = s[:, None] * x1 + (1 - s[:, None]) * eps, t[:, None] * x1 + (1 - t[:, None]) * e
    return {"x_s": x_s, "s": s, "u": s + (1 - s) * (0.1 + 0.9 * length), "t": t, "x_t": x_t}


def test_the_map_is_the_identity_where_s_is_u():
    x = inner_states()
    assert torch.equal(exact_map()(x["x_s"], x["s"], x["s"], t=x["t"], x_t=x["x_t"]), x["x_s"])


def test_the_exact_map_is_a_semigroup():
    x, flow_map = inner_states(), exact_map()
    condition = {"t": x["t"], "x_t": x["x_t"]}
    w = x["s"] + 0.3 * (x["u"] - x["s"])
    halfway = flow_map(x["x_s"], x["s"], w, **condition)
    twice = flow_map(halfway, w, x["u"], **condition)
    torch.testing.assert_close(flow_map(x["x_s"], x["s"], x["u"], **condition), twice, rtol=0, atol=1e-9)


def derivative(flow_map: FlowMap, x: dict[str, Tensor], *, s: float, u: float, along: Tensor) -> tuple[Tensor, Tensor]:
    """v_{s,u}(x_s) and its derivative when s, u and x_s move at these rates."""

    def average(s: Tensor, u: Tensor, x_s: Tensor) -> Tensor:
        return flow_map.velocity(x_s, s, u, t=x["t"], x_t=x["x_t"])

    rates = (torch.full_like(x["s"], s), torch.full_like(x["u"], u), along)
    return torch.func.jvp(average, (x["s"], x["u"], x["x_s"]), rates)


def test_the_eulerian_identity_holds_on_the_exact_map():
    """v_su = v_ss + (u - s) D v_su, with D along the inner trajectory."""
    x, flow_map = inner_states(), exact_map()
    v_ss = flow_map.velocity(x["x_s"], x["s"], x["s"], t=x["t"], x_t=x["x_t"])
    v_su, along_s = derivative(flow_map, x, s=1, u=0, along=v_ss)
    span = (x["u"] - x["s"])[:, None]
    torch.testing.assert_close(v_su, v_ss + span * along_s, rtol=0, atol=1e-8)


def test_the_lagrangian_identity_holds_on_the_exact_map():
    """d/du X_su = v_su + (u - s) d/du v_su = v_uu(X_su)."""
    x, flow_map = inner_states(), exact_map()
    v_su, along_u = derivative(flow_map, x, s=0, u=1, along=torch.zeros_like(x["x_s"]))
    span = (x["u"] - x["s"])[:, None]
    end = x["x_s"] + span * v_su
    v_uu = flow_map.velocity(end, x["u"], x["u"], t=x["t"], x_t=x["x_t"])
    torch.testing.assert_close(v_su + span * along_u, v_uu, rtol=0, atol=1e-8)


def test_the_progressive_identity_holds_on_the_exact_map():
    """v_su = g v_sw + (1 - g) v_wu(X_sw)."""
    x, flow_map = inner_states(), exact_map()
    condition = {"t": x["t"], "x_t": x["x_t"]}
    w = x["s"] + 0.37 * (x["u"] - x["s"])
    v_sw = flow_map.velocity(x["x_s"], x["s"], w, **condition)
    v_wu = flow_map.velocity(x["x_s"] + (w - x["s"])[:, None] * v_sw, w, x["u"], **condition)
    v_su = flow_map.velocity(x["x_s"], x["s"], x["u"], **condition)
    torch.testing.assert_close(v_su, 0.37 * v_sw + 0.63 * v_wu, rtol=0, atol=5e-10)


def test_the_drift_is_the_marginal_velocity():
    x = inner_states()
    torch.testing.assert_close(
        exact_map().drift(x["x_t"], x["t"]), mixture().velocity(x["x_t"], x["t"]), rtol=0, atol=1e-14
    )


def test_posterior_draws_have_one_row_per_request_and_differ():
    x = inner_states(rows=3)
    draws = exact_map(10).posterior_draws(x["x_t"], x["t"], num_draws=5, generator=KeyedNoise.for_images(0, 3))
    assert draws.shape == (3, 5, 2)
    assert draws.flatten(0, 1).unique(dim=0).shape[0] == 15


def test_draws_of_a_row_do_not_depend_on_the_others():
    x, noise, flow_map = inner_states(rows=8), KeyedNoise.for_images(0, 8), exact_map(10)
    everyone = flow_map.posterior_draws(x["x_t"], x["t"], num_draws=3, generator=noise)
    alone = flow_map.posterior_draws(x["x_t"][5:6], x["t"][5:6], num_draws=3, generator=noise[5:6])
    torch.testing.assert_close(everyone[5:6], alone, rtol=0, atol=1e-13)


def test_several_steps_are_the_same_draw_when_the_map_is_exact():
    x, noise = inner_states(rows=4), KeyedNoise.for_images(0, 4)
    one, four = (
        exact_map().posterior_draws(x["x_t"], x["t"], num_draws=2, generator=noise, num_steps=steps) for steps in (1, 4)
    )
    torch.testing.assert_close(one, four, rtol=0, atol=1e-7)


def test_draws_reparametrise_the_posterior_mean():
    """d x_1 / d x_t at fixed inner noise averages to d E[x_1 | x_t] / d x_t, within 4 standard errors."""
    n = 1000
    x_t = torch.tensor([[0.3, 0.1]]).double().expand(n, 2).clone().requires_grad_()
    t = torch.full((n,), 0.6).double()
    draws = exact_map(40).posterior_draws(x_t, t, num_draws=1, generator=KeyedNoise.for_images(0, n))
    (of_draws,) = torch.autograd.grad(draws.sum(), x_t)
    (of_mean,) = torch.autograd.grad(mixture().posterior(x_t, t).mean().sum(), x_t)
    assert ((of_draws.mean(0) - of_mean[0]).abs() < 4 * of_draws.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("argument", ["num_draws", "num_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_counts_below_one_are_refused_by_name(argument, value):
    x = inner_states(rows=1)
    arguments = {"num_draws": 1, "num_steps": 1} | {argument: value}
    with pytest.raises(ValueError, match=f"{argument}={value}: expected an integer of at least 1"):
        exact_map(1).posterior_draws(x["x_t"], x["t"], generator=torch.Generator(), **arguments)
