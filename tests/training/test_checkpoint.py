"""What a checkpoint says of itself, and who may go on from it. Damage to real ones: test_sharding.py."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pyarrow import fs

from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import (
    FIXED_FILE,
    CheckpointError,
    CheckpointState,
    PieceReader,
    UnfinishedError,
    check_compatible,
    ema_kind,
    ema_name,
    feed_name,
    manifest_name,
    read_checkpoint_model,
    read_feed,
    read_state,
    verify_rank,
    write_files,
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
    ema_updates=5,
    optimizer={"step": 5.0},
    shapes={"weight": [2, 3], "scale": []},
    model_entries={"weight": "weight", "again": "weight", "scale": "scale", "count": "count"},
    versions={},
)
WEIGHT = torch.arange(6.0)


def files_of(state: CheckpointState) -> dict[str, dict[str, torch.Tensor]]:
    """One rank's files: a weight in two pieces, of which the averages of the second decay are one larger."""
    averages = {}
    for shift, decay in enumerate(state.ema_decays):
        kind = ema_kind(decay)
        averages |= {
            f"{kind}/weight:4": WEIGHT[4:] + shift,
            f"{kind}/weight:0": WEIGHT[:4] + shift,
            f"{kind}/scale:0": torch.tensor([2.0]),
        }
    return {
        "training-rank-0.safetensors": {"weights/weight:0": WEIGHT},
        "ema-rank-0.safetensors": averages,
        FIXED_FILE: {"count": torch.tensor(3), "empty": torch.zeros(0, 2)},
    }


def as_local(folder: Path) -> Storage:
    return Storage(folder / "checkpoint")


def as_uri(folder: Path) -> Storage:
    return Storage(f"file://{folder}/checkpoint")


def as_mock(folder: Path) -> Storage:
    return Storage("bucket/checkpoint", filesystem=fs._MockFileSystem())


def as_sub_tree(folder: Path) -> Storage:
    return Storage("run/checkpoint", filesystem=fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_files(Storage(tmp_path), files_of(STATE), rank=0, state=STATE)
    return tmp_path


def manifest_of(place: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((place / manifest_name(rank)).read_text())


def test_files_are_ordinary_safetensors_with_the_hashes_of_the_manifest(place: Path) -> None:
    for name, tensors in files_of(STATE).items():
        loaded = safetensors.torch.load_file(place / name)
        assert sorted(loaded) == sorted(tensors)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
        assert hashlib.sha256((place / name).read_bytes()).hexdigest() == manifest_of(place)["files"][name]["sha256"]


def test_a_checkpoint_returns_the_state_it_was_written_with(place: Path) -> None:
    assert read_state(Storage(place)) == STATE
    assert read_checkpoint_model(place).state == STATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**MODEL, "network": {"name": "residual_mlp", "width": 16}}}, r"network.width=16.*with 8"),
        ({"model": {**MODEL, "network": {"name": "dit", "width": 8}}}, r"network.name=.dit.*residual_mlp"),
        ({"data_sha256": "cd"}, "data.path.*other data"),
        ({"ema_decays": (0.999,)}, r"ema_decay=\[0.999\].*averages of \[0.999, 0.9999\]"),
    ],
)
def test_another_network_or_data_is_refused_by_key(place: Path, changes: dict[str, Any], message: str) -> None:
    same: dict[str, Any] = {"model": MODEL, "data_sha256": "ab"}
    same["ema_decays"] = (0.999, 0.9999)
    check_compatible(Storage(place), STATE, **same)
    with pytest.raises(CheckpointError, match=message):
        check_compatible(Storage(place), STATE, **{**same, **changes})


def test_any_average_is_read_by_its_decay_the_first_without_being_named(place: Path) -> None:
    for asked, shift in ((None, 0), (0.999, 0), (0.9999, 1)):
        found = read_checkpoint_model(place, ema_decay=asked)
        weight = (WEIGHT + shift).reshape(2, 3)
        expected = {"weight": weight, "again": weight, "scale": torch.tensor(2.0), "count": torch.tensor(3)}
        assert sorted(found.state_dict) == sorted(expected)
        assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in expected.items())
        assert found.decay == (asked or 0.999)
    with pytest.raises(CheckpointError, match=r"ema_decay=0.5: .* holds averages of 0.999, 0.9999"):
        read_checkpoint_model(place, ema_decay=0.5)


def test_a_model_that_was_altered_is_not_read(place: Path) -> None:
    content = bytearray((place / ema_name(0)).read_bytes())
    content[-1] ^= 1
    (place / ema_name(0)).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{ema_name(0)}: content differs"):
        read_checkpoint_model(place)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "missing; expected a training checkpoint"),
        ({"format": "other"}, "not a manifest"),
        ({"format": "mfm-ray-checkpoint", "format_version": 9}, "format_version=9"),
        ({"format": "mfm-ray-checkpoint", "format_version": 3, "files": {}}, "has no 'step'"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(place: Path, manifest: dict | None, message: str) -> None:
    file = place / manifest_name(0)
    file.unlink() if manifest is None else file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint_model(place)


def test_files_of_different_checkpoints_are_not_mixed(place: Path, tmp_path: Path) -> None:
    write_files(Storage(place), {}, rank=0, state=replace(STATE, world_size=2))
    write_files(Storage(place), {}, rank=1, state=replace(STATE, world_size=2, step=6))
    with pytest.raises(CheckpointError, match=r"step=6, but rank 0 wrote 5"):
        read_state(Storage(place))


def test_any_range_of_a_parameter_is_put_together_from_the_pieces_that_hold_it(tmp_path: Path) -> None:
    whole = torch.randn(40, generator=torch.Generator().manual_seed(0))
    cuts = [(0, 7), (7, 7), (7, 30), (25, 40)]  # an empty one, and two that overlap
    files = [f"part-{i}" for i in range(2)]
    for i, name in enumerate(files):
        mine = {f"w/a.b:{start}": whole[start:end] for start, end in cuts[i::2]}
        write_files(Storage(tmp_path), {name: mine}, rank=i, state=STATE)
    with PieceReader(Storage(tmp_path), files) as reader:
        for start in range(0, 41, 3):
            for end in range(start, 41, 5):
                assert torch.equal(reader.read("w", "a.b", start, end - start), whole[start:end])
        with pytest.raises(CheckpointError, match=r"no w of 2 of the elements 38 to 42 of a.b"):
            reader.read("w", "a.b", 38, 4)


@pytest.mark.parametrize("make", [as_local, as_uri, as_mock, as_sub_tree])
def test_a_checkpoint_is_written_verified_and_read_on_any_file_system(tmp_path: Path, make: Any) -> None:
    place: Storage = make(tmp_path)
    write_files(place, files_of(STATE), rank=0, state=STATE)
    verify_rank(place, 0)
    assert read_state(place) == STATE
    assert torch.equal(read_checkpoint_model(place).state_dict["weight"], WEIGHT.reshape(2, 3))
    place.delete(manifest_name(0))  # written last: without it nothing is there
    with pytest.raises(UnfinishedError, match=manifest_name(0)):
        read_state(place)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_what_feeds_carry_is_shared_out_anew_by_rows_of_the_global_batch(tmp_path: Path, workers: int) -> None:
    whole = {"x1": torch.arange(40.0).reshape(2, 10, 2), "begun": torch.tensor([[True, False] * 5] * 2)}
    state = replace(STATE, world_size=workers, config={"global_batch_size": 10})
    for rank in range(workers):
        rows = slice(10 * rank // workers, 10 * (rank + 1) // workers)
        mine = {name: tensor[:, rows].contiguous() for name, tensor in whole.items()}
        write_files(Storage(tmp_path), {feed_name(rank): mine}, rank=rank, state=state)
    for rows in (range(10), range(3, 7), range(9, 10)):
        found = read_feed(Storage(tmp_path), state, rows, 10)
        assert sorted(found) == sorted(whole)
        assert all(torch.equal(found[name], tensor[:, rows.start : rows.stop]) for name, tensor in whole.items())
    with pytest.raises(CheckpointError, match="global_batch_size=12: .* resume with global_batch_size=10"):
        read_feed(Storage(tmp_path), state, range(12), 12)
