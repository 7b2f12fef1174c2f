"""A moving average of the weights, kept where the master weights are: each rank averages its own shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mfm_ray.training.zero import ZeroEngine


class ShardedEMA:
    """ema <- d ema + (1 - d) w after each optimiser step, float32, with d = min(decay, (1 + n) / (10 + n)).

    n counts the updates before this one, so that the first weights are soon forgotten. `decay` = 0 follows the last
    weights. Memory: one float32 copy of this rank's shard (at stage 0 of all parameters).
    """

    def __init__(self, engine: ZeroEngine, *, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._weights = engine.fp32_shards()
        self._averages = [shard.clone() for shard in self._weights]
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - decay)
        self.num_updates += 1

    def full_tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every entry of the state dict of `module` with averaged weights, whole, one after another (see
        `ZeroEngine.full_tensors`). Collective; the weights are exactly as before when it ends."""
        with self._in_place():
            yield from self._engine.full_tensors(module)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The averages in the place of the master weights. Elements move, storages stay: the optimiser holds views."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            _exchange(weight, average)
        try:
            yield
        finally:
            for weight, average in zip(self._weights, self._averages, strict=True):
                _exchange(weight, average)

    def save(self, path: Path) -> None:
        """Write this rank's averages as a safetensors file."""
        shards = {f"shard_{i:04d}": average for i, average in enumerate(self._averages)}
        save_file(shards, path, metadata={"num_updates": str(self.num_updates)})

    def load(self, path: Path) -> None:
        """Read what `save` wrote for the same sharding."""
        with safe_open(path, framework="pt") as file:
            for i, average in enumerate(self._averages):
                average.copy_(file.get_tensor(f"shard_{i:04d}"))
            self.num_updates = int(file.metadata()["num_updates"])


def _exchange(a: Tensor, b: Tensor) -> None:
    held = a.clone()
    a.copy_(b)
    b.copy_(held)
