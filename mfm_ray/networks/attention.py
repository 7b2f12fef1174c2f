"""Scaled dot-product attention that also has a forward-mode derivative."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from mfm_ray.attention_tangent import attention_tangent


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, heads, T, d), by the fastest kernel there is.

    The fused kernels have no forward-mode derivative. Inside a `torch.func.jvp` the value is theirs and its tangent
    `attention_tangent`'s; inside more than one transform of torch.func the softmax is written out.
    """
    if forward_ad._current_level < 0:
        return functional.scaled_dot_product_attention(query, key, value)
    if (torch._C._functorch.maybe_current_level() or 1) > 1:
        return written_out_attention(query, key, value)
    return _with_tangent(query, key, value)


def written_out_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by its formula, with scores and weights as whole matrices: any derivative, and most memory."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return torch.softmax(scores, dim=-1) @ value


def _with_tangent(*inputs: Tensor) -> Tensor:
    primals, tangents = zip(*(forward_ad.unpack_dual(part) for part in inputs), strict=True)
    out = functional.scaled_dot_product_attention(*primals)
    if all(tangent is None for tangent in tangents):
        return out
    query, key, value = (part.to(out.dtype) for part in primals)
    moved = (None if tangent is None else tangent.to(out.dtype) for tangent in tangents)
    return forward_ad.make_dual(out, attention_tangent(query, key, value, *moved))
