import pytest
import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap

IMAGE = DataSpace(kind="image", event_shape=(1, 4, 4))

# torch.func.jvp compiles its decompositions with torch's own deprecated torch.jit.script
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def moments() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64))
    return {
        "mean": torch.randn(16, generator=g, dtype=torch.float64),
        "variances": torch.linspace(2, 0.1, 16, dtype=torch.float64),
        "basis": basis,
    }


def network(*, num_classes: int = 0, trained: bool = True) -> ResidualMLPFlowMap:
    """A small network; `trained`: with a random correction, of the size a trained one has."""
    torch.manual_seed(0)
    flow_map = ResidualMLPFlowMap(space=IMAGE, width=32, num_blocks=2, num_classes=num_classes, **moments())
    if trained:
        for layer in (flow_map.network.project, *(block.contract for block in flow_map.network.blocks)):
            torch.nn.init.normal_(layer.weight, std=0.2)
    return flow_map.eval()


def inputs(rows: int = 12, *, t: float | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    x_s, x_t = (torch.randn(rows, 1, 4, 4, generator=g) for _ in range(2))
    s, u = torch.rand(2, rows, generator=g).sort(0).values
    return {"x_s": x_s, "s": s, "u": u, "t": torch.rand(rows, generator=g) if t is None else s * 0 + t, "x_t": x_t}


def test_before_training_it_is_the_exact_map_of_the_gaussian_with_the_datas_moments():
    m, x = moments(), inputs()
    one = GaussianMixture(torch.zeros(1).double(), m["mean"][None], m["variances"][None], m["basis"][None])
    flat = {name: (part.flatten(1) if part.ndim > 1 else part).double() for name, part in inputs(t=0.7).items()}
    exact = GaussianMixtureFlowMap(one, num_inner_steps=100).velocity(**flat)
    found = network(trained=False).velocity(**inputs(t=0.7))
    assert found.shape == x["x_s"].shape
    torch.testing.assert_close(found.flatten(1).double(), exact, rtol=1e-4, atol=1e-4)


def test_at_t_0_the_velocity_does_not_depend_on_the_outer_state():
    x, flow_map = inputs(t=0.0), network()
    assert torch.equal(flow_map.velocity(**x), flow_map.velocity(**(x | {"x_t": 50 * x["x_t"]})))


def test_elsewhere_it_does():
    x, flow_map = inputs(t=0.5), network()
    assert not torch.allclose(flow_map.velocity(**x), flow_map.velocity(**(x | {"x_t": 2 * x["x_t"]})), atol=1e-2)


@pytest.mark.parametrize(("s", "u", "t"), [(0, 0, 0), (1, 1, 0.999), (0, 1, 0.999), (1, 1, 0), (0, 1, 1)])
def test_every_corner_of_time_is_finite(s, u, t):
    x = inputs()
    times = {name: torch.full((12,), float(value)) for name, value in (("s", s), ("u", u), ("t", t))}
    assert torch.isfinite(network().velocity(**(x | times))).all()


def test_forward_mode_derivatives_are_central_differences():
    x, flow_map = {name: part.double() for name, part in inputs(t=0.6).items()}, network().double()
    direction = torch.randn(x["x_s"].shape, generator=torch.Generator().manual_seed(5)).double()

    def along(h: Tensor | float) -> Tensor:
        moved = {"x_s": x["x_s"] + h * direction, "s": 0.2 + 0.3 * x["s"] + h, "u": 0.6 + 0.3 * x["u"] - 0.5 * h}
        return flow_map.velocity(**(x | moved))

    zero = torch.zeros((), dtype=torch.float64)
    _, tangent = torch.func.jvp(along, (zero,), (zero + 1,))
    central = (along(2e-4) - along(-2e-4)) / 4e-4  # the correction is rounded to float32
    torch.testing.assert_close(tangent, central, rtol=2e-3, atol=2e-3)


def test_forward_mode_works_through_the_whole_velocity_at_the_corners_too():
    flow_map = network()
    for s, u, t in [(0.2, 0.7, 0.5), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.999)]:
        x = inputs()
        times = tuple(torch.full((12,), value) for value in (s, u))
        t = torch.full((12,), t)
        at = (x["x_s"], *times)
        rates = (torch.ones_like(x["x_s"]), torch.ones(12), torch.zeros(12))
        value, tangent = torch.func.jvp(
            lambda x_s, s, u, t=t, x=x: flow_map.velocity(x_s, s, u, t=t, x_t=x["x_t"]), at, rates
        )
        torch.testing.assert_close(value, flow_map.velocity(*at, t=t, x_t=x["x_t"]))
        assert torch.isfinite(tangent).all()


def test_no_label_is_the_null_class_and_classes_differ():
    x, flow_map = inputs(), network(num_classes=3)
    null = flow_map.velocity(**x, label=torch.full((12,), 3))
    assert torch.equal(flow_map.velocity(**x), null)
    assert not torch.allclose(flow_map.velocity(**x, label=torch.zeros(12, dtype=torch.int64)), null)


def test_the_weights_alone_make_another_instance_the_same_network():
    trained = network(num_classes=3)
    config = trained.config()
    copy = build_network(config, space=IMAGE, num_classes=3)
    assert isinstance(copy, FlowMap)
    assert copy.config() == config
    copy.load_state_dict(trained.state_dict())
    assert torch.equal(copy.velocity(**inputs()), trained.velocity(**inputs()))


def test_bfloat16_autocast_changes_the_correction_alone():
    x = inputs(t=0.9)
    for flow_map, tolerance in ((network(trained=False), 0.0), (network(), 0.05)):
        plain = flow_map.velocity(**x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(flow_map.velocity(**x), plain, rtol=tolerance, atol=tolerance)


def test_the_posterior_spread_is_that_of_the_gaussian():
    t = torch.tensor([0.0, 0.5, 1.0])
    variances = torch.linspace(2, 0.1, 16)
    exact = [float((variances * (1 - v) ** 2 / (v**2 * variances + (1 - v) ** 2)).sum().sqrt()) for v in (0.0, 0.5)]
    torch.testing.assert_close(network().posterior_spread(t), torch.tensor([*exact, 0.0]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "unknown"}, "network.name='unknown': expected one of .*residual_mlp"),
        ({"width": 8}, "network.name=None: expected one of"),
        ({"name": "residual_mlp", "width": 0, "num_blocks": 1}, "width=0: expected an integer of at least 1"),
        ({"name": "residual_mlp", "width": 8, "num_blocks": 1, "depth": 3}, "depth"),
    ],
)
def test_impossible_networks_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        build_network(config, space=IMAGE)


def test_a_guidance_scale_is_refused_by_a_model_without_any():
    with pytest.raises(ValueError, match=r"cfg_scale=2.0: this model was trained without guidance scales"):
        network().velocity(**inputs(), cfg_scale=2.0)


def test_an_unknown_argument_is_named_with_the_nearest_known_one():
    space = DataSpace(kind="coordinates", event_shape=(2,))
    with pytest.raises(ValueError, match=r"network\.num_block: unknown key; .*did you mean num_blocks\?"):
        build_network({"name": "residual_mlp", "width": 4, "num_block": 1}, space=space)
    with pytest.raises(ValueError, match=r"network.*num_blocks"):
        build_network({"name": "residual_mlp", "width": 4}, space=space)
