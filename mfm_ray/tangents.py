"""Forward-mode derivatives that ride on the recorded forward pass without recording themselves.

`torch.func.jvp` in grad mode keeps the graph of the tangent beside that of the value, although a stop-gradient target
never goes back through it; and it refuses modules with autograd Functions in their hooks, which is what DDP, FSDP and
ZeRO put there. Here a `Dual` is an ordinary pair of tensors. Modules are called as always, hooks included; every torch
operation on a pair computes its value as always, recorded for the backward pass, and its tangent from a rule, under
no_grad. The tangent therefore costs about one more forward pass, no memory that lasts, and under ZeRO-3 it uses the
parameters of a block while they are gathered for the value.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from mfm_ray.attention_tangent import attention_tangent

_OPERATORS = """
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ __matmul__
    __rmatmul__ __neg__ __abs__ __getitem__ __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __lt__ __le__
    __gt__ __ge__ __eq__ __ne__
"""
_LINEAR_NAMES = """
    view reshape flatten unflatten unsqueeze squeeze permute transpose swapaxes movedim expand repeat
    repeat_interleave chunk split tensor_split unbind select narrow index_select contiguous to float double half
    bfloat16 clone neg negative sum mean roll flip pad pixel_shuffle pixel_unshuffle interpolate avg_pool2d
    adaptive_avg_pool2d tril triu diagonal __getitem__ __neg__
"""
_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")
_CONSTANT_NAMES = """
    zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full detach
"""


class TangentError(NotImplementedError):
    """An operation has no forward-mode derivative; the message names it."""


_differentiable: ContextVar[bool] = ContextVar("differentiable_tangents", default=False)


def pushforward(
    function: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor], *, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """function(*primals) and its derivative along `tangents`: y = f(x) and J_f(x) v, both shaped like y.

    The value is recorded for the backward pass as always. The derivative carries no graph, unless `differentiable`,
    which keeps one through tangent and value alike and costs the memory of both.

    Raises TangentError for an operation without a forward-mode derivative and for operations in place.
    """
    duals = [Dual(primal, tangent) for primal, tangent in zip(primals, tangents, strict=True)]
    with tangents_recorded(differentiable):
        out = function(*duals)
    if not isinstance(out, Dual):  # it does not depend on the inputs
        return out, torch.zeros_like(out)
    return out.primal, out.tangent


def records_tangents() -> bool:
    """Whether the `pushforward` that is under way keeps a graph through its tangents (`differentiable`)."""
    return _differentiable.get()


def has_tangent(*inputs: Any) -> bool:
    """Whether a forward derivative is being taken: one of the inputs is a `Dual`, or torch's own mode is on."""
    return forward_ad._current_level >= 0 or any(isinstance(each, Dual) for each in inputs)


@contextmanager
def tangents_recorded(differentiable: bool) -> Iterator[None]:
    """Operations on `Dual`s keep a graph through their tangents, or none."""
    token = _differentiable.set(differentiable)
    try:
        yield
    finally:
        _differentiable.reset(token)


def central_difference(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor], *, step: float = 1e-3
) -> Tensor:
    """(f(x + h v) - f(x - h v)) / 2h, shaped like f(x): the derivative along v to order h^2.

    For functions that forward mode refuses. In float32 the error is about 1e-4 of the values; in half precision the
    difference is noise, so call it with a function that computes in float32.
    """
    ahead, behind = (
        function(*(x + sign * step * v for x, v in zip(primals, tangents, strict=True))) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


_Pair = namedtuple("_Pair", ["primal", "tangent"])


class Dual(_Pair):
    """A tensor and its tangent, of one shape, that go through torch operations, functionals and modules together.

    A named tuple, because that is what the hooks of sharded modules look into: they reach both tensors, and gradients
    flow through both. Whatever a tensor has as method or operator a Dual has too.
    """

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_in_place(func)
        out = func(*_primals(args), **_primals(kwargs))
        if func in _CONSTANT or not _is_floating(out):
            return out
        with torch.set_grad_enabled(torch.is_grad_enabled() and _differentiable.get()):
            return _pair(out, _RULES.get(func, _by_forward_mode)(_Operation(func, args, kwargs, out)))

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name)
        if callable(method):
            return _bind(method, self)
        value = getattr(self.primal, name)
        if name in ("T", "mT"):
            return Dual(value, getattr(self.tangent, name))
        if isinstance(value, Tensor):
            raise TangentError(f"Tensor.{name} has no forward-mode derivative")
        return value


def _bind(method: Callable[..., Any], dual: Dual) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return Dual.__torch_function__(method, (Dual,), (dual, *args), kwargs)

    return call


def _operator(name: str) -> Callable[..., Any]:
    def call(self: Dual, *args: Any) -> Any:
        return Dual.__torch_function__(getattr(Tensor, name), (Dual,), (self, *args))

    return call


# looked up on the class, and some of them a tuple has of its own
for _name in _OPERATORS.split():
    setattr(Dual, _name, _operator(_name))


def _name_of(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func))


def _refuse_in_place(func: Callable[..., Any]) -> None:
    name = _name_of(func)
    if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE:
        raise TangentError(f"{name} works in place: a tangent needs the operation that returns a new tensor")


class _Operation:
    """One call of a torch function: its arguments, Duals among them, and the value it gave."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out

    def arguments(self, *names: str) -> list[Any]:
        """Arguments by position or by name, None where they were not given."""
        given = [*self.args, *(self.kwargs.get(name) for name in names[len(self.args) :])]
        return given[: len(names)]


def _map(value: Any, change: Callable[[Dual], Any]) -> Any:
    if isinstance(value, Dual):
        return change(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return value


def _primals(value: Any) -> Any:
    return _map(value, lambda dual: dual.primal)


def _is_floating(out: Any) -> bool:
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    return isinstance(first, Tensor) and first.is_floating_point()


def _pair(out: Any, tangent: Any) -> Any:
    if tangent is None:
        return out
    if isinstance(out, Tensor):
        return Dual(out, tangent)
    return tuple(_pair(*both) for both in zip(out, tangent, strict=True))


def _primal(value: Any) -> Any:
    return value.primal if isinstance(value, Dual) else value


def _tangent(value: Any) -> Any:
    return value.tangent if isinstance(value, Dual) else None


_RULES: dict[Any, Callable[[_Operation], Any]] = {}


def _rule(*functions: str) -> Callable[[Callable[[_Operation], Any]], Callable[[_Operation], Any]]:
    """Register a rule for functions of torch, torch.Tensor and torch.nn.functional by name, where they exist."""

    def register(rule: Callable[[_Operation], Any]) -> Callable[[_Operation], Any]:
        for name in functions:
            for place in (torch, Tensor, functional):
                if hasattr(place, name):
                    _RULES[getattr(place, name)] = rule
        return rule

    return register


_CONSTANT = {
    getattr(place, name) for name in _CONSTANT_NAMES.split() for place in (torch, Tensor) if hasattr(place, name)
}


@_rule(*_LINEAR_NAMES.split())
def _linear_in_the_first(op: _Operation) -> Any:
    if not isinstance(op.args[0], Dual):
        return None
    return op.func(op.args[0].tangent, *_primals(op.args[1:]), **_primals(op.kwargs))


def _by_forward_mode(op: _Operation) -> Any:
    """Whatever has no rule of its own: torch's forward mode, on this one operation."""
    name = _name_of(op.func)
    with forward_ad.dual_level():

        def raised(dual: Dual) -> Tensor:
            return forward_ad.make_dual(dual.primal, dual.tangent.to(dual.primal.dtype))

        try:
            out = op.func(*_map(op.args, raised), **_map(op.kwargs, raised))
        except (NotImplementedError, RuntimeError) as error:
            raise TangentError(f"{name}: no forward-mode derivative ({str(error).splitlines()[0]})") from error
        return _unpack(out)


def _unpack(out: Any) -> Any:
    if isinstance(out, Tensor):
        tangent = forward_ad.unpack_dual(out).tangent
        return torch.zeros_like(out) if tangent is None else tangent
    return tuple(_unpack(item) for item in out)


@_rule("cat", "concat", "stack")
def _joined(op: _Operation) -> Tensor:
    parts = [item.tangent if isinstance(item, Dual) else torch.zeros_like(item) for item in op.args[0]]
    return op.func(parts, *op.args[1:], **op.kwargs)


@_rule("add", "__add__", "__radd__", "sub", "subtract", "__sub__", "__rsub__")
def _sum(op: _Operation) -> Tensor:
    if op.kwargs:
        return _by_forward_mode(op)
    name = op.func.__name__
    first, second = (_tangent(value) for value in op.args)
    second = second if second is None or "sub" not in name else -second
    if name == "__rsub__":
        first, second = (None if first is None else -first), (None if second is None else -second)
    if first is None or second is None:
        only = second if first is None else first
        assert only is not None
        return only.expand(op.out.shape)
    return first + second


@_rule("mul", "multiply", "__mul__", "__rmul__")
def _product(op: _Operation) -> Tensor:
    (a, b), (da, db) = _primals(op.args), map(_tangent, op.args)
    return _added(None if da is None else da * b, None if db is None else a * db)


@_rule("div", "divide", "true_divide", "__truediv__")
def _quotient(op: _Operation) -> Tensor:
    if op.kwargs:
        return _by_forward_mode(op)
    (_, b), (da, db) = _primals(op.args), map(_tangent, op.args)
    return _added(None if da is None else da / b, None if db is None else -op.out * db / b)


def _added(first: Tensor | None, second: Tensor | None) -> Tensor:
    if first is None or second is None:
        only = second if first is None else first
        assert only is not None
        return only
    return first + second


@_rule("matmul", "bmm", "mm", "__matmul__")
def _matrix_product(op: _Operation) -> Tensor:
    (a, b), (da, db) = _primals(op.args), map(_tangent, op.args)
    return _added(None if da is None else da @ b, None if db is None else a @ db)


@_rule("linear")
def _linear(op: _Operation) -> Tensor:
    x, weight, bias = op.arguments("input", "weight", "bias")
    if isinstance(weight, Dual) or isinstance(bias, Dual):
        return _by_forward_mode(op)
    return functional.linear(x.tangent, weight)


@_rule("conv1d", "conv2d", "conv3d", "conv_transpose2d")
def _convolution(op: _Operation) -> Tensor:
    names = ("input", "weight", "bias")
    x, weight, bias = op.arguments(*names)
    if isinstance(weight, Dual) or isinstance(bias, Dual):
        return _by_forward_mode(op)
    rest = {name: value for name, value in op.kwargs.items() if name not in names}
    return op.func(x.tangent, weight, None, *op.args[3:], **rest)


@_rule("silu")
def _silu(op: _Operation) -> Tensor:
    x = op.args[0]
    if torch.is_grad_enabled():  # the kernel has no derivative of its own
        gate = torch.sigmoid(x.primal)
        return x.tangent * (gate * (1 + x.primal * (1 - gate)))
    return torch.ops.aten.silu_backward(x.tangent.to(x.primal.dtype), x.primal)


@_rule("gelu")
def _gelu(op: _Operation) -> Tensor:
    x = op.args[0]
    return torch.ops.aten.gelu_backward(x.tangent.to(x.primal.dtype), x.primal, **op.kwargs)


@_rule("sigmoid")
def _sigmoid(op: _Operation) -> Tensor:
    return op.args[0].tangent * (op.out * (1 - op.out))


@_rule("tanh")
def _tanh(op: _Operation) -> Tensor:
    return op.args[0].tangent * (1 - op.out * op.out)


@_rule("exp")
def _exp(op: _Operation) -> Tensor:
    return op.args[0].tangent * op.out


@_rule("log")
def _log(op: _Operation) -> Tensor:
    return op.args[0].tangent / op.args[0].primal


@_rule("sqrt")
def _sqrt(op: _Operation) -> Tensor:
    return op.args[0].tangent / (2 * op.out)


@_rule("rsqrt")
def _rsqrt(op: _Operation) -> Tensor:
    return -0.5 * op.args[0].tangent * op.out / op.args[0].primal


@_rule("square")
def _square(op: _Operation) -> Tensor:
    return 2 * op.args[0].primal * op.args[0].tangent


@_rule("sin")
def _sin(op: _Operation) -> Tensor:
    return op.args[0].tangent * torch.cos(op.args[0].primal)


@_rule("cos")
def _cos(op: _Operation) -> Tensor:
    return -op.args[0].tangent * torch.sin(op.args[0].primal)


@_rule("layer_norm")
def _layer_norm(op: _Operation) -> Tensor:
    x, shape, weight, bias, eps = op.arguments("input", "normalized_shape", "weight", "bias", "eps")
    if isinstance(weight, Dual) or isinstance(bias, Dual):
        return _by_forward_mode(op)
    return _scaled(_normalised_tangent(x, len(shape), 1e-5 if eps is None else eps, op.out.dtype), weight)


@_rule("group_norm")
def _group_norm(op: _Operation) -> Tensor:
    x, groups, weight, bias, eps = op.arguments("input", "num_groups", "weight", "bias", "eps")
    if isinstance(weight, Dual) or isinstance(bias, Dual):
        return _by_forward_mode(op)
    grouped = Dual(*(part.reshape(part.shape[0], groups, -1) for part in x))
    tangent = _normalised_tangent(grouped, 1, 1e-5 if eps is None else eps, op.out.dtype).reshape(op.out.shape)
    return _scaled(tangent, None if weight is None else weight.reshape(-1, *[1] * (op.out.ndim - 2)))


def _scaled(tangent: Tensor, weight: Tensor | None) -> Tensor:
    return tangent if weight is None else tangent * weight


def _normalised_tangent(x: Dual, num_dims: int, eps: float, dtype: torch.dtype) -> Tensor:
    """Derivative of (x - mean) / sqrt(variance + eps) over the last dimensions: a symmetric matrix times the tangent,

    so that the fused kernel of the backward pass applies it as well.
    """
    with torch.autocast(x.primal.device.type, enabled=False):
        value, tangent = x.primal.to(dtype), x.tangent.to(dtype)
        if torch.is_grad_enabled():  # the kernel's own derivative takes mean and deviation for constants
            return _normalised_tangent_by_hand(value, tangent, tuple(range(-num_dims, 0)), eps)
        shape = value.shape[-num_dims:]
        _, mean, deviation = torch.native_layer_norm(value, shape, None, None, eps)
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(tangent.contiguous(), value, shape, mean, deviation, None, None, [True, False, False])[0]


def _normalised_tangent_by_hand(value: Tensor, tangent: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    variance, mean = torch.var_mean(value, dim=dims, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    normal, centred = (value - mean) * inverse, tangent - tangent.mean(dims, keepdim=True)
    return inverse * (centred - normal * (normal * centred).mean(dims, keepdim=True))


@_rule("softmax")
def _softmax(op: _Operation) -> Tensor:
    (dim,) = op.arguments("input", "dim")[1:]
    weighted = op.out * op.args[0].tangent
    return weighted - op.out * weighted.sum(dim, keepdim=True)


@_rule("log_softmax")
def _log_softmax(op: _Operation) -> Tensor:
    (dim,) = op.arguments("input", "dim")[1:]
    tangent = op.args[0].tangent
    return tangent - (op.out.exp() * tangent).sum(dim, keepdim=True)


@_rule("scaled_dot_product_attention")
def _attention(op: _Operation) -> Tensor:
    """The value by the fused kernel; the tangent through the weights, which it does not give out."""
    if op.kwargs or len(op.args) != 3:
        raise TangentError("scaled_dot_product_attention with a mask, dropout or scale has no tangent rule")
    dtype = op.out.dtype  # what autocast made of the inputs
    query, key, value = (part.to(dtype) for part in _primals(op.args))
    moved = (None if (tangent := _tangent(part)) is None else tangent.to(dtype) for part in op.args)
    return attention_tangent(query, key, value, *moved)
