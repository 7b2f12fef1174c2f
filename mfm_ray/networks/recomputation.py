"""Activation checkpointing of blocks: each keeps its inputs alone and is computed again in the backward pass.

It changes what a step keeps, not what it computes: losses and gradients are the same to the bit. A backward pass then
costs one more forward pass of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mfm_ray.tangents import Dual, records_tangents, tangents_recorded


def recomputed(block: nn.Module, *inputs: Any) -> Any:
    """block(*inputs), without what it would keep for the backward pass. inputs: tensors, or `Dual`s of them.

    A tangent that nothing goes back through is computed once and neither kept nor computed again. Inside a transform
    of torch.func, which is over before the backward pass comes, everything is kept.
    """
    if not torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return block(*inputs)
    if not any(isinstance(each, Dual) for each in inputs):
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return _with_tangents(block, inputs)


def _with_tangents(block: nn.Module, inputs: tuple[Any, ...]) -> Dual:
    primals = [each.primal if isinstance(each, Dual) else each for each in inputs]
    tangents = [each.tangent if isinstance(each, Dual) else None for each in inputs]
    return Dual(*(_recorded if records_tangents() else _unrecorded)(block, primals, tangents))


def _recorded(block: nn.Module, primals: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The graph goes through the tangents, which are inputs like the others."""
    count = len(primals)

    def call(*both: Any) -> Any:
        with tangents_recorded(True):  # in the backward pass as well, when the pushforward is over
            return tuple(_call(block, both[:count], both[count:]))

    pair: tuple[Tensor, Tensor] = checkpoint(call, *primals, *tangents, use_reentrant=False, preserve_rng_state=False)
    return pair


def _unrecorded(block: nn.Module, primals: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The backward pass computes the values alone again: of the tangents it needs nothing."""
    waiting = [tangents]

    def call(*values: Tensor) -> Any:
        return tuple(_call(block, values, waiting.pop())) if waiting else block(*values)

    pair: tuple[Tensor, Tensor] = checkpoint(call, *primals, use_reentrant=False, preserve_rng_state=False)
    return pair


def _call(block: nn.Module, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Any:
    return block(*(p if t is None else Dual(p, t) for p, t in zip(primals, tangents, strict=True)))
