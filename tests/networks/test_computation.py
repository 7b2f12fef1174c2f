"""How a network is computed changes rounding at most: precision, compilation, replay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.computation import AutocastFlowMap, CompiledFlowMap, computed
from mfm_ray.networks.dit import DiTFlowMap
from mfm_ray.networks.replay import Inputs, ReplayedFlowMap, rows_of_graph
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.padding import PaddedFlowMap
from mfm_ray.samplers import sample
from mfm_ray.tangents import pushforward


def transformer(*, seed: int = 0, depth: int = 2) -> DiTFlowMap:
    torch.manual_seed(seed)
    network = DiTFlowMap(
        space=DataSpace(kind="image", event_shape=(4, 8, 8)),
        patch_size=2,
        hidden_size=32,
        depth=depth,
        num_heads=2,
        encoder_depth=1,
        num_classes=5,
        cfg_scales=(2.5,),
    )
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def call(rows: int = 4, *, seed: int = 1) -> Callable[[FlowMap], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, x_t = torch.randn(2, rows, 4, 8, 8, generator=generator)
    s, t = 0.5 * torch.rand(2, rows, generator=generator)
    label = torch.arange(rows) % 5
    return lambda flow_map: flow_map.velocity(x, s, s + 0.3, t=t, x_t=x_t, label=label, cfg_scale=2.5)


def relative(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).detach().norm() / expected.detach().norm())


def test_the_plain_way_is_the_network_itself() -> None:
    network = transformer()
    assert computed(network) is network
    for arguments in ({"precision": "fp16"}, {"execution": "fast"}):
        with pytest.raises(ValueError, match=r"expected one of (fp32, bf16|eager, compiled, graphs)"):
            computed(network, **arguments)


@pytest.mark.parametrize("execution", ["eager", "compiled", "graphs"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_way_has_the_same_weights_and_config_and_travels(precision: str, execution: str) -> None:
    network = transformer()
    way = computed(network, precision=precision, execution=execution)
    assert {id(p) for p in way.parameters()} == {id(p) for p in network.parameters()}
    assert way.config() == network.config()
    assert way.in_full_precision() is network
    times = torch.rand(3)
    assert torch.equal(way.posterior_spread(times), network.posterior_spread(times))
    for other in (pickle.loads(pickle.dumps(way)), copy.deepcopy(way)):
        assert type(other) is type(way)
        assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in network.parameters())


def test_bfloat16_keeps_times_norms_residuals_and_output_in_float32() -> None:
    network, seen = transformer(), {}

    def note(name: str):
        def hook(module, inputs, output) -> None:
            seen[name] = (inputs[0].dtype, output.dtype)

        return hook

    for name, module in list(network.named_modules())[1:]:
        module.register_forward_hook(note(name))
    expected = call()(network)
    seen.clear()
    given = call()(AutocastFlowMap(network))
    single, half = torch.float32, torch.bfloat16
    embedders = ("s_embedder", "t_embedder", "s_embedder_second", "t_embedder_second", "t_cond_embedder")
    for name in embedders:
        assert seen[name] == seen[f"{name}.mlp.0"] == seen[f"{name}.mlp.2"] == (single, single)
    assert {seen[f"blocks.{index}"] for index in range(2)} == {(single, single)}  # the residual stream
    assert seen["final_layer.linear"] == (single, single)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert seen[f"blocks.0.{name}"][1] == half
    assert given.dtype == single
    assert 1e-5 < relative(given, expected) < 2e-2


def test_bfloat16_tells_close_times_apart() -> None:
    """cos(0.01) and cos(0.02) are one number in bfloat16; the embedding of the time must not be."""
    network = transformer()
    with torch.autocast("cpu", torch.bfloat16):
        near = network.t_embedder(torch.tensor([0.01, 0.02]))
    plain = network.t_embedder(torch.tensor([0.01, 0.02]))
    assert torch.equal(near, plain)
    assert torch.cos(torch.tensor(0.01)).bfloat16() == torch.cos(torch.tensor(0.02)).bfloat16()


class Programs:
    """A backend of torch.compile that runs a program as it was traced, and counts programs."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.sizes.append(len(graph.graph.nodes))
        return graph.forward


@pytest.fixture
def programs():
    torch.compiler.reset()
    yield Programs()
    torch.compiler.reset()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_velocity_is_one_program_for_each_kind_of_call_and_any_batch(programs: Programs, precision: str) -> None:
    network = computed(transformer(), precision=precision)
    compiled = CompiledFlowMap(network, backend=programs, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            assert relative(call()(compiled), call()(network)) < 1e-6
        assert len(programs.sizes) == 1
        for rows in (8, 12, 4, 20, 16, 64):
            assert relative(call(rows)(compiled), call(rows)(network)) < 1e-6
        assert len(programs.sizes) == 2  # the first size, and any size
    for rows in (4, 8, 12):
        call(rows)(compiled)
    assert len(programs.sizes) <= 4  # the same with a gradient


def test_guidance_scales_share_a_program(programs: Programs) -> None:
    compiled = CompiledFlowMap(transformer().requires_grad_(False), backend=programs, fullgraph=True)
    x, half = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    for scale in (1.0, 2.5, torch.tensor([1.0, 2.5, 1.0, 2.5])):
        compiled.velocity(x, half, half, t=half, x_t=x, cfg_scale=scale)
    assert len(programs.sizes) == 1


def test_calls_with_a_tangent_are_computed_as_they_stand(programs: Programs) -> None:
    network = transformer()
    compiled = CompiledFlowMap(network, backend=programs, fullgraph=True)
    x, half = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)

    def velocity(of: FlowMap) -> Callable[[Tensor], Tensor]:
        return lambda x: of.velocity(x, half, half, t=half, x_t=x)

    for transform in (pushforward, torch.func.jvp):
        given, expected = (transform(velocity(of), (x,), (x,)) for of in (compiled, network))
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
    assert not programs.sizes


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_gradient_is_that_of_the_network(recompute: bool) -> None:
    torch.compiler.reset()
    network = transformer()
    network.recompute_activations(recompute)
    gradients = []
    for way in (network, CompiledFlowMap(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        call()(way).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    torch.compiler.reset()
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inductor_makes_the_same_velocity_and_gradient(precision: str) -> None:
    torch.compiler.reset()
    network = transformer()
    results = []
    for execution in ("eager", "compiled"):
        way = computed(network, precision=precision, execution=execution)
        network.zero_grad()
        value = call()(way)
        value.square().mean().backward()
        results.append((value.detach(), network.blocks[0].attn.qkv.weight.grad.clone()))
    torch.compiler.reset()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for expected, given in zip(*results, strict=True):
        assert relative(given, expected) < tolerance


class FakeGraphs:
    """What CUDA does, on a CPU: a graph is recorded from buffers and reads and writes those alone."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed = 0

    def __call__(self, function: Callable[[Inputs], Tensor], buffers: Inputs):
        self.recorded.append(len(buffers["x_s"]))
        addresses = {name: value.data_ptr() for name, value in buffers.items()}
        output = function(buffers)

        def replay() -> None:
            assert {name: value.data_ptr() for name, value in buffers.items()} == addresses
            self.replayed += 1
            output.copy_(function(buffers))

        return replay, output


@pytest.fixture
def graphs() -> FakeGraphs:
    return FakeGraphs()


def test_rows_are_rounded_up_to_few_sizes() -> None:
    sizes = [rows_of_graph(rows) for rows in range(1, 1025)]
    assert all(size >= rows and size % 4 == 0 for rows, size in enumerate(sizes, 1))
    assert all(size <= 1.25 * rows for rows, size in enumerate(sizes, 1) if rows > 16)
    assert len(set(sizes)) == 28
    assert [rows_of_graph(rows) for rows in (1, 4, 5, 16, 17, 33, 64, 65, 1024)] == [4, 4, 8, 16, 20, 40, 64, 80, 1024]


@torch.no_grad()
def test_a_replayed_call_is_the_networks_and_its_result_stays(graphs: FakeGraphs) -> None:
    network = transformer()
    replayed = ReplayedFlowMap(network, capture=graphs)
    first = call(12, seed=1)(replayed)
    kept = first.clone()
    for rows, seed in ((12, 2), (9, 3), (12, 4), (10, 5)):
        given, expected = call(rows, seed=seed)(replayed), call(rows, seed=seed)(network)
        assert given.shape == expected.shape
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, kept)  # a copy, not the buffer of the graph
    assert graphs.recorded == [12]
    assert graphs.replayed == 5


@torch.no_grad()
def test_each_set_of_inputs_has_its_graph_and_the_least_used_leave(graphs: FakeGraphs) -> None:
    network = transformer()
    replayed = ReplayedFlowMap(network, capture=graphs, max_graphs=2)
    x, half = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    arguments = (x, half, half)
    for changes in ({}, {"cfg_scale": 2.5}, {"cfg_scale": 1.0}, {}):
        given = replayed.velocity(*arguments, t=half, x_t=x, **changes)
        torch.testing.assert_close(given, network.velocity(*arguments, t=half, x_t=x, **changes))
    assert graphs.recorded == [4, 4]  # without and with a guidance scale, whatever it is
    replayed.velocity(*arguments, t=half, x_t=x, label=torch.arange(4))  # the second one leaves
    replayed.velocity(*arguments, t=half, x_t=x)
    assert len(graphs.recorded) == 3
    replayed.velocity(*arguments, t=half, x_t=x, cfg_scale=2.5)
    assert len(graphs.recorded) == 4
    assert len(replayed._graphs) == 2


def test_weights_may_change_in_place_and_graphs_are_forgotten_when_they_move(graphs: FakeGraphs) -> None:
    network = transformer().requires_grad_(False)
    replayed = ReplayedFlowMap(network, capture=graphs)
    call()(replayed)
    network.load_state_dict(transformer(seed=3).state_dict())
    torch.testing.assert_close(call()(replayed), call()(transformer(seed=3).requires_grad_(False)))
    assert len(graphs.recorded) == 1
    replayed.to("cpu")
    call()(replayed)
    assert len(graphs.recorded) == 2


def test_calls_with_a_gradient_or_a_tangent_are_plain(graphs: FakeGraphs) -> None:
    network = transformer().requires_grad_(False)
    replayed = ReplayedFlowMap(network, capture=graphs)
    x, half = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    state = x.clone().requires_grad_()
    replayed.velocity(state, half, half, t=half, x_t=x).sum().backward()
    assert state.grad is not None
    pushforward(lambda x: replayed.velocity(x, half, half, t=half, x_t=x), (x,), (x,))
    torch.func.jvp(lambda x: replayed.velocity(x, half, half, t=half, x_t=x), (x,), (x,))
    assert not graphs.recorded
    replayed.velocity(x, half, half, t=half, x_t=x)
    assert graphs.recorded == [4]


def test_on_a_cpu_nothing_is_replayed() -> None:
    network = transformer().requires_grad_(False)
    replayed = computed(network, execution="graphs")
    assert isinstance(replayed, ReplayedFlowMap)
    assert torch.equal(call()(replayed), call()(network))
    assert not replayed._graphs
    with pytest.raises(ValueError, match="max_graphs=0: expected an integer of at least 1"):
        ReplayedFlowMap(network, max_graphs=0)


def test_sampling_through_graphs_is_sampling(graphs: FakeGraphs) -> None:
    network = transformer().requires_grad_(False)
    replayed = ReplayedFlowMap(network, capture=graphs)
    plain, fast = (sample(of, num_samples=6, num_steps=3, seed=0, label=1) for of in (network, replayed))
    torch.testing.assert_close(fast.images, plain.images, rtol=1e-5, atol=1e-5)
    assert graphs.replayed >= 3
    assert len(graphs.recorded) <= 2


def test_both_parts_of_a_tuned_map_are_computed_so(graphs: FakeGraphs) -> None:
    tuned = TunedFlowMap(transformer(), transformer(seed=1)).requires_grad_(False)
    way = computed(tuned, precision="bf16", execution="graphs")
    assert isinstance(way, TunedFlowMap)
    assert all(isinstance(part, ReplayedFlowMap) for part in (way.base, way.tuned))
    assert way.config() == tuned.config()
    x, t = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    assert relative(PaddedFlowMap(way).drift(x, t), tuned.drift(x, t)) < 2e-2
