"""Network calls replayed from CUDA graphs: a call without a gradient costs one launch in place of hundreds.

Why not torch.compile(mode="reduce-overhead"), which uses CUDA graphs too: it holds one graph for every shape that ever
comes, and its memory pool belongs to the thread that recorded it, while a server's steps come from several threads with
as many sizes as there are requests. Here the number of rows is rounded up to a few sizes, graphs share a pool, and the
least recently used leave. What is replayed are the kernels of the call as it stands, so that numbers stay the same.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.wrapped import WrappedFlowMap
from mfm_ray.tangents import has_tangent

MAX_GRAPHS = 16
_LEAST_STEP = 4
_WARM_UP_CALLS = 3  # libraries choose kernels and allocate workspaces in the first calls, which no graph can hold

Inputs = dict[str, Tensor]
Capture = Callable[[Callable[[Inputs], Tensor], Inputs], tuple[Callable[[], object], Tensor]]
"""Records function(buffers) for buffers that stay where they are; returns what replays it, and where the result is."""


def rows_of_graph(rows: int) -> int:
    """The number of rows that a call of `rows` is rounded up to: at most four sizes between one power of two and the
    next, multiples of 4, so that at most a quarter of the work is for nothing beyond 16 rows."""
    step = max(_LEAST_STEP, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


@dataclass
class _Graph:
    """buffers: the inputs where the kernels read them. output: where they leave the result."""

    buffers: Inputs
    replay: Callable[[], object]
    output: Tensor

    def __call__(self, inputs: Inputs, rows: int) -> Tensor:
        """Rows beyond `rows` compute whatever was there; no row depends on another."""
        for name, value in inputs.items():
            self.buffers[name][:rows].copy_(value)
        self.replay()
        return self.output[:rows].clone()


class ReplayedFlowMap(WrappedFlowMap):
    """A flow map whose calls without a gradient are replayed; on a CPU, with a gradient or a tangent, plain calls.

    Weights may change in place. Moving or casting this module forgets the graphs; whoever puts other tensors in place
    of the inner one's weights calls `forget`. Calls of several threads take turns, and must be of one stream.

    max_graphs: graphs kept, one for each number of rows, types and set of inputs. capture: for tests; None: CUDA's.
    """

    def __init__(self, inner: FlowMap, *, max_graphs: int = MAX_GRAPHS, capture: Capture | None = None) -> None:
        super().__init__(inner)
        if max_graphs < 1:
            raise ValueError(f"max_graphs={max_graphs}: expected an integer of at least 1")
        self.max_graphs, self._capture = max_graphs, capture
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._pool: Any = None
        self._turn = threading.Lock()

    def __reduce__(self) -> Any:
        return _replayed, (self._inner, self.max_graphs)  # graphs do not travel

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)

    def forget(self) -> None:
        """Record again what is called next: the weights are other tensors now."""
        with self._turn:
            self._graphs.clear()

    def velocity(self, x_s: Tensor, s: Tensor, u: Tensor, *, cfg_scale: Any = None, **condition: Any) -> Tensor:
        scale = torch.full(s.shape, cfg_scale, device=s.device) if isinstance(cfg_scale, float | int) else cfg_scale
        given = {"x_s": x_s, "s": s, "u": u, "cfg_scale": scale, **condition}
        inputs = {name: value for name, value in given.items() if value is not None}
        if not self._replays(inputs):
            return self._inner.velocity(x_s, s, u, cfg_scale=cfg_scale, **condition)
        with self._turn, torch.no_grad():
            return self._graph(inputs)(inputs, x_s.shape[0])

    def _replays(self, inputs: Inputs) -> bool:
        if has_tangent(*inputs.values()) or not (self._capture or inputs["x_s"].is_cuda):
            return False
        if not torch.is_grad_enabled():
            return True
        return not any(each.requires_grad for each in (*inputs.values(), *self._inner.parameters()))

    def _graph(self, inputs: Inputs) -> _Graph:
        rows = rows_of_graph(inputs["x_s"].shape[0])
        device = inputs["x_s"].device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = (rows, device, autocast, *((name, each.dtype) for name, each in sorted(inputs.items())))
        if key not in self._graphs:
            self._graphs[key] = self._record(inputs, rows)
            while len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _record(self, inputs: Inputs, rows: int) -> _Graph:
        buffers = {name: value.new_zeros(rows, *value.shape[1:]) for name, value in inputs.items()}
        for name, value in inputs.items():  # what it computes while it is recorded is finite
            buffers[name][: value.shape[0]].copy_(value)
        capture = self._capture or functools.partial(capture_on_cuda, pool=self._shared_pool())
        replay, output = capture(lambda buffers: self._inner.velocity(**buffers), buffers)
        return _Graph(buffers, replay, output)

    def _shared_pool(self) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def _replayed(inner: FlowMap, max_graphs: int) -> ReplayedFlowMap:
    return ReplayedFlowMap(inner, max_graphs=max_graphs)


def capture_on_cuda(
    function: Callable[[Inputs], Tensor], buffers: Inputs, *, pool: Any
) -> tuple[Callable[[], object], Tensor]:
    """A CUDA graph of function(buffers), after a few calls beside the main stream; other threads may use the GPU.

    pool: memory that it shares with others, which are replayed when its result has been copied.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            function(buffers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = function(buffers)
    return graph.replay, output
