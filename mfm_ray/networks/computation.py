"""How a network is computed, which is no part of what it is: its precision, and compiled, replayed or as it stands.

A flow map goes in and one with the same weights comes out; configurations, weights and model directories never see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.replay import ReplayedFlowMap
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.networks.wrapped import WrappedFlowMap
from mfm_ray.tangents import has_tangent

PRECISIONS = ("fp32", "bf16")
EXECUTIONS = ("eager", "compiled", "graphs")


def computed(flow_map: FlowMap, *, precision: str = "fp32", execution: str = "eager") -> FlowMap:
    """The flow map computed in `precision` and by `execution`; `flow_map` itself for fp32 and eager.

    bf16: under autocast (`AutocastFlowMap`). compiled: by torch.compile (`CompiledFlowMap`). graphs: calls without a
    gradient replayed from CUDA graphs (`ReplayedFlowMap`), on a CPU as they stand. ValueError for another word.
    """
    require(precision in PRECISIONS, "precision", precision, f"one of {', '.join(PRECISIONS)}")
    require(execution in EXECUTIONS, "execution", execution, f"one of {', '.join(EXECUTIONS)}")
    if execution != "eager" and isinstance(flow_map, TunedFlowMap):  # which of the two answers depends on the rows
        parts = [computed(part, precision=precision, execution=execution) for part in (flow_map.base, flow_map.tuned)]
        return TunedFlowMap(*parts)
    precise = AutocastFlowMap(flow_map) if precision == "bf16" else flow_map
    if execution == "eager":
        return precise
    return CompiledFlowMap(precise) if execution == "compiled" else ReplayedFlowMap(precise)


class AutocastFlowMap(WrappedFlowMap):
    """A flow map whose velocity is computed in bfloat16 where autocast allows it and returned in float32.

    What the networks themselves keep in float32: embeddings of times, norms, the residual stream of the transformer
    and its last projection, closed-form preconditioning.
    """

    def velocity(self, x_s: Tensor, s: Tensor, u: Tensor, **condition: Any) -> Tensor:
        with torch.autocast(x_s.device.type, torch.bfloat16):
            return self._inner.velocity(x_s, s, u, **condition).float()

    def in_full_precision(self) -> FlowMap:
        return self._inner.in_full_precision()


class CompiledFlowMap(WrappedFlowMap):
    """A flow map whose velocity is one program of torch.compile, with its gradient.

    The first size of a batch gets a program of its own, all further ones share one for any size (and a single row has
    its own); with and without label, guidance scale and gradient are different programs. Calls with a tangent, in a
    `pushforward` or a `torch.func.jvp`, are computed as they stand: torch.compile does not trace those.

    backend: of torch.compile. fullgraph: raise where the program would break into several.
    """

    def __init__(self, inner: FlowMap, *, backend: str = "inductor", fullgraph: bool = False) -> None:
        super().__init__(inner)
        # in a tuple, so that it is not registered: the same weights must not have a second name
        self._program = (torch.compile(inner.velocity, backend=backend, fullgraph=fullgraph),)
        self._options = (backend, fullgraph)

    def __reduce__(self) -> Any:
        backend, fullgraph = self._options
        return _compiled, (self._inner, backend, fullgraph)  # programs do not travel

    def velocity(self, x_s: Tensor, s: Tensor, u: Tensor, *, cfg_scale: Any = None, **condition: Any) -> Tensor:
        if has_tangent(x_s, s, u, *condition.values()):
            return self._inner.velocity(x_s, s, u, cfg_scale=cfg_scale, **condition)
        return self._program[0](x_s, s, u, cfg_scale=as_rows(cfg_scale, s), **condition)


def _compiled(inner: FlowMap, backend: str, fullgraph: bool) -> CompiledFlowMap:
    return CompiledFlowMap(inner, backend=backend, fullgraph=fullgraph)


def as_rows(cfg_scale: float | Tensor | None, like: Tensor) -> Tensor | None:
    """A guidance scale as one for each row (B,): a number would be a constant of the program."""
    if cfg_scale is None or isinstance(cfg_scale, Tensor):
        return cfg_scale
    return torch.full(like.shape, cfg_scale, device=like.device)
