import pytest
import torch

from mfm_ray.data_space import DataSpace
from mfm_ray.networks import build_network
from mfm_ray.networks.flops import forward_flops

IMAGE = DataSpace(kind="image", event_shape=(1, 4, 4))
MLP = {"name": "residual_mlp", "width": 32, "num_blocks": 2}
DIT = {"name": "dit", "patch_size": 2, "hidden_size": 8, "depth": 2, "num_heads": 2, "encoder_depth": 1}


def test_an_mlp_costs_twice_its_multiply_adds():
    rotations = 3 * 16 * 16  # both states into principal coordinates, the velocity out of them
    condition = 80 * 128
    network = 48 * 32 + 2 * (32 * 32 + 128 * 32 + 32 * 32) + 32 * 16
    assert forward_flops(build_network(MLP, space=IMAGE)) == 2 * (rotations + condition + network)


def test_attention_and_convolutions_count():
    tokens, width = 4, 8
    patches = 2 * tokens * 4 * width
    embedders = 5 * (256 * width + width * width) + 2 * width * width  # of the times; modulation of the outer state
    block = tokens * 12 * width * width + 2 * tokens * tokens * width + 6 * width * width
    final = tokens * 4 * width + 2 * width * width
    found = forward_flops(build_network(DIT, space=IMAGE, num_classes=3))
    assert found == 2 * (patches + embedders + 2 * block + final)


@pytest.mark.parametrize("network", [MLP, DIT])
def test_counting_leaves_the_network_as_it_was(network):
    flow_map = build_network(network, space=IMAGE, num_classes=3)
    before = {name: tensor.clone() for name, tensor in flow_map.state_dict().items()}
    assert forward_flops(flow_map) == forward_flops(flow_map) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in flow_map.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in flow_map.parameters())
