"""Activation checkpointing: the same numbers to the bit, from a fraction of what a step keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.networks import build_network
from mfm_ray.networks.dit import DiTFlowMap
from mfm_ray.tangents import pushforward

WAYS = {"value": None, "unrecorded tangent": False, "recorded tangent": True}


def transformer(depth: int = 3) -> DiTFlowMap:
    torch.manual_seed(0)
    network = DiTFlowMap(
        space=DataSpace(kind="latent", event_shape=(4, 8, 8)),
        patch_size=2,
        hidden_size=32,
        depth=depth,
        num_heads=2,
        encoder_depth=2,
        num_classes=5,
        cfg_scales=(2.5,),
    )
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


def step(network: DiTFlowMap, differentiable: bool | None, *, bf16: bool) -> tuple[list[Tensor], int]:
    """Loss, value and gradients of all weights and of the state; bytes kept between forward and backward pass."""
    generator = torch.Generator().manual_seed(1)
    x, x_t, direction = torch.randn(3, 4, 4, 8, 8, generator=generator)
    s = 0.5 * torch.rand(4, generator=generator)
    u, x = s + 0.3, x.requires_grad_()
    kept = [0]

    def velocity(x: Tensor, s: Tensor, u: Tensor) -> Tensor:
        return network.velocity(x, s, u, t=s * 0.5, x_t=x_t, label=torch.arange(4), cfg_scale=2.5)

    def pack(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel() * tensor.element_size()
        return tensor

    network.zero_grad()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        if differentiable is None:
            value, tangent = velocity(x, s, u), torch.ones(())
        else:
            directions = (direction, torch.ones_like(s), torch.zeros_like(u))
            value, tangent = pushforward(velocity, (x, s, u), directions, differentiable=differentiable)
            assert tangent.requires_grad == differentiable
    loss = (value.float() + tangent.float()).square().mean()
    loss.backward()
    gradients = [each.grad for each in (x, *network.parameters()) if each.grad is not None]
    return [loss.detach(), value.detach(), *(gradient.clone() for gradient in gradients)], kept[0]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_to_the_bit_and_a_third_is_kept_at_most(way: str, bf16: bool) -> None:
    network = transformer()
    plain, kept = step(network, WAYS[way], bf16=bf16)
    network.recompute_activations()
    again, kept_less = step(network, WAYS[way], bf16=bf16)
    assert len(plain) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept_less < kept / 3
    network.recompute_activations(False)
    assert step(network, WAYS[way], bf16=bf16)[1] == kept


def test_a_further_block_keeps_its_inputs_alone() -> None:
    kept = []
    for depth in (2, 3):
        network = transformer(depth)
        network.recompute_activations()
        kept.append(step(network, None, bf16=False)[1])
    rows, tokens, width = 4, 16, 32
    condition = rows * width  # what is not shared with other blocks: its view, and SiLU's input inside is recomputed
    assert kept[1] - kept[0] <= 4 * (rows * tokens * width + 2 * condition)


def test_it_is_no_part_of_what_the_network_is() -> None:
    plain, lean = transformer(), transformer()
    lean.recompute_activations()
    assert lean.config() == plain.config()
    assert lean.state_dict().keys() == plain.state_dict().keys()


def test_torch_func_goes_through() -> None:
    network = transformer().requires_grad_(False)
    x, x_t, direction = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    half = torch.full((4,), 0.5)

    def velocity(x: Tensor) -> Tensor:
        return network.velocity(x, half, half, t=half, x_t=x_t)

    plain = torch.func.jvp(velocity, (x,), (direction,))
    network.recompute_activations()
    torch.testing.assert_close(torch.func.jvp(velocity, (x,), (direction,)), plain, rtol=0, atol=0)


def test_a_network_without_blocks_refuses_by_name() -> None:
    network = build_network({"name": "residual_mlp", "width": 8, "num_blocks": 1}, space=DataSpace("coordinates", (2,)))
    network.recompute_activations(False)
    with pytest.raises(ValueError, match="ResidualMLPFlowMap has no blocks to compute again"):
        network.recompute_activations()
