"""The forward derivative of softmax attention, a part of the scores at a time.

The fused kernels give the value and have no forward derivative, and neither the weights nor the derivative of the
scores come out of them. Written out they are (B, heads, T, T) matrices, four of them in float32; here they exist for a
few images or queries at once, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Elements of a score matrix that exist at once: on a CPU what its caches hold, on a GPU what fills it (256 MB)."""

_Parts = tuple[Any, ...]


def attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tangent: Tensor | None,
    key_tangent: Tensor | None,
    value_tangent: Tensor | None,
    *,
    scores_at_once: int | None = None,
) -> Tensor:
    """Derivative of softmax(q k^T / sqrt(d)) v along the tangents, (B, heads, T, d) as the value; None: no tangent.

    With S = q k^T / sqrt(d) and P = softmax(S),

        d(P v) = (P * (dS - rowsum(P * dS))) v + P dv,        dS = (dq k^T + q dk^T) / sqrt(d).

    Scores, softmax and sums are float32 for inputs in half precision, float64 for float64. query (B, heads, T, d), key
    and value (B, heads, S, d), tangents like what they belong to, at least one of them given. Where a graph is
    recorded, each part is computed again in the backward pass and keeps its inputs alone.
    """
    heads, queries = query.shape[1:3]
    budget = scores_at_once or SCORES_AT_ONCE["cuda" if query.is_cuda else "cpu"]
    row = heads * key.shape[-2]
    several_images, several_queries = max(1, budget // (row * queries)), max(1, min(queries, budget // row))
    inputs = (query, query_tangent, key, key_tangent, value, value_tangent)
    with torch.autocast(query.device.type, enabled=False):
        parts = [
            torch.cat([_kept_small(part) for part in _in_queries(some, several_queries)], dim=-2)
            for some in _in_images(inputs, several_images)
        ]
    return torch.cat(parts)


def _in_images(inputs: _Parts, size: int) -> Iterator[_Parts]:
    for first in range(0, inputs[0].shape[0], size):
        yield tuple(None if part is None else part[first : first + size] for part in inputs)


def _in_queries(inputs: _Parts, size: int) -> Iterator[_Parts]:
    query, query_tangent, *rest = inputs
    for first in range(0, query.shape[-2], size):
        some = slice(first, first + size)
        yield query[:, :, some], None if query_tangent is None else query_tangent[:, :, some], *rest


def _kept_small(inputs: _Parts) -> Tensor:
    """The part's tangent; where it is recorded, without its score matrices."""
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in inputs):
        recomputed: Tensor = checkpoint(_tangent_of_part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return recomputed
    return _tangent_of_part(*inputs)


def _tangent_of_part(
    q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None
) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1])
    weights = torch.softmax(_product(q, k.mT) * scale, dim=-1)
    tangent = None
    if dq is not None or dk is not None:
        moved = _moved_scores(q, dq, k, dk) * scale
        moved = weights * (moved - (weights * moved).sum(-1, keepdim=True))
        tangent = _product(moved.to(v.dtype), v)
    if dv is not None:
        straight = _product(weights.to(v.dtype), dv)
        tangent = straight if tangent is None else tangent + straight
    assert tangent is not None, "attention without any tangent"
    return tangent.to(v.dtype)


def _moved_scores(q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None) -> Tensor:
    """dq k^T + q dk^T; as one product of twice the depth where both move."""
    if dq is None or dk is None:
        return _product(q, dk.mT) if dk is not None else _product(dq, k.mT)  # type: ignore[arg-type]
    return _product(torch.cat([dq, q], dim=-1), torch.cat([k, dk], dim=-1).mT)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in at least float32, summed and returned."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide or not a.is_cuda:
        return a.to(wide) @ b.to(wide)
    if torch.is_grad_enabled():  # sums in float32 and rounds what they come to
        return (a @ b).to(wide)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=wide).unflatten(0, a.shape[:2])
