"""Rows that do not depend on their batch: network calls are padded to a multiple of four rows.

CPU matrix kernels treat one to three rows differently from four and more; with at least four, a row's result is the
same to the bit whatever else is in the batch (CPU, float32; measured, and held by the sampler's tests).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap

ROW_MULTIPLE = 4
"""Rows of every network call are padded to a multiple of this."""


class PaddedFlowMap(FlowMap):
    """A flow map whose calls see a multiple of `ROW_MULTIPLE` rows; row 0 stands in for those that are missing."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__(flow_map.space, num_classes=flow_map.num_classes, cfg_scales=flow_map.cfg_scales)
        self.flow_map = flow_map

    def velocity(
        self,
        x_s: Tensor,
        s: Tensor,
        u: Tensor,
        *,
        t: Tensor,
        x_t: Tensor,
        label: Tensor | None = None,
        cfg_scale: float | Tensor | None = None,
    ) -> Tensor:
        rows = x_s.shape[0]
        if rows % ROW_MULTIPLE == 0:
            return self.flow_map.velocity(x_s, s, u, t=t, x_t=x_t, label=label, cfg_scale=cfg_scale)
        index = padded_index(rows, x_s.device)
        padded = self.flow_map.velocity(
            x_s[index],
            s[index],
            u[index],
            t=t[index],
            x_t=x_t[index],
            label=None if label is None else label[index],
            cfg_scale=cfg_scale[index] if isinstance(cfg_scale, Tensor) else cfg_scale,
        )
        return padded[:rows]

    def posterior_spread(self, t: Tensor) -> Tensor:
        return padded_call(self.flow_map.posterior_spread, t)

    def config(self) -> dict[str, Any]:
        return self.flow_map.config()


def padded_call(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """function(rows) of a function of each row alone, called with a multiple of `ROW_MULTIPLE` rows."""
    count = rows.shape[0]
    if count % ROW_MULTIPLE == 0:
        return function(rows)
    return function(rows[padded_index(count, rows.device)])[:count]


def padded_index(rows: int, device: torch.device) -> Tensor:
    """0 .. rows - 1, and row 0 again up to a multiple of `ROW_MULTIPLE`."""
    index = torch.arange(rows + -rows % ROW_MULTIPLE, device=device)
    return torch.where(index < rows, index, 0)
