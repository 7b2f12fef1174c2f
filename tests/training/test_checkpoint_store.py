"""Which checkpoints of a run stay, which is the newest, and the thread that writes them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mfm_ray.storage import Storage
from mfm_ray.training.background import Background
from mfm_ray.training.checkpoint import CheckpointError, manifest_name, write_files
from mfm_ray.training.checkpoint_store import (
    CHECKPOINTS,
    Retention,
    folder_name,
    folders,
    newest_checkpoint,
    next_number,
)
from tests.training.test_checkpoint import STATE, files_of

LOSSES = (3.0, 1.0, 2.0, 1.0, 4.0)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """Five checkpoints of steps 10 to 50, with those losses."""
    for number, loss in enumerate(LOSSES):
        write(Storage(tmp_path), number, loss)
    return Storage(tmp_path)


def write(run: Storage, number: int, loss: float) -> str:
    name, step = folder_name(number, 10 * (number + 1)), 10 * (number + 1)
    state = replace(STATE, step=step, figures={"loss": loss})
    write_files(run.child(CHECKPOINTS, name), files_of(state), rank=0, state=state)
    return name


def numbers(run: Storage) -> list[int]:
    return [int(name[:6]) for name in folders(run)]


@pytest.mark.parametrize(
    ("newest", "best", "order", "kept"),
    [(1, 0, "min", [4]), (2, 0, "min", [3, 4]), (1, 1, "min", [3, 4]), (1, 2, "max", [0, 4]), (2, 2, "min", [1, 3, 4])],
)
def test_the_newest_stay_and_the_best_of_equals_the_newer(
    run: Storage, newest: int, best: int, order: str, kept: list[int]
) -> None:
    Retention(run, newest=newest, best=best, score="loss", order=order).prune(before=5)
    assert numbers(run) == kept


def test_what_was_never_completed_goes_when_something_newer_is_complete(run: Storage) -> None:
    retention = Retention(run, newest=2, best=0, score="loss", order="min")
    for number in (3, 4):
        run.delete(f"{CHECKPOINTS}/{folders(run)[number]}/{manifest_name(0)}")
    retention.prune(before=5)
    assert numbers(run) == [1, 2, 3, 4]  # another rank may still be writing
    assert newest_checkpoint(run).storage.name == folder_name(2, 30)  # type: ignore[union-attr]
    assert next_number(run) == 5
    write(run, 5, 0.5)
    retention.prune(before=5)
    assert numbers(run) == [1, 2, 3, 4, 5]  # the sixth is none of its business yet
    retention.prune(before=6)
    assert numbers(run) == [2, 5]


def test_a_score_that_no_line_has_is_refused_with_those_that_there_are(run: Storage) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint_score=reward: .* one of loss, seconds"):
        Retention(run, newest=1, best=1, score="reward", order="max").score_of({"seconds": 1.0, "loss": 2.0})


def test_checkpoints_of_the_earlier_format_are_refused_not_overlooked(tmp_path: Path) -> None:
    old = tmp_path / CHECKPOINTS / "checkpoint_2026-01-01_00-00-00.000000"
    old.mkdir(parents=True)
    (old / manifest_name(0)).write_text('{"format": "mfm-ray-checkpoint", "format_version": 2}')
    with pytest.raises(CheckpointError, match="format_version=2, expected 3"):
        newest_checkpoint(Storage(tmp_path))


def test_work_beside_the_loop_is_one_at_a_time_and_its_failure_is_raised_once() -> None:
    background, gate, done = Background("test"), threading.Event(), list[int]()

    def first() -> None:
        gate.wait()
        done.append(1)

    background.start(first)
    background.check()
    assert done == []
    gate.set()
    background.start(lambda: done.append(2))  # waits for the first
    background.wait()
    assert done == [1, 2]

    def failing() -> None:
        raise OSError("disk full")

    background.start(failing)
    background.settle()
    with pytest.raises(OSError, match="disk full"):
        background.check()
    background.wait()
