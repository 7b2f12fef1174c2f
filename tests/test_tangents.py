"""Tangents that ride on the recorded pass: equal to torch's forward mode, and without a graph of their own."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.attention import attention
from mfm_ray.networks.dit import DiTFlowMap
from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.tangents import Dual, TangentError, central_difference, pushforward

WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
KERNEL = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

OPERATIONS = {
    "arithmetic": lambda x: (2 - x) * x / (x + 3) - x / 2 + 1 / (x + 4) + x.sum(0) * 3 - (x - 1) ** 3,
    "between duals": lambda x: (x * x.exp() + x.roll(1, 0)) / (x.roll(1, 1) + 5),
    "broadcast": lambda x: x[:, :1] + torch.ones(6, dtype=x.dtype) * x[:1] - x[0],
    "powers": lambda x: (x + 3).sqrt() + (x + 3).rsqrt() + (x + 3).log() + x.square() + torch.pow(x + 3, 1.5),
    "circle": lambda x: torch.sin(x) + torch.cos(2 * x) + torch.tanh(x) + torch.sigmoid(x),
    "activations": lambda x: functional.silu(x) + functional.gelu(x) + functional.gelu(x, approximate="tanh"),
    "softmax": lambda x: torch.softmax(x, dim=-1) + functional.softmax(x, dim=0) + x.log_softmax(-1),
    "linear": lambda x: functional.linear(x, WEIGHT, WEIGHT[0]) + x @ WEIGHT + WEIGHT @ (x @ x.mT) @ WEIGHT,
    "matrix product of duals": lambda x: x @ x.transpose(0, 1) @ x.T.mT @ x.mT,
    "normalisation": lambda x: functional.layer_norm(x, (6,), WEIGHT[1], WEIGHT[2]) + functional.layer_norm(x, (6, 6)),
    "shapes": lambda x: torch.cat([x.reshape(3, 12), x.view(12, 3).mT, torch.ones(3, 2, dtype=x.dtype)], dim=1)[
        ..., ::2
    ],
    "pieces": lambda x: torch.stack([part.sum(-1) for part in x.chunk(3, dim=1)]) * x.unbind(0)[2].repeat(1),
    "choices": lambda x: torch.where(x > 0, x, 2 * x) + x.clamp_min(0.1) + torch.maximum(x, -x) + x.abs() + x.amax(0),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, WEIGHT),
    "angles": lambda x: torch.atan2(x, x + 4) + torch.hypot(x, x + 1),
    "attention": lambda x: attention(*(x.reshape(1, 2, 3, 6) * k for k in (1, 2, 3))),
    "attention to constants": lambda x: attention(
        WEIGHT.reshape(1, 2, 3, 6), x.reshape(1, 2, 3, 6), x.reshape(1, 2, 3, 6)
    ),
    "values alone": lambda x: attention(*[WEIGHT.reshape(1, 2, 3, 6)] * 2, x.reshape(1, 2, 3, 6)),
    "convolution": lambda x: functional.conv2d(x.reshape(1, 6, 2, 3), KERNEL, KERNEL[:, 0, 0, 0], padding=1),
    "group norm": lambda x: functional.group_norm(x.reshape(2, 6, 3), 3, WEIGHT[0], WEIGHT[1]),
    "images": lambda x: functional.avg_pool2d(functional.interpolate(x.reshape(1, 1, 6, 6), scale_factor=2.0), 3),
    "types": lambda x: (x.float().double() + x.to(torch.float64)).expand(2, 6, 6).contiguous().flatten(0, 1),
}


def point() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_the_derivative_of_torch(name: str) -> None:
    x, v = point()
    value, tangent = pushforward(OPERATIONS[name], (x,), (v,))
    expected_value = OPERATIONS[name](x)
    expected = torch.func.jvp(OPERATIONS[name], (x,), (v,))[1]
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=1e-12)
    tolerance = 1e-5 if name == "types" else 1e-9  # float32 in between
    torch.testing.assert_close(tangent, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("choices", "types")])
def test_a_differentiable_tangent_has_the_gradient_of_differences(name: str) -> None:
    """Against central differences of the tangent itself: torch's own reverse-over-forward mode takes the mean and
    deviation of a layer_norm for constants, and is wrong by its own size there."""
    x, v = point()

    def slope(at: Tensor) -> Tensor:
        tangent = pushforward(OPERATIONS[name], (at,), (v,), differentiable=True)[1]
        return (tangent * torch.linspace(-1, 1, tangent.numel(), dtype=x.dtype).view_as(tangent)).sum() + 0 * at.sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(slope(x), x)
    with torch.no_grad():
        step = 1e-5
        expected = (slope(x + step * v) - slope(x - step * v)) / (2 * step)
    torch.testing.assert_close((gradient * v).sum(), expected, rtol=1e-5, atol=1e-5)


def random_weights(flow_map: FlowMap) -> FlowMap:
    generator = torch.Generator().manual_seed(1)
    for parameter in flow_map.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return flow_map.double()


def mlp() -> FlowMap:
    torch.manual_seed(0)
    space = DataSpace("coordinates", (3,))
    return random_weights(ResidualMLPFlowMap(space=space, width=16, num_blocks=2, num_classes=3))


def dit() -> FlowMap:
    torch.manual_seed(0)
    space = DataSpace("image", (2, 8, 8))
    sizes = {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "encoder_depth": 1}
    return random_weights(DiTFlowMap(space=space, **sizes, num_classes=3))


def exact() -> FlowMap:
    means = torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    return GaussianMixtureFlowMap(isotropic_mixture(means, variance=0.5))


def along_the_flow(flow_map: FlowMap):
    """A velocity as a function of (x_s, s, u), a point and a direction."""
    generator = torch.Generator().manual_seed(2)
    rows = 5

    def normal() -> Tensor:
        return torch.randn(rows, *flow_map.event_shape, generator=generator, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(rows, generator=generator, dtype=torch.float64)

    x_s, x_t, direction, s, t = normal(), normal(), normal(), 0.5 * uniform(), 0.8 * uniform()
    label = torch.arange(rows) % 3 if flow_map.num_classes else None
    velocity = lambda x, s, u: flow_map.velocity(x, s, u, t=t, x_t=x_t, label=label)  # noqa: E731
    return velocity, (x_s, s, s + 0.3), (direction, torch.ones_like(s), torch.full_like(s, -0.5))


@pytest.mark.parametrize("make", [mlp, dit, exact])
def test_networks_have_the_derivative_of_torch_and_the_tangent_has_no_graph(make) -> None:
    flow_map = make()
    velocity, at, along = along_the_flow(flow_map)
    value, tangent = pushforward(velocity, at, along)
    torch.testing.assert_close(value, velocity(*at), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, torch.func.jvp(velocity, at, along)[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tangent, central_difference(velocity, at, along), rtol=1e-2, atol=1e-2)
    assert not tangent.requires_grad
    assert value.requires_grad == any(True for _ in flow_map.parameters())


@pytest.mark.parametrize("make", [mlp, dit])
def test_the_value_keeps_its_gradient(make) -> None:
    flow_map = make()
    velocity, at, along = along_the_flow(flow_map)
    weights = list(flow_map.parameters())
    with_tangent = torch.autograd.grad(pushforward(velocity, at, along)[0].square().sum(), weights, allow_unused=True)
    alone = torch.autograd.grad(velocity(*at).square().sum(), weights, allow_unused=True)
    for a, b in zip(with_tangent, alone, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def saved_bytes(run) -> int:
    """Of what is kept for the backward pass."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept)


def test_the_tangent_keeps_no_memory_for_the_backward_pass() -> None:
    flow_map = dit()
    velocity, at, along = along_the_flow(flow_map)
    alone = saved_bytes(lambda: velocity(*at))
    riding = saved_bytes(lambda: pushforward(velocity, at, along)[0])
    recorded = saved_bytes(lambda: torch.func.jvp(velocity, at, along)[0])
    assert riding <= 1.05 * alone
    assert recorded > 1.5 * alone


def test_hooks_of_modules_see_both_tensors_and_may_wrap_them() -> None:
    """What sharding does: an autograd Function around every tensor that leaves a module, looked for in tuples."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.detach()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient.shape)
            return gradient

    def wrap(module, inputs, out):
        return type(out)(*(Through.apply(part) for part in out)) if isinstance(out, tuple) else Through.apply(out)

    seen: list[torch.Size] = []
    layer = nn.Linear(6, 6).double()
    layer.register_forward_hook(wrap)
    x, v = point()
    value, tangent = pushforward(lambda x: layer(x).exp(), (x,), (v,))
    torch.testing.assert_close(tangent, value.detach() * (v @ layer.weight.detach().T))
    value.sum().backward()
    assert seen == [x.shape]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.add_(1), "add_ works in place"),
        (lambda x: x.__setitem__(0, 1.0), "__setitem__ works in place"),
        (lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True), "no tangent rule"),
        (lambda x: x.data, "Tensor.data has no forward-mode derivative"),
        (
            lambda x: (
                torch.ops.aten.angle(x)
                if False
                else functional.ctc_loss(x.unsqueeze(1).log_softmax(2), torch.ones(1, 2, dtype=torch.long), (6,), (2,))
            ),
            "no forward-mode derivative",
        ),
    ],
)
def test_what_has_no_derivative_is_refused_by_name(function, message: str) -> None:
    x, v = point()
    with pytest.raises(TangentError, match=message):
        pushforward(function, (x,), (v,))


def test_a_function_that_ignores_its_input_has_tangent_zero() -> None:
    x, v = point()
    value, tangent = pushforward(lambda x: torch.full_like(x, math.pi), (x,), (v,))
    assert bool((value == math.pi).all())
    assert bool((tangent == 0).all())


def test_comparisons_and_shapes_are_those_of_the_value() -> None:
    dual = Dual(*point())
    assert dual.shape == (6, 6)
    assert (dual > 0).dtype == torch.bool
    assert dual.dtype == torch.float64
    assert dual.ndim == dual.dim() == 2
