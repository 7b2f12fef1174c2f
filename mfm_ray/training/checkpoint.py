"""Checkpoints: the files of each rank, the manifests that vouch for them, and reading only what they vouch for.

    training-rank-<N>.safetensors   this rank's pieces of the float32 weights and of the optimiser's moments
    ema-rank-<N>.safetensors        its pieces of the moving averages
    feed-rank-<N>.safetensors       what its feed carries from step to step, where it carries anything
    fixed-rank-0.safetensors        what is not trained (buffers)
    manifest-rank-<N>.json          step, layout and configuration, and size and SHA-256 of every file of that rank

A piece is named by its parameter and its place in it (pieces.py), so that a run of any ZeRO stage and any number of
workers can go on from it, element by element the same. Nothing in a checkpoint is unpickled. A manifest is written
after the files that it names: a checkpoint is there when the manifests of all its ranks are.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.training.pieces import parse_key

FORMAT = "mfm-ray-checkpoint"
FORMAT_VERSION = 3
_MANIFEST = "manifest-rank-"
_BLOCK = 1 << 22  # bytes that are read or hashed at once

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


class CheckpointError(InputError):
    """A checkpoint that cannot be used; one line naming the file or the field."""


class UnfinishedError(CheckpointError):
    """A checkpoint that was never completed, such as one whose writer was killed."""


@dataclass(frozen=True)
class CheckpointState:
    """Where a run stood: optimiser steps done, seconds of training so far, and how it was laid out.

    `config` is the training configuration, `model` the config.json of the model it trains (what export needs),
    `data_sha256` the hash of the data's manifest, `figures` the last line of the metrics, `ema_decays` the decays of
    the averages, that of the exported model first. `ema_updates` and `optimizer` are the counters of the averages and
    of the optimiser, `shapes` the whole shape of each trained parameter, `model_entries` the parameter or fixed tensor
    behind each entry of the model's state dict, `versions` those of the libraries that wrote.
    """

    step: int
    seconds: float
    world_size: int
    stage: int
    config: dict[str, Any]
    model: dict[str, Any]
    data_sha256: str
    figures: dict[str, float]
    ema_decays: list[float]
    ema_updates: int
    optimizer: dict[str, float]
    shapes: dict[str, list[int]]
    model_entries: dict[str, str]
    versions: dict[str, str]


def manifest_name(rank: int) -> str:
    return f"{_MANIFEST}{rank}.json"


def training_name(rank: int) -> str:
    return f"training-rank-{rank}.safetensors"


def ema_name(rank: int) -> str:
    return f"ema-rank-{rank}.safetensors"


def feed_name(rank: int) -> str:
    return f"feed-rank-{rank}.safetensors"


FIXED_FILE = "fixed-rank-0.safetensors"


def ema_kind(decay: float) -> str:
    """How pieces of the averages of a decay are called."""
    return f"ema_{decay!r}"


def write_files(
    checkpoint: Storage, files: Mapping[str, Mapping[str, Tensor]], *, rank: int, state: CheckpointState
) -> None:
    """Write this rank's files of tensors, and then the manifest that vouches for them."""
    entries = {name: write_tensors(checkpoint, name, tensors) for name, tensors in files.items()}
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "rank": rank, **asdict(state), "files": entries}
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    checkpoint.write_bytes(manifest_name(rank), text.encode())


def read_state(checkpoint: Storage) -> CheckpointState:
    """What the manifests say, after a check that all of them and all their files are there with the right size.

    Hashes are checked by whoever reads the files. Raises CheckpointError naming what is missing or wrong.
    """
    manifest = _read_manifest(checkpoint, 0)
    # all manifests first: where one is not there yet, nothing is damaged
    for rank, other in enumerate([_read_manifest(checkpoint, rank) for rank in range(manifest["world_size"])]):
        for field in ("step", "world_size", "stage"):
            if other[field] != manifest[field]:
                raise CheckpointError(
                    f"{checkpoint.uri_of(manifest_name(rank))}: {field}={other[field]}, but rank 0 wrote "
                    f"{manifest[field]}: files of different checkpoints are mixed"
                )
        for name, entry in other["files"].items():
            _check_size(checkpoint, name, entry["size"])
    return _state_of(manifest)


def check_compatible(
    checkpoint: Storage,
    state: CheckpointState,
    *,
    model: Mapping[str, Any],
    data_sha256: str,
    ema_decays: Sequence[float],
) -> None:
    """Raises CheckpointError unless a run of this network, data and averages can go on from `state`.

    Stage and number of workers may differ.
    """
    if list(ema_decays) != state.ema_decays:
        held, wanted = (json.dumps(list(decays)) for decays in (state.ema_decays, ema_decays))
        raise CheckpointError(f"ema_decay={wanted}: {checkpoint.uri} holds averages of {held}; resume with those")
    for group in ("network", "interpolant", "data", "cfg_scales", "tuning"):
        difference = _first_difference(state.model.get(group), model.get(group), group)
        if difference is not None:
            key, theirs, ours = difference
            raise CheckpointError(
                f"{key}={json.dumps(ours)}: {checkpoint.uri} is of another model, with {json.dumps(theirs)}"
            )
    if state.data_sha256 != data_sha256:
        raise CheckpointError(
            f"data.path: {checkpoint.uri} was trained on other data (its manifest's SHA-256 begins "
            f"{state.data_sha256[:12]}, here {data_sha256[:12]})"
        )


def verify_rank(checkpoint: Storage, rank: int) -> None:
    """Check size and SHA-256 of every file that `rank` wrote. CheckpointError naming the first that differs."""
    for name, entry in _read_manifest(checkpoint, rank)["files"].items():
        _check_size(checkpoint, name, entry["size"])
        if _sha256(checkpoint, name) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint.uri_of(name)}: content differs from {manifest_name(rank)} (damaged)")


@dataclass(frozen=True)
class CheckpointModel:
    """The averaged weights of a checkpoint and their decay, the config.json they belong to, where training stood."""

    state_dict: dict[str, Tensor]
    decay: float
    state: CheckpointState


def read_checkpoint_model(location: Storage | str | Path, *, ema_decay: float | None = None) -> CheckpointModel:
    """The averaged model of any checkpoint, of any stage and number of workers.

    ema_decay: which of the averages, by default the first of them. Raises CheckpointError when the folder is no
    checkpoint or has no such average, or a file is missing or was changed.
    """
    checkpoint = Storage(location)
    state = read_state(checkpoint)
    decay = check_decay(checkpoint, state, ema_decay)
    files = [ema_name(rank) for rank in range(state.world_size)]
    for rank, name in [*enumerate(files), (0, FIXED_FILE)]:
        if _sha256(checkpoint, name) != _read_manifest(checkpoint, rank)["files"][name]["sha256"]:
            raise CheckpointError(f"{checkpoint.uri_of(name)}: content differs from {manifest_name(rank)} (damaged)")
    with PieceReader(checkpoint, files) as pieces, TensorFile(checkpoint, FIXED_FILE) as fixed:
        entries = {
            entry: (
                pieces.read(ema_kind(decay), name, 0, math.prod(state.shapes[name])).view(state.shapes[name])
                if name in state.shapes
                else fixed.read(name)
            )
            for entry, name in state.model_entries.items()
        }
    return CheckpointModel(state_dict=entries, decay=decay, state=state)


def check_decay(checkpoint: Storage, state: CheckpointState, ema_decay: float | None) -> float:
    """The decay that is asked for, the first of the checkpoint's for None. CheckpointError when it has no such one."""
    if ema_decay is None:
        return state.ema_decays[0]
    if ema_decay not in state.ema_decays:
        held = ", ".join(map(repr, state.ema_decays))
        raise CheckpointError(f"ema_decay={ema_decay!r}: {checkpoint.uri} holds averages of {held}")
    return ema_decay


def write_tensors(checkpoint: Storage, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write contiguous CPU tensors as a safetensors file, in one pass; its size and SHA-256."""
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with checkpoint.open_new(name) as stream:
        head = memoryview(struct.pack("<Q", len(text)) + text)
        for part in (head, *map(_bytes_of, tensors.values())):
            stream.write(part)
            digest.update(part)
    return {"size": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


class TensorFile:
    """Any part of a safetensors file on any file system, without reading the rest. A context."""

    def __init__(self, checkpoint: Storage, name: str) -> None:
        self._uri = checkpoint.uri_of(name)
        self._file = checkpoint.open_for_parts(name)
        (length,) = struct.unpack("<Q", self._file.read_at(8, 0))
        self.entries: dict[str, Any] = json.loads(self._file.read_at(length, 8))
        self._body = 8 + length

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, key: str) -> Tensor:
        """A whole tensor."""
        entry = self.entries[key]
        return self.part(key, 0, math.prod(entry["shape"])).view(entry["shape"])

    def part(self, key: str, start: int, count: int) -> Tensor:
        """`count` elements of a flattened tensor."""
        entry = self.entries[key]
        dtype = _TORCH_DTYPES[entry["dtype"]]
        first = self._body + entry["data_offsets"][0] + start * dtype.itemsize
        if count == 0:
            return torch.empty(0, dtype=dtype)
        content = self._file.read_at(count * dtype.itemsize, first)
        if len(content) != count * dtype.itemsize:
            raise CheckpointError(f"{self._uri}: ends within {key!r} (truncated?)")
        return torch.frombuffer(bytearray(content), dtype=dtype)


class PieceReader:
    """Elements of parameters from the files of those that wrote them, whatever the sharding was. A context.

    Files are opened in the order that they are given, and only as far as is needed: a rank that is laid out as its
    predecessor finds everything in the first.
    """

    def __init__(self, checkpoint: Storage, files: Sequence[str]) -> None:
        self._checkpoint, self._unopened = checkpoint, list(files)
        self._open: list[TensorFile] = []
        self._found: dict[tuple[str, str], list[tuple[int, int, TensorFile, str]]] = {}

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        for file in self._open:
            file.__exit__(kind, error, trace)

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count` of flattened `name`. CheckpointError when no file has some of them."""
        target, missing = None, count
        while True:
            parts = self._parts(kind, name, start, start + count)
            missing = count - sum(last - first for first, last, *_ in parts)
            if missing == 0:
                break
            if not self._unopened:
                raise CheckpointError(
                    f"{self._checkpoint.uri}: holds no {kind} of {missing} of the elements {start} to {start + count} "
                    f"of {name}"
                )
            self._open_next()
        for first, last, begin, file, key in parts:
            part = file.part(key, first - begin, last - first)
            if target is None:
                target = torch.empty(count, dtype=part.dtype)
            target[first - start : last - start] = part
        return torch.empty(0) if target is None else target

    def _parts(self, kind: str, name: str, start: int, end: int) -> list[tuple[int, int, int, TensorFile, str]]:
        """(first, last, begin of its piece, file, key) of what is known of a range; each element at most once."""
        parts, at = [], start
        for begin, stop, file, key in sorted(self._found.get((kind, name), []), key=lambda found: found[0]):
            first, last = max(begin, at), min(stop, end)
            if first < last:
                parts.append((first, last, begin, file, key))
                at = last
        return parts

    def _open_next(self) -> None:
        file = TensorFile(self._checkpoint, self._unopened.pop(0))
        self._open.append(file)
        for key, entry in file.entries.items():
            kind, name, start = parse_key(key)
            found = (start, start + entry["shape"][0], file, key)
            self._found.setdefault((kind, name), []).append(found)


def read_feed(checkpoint: Storage, state: CheckpointState, rows: range, batch_size: int) -> dict[str, Tensor]:
    """What the feeds carried for these rows of the global batch, along dimension 1 of each tensor; nothing: {}.

    CheckpointError when the checkpoint's global batch had another size.
    """
    names = [feed_name(rank) for rank in range(state.world_size)]
    if not checkpoint.is_file(names[0]):
        return {}
    parts: list[dict[str, Tensor]] = []
    for name in names:
        with TensorFile(checkpoint, name) as file:
            parts.append({key: file.read(key) for key in file.entries})
    whole = {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}
    if any(tensor.shape[1] != batch_size for tensor in whole.values()):
        raise CheckpointError(
            f"global_batch_size={batch_size}: {checkpoint.uri} holds anchors of another number of rows; resume with "
            f"global_batch_size={state.config['global_batch_size']}"
        )
    return {key: tensor[:, rows.start : rows.stop].contiguous() for key, tensor in whole.items()}


def _read_manifest(checkpoint: Storage, rank: int) -> dict[str, Any]:
    name = manifest_name(rank)
    if not checkpoint.is_file(name):
        raise UnfinishedError(f"{checkpoint.uri_of(name)}: missing; expected a training checkpoint of this project")
    try:
        manifest = checkpoint.read_json(name)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint.uri_of(name)}: not a manifest of this project")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint.uri_of(name)}: format_version={manifest.get('format_version')}, expected {FORMAT_VERSION}"
        )
    missing = [key for key in ("files", *CheckpointState.__dataclass_fields__) if key not in manifest]
    if missing:
        raise CheckpointError(f"{checkpoint.uri_of(name)}: has no {missing[0]!r}")
    return manifest


def _check_size(checkpoint: Storage, name: str, size: int) -> None:
    info = checkpoint.filesystem.get_file_info(f"{checkpoint.path}/{name}")
    if not info.is_file:
        raise CheckpointError(f"{checkpoint.uri_of(name)}: missing from the checkpoint")
    if info.size != size:
        raise CheckpointError(f"{checkpoint.uri_of(name)}: {info.size} bytes, the manifest says {size} (truncated?)")


def _state_of(manifest: Mapping[str, Any]) -> CheckpointState:
    return CheckpointState(**{name: manifest[name] for name in CheckpointState.__dataclass_fields__})


def _sha256(checkpoint: Storage, name: str) -> str:
    digest = hashlib.sha256()
    with checkpoint.open_for_parts(name) as file:
        while block := file.read_buffer(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _first_difference(theirs: Any, ours: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            found = _first_difference(theirs.get(name), ours.get(name), f"{key}.{name}")
            if found is not None:
                return found
        return None
    return None if theirs == ours else (key, theirs, ours)
