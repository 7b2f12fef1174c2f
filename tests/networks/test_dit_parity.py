"""DiTFlowMap against the paper's network written from the equations, over shapes, seeds and what descends from what."""

import pytest
import torch

from mfm_ray.data_space import DataSpace
from mfm_ray.networks.dit import DiTFlowMap
from mfm_ray.networks.dit_layouts import as_flow_map, check_tensors, layout_of
from tests.networks import dit_reference as reference

# torch compiles its own derivative of layer_norm with torch.jit on first use
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated:DeprecationWarning")

SIZES = {
    "one block, one head": {"width": 16, "depth": 1, "patch": 2, "channels": 4, "grid": 2, "heads": 1, "encoder": 1},
    "wide patches": {"width": 48, "depth": 4, "patch": 4, "channels": 3, "grid": 2, "heads": 4, "encoder": 1},
    "single pixels": {"width": 32, "depth": 3, "patch": 1, "channels": 2, "grid": 5, "heads": 8, "encoder": 3},
    "as the paper, small": {"width": 72, "depth": 5, "patch": 2, "channels": 4, "grid": 4, "heads": 6, "encoder": 4},
}
SCALES = {1: (), 2: (2.5,), 4: (1.5, 2.5, 4.0)}


def shape_of(size):
    side = size["grid"] * size["patch"]
    return size["channels"], side, side


def network_of(size, *, classes, scales, time_flip):
    return DiTFlowMap(
        space=DataSpace("latent", shape_of(size), scale=0.18215),
        patch_size=size["patch"],
        hidden_size=size["width"],
        depth=size["depth"],
        num_heads=size["heads"],
        encoder_depth=size["encoder"],
        num_classes=classes,
        cfg_scales=scales,
        time_flip=time_flip,
    ).requires_grad_(False)


def weights_of(size, **changes):
    names = ("width", "depth", "patch", "channels", "grid")
    return reference.random_weights(**{name: size[name] for name in names}, **changes)


def inputs(size, *, classes, scales=(), seed=0, batch=6):
    """x_s, s, u, t, x_t, label and the row of the guidance table, the corners of the times among them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    s, u = torch.rand((2, batch), generator=generator).sort(dim=0).values
    t = torch.rand(batch, generator=generator)
    s[0], u[0], t[0], u[1] = 0.0, 1.0, 0.0, s[1]
    x_s, x_t = torch.randn((2, batch, *shape_of(size)), generator=generator)
    label = torch.randint(classes + 1, (batch,), generator=generator)
    return x_s, s, u, t, x_t, label, torch.randint(len(scales) + 1, (batch,), generator=generator)


def doubles(*tensors):
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def relative_error(given, expected):
    return float((given.double() - expected).norm() / expected.norm())


@jit_is_deprecated
@pytest.mark.parametrize("rows", SCALES)
@pytest.mark.parametrize("time_flip", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_velocity_map_and_forward_derivative_equal_the_equations(name, time_flip, rows):
    size, scales = SIZES[name], SCALES[rows]
    seed = rows + 10 * time_flip
    classes = 1 + seed % 7
    weights = weights_of(size, classes=classes, guidance=rows, seed=seed)
    network = network_of(size, classes=classes, scales=scales, time_flip=time_flip)
    network.load_state_dict(weights)
    x_s, s, u, t, x_t, label, row = inputs(size, classes=classes, scales=scales, seed=seed)
    condition = {"t": t, "x_t": x_t, "label": label, "cfg_scale": torch.tensor((1.0, *scales))[row]}
    facts = {"heads": size["heads"], "encoder_depth": size["encoder"], "time_flip": time_flip}
    exact, wide = reference.doubled(weights), doubles(x_s, s, u, t, x_t)

    def velocity(x_s, s):
        return reference.mfm(exact, x_s, s, wide[2], wide[3], wide[4], label, row, **facts)

    expected = velocity(wide[0], wide[1])
    assert relative_error(network.velocity(x_s, s, u, **condition), expected) < 1e-5
    mapped = wide[0] + (wide[2] - wide[1]).view(-1, 1, 1, 1) * expected
    assert relative_error(network(x_s, s, u, **condition), mapped) < 1e-5
    direction = torch.randn(x_s.shape, generator=torch.Generator().manual_seed(seed))
    given = torch.func.jvp(
        lambda x_s, s: network.velocity(x_s, s, u, **condition), (x_s, s), (direction, torch.ones_like(s))
    )[1]
    step = 1e-6
    ahead = velocity(wide[0] + step * direction.double(), wide[1] + step)
    behind = velocity(wide[0] - step * direction.double(), wide[1] - step)
    assert relative_error(given, (ahead - behind) / (2 * step)) < 1e-4


def started(size, weights, *, classes, scales, time_flip, seed=3):
    torch.manual_seed(seed)
    network = network_of(size, classes=classes, scales=scales, time_flip=time_flip)
    layout = layout_of(weights)
    check_tensors(weights, layout)
    network.load_state_dict(as_flow_map(weights, layout, network.state_dict()))
    return network


@pytest.mark.parametrize("name", SIZES)
def test_from_dmf_the_map_starts_as_minus_dmf_whatever_it_is_told_beside(name):
    size, scales = SIZES[name], (1.5, 2.5)
    weights = weights_of(size, kind="one_time", classes=3)
    network = started(size, weights, classes=3, scales=scales, time_flip=True)
    x_s, s, u, t, x_t, label, row = inputs(size, classes=3, scales=scales)
    exact, wide = reference.doubled(weights), doubles(x_s, s, u)
    facts = {"heads": size["heads"], "encoder_depth": size["encoder"]}
    expected = -reference.dmf(exact, wide[0], 1 - wide[1], 1 - wide[2], label, **facts)
    given = network.velocity(x_s, s, u, t=t, x_t=x_t, label=label, cfg_scale=torch.tensor((1.0, *scales))[row])
    assert relative_error(given, expected) < 1e-5
    # to the bit: the outer time, the outer state, the guidance scale and the seed of the silent layers say nothing
    other = started(size, weights, classes=3, scales=(), time_flip=True, seed=4)
    assert torch.equal(other.velocity(x_s, s, u, t=1 - t, x_t=100 * x_t.flip(0), label=label), given)


@pytest.mark.parametrize("name", SIZES)
def test_from_dmf_the_map_starts_as_minus_dmf_to_the_bit_in_the_same_arithmetic(name):
    """DMF in float32 through the same operations, its one embedder called twice: not one bit of the map differs."""
    size = SIZES[name]
    weights = weights_of(size, kind="one_time", classes=3)
    network = started(size, weights, classes=3, scales=(2.5,), time_flip=True)
    x_s, s, u, t, x_t, label, _ = inputs(size, classes=3)
    expected = -one_embedder_in_float32(network, weights, x_s, 1 - s, 1 - u, label)
    given = network.velocity(x_s, s, u, t=t, x_t=x_t, label=label, cfg_scale=2.5)
    assert torch.equal(given, expected)


def one_embedder_in_float32(network, weights, x, first, second, label):
    """DMF(x, first, second): the blocks are the network's own modules, all that is told to them comes from here."""

    def told(time):
        frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * (torch.arange(128) / 128))
        angle = time.unsqueeze(-1) * frequencies
        features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
        linear = torch.nn.functional.linear
        hidden = linear(features, weights["t_embedder.mlp.0.weight"], weights["t_embedder.mlp.0.bias"])
        hidden = torch.nn.functional.silu(hidden)
        embedded = linear(hidden, weights["t_embedder.mlp.2.weight"], weights["t_embedder.mlp.2.bias"])
        return (embedded + weights["y_embedder.embedding_table.weight"][label]).unsqueeze(1)

    encoder, decoder = told(first), told(second)
    patch = weights["x_embedder.proj.weight"].shape[-1]
    kernel, bias = weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"]
    h = torch.nn.functional.conv2d(x, kernel, bias, stride=patch).flatten(2).transpose(1, 2) + weights["pos_embed"]
    for index, block in enumerate(network.blocks):
        h = block(h, encoder if index < network.encoder_depth else decoder)
    return network._unpatchify(network.final_layer(h, decoder))


@pytest.mark.parametrize("sigma", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_from_sit_the_diagonal_starts_as_sit(name, sigma):
    size = SIZES[name]
    weights = weights_of(size, kind="one_time", classes=3, sigma=sigma)
    network = started(size, weights, classes=3, scales=(2.5,), time_flip=False)
    x_s, s, _, t, x_t, label, _ = inputs(size, classes=3)
    exact, wide = reference.doubled(weights), doubles(x_s, s)
    expected = reference.sit(exact, *wide, label, heads=size["heads"], sigma=sigma)
    assert relative_error(network.velocity(x_s, s, s, t=t, x_t=x_t, label=label), expected) < 1e-5
    assert relative_error(network.drift(x_s, s, label=label), expected) < 1e-5


def test_the_embedding_of_positions_is_the_one_that_files_hold():
    """Sine and cosine of the column in the first half, of the row in the second, at 10000^(-k / (D / 4))."""
    size = SIZES["as the paper, small"]
    width, grid = size["width"], size["grid"]
    table = network_of(size, classes=0, scales=(), time_flip=True).pos_embed[0]
    for token in range(grid * grid):
        for half, place in ((0, token % grid), (1, token // grid)):
            for k in range(width // 4):
                angle = torch.tensor(place * 10000.0 ** (-k / (width / 4)), dtype=torch.float64)
                first = half * width // 2 + k
                assert abs(float(table[token, first]) - float(angle.sin())) < 1e-6
                assert abs(float(table[token, first + width // 4]) - float(angle.cos())) < 1e-6
