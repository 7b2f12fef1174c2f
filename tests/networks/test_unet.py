"""The UNet: what it is before training, what holds for any weights, and that it learns."""

import math

import pytest
import torch
from torch import Tensor

from mfm_ray.config import compose
from mfm_ray.data import Batch
from mfm_ray.data_space import DataSpace
from mfm_ray.networks import build_network
from mfm_ray.networks.flops import forward_flops
from mfm_ray.networks.gaussian import GaussianMixture, GaussianMixtureFlowMap
from mfm_ray.networks.unet import UNetFlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import named_objective
from mfm_ray.pretrained import load_flow_map, save_model
from mfm_ray.training.loss_module import LossModule

# torch.func.jvp compiles its decompositions with torch's own deprecated torch.jit.script
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")

SMALL = {"base_width": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "attention_levels": (1,)}
SIDES = {8: {}, 7: {}, 28: {"patch_size": 4}}


def space(side: int) -> DataSpace:
    return DataSpace(kind="image", event_shape=(1, side, side))


def moments(side: int) -> dict[str, Tensor]:
    g, size = torch.Generator().manual_seed(0), side * side
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    mean = 0.3 * torch.randn(size, generator=g, dtype=torch.float64)
    return {"mean": mean, "variances": torch.linspace(2, 0.05, size, dtype=torch.float64), "basis": basis}


def network(side: int = 8, *, trained: bool = True, **changes) -> UNetFlowMap:
    """A small network; `trained`: with a random correction, of the size a trained one has."""
    torch.manual_seed(0)
    arguments = {"space": space(side), **SMALL, "condition_width": 16, **moments(side), **SIDES[side]}
    flow_map = UNetFlowMap(**(arguments | changes))
    for parameter in flow_map.parameters():
        if trained and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return flow_map.eval()


def inputs(side: int = 8, rows: int = 6, *, t: float | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    x_s, x_t = (torch.randn(rows, 1, side, side, generator=g) for _ in range(2))
    s, u = torch.rand(2, rows, generator=g).sort(0).values
    return {"x_s": x_s, "s": s, "u": u, "t": torch.rand(rows, generator=g) if t is None else s * 0 + t, "x_t": x_t}


@pytest.mark.parametrize("side", SIDES)
def test_before_training_it_is_the_exact_map_of_the_gaussian_with_the_datas_moments(side):
    m = moments(side)
    one = GaussianMixture(torch.zeros(1).double(), m["mean"][None], m["variances"][None], m["basis"][None])
    x = inputs(side, t=0.7)
    flat = {name: (part.flatten(1) if part.ndim > 1 else part).double() for name, part in x.items()}
    exact = GaussianMixtureFlowMap(one, num_inner_steps=100).velocity(**flat)
    found = network(side, trained=False, num_classes=10).velocity(**x)
    assert found.shape == x["x_s"].shape
    torch.testing.assert_close(found.flatten(1).double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", SIDES)
def test_sides_of_any_kind_come_out_as_they_went_in(side):
    found = network(side).velocity(**inputs(side))
    assert found.shape == (6, 1, side, side)
    assert not torch.allclose(found, network(side, trained=False).velocity(**inputs(side)), atol=1e-2)


def test_at_t_0_the_velocity_does_not_depend_on_the_outer_state():
    x, flow_map = inputs(t=0.0), network()
    assert torch.equal(flow_map.velocity(**x), flow_map.velocity(**(x | {"x_t": 50 * x["x_t"]})))


def test_elsewhere_it_does():
    x, flow_map = inputs(t=0.5), network()
    assert not torch.allclose(flow_map.velocity(**x), flow_map.velocity(**(x | {"x_t": 2 * x["x_t"]})), atol=1e-2)


@pytest.mark.parametrize(("s", "u", "t"), [(0, 0, 0), (1, 1, 0.999), (0, 1, 0.999), (1, 1, 0), (0, 1, 1)])
def test_every_corner_of_time_is_finite(s, u, t):
    times = {name: torch.full((6,), float(value)) for name, value in (("s", s), ("u", u), ("t", t))}
    assert torch.isfinite(network().velocity(**(inputs() | times))).all()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    x, flow_map = inputs(), network()
    first = {name: part[:1] for name, part in x.items()}
    torch.testing.assert_close(flow_map.velocity(**first), flow_map.velocity(**x)[:1], rtol=1e-4, atol=1e-4)


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


def test_no_label_is_the_null_class_and_classes_differ():
    x, flow_map = inputs(), network(num_classes=3)
    null = flow_map.velocity(**x, label=torch.full((6,), 3))
    assert torch.equal(flow_map.velocity(**x), null)
    assert not torch.allclose(flow_map.velocity(**x, label=torch.zeros(6, dtype=torch.int64)), null)


def test_a_guidance_scale_is_told_by_the_nearest_one_known():
    x, flow_map = inputs(), network(cfg_scales=(2.0, 4.0))
    assert flow_map.cfg_scales == (2.0, 4.0)
    one, two, four = (flow_map.velocity(**x, cfg_scale=scale) for scale in (1.0, 2.1, 4.0))
    assert torch.equal(flow_map.velocity(**x), one)
    assert not torch.allclose(one, two)
    mixed = flow_map.velocity(**x, cfg_scale=torch.tensor([2.0] * 3 + [4.0] * 3))
    torch.testing.assert_close(mixed, torch.cat([two[:3], four[3:]]), rtol=1e-4, atol=1e-4)


def test_a_guidance_scale_is_refused_by_a_model_without_any():
    with pytest.raises(ValueError, match=r"cfg_scale=2.0: this model was trained without guidance scales"):
        network().velocity(**inputs(), cfg_scale=2.0)


def test_bfloat16_autocast_changes_the_correction_alone():
    x = inputs(t=0.9)
    for flow_map, tolerance in ((network(trained=False), 0.0), (network(), 0.05)):
        plain = flow_map.velocity(**x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(flow_map.velocity(**x), plain, rtol=tolerance, atol=tolerance)


def test_a_model_directory_brings_it_back(tmp_path):
    trained = network(num_classes=3, cfg_scales=(2.0,))
    config = {"data": {"name": "digits", **space(8).config(), "num_classes": 3, "class_names": ["a", "b", "c"]}}
    save_model(tmp_path / "model", trained, config=config | {"training": {}})
    loaded = load_flow_map(tmp_path / "model")
    assert loaded.config() == trained.config()
    assert torch.equal(loaded.velocity(**inputs(), cfg_scale=2.0), trained.velocity(**inputs(), cfg_scale=2.0))


def composed(*words: str, side: int = 28) -> UNetFlowMap:
    """The network of a command line, as training builds it."""
    network = compose("train", words).values["network"]
    return build_network(network, space=space(side), num_classes=10, moments=moments(side))


def test_the_papers_network_has_its_size_and_learns():
    flow_map = composed("network=unet")
    assert 8e6 < sum(parameter.numel() for parameter in flow_map.parameters()) < 10e6
    losses = descend(flow_map, side=28, rows=2, steps=8)
    assert losses[-1] < 0.9 * losses[0], losses


def test_the_recipe_for_a_cpu_has_a_small_one_that_learns():
    flow_map = composed("experiment=mnist")
    assert forward_flops(flow_map) < 50e6
    losses = descend(flow_map, side=28, rows=16, steps=12)
    assert losses[-1] < 0.9 * losses[0], losses
    at_8x8 = composed("experiment=mnist", "network.patch_size=1", side=8)
    assert at_8x8.velocity(**inputs(8)).shape == (6, 1, 8, 8)


def descend(flow_map: UNetFlowMap, *, side: int, rows: int, steps: int) -> list[float]:
    """Losses of optimiser steps on one batch of bright squares, always with the same noise."""
    loss_module = LossModule(flow_map, named_objective("semigroup", label_dropout=0.5), precision="bf16")
    optimiser = torch.optim.Adam(flow_map.parameters(), lr=1e-3)
    images = torch.full((rows, 1, side, side), -1.0)
    images[:, :, side // 4 : side // 2, side // 4 : side // 2] = 1.0
    batch = Batch(images, torch.arange(rows) % 10, torch.arange(rows))
    losses = []
    for _ in range(steps):
        loss, _ = loss_module(batch, KeyedNoise.for_rows(0, batch.rows), step=0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(loss) for loss in losses)
    return losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_width": 12}, "base_width=12: expected a multiple of 8"),
        ({"base_width": 0}, "base_width=0: expected an integer of at least 1"),
        ({"channel_multipliers": ()}, r"channel_multipliers=\[\]: expected integers of at least 1"),
        ({"channel_multipliers": (1, 0)}, r"channel_multipliers=\[1, 0\]: expected integers of at least 1"),
        ({"blocks_per_level": 0}, "blocks_per_level=0: expected an integer of at least 1"),
        ({"attention_levels": (2,)}, r"attention_levels=\[2\]: expected levels from 0 to 1"),
        ({"num_heads": 3}, r"num_heads=3: expected a divisor of the channels \[16\] that attend"),
        ({"patch_size": 3}, "patch_size=3: expected a divisor of the side 8"),
        ({"space": DataSpace(kind="coordinates", event_shape=(2,))}, r"event_shape=\[2\]: expected square images"),
        ({"space": DataSpace(kind="image", event_shape=(1, 8, 4))}, r"event_shape=\[1, 8, 4\]: expected square images"),
    ],
)
def test_impossible_networks_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetFlowMap(**({"space": space(8), **SMALL} | changes))
