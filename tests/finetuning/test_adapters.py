"""Low-rank adapters: they begin at the frozen network, merge into one like it, and leave all else as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfm_ray.data_space import DataSpace
from mfm_ray.finetuning import LowRank, WholeNetwork, build_adapter
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network

RANK = 3
IMAGES = DataSpace("image", (1, 8, 8))
NETWORKS: dict[str, Mapping[str, Any]] = {
    "residual_mlp": {"name": "residual_mlp", "width": 16, "num_blocks": 2},
    "dit": {"name": "dit", "hidden_size": 16, "depth": 2, "encoder_depth": 1, "num_heads": 2, "patch_size": 4},
    "unet": {
        "name": "unet",
        "base_width": 8,
        "channel_multipliers": [1, 2],
        "blocks_per_level": 1,
        "attention_levels": [1],
        "num_heads": 2,
        "condition_width": 16,
    },
}


@pytest.fixture(params=NETWORKS)
def base(request: pytest.FixtureRequest) -> FlowMap:
    """With random weights everywhere: fresh networks end in zeros, which would hide what is adapted before."""
    torch.manual_seed(0)
    network = build_network(NETWORKS[request.param], space=IMAGES, num_classes=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return network.eval().requires_grad_(False)


def drift(network: FlowMap) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(network.parameters()).dtype
    x, t = torch.randn(5, *IMAGES.event_shape, generator=generator), torch.rand(5, generator=generator)
    return network.drift(x.to(dtype), t.to(dtype), label=torch.tensor([0, 1, 2, 3, 0]))


def difference(one: FlowMap, other: FlowMap) -> float:
    with torch.no_grad():
        return float((drift(one) - drift(other)).abs().max())


def tuned(network: FlowMap) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}


def moved(network: FlowMap) -> None:
    """As if tuned: a few steps of a descent on what is trainable."""
    optimizer = torch.optim.SGD(tuned(network).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (drift(network) - 1).square().mean().backward()
        optimizer.step()


def test_it_begins_at_the_frozen_network_to_the_bit_and_the_same_from_the_same_seed(base: FlowMap) -> None:
    random = torch.random.get_rng_state()
    first, again, other = (LowRank(rank=RANK).trainable(base, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.equal(drift(first), drift(base))
    pairs = [(tuned(first)[name], tuned(again)[name], tuned(other)[name]) for name in tuned(first)]
    assert all(torch.equal(one, same) for one, same, _ in pairs)
    assert not all(torch.equal(one, differs) for one, _, differs in pairs)


def test_only_the_corrections_of_linear_layers_and_convolutions_are_tuned(base: FlowMap) -> None:
    network = LowRank(rank=RANK).trainable(base, seed=0)
    layers = [module for module in base.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    # A: rank x inputs, B: outputs x rank; a convolution's inputs are those under its kernel
    expected = sum(RANK * (math.prod(layer.weight.shape[1:]) + layer.weight.shape[0]) for layer in layers)
    facts = LowRank(rank=RANK).facts(base)
    assert sum(each.numel() for each in tuned(network).values()) == expected == facts["tuned_parameters"]
    assert facts["parameters"] == sum(each.numel() for each in base.parameters())
    assert facts["layers"] == len(layers)


def test_frozen_weights_stay_and_what_is_merged_computes_the_same(base: FlowMap) -> None:
    adapter = LowRank(rank=RANK, alpha=6.0)
    network = adapter.trainable(base, seed=0)
    moved(network)
    frozen = {name.replace(".base_layer", ""): p for name, p in network.named_parameters() if not p.requires_grad}
    assert set(frozen) == {name for name, _ in base.named_parameters()}
    assert all(torch.equal(tensor, base.get_parameter(name)) for name, tensor in frozen.items())
    merged = adapter.merged(base, tuned(network))
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert type(merged) is type(base)
    assert difference(network, base) > 1e-2
    assert difference(merged, network) < 1e-4
    # in double precision nothing but the order of sums is left
    base, network = copy.deepcopy(base).double(), network.double()
    merged = adapter.merged(base, tuned(network))
    assert difference(merged, network) < 1e-10


def test_forward_mode_goes_through_the_corrections(base: FlowMap) -> None:
    network = LowRank(rank=RANK).trainable(base, seed=0)
    moved(network)
    merged = LowRank(rank=RANK).merged(base, tuned(network))
    x, t = torch.randn(4, *IMAGES.event_shape, generator=torch.Generator().manual_seed(3)), torch.full((4,), 0.4)
    slopes = [
        torch.func.jvp(lambda time, each=each: each.drift(x, time), (t,), (torch.ones(4),))[1].detach()
        for each in (network, merged)
    ]
    assert float(slopes[0].abs().max()) > 1e-2
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


def test_alpha_scales_a_correction(base: FlowMap) -> None:
    weights = LowRank(rank=RANK).trainable(base, seed=0)
    moved(weights)
    name = next(name for name, module in base.named_modules() if isinstance(module, nn.Linear))
    before = base.get_parameter(f"{name}.weight")
    change = [
        LowRank(rank=RANK, alpha=alpha).merged(base, tuned(weights)).get_parameter(f"{name}.weight") - before
        for alpha in (None, 2.0 * RANK)
    ]
    assert float(change[0].abs().max()) > 0
    torch.testing.assert_close(change[1], 2 * change[0], rtol=1e-4, atol=1e-6)


def test_targets_choose_layers_by_the_end_of_their_name() -> None:
    base = build_network(NETWORKS["dit"], space=IMAGES, num_classes=3)
    adapter = LowRank(rank=2, targets=["qkv", "blocks.0.mlp.fc1"])
    assert [name.split(".", 1)[1] for name in adapter.layers(base) if name.endswith("qkv")]
    chosen = adapter.layers(base)
    assert all(name.endswith(("qkv", "blocks.0.mlp.fc1")) for name in chosen)
    assert len(chosen) == 3
    named = {name.partition(".lora_")[0] for name in tuned(adapter.trainable(base, seed=0))}
    assert named == set(chosen)


def test_a_whole_network_is_tuned_without_an_adapter(base: FlowMap) -> None:
    adapter = build_adapter({"name": "none"})
    assert isinstance(adapter, WholeNetwork)
    network = adapter.trainable(base, seed=0)
    assert len(tuned(network)) == len(list(base.parameters()))
    moved(network)
    assert difference(adapter.merged(base, network.state_dict()), network) == 0
    assert not any(each.requires_grad for each in base.parameters())


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"name": "lorra"}, "adapter.name='lorra': expected one of lora, none"),
        ({"name": "lora", "rnk": 2}, "adapter.rnk: unknown key; expected rank, alpha, targets; did you mean rank?"),
        ({"name": "none", "rank": 2}, "adapter.rank: unknown key; expected no further keys"),
        ({"name": "lora", "rank": 0}, "rank=0: expected an integer of at least 1"),
        ({"name": "lora", "alpha": 0}, "alpha=0: expected a number above 0, or null for the rank"),
        ({"name": "lora", "targets": []}, "targets=[]: expected names of layers, or null for all of them"),
        ({"name": "lora", "targets": "qkv"}, "targets=qkv: expected names of layers"),
    ],
)
def test_a_mistake_is_one_line(adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        build_adapter(adapter)
    assert message in str(caught.value)


def test_a_target_that_is_no_layer_and_weights_of_other_layers_are_named() -> None:
    base = build_network(NETWORKS["residual_mlp"], space=IMAGES)
    with pytest.raises(ValueError, match=r"adapter.targets=qkv: no linear layer .* such as condition, contract, expan"):
        LowRank(targets=["qkv"]).check(base)
    weights = tuned(LowRank(rank=2, targets=["expand"]).trainable(base, seed=0))
    with pytest.raises(ValueError, match=r"adapter: weights of other layers, network\.blocks\.0\.contract"):
        LowRank(rank=2, targets=["expand", "contract"]).merged(base, weights)
