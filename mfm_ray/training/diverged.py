"""The batch at which a training diverged, as a file that can be loaded and computed on again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mfm_ray.data.batch import Batch
from mfm_ray.errors import StorageError
from mfm_ray.finetuning import DriftTargets
from mfm_ray.noise import KeyedNoise
from mfm_ray.storage import Storage
from mfm_ray.training.metrics_log import TrainingDiverged
from mfm_ray.training.session import Training

FOLDER = "diverged"
_RECORDS: dict[str, Any] = {kind.__name__: kind for kind in (Batch, DriftTargets)}


@dataclass(frozen=True)
class SavedBatch:
    """A worker's part of a step: the arguments of each micro-batch, as the task's module takes them before `step`."""

    step: int
    rank: int
    micro_batches: list[tuple[Any, ...]]


def with_batches(training: Training, error: TrainingDiverged) -> TrainingDiverged:
    """The same error, saying where the batches lie that the workers to blame computed on, which are saved here.

    Collective.
    """
    place: str | None = None
    if error.step is not None and error.blamed:
        try:
            place = _save(training, error.step)
        except StorageError as refused:
            place = f"nowhere ({refused})"
    places: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(places, place)
    told = next((found for found in places if found is not None), None)
    return error if told is None else TrainingDiverged(f"{error}; its batch is in {told}")


def _save(training: Training, step: int) -> str | None:
    """Where this worker's batch of a step (from 1) is now, None when its feed has let it go."""
    batches = training.feed.again(step - 1)
    if batches is None:
        return None
    folder, name = training.plan.run.child(FOLDER), f"step-{step:08d}-worker-{training.rank}.safetensors"
    folder.write_bytes(name, _packed(SavedBatch(step, training.rank, list(batches))))
    return folder.uri_of(name)


def load_batch(location: str | Path) -> SavedBatch:
    """What `with_batches` saved, on the CPU. FileNotFoundError when there is no such file."""
    path = Path(location)
    content = Storage(path.parent).read_bytes(path.name)
    tensors = safetensors.torch.load(content)
    length = int.from_bytes(content[:8], "little")
    told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["batch"])
    micro_batches = [
        tuple(_unpacked(kind, f"{i}.{j}", tensors) for j, kind in enumerate(kinds))
        for i, kinds in enumerate(told["micro_batches"])
    ]
    return SavedBatch(told["step"], told["rank"], micro_batches)


def _packed(batch: SavedBatch) -> bytes:
    tensors: dict[str, Tensor] = {}
    for i, arguments in enumerate(batch.micro_batches):
        for j, argument in enumerate(arguments):
            tensors |= {f"{i}.{j}.{name}": tensor for name, tensor in _fields(argument).items()}
    told = {
        "step": batch.step,
        "rank": batch.rank,
        "micro_batches": [[type(argument).__name__ for argument in arguments] for arguments in batch.micro_batches],
    }
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies, metadata={"batch": json.dumps(told)})


def _fields(argument: Any) -> dict[str, Tensor]:
    if isinstance(argument, Tensor):
        return {"": argument}
    if isinstance(argument, KeyedNoise):
        return {"keys": argument.keys}
    return {name: value for name, value in vars(argument).items() if value is not None}


def _unpacked(kind: str, prefix: str, tensors: dict[str, Tensor]) -> Any:
    if kind == "Tensor":
        return tensors[f"{prefix}."]
    if kind == "KeyedNoise":
        return KeyedNoise(tensors[f"{prefix}.keys"])
    record = _RECORDS[kind]
    return record(**{field.name: tensors.get(f"{prefix}.{field.name}") for field in dataclasses.fields(record)})
