"""The DiT against the official network's numbers, and what holds for any weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfm_ray.data_space import DataSpace
from mfm_ray.networks.dit import DiTFlowMap, position_embedding

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "official_dit"
needs_official_numbers = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the official network's numbers lie beside a developer's checkout, not in the project"
)
# torch compiles its own derivative of layer_norm with torch.jit on first use
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")


def small_dit(**changes):
    arguments = {
        "space": DataSpace(kind="image", event_shape=(4, 8, 8)),
        "patch_size": 2,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "encoder_depth": 2,
        "num_classes": 5,
        "cfg_scales": (2.5,),
        "time_flip": True,
    }
    return DiTFlowMap(**(arguments | changes)).requires_grad_(False)


def randomise(network, *, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def relative_error(given, expected):
    return float((given - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def official():
    weights = {key.removeprefix("dit."): value for key, value in load_file(OFFICIAL / "weights.safetensors").items()}
    network = small_dit()
    network.load_state_dict(weights, strict=True)
    numbers = load_file(OFFICIAL / "io.safetensors")
    condition = {key: numbers[key] for key in ("t", "x_t", "label", "cfg_scale")}
    return network, numbers, condition


@needs_official_numbers
def test_velocity_and_map_equal_the_official_network(official):
    network, io, condition = official
    assert relative_error(network.velocity(io["x_s"], io["s"], io["u"], **condition), io["velocity"]) < 1e-5
    assert relative_error(network(io["x_s"], io["s"], io["u"], **condition), io["map"]) < 1e-5


@needs_official_numbers
@jit_is_deprecated
def test_forward_derivative_equals_the_official_network(official):
    network, io, condition = official
    tangents = (torch.ones_like(io["s"]), io["tangent_x_s"])
    _, tangent = torch.func.jvp(
        lambda s, x_s: network.velocity(x_s, s, io["u"], **condition), (io["s"], io["x_s"]), tangents
    )
    assert relative_error(tangent, io["jvp"]) < 1e-4


def inputs(batch=6, *, shape=(4, 8, 8), seed=1):
    generator = torch.Generator().manual_seed(seed)
    s, u = torch.rand((2, batch), generator=generator).sort(dim=0).values
    x_s, x_t = torch.randn((2, batch, *shape), generator=generator)
    return x_s, s, u, {"t": torch.rand(batch, generator=generator), "x_t": x_t}


def test_starts_as_the_identity_map():
    x_s, s, u, condition = inputs()
    assert torch.equal(small_dit()(x_s, s, u, **condition), x_s)


def test_no_label_is_the_null_class_and_no_scale_is_one():
    network, (x_s, s, u, condition) = randomise(small_dit()), inputs()
    null = torch.full((6,), 5)
    given = network.velocity(x_s, s, u, label=null, cfg_scale=1.0, **condition)
    assert torch.equal(network.velocity(x_s, s, u, **condition), given)


def test_time_flip_mirrors_the_inner_times_and_the_output():
    flipped, (x_s, s, u, condition) = randomise(small_dit()), inputs()
    plain = small_dit(time_flip=False)
    plain.load_state_dict(flipped.state_dict())
    expected = -plain.velocity(x_s, 1 - s, 1 - u, **condition)
    assert torch.equal(flipped.velocity(x_s, s, u, **condition), expected)


@jit_is_deprecated
def test_values_beside_a_forward_derivative_are_the_plain_ones():
    network, (x_s, s, u, condition) = randomise(small_dit()), inputs()
    primal, tangent = torch.func.jvp(lambda s: network.velocity(x_s, s, u, **condition), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(primal, network.velocity(x_s, s, u, **condition), rtol=1e-5, atol=1e-5)
    step = 1e-2
    ahead, behind = (network.velocity(x_s, s + d, u, **condition) for d in (step, -step))
    assert relative_error(tangent, (ahead - behind) / (2 * step)) < 1e-2


def test_position_embedding_puts_the_column_first():
    table = position_embedding(16, 4).reshape(4, 4, 16)
    assert torch.equal(table[0, 2, :8], table[3, 2, :8])
    assert torch.equal(table[2, 0, 8:], table[2, 3, 8:])
    assert not torch.equal(table[0, 2, :8], table[0, 3, :8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "divisible by patch_size=3"),
        ({"hidden_size": 30}, "hidden_size=30: expected a multiple of 4"),
        ({"encoder_depth": 4}, "encoder_depth=4: expected an integer from 1 to depth=3"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small_dit(**changes)
