"""What a worker of a fine-tuning computes on: targets of each step, made while the step before is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from mfm_ray.data.prefetch import Prefetcher
from mfm_ray.finetuning import Anchors, DriftTargets, Tilt, TiltedChains, TuningMethod
from mfm_ray.finetuning.targets import Drift
from mfm_ray.noise import KeyedNoise
from mfm_ray.training.checkpoint import CheckpointError
from mfm_ray.training.tuning_rows import TuningRows

_KEPT = 16
"""Steps whose targets are kept for the case that they made the loss diverge."""

Result = TypeVar("Result")
TunedBatch = tuple[DriftTargets, Tensor]
"""Targets, and the rewards of the anchors that they were made around, (B,)."""


class TargetsError(ArithmeticError):
    """A reward that failed for good, or a weight that is not finite; one line that names the reward."""


class TargetFeed:
    """The micro-batches of a tuning method, and the chains of anchors that they move.

    A method that is off policy works in a thread one or two steps ahead, so that a step does not wait for rewards. What
    the chains of a step became travels with its targets, and counts when these are taken: `state` knows nothing of
    steps that were made ahead. drift: the tuned one, for methods that are on policy, whose targets are made when they
    are asked for. sizes: rows of this worker's micro-steps. collective_drift: whether all workers must take part in it.
    """

    def __init__(
        self,
        rows: TuningRows,
        method: TuningMethod,
        tilt: Tilt,
        *,
        sizes: Sequence[int],
        chains: int,
        restart: float,
        end: int,
        device: torch.device,
        drift: Drift,
        collective_drift: bool,
    ) -> None:
        self._rows, self._method, self._tilt, self._sizes, self._device = rows, method, tilt, sizes, device
        self._drift = drift if method.on_policy else None
        self._fails_alone = method.on_policy and collective_drift
        shape = tilt.flow_map.event_shape
        self._ahead, self._taken = (
            TiltedChains(rows=sum(sizes), event_shape=shape, chains=chains, restart=restart) for _ in range(2)
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and not method.on_policy else None
        self._kept: dict[int, list[TunedBatch]] = {}
        self._steps: Prefetcher[_Made] = Prefetcher(self._make, end=end)

    def take(self, step: int) -> list[TunedBatch]:
        """This worker's micro-batches of a step. Collective; TargetsError on all workers when one of them failed."""
        make = self._make if self._method.on_policy else self._steps.take
        made = make(step) if self._fails_alone else together(lambda: make(step), self._device)
        if made.finished is not None:
            made.hand_over(torch.cuda.current_stream(self._device))
        self._taken.put(step, made.visited)
        self._kept = {**dict([*self._kept.items()][1 - _KEPT :]), step: made.batches}
        return made.batches

    def again(self, step: int) -> list[TunedBatch] | None:
        """The micro-batches of one of the last steps: targets cannot be made once more, the chains have moved on."""
        return self._kept.get(step)

    def state(self) -> dict[str, Tensor]:
        """The chains as the steps that were taken left them."""
        return self._taken.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """CheckpointError for chains of another number or shape."""
        try:
            self._ahead.load_state(dict(state))
            self._taken.load_state(dict(state))
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"anchors.chains, global_batch_size: the checkpoint holds other chains ({error}); resume with the same"
            ) from error

    def close(self) -> None:
        self._steps.close()

    def _make(self, step: int) -> _Made:
        if self._stream is None:
            return self._make_here(step)
        with torch.cuda.stream(self._stream):
            made = self._make_here(step)
            return _Made(made.batches, made.visited, self._stream.record_event())

    def _make_here(self, step: int) -> _Made:
        data, label, noise = self._rows.batch(step)
        anchors = self._anchors(data, label, noise, step)
        batches = []
        for last, size in zip(accumulate(self._sizes), self._sizes, strict=True):
            part = slice(last - size, last)
            mine = Anchors(
                anchors.x1[part], None if anchors.label is None else anchors.label[part], anchors.reward[part]
            )
            targets = self._method.targets(self._tilt, mine, noise[part], drift=self._drift)
            if not self._method.anchors_are_data:
                self._ahead.advance(targets, step, rows=part)
            batches.append((targets, mine.reward))
        return _Made(batches, self._ahead.visited(step), None)

    def _anchors(self, data: Tensor, label: Tensor | None, noise: KeyedNoise, step: int) -> Anchors:
        if not self._method.anchors_are_data:
            return self._ahead.anchors(self._tilt, data, label, noise, step)
        # a method that draws its own endpoints scores those, and not the data
        unknown = torch.full((len(data),), torch.nan, dtype=torch.float64, device=data.device)
        return Anchors(data, label, unknown if self._method.on_policy else self._tilt.rewards(data))


@dataclass(frozen=True)
class _Made:
    """Micro-batches of a step, what its chains became, and, on CUDA, the event at which all of it is there."""

    batches: list[TunedBatch]
    visited: dict[str, Tensor]
    finished: torch.cuda.Event | None

    def hand_over(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait for the targets, and keep their memory from being used again before it is done."""
        assert self.finished is not None
        stream.wait_event(self.finished)
        for targets, reward in self.batches:
            for tensor in (*targets.tensors(), reward):
                tensor.record_stream(stream)


def together(make: Callable[[], Result], device: torch.device) -> Result:
    """make() on every worker, or TargetsError on all when it raised ValueError on one: none waits for another.

    Collective.
    """
    error: str | None = None
    try:
        made = make()
    except ValueError as found:
        error = str(found)
    failed = torch.tensor([0 if error is None else 1], device=device)
    torch.distributed.all_reduce(failed)
    if not int(failed):
        return made
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    raise TargetsError(next(text for text in errors if text is not None))
