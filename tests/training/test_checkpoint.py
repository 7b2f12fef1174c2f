"""What a checkpoint says of itself, and who may go on from it. Damage to real ones: test_sharding.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import (
    MODEL_FILE,
    CheckpointError,
    CheckpointState,
    check_compatible,
    manifest_name,
    read_checkpoint_model,
    read_state,
    write_manifest,
    write_tensors,
)

MODEL = {"network": {"name": "residual_mlp", "width": 8}, "interpolant": "linear", "data": {"kind": "image"}}
STATE = CheckpointState(
    step=5,
    seconds=1.5,
    world_size=1,
    stage=2,
    config={"seed": 0},
    model=MODEL,
    data_sha256="ab",
    figures={"loss": 1.0},
    ema_decays=[0.999, 0.9999],
)
TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3), "empty": torch.zeros(0, 2)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_tensors(tmp_path / MODEL_FILE, TENSORS.items())
    slow = {name: tensor + 1 for name, tensor in TENSORS.items()}
    write_tensors(tmp_path / "ema_model-0.9999.safetensors", slow.items())
    write_manifest(tmp_path, rank=0, state=STATE)
    return tmp_path


def test_tensors_written_one_by_one_are_an_ordinary_safetensors_file(place: Path) -> None:
    loaded = safetensors.torch.load_file(place / MODEL_FILE)
    assert sorted(loaded) == sorted(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_checkpoint_returns_the_state_it_was_written_with(place: Path) -> None:
    assert read_state(Storage(place)) == STATE
    assert read_checkpoint_model(place).state == STATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 2}, r"scaling.num_workers=2.*written with 1"),
        ({"stage": 3}, r"zero.stage=3.*written with 2"),
        ({"model": {**MODEL, "network": {"name": "residual_mlp", "width": 16}}}, r"network.width=16.*with 8"),
        ({"model": {**MODEL, "network": {"name": "dit", "width": 8}}}, r"network.name=.dit.*residual_mlp"),
        ({"data_sha256": "cd"}, "data.path.*other data"),
        ({"ema_decays": (0.999,)}, r"ema_decay=\[0.999\].*averages of \[0.999, 0.9999\]"),
    ],
)
def test_another_layout_network_or_data_is_refused_by_key(place: Path, changes: dict[str, Any], message: str) -> None:
    same: dict[str, Any] = {"world_size": 1, "stage": 2, "model": MODEL, "data_sha256": "ab"}
    same["ema_decays"] = (0.999, 0.9999)
    check_compatible(Storage(place), STATE, **same)
    with pytest.raises(CheckpointError, match=message):
        check_compatible(Storage(place), STATE, **{**same, **changes})


def test_any_average_is_read_by_its_decay_the_first_without_being_named(place: Path) -> None:
    for asked, shift in ((None, 0), (0.999, 0), (0.9999, 1)):
        found = read_checkpoint_model(place, ema_decay=asked)
        assert torch.equal(found.state_dict["count"], TENSORS["count"] + shift)
        assert found.decay == (asked or 0.999)
    with pytest.raises(CheckpointError, match=r"ema_decay=0.5: .* holds averages of 0.999, 0.9999"):
        read_checkpoint_model(place, ema_decay=0.5)


def test_a_model_that_was_altered_is_not_read(place: Path) -> None:
    content = bytearray((place / MODEL_FILE).read_bytes())
    content[-1] ^= 1
    (place / MODEL_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{MODEL_FILE}: content differs"):
        read_checkpoint_model(place)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "missing; expected a training checkpoint"),
        ({"format": "other"}, "not a manifest"),
        ({"format": "mfm-ray-checkpoint", "format_version": 9}, "format_version=9"),
        ({"format": "mfm-ray-checkpoint", "format_version": 2, "files": {}}, "has no 'step'"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(place: Path, manifest: dict | None, message: str) -> None:
    file = place / manifest_name(0)
    file.unlink() if manifest is None else file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint_model(place)


def test_files_of_different_checkpoints_are_not_mixed(place: Path, tmp_path: Path) -> None:
    write_manifest(place, rank=0, state=replace(STATE, world_size=2))
    write_manifest(place, rank=1, state=replace(STATE, world_size=2, step=6))
    with pytest.raises(CheckpointError, match=r"step=6, but rank 0 wrote 5"):
        read_state(Storage(place))
