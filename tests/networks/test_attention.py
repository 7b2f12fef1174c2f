"""Attention and its forward derivative: equal to the formula in float64, in every precision, and small in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mfm_ray.attention_tangent import attention_tangent
from mfm_ray.networks.attention import attention, written_out_attention
from mfm_ray.tangents import Dual, central_difference, pushforward

SHAPES = [(1, 1, 1, 1, 4), (2, 3, 5, 5, 8), (3, 2, 16, 16, 4), (5, 2, 7, 11, 6)]  # images, heads, queries, keys, depth
PARTS = [1, 12, 100, 1 << 18]  # elements of the scores at once: less than a row, rows, images, all
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the norm
MOVING = [moving for moving in itertools.product((True, False), repeat=3) if any(moving)]


def inputs(shape: tuple[int, int, int, int, int], *, seed: int = 0, size: float = 1.0) -> tuple[list[Tensor], ...]:
    """Query, key and value, and a tangent of each, float64."""
    images, heads, queries, keys, depth = shape
    generator = torch.Generator().manual_seed(seed)
    both = []
    for _ in range(2):
        lengths = (queries, keys, keys)
        both.append(
            [size * torch.randn(images, heads, n, depth, generator=generator, dtype=torch.float64) for n in lengths]
        )
    return tuple(both)


def by_formula(primals: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Value and derivative in float64 by torch's own forward mode through the written-out softmax."""
    wide = [part.double() for part in primals]
    moved = [torch.zeros_like(part) if t is None else t.double() for part, t in zip(wide, tangents, strict=True)]
    return torch.func.jvp(written_out_attention, tuple(wide), tuple(moved))


def relative(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tangent_is_that_of_the_formula_in_float64_in_parts_of_any_size(shape: tuple, dtype: torch.dtype) -> None:
    primals, tangents = ([part.to(dtype) for part in parts] for parts in inputs(shape))
    for moving in MOVING:
        some = [tangent if moves else None for tangent, moves in zip(tangents, moving, strict=True)]
        expected = by_formula(primals, some)[1]
        for size in PARTS:
            given = attention_tangent(*primals, *some, scores_at_once=size)
            assert given.dtype == dtype
            assert given.shape == expected.shape
            error = (given.double() - expected).norm()
            # one key: the weight is 1 whatever the scores, and the derivative of it rounding alone
            assert error <= TOLERANCE[dtype] * expected.norm() + 1e-12, (moving, size)


def test_the_tangent_is_that_of_differences() -> None:
    primals, tangents = inputs(SHAPES[1])
    difference = central_difference(functional.scaled_dot_product_attention, primals, tangents, step=1e-4)
    assert relative(attention_tangent(*primals, *tangents), difference) < 1e-7


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_and_tangent_of_a_dual_and_of_torch_are_those_of_the_formula(dtype: torch.dtype) -> None:
    primals, tangents = ([part.to(dtype) for part in parts] for parts in inputs(SHAPES[2]))
    value, tangent = by_formula(primals, list(tangents))
    for given in (
        pushforward(attention, primals, tangents),
        torch.func.jvp(attention, tuple(primals), tuple(tangents)),
    ):
        assert [part.dtype for part in given] == [dtype, dtype]
        assert relative(given[0], value) < TOLERANCE[dtype]
        assert relative(given[1], tangent) < TOLERANCE[dtype]


def test_large_scores_in_bfloat16_are_summed_in_float32() -> None:
    """Scores of about 30, which bfloat16 would round by 0.1: only inputs and weights are, and what comes out."""
    primals, tangents = ([part.bfloat16() for part in parts] for parts in inputs((2, 2, 64, 64, 16), size=3.0))
    expected = by_formula(primals, list(tangents))[1]
    rounded = torch.func.jvp(written_out_attention, tuple(primals), tuple(tangents))[1]
    error = relative(attention_tangent(*primals, *tangents), expected)
    assert error < 1e-2
    assert error < relative(rounded, expected) / 3


def test_under_autocast_the_inputs_alone_are_rounded() -> None:
    primals, tangents = ([part.float() for part in parts] for parts in inputs(SHAPES[1]))
    with torch.autocast("cpu", torch.bfloat16):
        value, tangent = pushforward(attention, primals, tangents)
    assert value.dtype == tangent.dtype == torch.bfloat16
    half = [[part.bfloat16() for part in parts] for parts in (primals, tangents)]
    assert relative(tangent, by_formula(*half)[1]) < 1e-2


def test_every_transform_of_torch_goes_through() -> None:
    primals, tangents = inputs(SHAPES[1])
    query, key, value = primals

    def of_query(x: Tensor) -> Tensor:
        return attention(x, key, value)

    def plain(x: Tensor) -> Tensor:
        return written_out_attention(x, key, value)

    def twice(function):
        return torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (tangents[0],))[1], (query,), (tangents[0],))[1]

    def gradient(function):
        loss = lambda x: torch.func.jvp(function, (x,), (tangents[0],))[1].square().sum()  # noqa: E731
        return torch.func.grad(loss)(query)

    jacobians = [
        torch.func.jacfwd(function)(query[:1, :1])
        for function in (of_query_small(primals, attention), of_query_small(primals, written_out_attention))
    ]
    torch.testing.assert_close(*jacobians)
    torch.testing.assert_close(twice(of_query), twice(plain))
    torch.testing.assert_close(gradient(of_query), gradient(plain))


def of_query_small(primals: list[Tensor], function):
    return lambda x: function(x, primals[1][:1, :1], primals[2][:1, :1])


@pytest.mark.parametrize("make", [pushforward, torch.func.jvp], ids=["dual", "torch"])
def test_the_recorded_value_has_the_gradient_of_the_fused_kernel(make) -> None:
    primals, tangents = inputs(SHAPES[2])
    leaves = [part.requires_grad_() for part in primals]
    value, _ = make(attention, tuple(leaves), tuple(tangents))
    given = torch.autograd.grad(value.square().sum(), leaves)
    expected = torch.autograd.grad(functional.scaled_dot_product_attention(*leaves).square().sum(), leaves)
    torch.testing.assert_close(given, expected)


def test_a_recorded_tangent_has_the_gradient_of_the_formula() -> None:
    primals, tangents = inputs(SHAPES[1])
    leaves = [part.requires_grad_() for part in (*primals, *tangents)]
    expected = torch.autograd.grad(by_formula(leaves[:3], leaves[3:])[1].square().sum(), leaves)
    for size in PARTS:
        given = torch.autograd.grad(attention_tangent(*leaves, scores_at_once=size).square().sum(), leaves)
        torch.testing.assert_close(given, expected)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        parts = out if isinstance(out, tuple | list) else [out]
        made = [part.numel() for part in parts if isinstance(part, Tensor)]
        self.elements = max([self.elements, *made])
        return out


def test_no_score_matrix_is_larger_than_a_part() -> None:
    primals, tangents = inputs((4, 2, 64, 64, 2))
    small = 2 * 2 * max(part.numel() for part in primals)  # query and its tangent side by side
    with Largest() as in_parts:
        attention_tangent(*primals, *tangents, scores_at_once=1024)
    with Largest() as whole:
        torch.func.jvp(written_out_attention, tuple(primals), tuple(tangents))
    assert in_parts.elements <= max(small, 1024)
    assert whole.elements == 4 * 2 * 64 * 64


def test_a_recorded_tangent_keeps_no_score_matrix() -> None:
    primals, tangents = inputs((2, 2, 64, 64, 4))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    leaves = [part.requires_grad_() for part in primals]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pushforward(attention, leaves, tangents, differentiable=True)
    assert max(kept, default=0) < 2 * 2 * 64 * 64


def test_constants_and_masks() -> None:
    primals, tangents = inputs(SHAPES[1])
    out = attention(Dual(primals[0], tangents[0]), primals[1], primals[2])  # type: ignore[arg-type]
    expected = by_formula(primals, [tangents[0], None, None])
    torch.testing.assert_close(tuple(out), expected)
