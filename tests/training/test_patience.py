"""Storage that is away for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mfm_ray.errors import StorageError
from mfm_ray.storage import Storage
from mfm_ray.training.metrics_log import METRICS_FILE, MetricsLog
from mfm_ray.training.patience import Patience


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now, self.naps, self.said, self.alive = 0.0, [], [], 0  # type: float, list[float], list[str], int

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds

    def patience(self, timeout_s: float) -> Patience:
        return Patience(timeout_s, self.said.append, self._alive, self.sleep, lambda: self.now)

    def _alive(self) -> None:
        self.alive += 1


def back_at(clock: Clock, second: float) -> Callable[[], str]:
    def read() -> str:
        if clock.now < second:
            raise OSError(28, "No space left on device")
        return "written"

    return read


def test_a_storage_that_is_back_in_time_is_written_and_both_are_said() -> None:
    clock = Clock()
    assert clock.patience(60.0).insist("the checkpoint of step 5", back_at(clock, 20.0)) == "written"
    assert clock.naps == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0]
    assert clock.alive == len(clock.naps)  # so that waiting is not taken for a hang
    refused = "the checkpoint of step 5: OSError: [Errno 28] No space left on device; trying again for up to 60 s"
    assert clock.said == [refused, "the checkpoint of step 5: done after 30 s"]


def test_what_works_at_once_says_nothing() -> None:
    clock = Clock()
    assert clock.patience(0.0).insist("it", lambda: 3) == 3
    assert (clock.said, clock.naps) == ([], [])


def test_a_storage_that_stays_away_is_an_error_that_names_what_and_why_after_the_stated_time() -> None:
    clock = Clock()
    with pytest.raises(StorageError, match=r"the metrics: .*No space left on device; given up after 10 s"):
        clock.patience(10.0).insist("the metrics", back_at(clock, 11.0))
    assert clock.now == 10.0


def test_what_is_no_refusal_of_a_storage_is_not_tried_again() -> None:
    clock = Clock()

    def wrong() -> None:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        clock.patience(10.0).insist("it", wrong)
    assert clock.naps == []


class FullDisk:
    """A file that takes `room` bytes and then none."""

    def __init__(self, file: object, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = data[: self.room]
        self.room -= len(taken)
        return self.file.write(taken)  # type: ignore[attr-defined,no-any-return]

    def close(self) -> None:
        self.file.close()  # type: ignore[attr-defined]


def test_the_lines_that_a_full_disk_refused_are_written_later_whole_and_once(tmp_path: Path) -> None:
    log = MetricsLog(Storage(tmp_path), resume_step=0)
    assert log.write(1, {"loss": 0.5}) is None
    real = log._file
    log._file = FullDisk(real, room=9)  # type: ignore[assignment]
    assert "No space left" in str(log.write(2, {"loss": 0.25}))
    assert "No space left" in str(log.write(3, {"loss": 0.125}))
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    log._file = real
    log.flush()
    log.close()
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 0.25}', '{"step": 3, "loss": 0.125}']
