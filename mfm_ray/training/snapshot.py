"""From a running training to a checkpoint and back: a copy that the next step cannot change, and taking one up."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfm_ray.storage import Storage
from mfm_ray.training import checkpoint
from mfm_ray.training.agreement import agree
from mfm_ray.training.pieces import Piece, Shards, key_of, shapes_of
from mfm_ray.training.session import Training

_WEIGHTS = "weights"


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint in host memory: tensors by file and name, and what its manifest says."""

    files: Mapping[str, Mapping[str, Tensor]]
    rank: int
    state: checkpoint.CheckpointState

    def write(self, folder: Storage) -> None:
        """Write it below `folder`, the same on all ranks. Not collective."""
        checkpoint.write_files(folder, self.files, rank=self.rank, state=self.state)


class SnapshotMaker:
    """Copies what a rank has to write into memory of its own, the same from one snapshot to the next.

    A snapshot is good until the next one is taken. Memory: one more copy of this rank's weights, moments and averages
    on the host (at stage 0 of its share of them); pinned where they come from a GPU.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._held: dict[str, Tensor] = {}

    def take(self, done: int, figures: Mapping[str, float]) -> Snapshot:
        """The state after `done` steps."""
        training, rank = self._training, self._training.rank
        files = {
            checkpoint.training_name(rank): self._copies(training_kinds(training)),
            checkpoint.ema_name(rank): self._copies(average_kinds(training)),
        }
        fixed = {name: self._copy(name, tensor) for name, tensor in training.engine.buffers().items()}
        if rank == 0:
            files[checkpoint.FIXED_FILE] = fixed
        if feed := training.feed.state():
            files[checkpoint.feed_name(rank)] = {name: tensor.cpu().contiguous() for name, tensor in feed.items()}
        if training.engine.device.type == "cuda":
            torch.cuda.synchronize(training.engine.device)
        return Snapshot(files=files, rank=rank, state=state_of(training, done, figures))

    def _copies(self, kinds: Mapping[str, Shards]) -> dict[str, Tensor]:
        pieces = self._training.engine.owned_pieces()
        named = ((key_of(kind, piece), piece.of(shards)) for kind, shards in kinds.items() for piece in pieces)
        return {key: self._copy(key, part) for key, part in named}

    def _copy(self, key: str, source: Tensor) -> Tensor:
        if key not in self._held:
            from_gpu = source.device.type == "cuda"
            self._held[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=from_gpu)
        return self._held[key].copy_(source, non_blocking=True)


def training_kinds(training: Training) -> dict[str, Shards]:
    """What the next step begins with: the shards of weights and moments by kind."""
    return {_WEIGHTS: training.engine.fp32_shards(), **training.engine.moments()}


def average_kinds(training: Training) -> dict[str, Shards]:
    return {checkpoint.ema_kind(decay): training.ema.shards(decay) for decay in training.ema.decays}


def state_of(training: Training, done: int, figures: Mapping[str, float]) -> checkpoint.CheckpointState:
    """What the manifests say of a training after `done` steps."""
    return checkpoint.CheckpointState(
        step=done,
        seconds=training.seconds,
        world_size=training.split.num_workers,
        stage=training.engine.stage,
        config=training.plan.config,
        model=training.plan.model,
        data_sha256=training.data.sha256,
        figures=dict(figures),
        ema_decays=list(training.ema.decays),
        ema_updates=training.ema.num_updates,
        optimizer=training.engine.counters(),
        shapes=shapes_of(training.engine.parameters()),
        model_entries=dict(_model_entries(training)),
        versions={name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "ray")},
    )


def _model_entries(training: Training) -> Iterator[tuple[str, str]]:
    """The name in the engine's module behind each entry of the flow map's state dict, shared weights under one.

    Without frozen weights, which are those of whatever model they were taken from.
    """
    module, flow_map = training.engine.module, training.flow_map
    prefix = next(name for name, part in module.named_modules() if part is flow_map)
    trained = {id(parameter): name for name, parameter in training.engine.parameters().items()}
    for name, tensor in flow_map.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        yield name, trained.get(id(tensor), f"{prefix}.{name}")


def write_checkpoint(training: Training, folder: Storage, *, done: int, figures: Mapping[str, float]) -> None:
    """Put this rank's part of a checkpoint into a folder that all ranks share, and wait for it."""
    SnapshotMaker(training).take(done, figures).write(folder)


def read_checkpoint(training: Training, folder: Storage) -> int:
    """Take weights, optimiser state, averages and chains from a checkpoint of any layout; the steps that are done.

    Collective. CheckpointError, on all ranks alike, naming the first file that is missing or damaged.
    """
    state = checkpoint.read_state(folder)
    agree(lambda: _verify_share(training, folder, state.world_size))
    agree(lambda: _fill(training, folder, state))
    training.engine.restored(state.optimizer)
    training.ema.num_updates = state.ema_updates
    training.seconds_before, training.started = state.seconds, time.monotonic()
    return state.step


def _verify_share(training: Training, folder: Storage, writers: int) -> None:
    """Check the hashes of what some ranks wrote: together all ranks read every file once."""
    for writer in range(training.rank, writers, training.split.num_workers):
        checkpoint.verify_rank(folder, writer)


def _fill(training: Training, folder: Storage, state: checkpoint.CheckpointState) -> None:
    """Copy what this rank holds out of the files of all ranks, those of its predecessor first."""
    ranks = sorted(range(state.world_size), key=lambda writer: (writer != training.rank, writer))
    pieces = training.engine.pieces()
    for name_of, kinds in (
        (checkpoint.training_name, training_kinds(training)),
        (checkpoint.ema_name, average_kinds(training)),
    ):
        with checkpoint.PieceReader(folder, [name_of(writer) for writer in ranks]) as reader:
            for kind, shards in kinds.items():
                _fill_shards(reader, kind, pieces, shards)
    with checkpoint.TensorFile(folder, checkpoint.FIXED_FILE) as fixed:
        training.engine.set_buffers({name: fixed.read(name) for name in fixed.entries})
    split = training.split
    feed = checkpoint.read_feed(folder, state, split.rows_of(training.rank), split.global_batch_size)
    training.feed.load_state(feed)


@torch.no_grad()
def _fill_shards(reader: checkpoint.PieceReader, kind: str, pieces: list[Piece], shards: Shards) -> None:
    for piece in pieces:
        piece.of(shards).copy_(reader.read(kind, piece.name, piece.start, piece.count))
