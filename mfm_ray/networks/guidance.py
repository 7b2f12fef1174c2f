"""The guidance scale as an input of a network: a row of a learned table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def guidance_index(cfg_scale: float | Tensor | None, cfg_scales: Sequence[float], like: Tensor) -> Tensor:
    """Row of the table (1, *cfg_scales) that is nearest to each scale, (B,) int64; without a scale that of 1.

    cfg_scale: one for all, one for each row of `like` (B,), or None.
    """
    if not isinstance(cfg_scale, Tensor):
        cfg_scale = torch.full(like.shape, 1.0 if cfg_scale is None else cfg_scale, device=like.device)
    given = cfg_scale.to(like.device).expand(like.shape)
    # filled on the device: a copy from host memory would make every call wait, and no CUDA graph could hold it
    known = torch.cat([torch.full((1,), value, device=like.device) for value in (1.0, *cfg_scales)])
    return (given.unsqueeze(-1) - known).abs().argmin(-1)
