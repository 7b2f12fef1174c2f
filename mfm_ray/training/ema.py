"""Moving averages of the weights, kept where the master weights are: each rank averages its own shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mfm_ray.training.zero import ZeroEngine


def ema_decays(setting: float | Sequence[float]) -> tuple[float, ...]:
    """The decays that `ema_decay` asks for, the exported one first.

    ValueError when there is none, or one twice.
    """
    decays = tuple(setting) if isinstance(setting, Sequence) else (setting,)
    if not decays or len(set(decays)) < len(decays):
        raise ValueError(f"ema_decay={list(decays)}: expected at least one decay, each of them once")
    return decays


class ShardedEMA:
    """ema <- d ema + (1 - d) w after each optimiser step, float32, with d = min(decay, (1 + n) / (10 + n)), by decay.

    n counts the updates before this one, so that the first weights are soon forgotten. A decay of 0 follows the last
    weights. Memory: one float32 copy of this rank's shard (at stage 0 of all parameters) for each decay.
    """

    def __init__(self, engine: ZeroEngine, *, decays: Sequence[float]) -> None:
        self._engine = engine
        self._weights = engine.fp32_shards()
        self._averages = {decay: [shard.clone() for shard in self._weights] for decay in decays}
        self.num_updates = 0

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays, that of the exported model first."""
        return tuple(self._averages)

    @torch.no_grad()
    def update(self) -> None:
        longest = (1 + self.num_updates) / (10 + self.num_updates)
        for decay, averages in self._averages.items():
            torch._foreach_lerp_(averages, self._weights, 1.0 - min(decay, longest))
        self.num_updates += 1

    def full_tensors(self, module: nn.Module, decay: float | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every entry of the state dict of `module` with averaged weights, whole, one after another (see
        `ZeroEngine.full_tensors`): the averages of `decay`, by default the first. Collective; the weights are
        exactly as before when it ends."""
        with self._in_place(self._averages[self.decays[0] if decay is None else decay]):
            yield from self._engine.full_tensors(module)

    @contextmanager
    def _in_place(self, averages: list[Tensor]) -> Iterator[None]:
        """The averages in the place of the master weights. Elements move, storages stay: the optimiser holds views."""
        for weight, average in zip(self._weights, averages, strict=True):
            _exchange(weight, average)
        try:
            yield
        finally:
            for weight, average in zip(self._weights, averages, strict=True):
                _exchange(weight, average)

    def shards(self, decay: float) -> list[Tensor]:
        """The averages of a decay, laid out as the engine's `fp32_shards`; what is written into them counts."""
        return self._averages[decay]


def _exchange(a: Tensor, b: Tensor) -> None:
    held = a.clone()
    a.copy_(b)
    b.copy_(held)
