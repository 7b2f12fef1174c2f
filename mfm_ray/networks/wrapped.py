"""A flow map around another one, with the same weights and the same config: what changes is how it is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mfm_ray.flow_map import FlowMap


class WrappedFlowMap(FlowMap):
    """Answers as the inner one does, except for what a subclass says; `velocity` must be."""

    def __init__(self, inner: FlowMap) -> None:
        super().__init__(inner.space, num_classes=inner.num_classes, cfg_scales=inner.cfg_scales)
        self._inner = inner

    def posterior_spread(self, t: Tensor) -> Tensor:
        return self._inner.posterior_spread(t)

    def in_full_precision(self) -> FlowMap:
        return self._inner.in_full_precision()

    def recompute_activations(self, on: bool = True) -> None:
        self._inner.recompute_activations(on)

    def config(self) -> dict[str, Any]:
        return self._inner.config()
