"""What a worker computes on: its micro-batches of each step, made while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.config import TrainingConfig
from mfm_ray.data.augment import AffineJitter
from mfm_ray.data.batch import Batch
from mfm_ray.data.latents import draw
from mfm_ray.data.mapped import MappedRows
from mfm_ray.data.order import SampleOrder
from mfm_ray.data.prefetch import Prefetcher
from mfm_ray.data.shards import open_split, read_manifest
from mfm_ray.data_space import DataSpace
from mfm_ray.noise import KeyedNoise
from mfm_ray.storage import Storage
from mfm_ray.training.zero import BatchSplit

MicroBatch = tuple[Batch, KeyedNoise]


@dataclass
class TrainingData:
    """The training split in data units, in memory or mapped into it, and this worker's way through it."""

    x: Tensor | MappedRows
    row_form: str
    space: DataSpace
    jitter: AffineJitter
    labels: Tensor | None
    sha256: str
    order: SampleOrder
    seed: int
    split: BatchSplit
    rank: int
    device: torch.device

    @classmethod
    def load(
        cls,
        source: Storage,
        config: TrainingConfig,
        split: BatchSplit,
        *,
        jitter: AffineJitter,
        rank: int,
        device: torch.device,
    ) -> TrainingData:
        rows, manifest = open_split(source, "train"), read_manifest(source)
        return cls(
            x=rows.data,
            row_form=manifest.row_form,
            space=manifest.space,
            jitter=jitter,
            labels=rows.labels if bool((rows.labels >= 0).any()) else None,
            sha256=manifest.sha256,
            order=SampleOrder(num_rows=len(rows), seed=config.seed, global_batch_size=config.global_batch_size),
            seed=config.seed,
            split=split,
            rank=rank,
            device=device,
        )

    def samples(self, index: Tensor) -> Tensor:
        """Samples of some rows of the split in model space, (N, *event), the same on all workers."""
        noise = KeyedNoise.for_rows(self.seed, index)
        return self.space.to_model_space(draw(self.x[index], self.row_form, noise))

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This worker's micro-batches of a step, each with its noise.

        Noise is keyed by (seed, row of the global batch, step), that of the jitter and of stored posteriors too: the
        losses of a step do not depend on how many workers and micro-steps share it.
        """
        index = self.order.rows(step, self.rank, self.split.num_workers)
        positions = self.order.positions(self.rank, self.split.num_workers)
        rows = torch.arange(positions.start, positions.stop)
        noise = KeyedNoise.for_rows(self.seed, rows).fold_in(step)
        samples = self.jitter(draw(self.x[index], self.row_form, noise), noise)
        mine = Batch(
            data=self.space.to_model_space(samples),
            label=None if self.labels is None else self.labels[index],
            rows=rows,
        )
        for micro in mine.to(self.device).split(self.split.sizes(self.rank)):
            yield micro, KeyedNoise.for_rows(self.seed, micro.rows).fold_in(step)


class BatchFeed:
    """The micro-batches of `TrainingData`, bit for bit, made and copied by a thread one or two steps ahead.

    end: steps of the run. On CUDA the copies run on a stream of their own, so that they overlap the computation.
    """

    def __init__(self, data: TrainingData, *, end: int) -> None:
        self._data = data
        self._stream = torch.cuda.Stream(data.device) if data.device.type == "cuda" else None
        self._steps: Prefetcher[Staged] = Prefetcher(self._stage, end=end)

    def take(self, step: int) -> list[MicroBatch]:
        """This worker's micro-batches of a step. What went wrong while they were made is raised here."""
        staged = self._steps.take(step)
        if staged.copied is not None:
            staged.hand_over(torch.cuda.current_stream(self._data.device))
        return staged.batches

    def again(self, step: int) -> list[MicroBatch]:
        """Any step's micro-batches, made once more."""
        return list(self._data.micro_batches(step))

    def state(self) -> dict[str, Tensor]:
        """Nothing: the batches of a step follow from its number."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        assert not state

    def close(self) -> None:
        self._steps.close()

    def _stage(self, step: int) -> Staged:
        if self._stream is None:
            return Staged(list(self._data.micro_batches(step)), copied=None)
        with torch.cuda.stream(self._stream):
            batches = list(self._data.micro_batches(step))
            return Staged(batches, copied=self._stream.record_event())


@dataclass(frozen=True)
class Staged:
    """Micro-batches on their device, and, on CUDA, the event at which they have arrived."""

    batches: list[MicroBatch]
    copied: torch.cuda.Event | None

    def hand_over(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait for the copies, and keep their memory from being used again before it is done."""
        assert self.copied is not None
        stream.wait_event(self.copied)
        for batch, noise in self.batches:
            for tensor in (*batch.tensors(), noise.keys):
                tensor.record_stream(stream)
