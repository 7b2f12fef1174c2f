"""Checkpoints on disk: what each rank writes, the manifest that vouches for it, and reading only what it vouches for.

    deepspeed/...               the engine's own shards (pickles: read only after their hashes matched)
    ema-rank-<N>.safetensors    this rank's part of the moving averages
    feed-rank-<N>.safetensors   what this rank's feed carries from step to step, where it carries anything
    ema_model.safetensors       the averaged model whole, written tensor by tensor by rank 0; what `jobs.export` reads
    ema_model-<decay>...        the same by each further decay of `ema_decay`
    manifest-rank-<N>.json      step, layout and configuration, and size and SHA-256 of every file that rank wrote

Ray Train merges the ranks' folders into one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

FORMAT = "mfm-ray-checkpoint"
FORMAT_VERSION = 2
MODEL_FILE = "ema_model.safetensors"
_MANIFEST = "manifest-rank-"

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


class CheckpointError(InputError):
    """A checkpoint that cannot be used; one line naming the file or the field."""


@dataclass(frozen=True)
class CheckpointState:
    """Where a run stood: optimiser steps done, seconds of training so far, and how it was laid out.

    `config` is the training configuration, `model` the config.json of the model it trains (what export needs),
    `data_sha256` the hash of the data's manifest, `figures` the last line of the metrics, `ema_decays` the decays of
    the averages, that of `ema_model.safetensors` first.
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


def manifest_name(rank: int) -> str:
    return f"{_MANIFEST}{rank}.json"


def ema_name(rank: int) -> str:
    return f"ema-rank-{rank}.safetensors"


def feed_name(rank: int) -> str:
    return f"feed-rank-{rank}.safetensors"


def model_files(decays: Sequence[float]) -> dict[float, str]:
    """Where the averaged model of each decay lies, the first under the plain name."""
    return {decay: f"ema_model-{decay!r}.safetensors" if i else MODEL_FILE for i, decay in enumerate(decays)}


def write_manifest(directory: Path, *, rank: int, state: CheckpointState) -> None:
    """Vouch for everything that this rank has put below `directory`; the last file to be written there."""
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(_MANIFEST)
    }
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "rank": rank, **asdict(state), "files": files}
    (directory / manifest_name(rank)).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def read_state(checkpoint: Storage) -> CheckpointState:
    """What the manifests say, after a check that all of them and all their files are there with the right size.

    Hashes are checked by whoever reads the files. Raises CheckpointError naming what is missing or wrong.
    """
    manifest = _read_manifest(checkpoint, 0)
    for rank in range(manifest["world_size"]):
        other = _read_manifest(checkpoint, rank)
        for field in ("step", "world_size", "stage"):
            if other[field] != manifest[field]:
                raise CheckpointError(
                    f"{checkpoint.uri_of(manifest_name(rank))}: {field}={other[field]}, but rank 0 wrote "
                    f"{manifest[field]}: files of different checkpoints are mixed"
                )
        for name, entry in other["files"].items():
            _check_size(checkpoint, name, entry["size"])
    names = CheckpointState.__dataclass_fields__
    return CheckpointState(**{name: manifest[name] for name in names})


def check_compatible(
    checkpoint: Storage,
    state: CheckpointState,
    *,
    world_size: int,
    stage: int,
    model: Mapping[str, Any],
    data_sha256: str,
    ema_decays: Sequence[float],
) -> None:
    """Raises CheckpointError unless a run of this layout, network, data and averages can go on from `state`."""
    layout = {"scaling.num_workers": (state.world_size, world_size), "zero.stage": (state.stage, stage)}
    for key, (theirs, ours) in layout.items():
        if theirs != ours:
            raise CheckpointError(
                f"{key}={ours}: {checkpoint.uri} was written with {theirs}; resume with {key}={theirs}"
            )
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


def verify_rank(directory: Path, rank: int) -> None:
    """Check size and SHA-256 of every file that `rank` wrote. CheckpointError naming the first that differs."""
    checkpoint = Storage(directory)
    manifest = _read_manifest(checkpoint, rank)
    for name, entry in manifest["files"].items():
        _check_size(checkpoint, name, entry["size"])
        if _sha256(directory / name) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint.uri_of(name)}: content differs from {manifest_name(rank)} (damaged)")


@dataclass(frozen=True)
class CheckpointModel:
    """The averaged weights of a checkpoint and their decay, the config.json they belong to, where training stood."""

    state_dict: dict[str, Tensor]
    decay: float
    state: CheckpointState


def read_checkpoint_model(location: Storage | str | Path, *, ema_decay: float | None = None) -> CheckpointModel:
    """The averaged model of any checkpoint, of any stage and number of workers; nothing is unpickled.

    ema_decay: which of the averages, by default the first of them. Raises CheckpointError when the folder is no
    checkpoint or has no such average, or the model file is missing or was changed.
    """
    checkpoint = Storage(location)
    manifest = _read_manifest(checkpoint, 0)
    state = CheckpointState(**{name: manifest[name] for name in CheckpointState.__dataclass_fields__})
    decay = check_decay(checkpoint, state, ema_decay)
    name = model_files(state.ema_decays)[decay]
    entry = manifest["files"].get(name)
    if entry is None:
        raise CheckpointError(f"{checkpoint.uri_of(manifest_name(0))}: lists no {name}")
    _check_size(checkpoint, name, entry["size"])
    data = checkpoint.read_bytes(name)
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{checkpoint.uri_of(name)}: content differs from {manifest_name(0)} (damaged)")
    return CheckpointModel(state_dict=safetensors.torch.load(data), decay=decay, state=state)


def check_decay(checkpoint: Storage, state: CheckpointState, ema_decay: float | None) -> float:
    """The decay that is asked for, the first of the checkpoint's for None. CheckpointError when it has no such one."""
    if ema_decay is None:
        return state.ema_decays[0]
    if ema_decay not in state.ema_decays:
        held = ", ".join(map(repr, state.ema_decays))
        raise CheckpointError(f"ema_decay={ema_decay!r}: {checkpoint.uri} holds averages of {held}")
    return ema_decay


def write_tensors(path: Path | None, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file one tensor at a time, so that a model never has to be whole in memory.

    With path None the tensors are only consumed: the other ranks take part in gathering them.
    """
    if path is None:
        for _ in tensors:
            pass
        return
    header: dict[str, Any] = {}
    offset = 0
    body = path.with_suffix(".body")
    with body.open("wb") as file:
        for name, tensor in tensors:
            size = file.write(_bytes_of(tensor))
            offsets = [offset, offset + size]
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            offset += size
    # the header comes first in the file, but is known only when all tensors have passed
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, body.open("rb") as content:
        file.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(content, file, 1 << 22)
    body.unlink()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read_manifest(checkpoint: Storage, rank: int) -> dict[str, Any]:
    name = manifest_name(rank)
    if not checkpoint.is_file(name):
        raise CheckpointError(f"{checkpoint.uri_of(name)}: missing; expected a training checkpoint of this project")
    manifest = checkpoint.read_json(name)
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
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
