"""The history of a run: sums of per-step numbers on the device, lines of metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mfm_ray.storage import Storage

METRICS_FILE = "metrics.jsonl"


class TrainingDiverged(ArithmeticError):
    """A loss or gradient became NaN or infinite; the message names step, worker and term.

    step: the first such step, where it is known. blamed: whether it was this worker's number.
    """

    step: int | None = None
    blamed: bool = False


class StepWindow:
    """Numbers of the steps since the last flush, kept on the device so that no step waits for them.

    Each step contributes one vector (terms of the loss, gradient norm). `flush` averages it over ranks, which is
    the only time that a worker waits, and finds the first step at which something was not finite.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._rows: list[Tensor] = []
        self._first_step = 0

    def add(self, step: int, row: Tensor) -> None:
        if not self._rows:
            self._first_step = step
        self._rows.append(row)

    def flush(self) -> dict[str, float]:
        """Means over the window's steps and over ranks, by name. Collective.

        Raises TrainingDiverged, on every rank alike, naming the first step and number that is not finite, and the
        first rank where it is not.
        """
        if not self._rows:
            return {}
        mine = torch.stack(self._rows).double()
        self._rows = []
        values = mine.clone()
        torch.distributed.all_reduce(values)
        values = (values / torch.distributed.get_world_size()).cpu()
        broken = (~torch.isfinite(values)).nonzero()
        if len(broken):
            row, column = (int(i) for i in broken[0])
            raise self._diverged(self._first_step + row, column, mine[row, column])
        return dict(zip(self.names, values.mean(0).tolist(), strict=True))

    def _diverged(self, step: int, column: int, mine: Tensor) -> TrainingDiverged:
        """The error of a step, by what the number is on each rank. Collective."""
        numbers = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(numbers, mine.contiguous())
        first, number = next((rank, float(n)) for rank, n in enumerate(numbers) if not torch.isfinite(n))
        error = TrainingDiverged(
            f"step {step}, worker {first}: {self.names[column]} is {number}; lower optimizer.learning_rate, set "
            "gradient_clipping, or look at the data; the checkpoints written before are good"
        )
        error.step, error.blamed = step, not bool(torch.isfinite(mine))
        return error


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run, written by one process.

    A run on a local path is written in place, line by line. Elsewhere the files grow in a local folder that
    `upload` copies there. What an earlier attempt wrote after `resume_step` is removed, so that each step appears once.
    """

    def __init__(self, run: Storage, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._is_local = run.local_path is not None
        self._folder = run.local_path or Path(tempfile.mkdtemp(prefix="mfm-ray-log-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._open(resume_step)
        self._kept = b""
        self._unflushed: list[tuple[int, Mapping[str, float]]] = []
        self._events_are_lost = False
        self._open_events = lambda purge_step: SummaryWriter(str(self._folder), purge_step=purge_step)
        self._events = self._open_events(resume_step + 1 if resume_step else None)

    def _open(self, resume_step: int) -> BinaryIO:
        path = self._folder / METRICS_FILE
        if not self._is_local and resume_step and self._run.is_file(METRICS_FILE):
            path.write_bytes(self._run.read_bytes(METRICS_FILE))
        kept = history_until(path.read_text() if path.exists() else "", resume_step)
        staging = path.with_suffix(".part")
        staging.write_text(kept)
        staging.replace(path)
        return path.open("ab", buffering=0)

    def write(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """Adds a line. Why the disk refuses it, where it does: it is kept, and written with the next one."""
        self._kept += json.dumps({"step": step, **numbers}, allow_nan=False).encode() + b"\n"
        self._unflushed.append((step, numbers))
        try:
            self._write_kept()
            if not self._events_are_lost:
                self._add_events(step, numbers)
        except OSError as error:
            return str(error)
        return None

    def flush(self) -> None:
        """Make what was written so far readable here, and ready for `upload`. OSError when the disk refuses."""
        self._write_kept()
        self._flush_events()
        self._unflushed = []

    def close(self) -> None:
        self.flush()
        self._events.close()
        self.upload()
        self._file.close()
        if not self._is_local:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write_kept(self) -> None:
        while self._kept:
            self._kept = self._kept[self._file.write(self._kept) or 0 :]  # a full disk takes a part of a line

    def _add_events(self, step: int, numbers: Mapping[str, float]) -> None:
        try:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
        except OSError:
            self._events_are_lost = True  # TensorBoard's writer ends with its first error
            raise

    def _flush_events(self) -> None:
        if self._events_are_lost:
            self._events, self._events_are_lost = self._open_events(None), False
            for step, numbers in self._unflushed:
                self._add_events(step, numbers)
        try:
            self._events.flush()
        except OSError:
            self._events_are_lost = True
            raise

    def upload(self) -> None:
        """Make what was flushed readable in the run's storage; any thread may call it while lines are added."""
        if self._is_local:
            return
        for path in self._folder.iterdir():
            self._run.write_bytes(path.name, path.read_bytes())


def history_until(text: str, step: int) -> str:
    """The lines of a metrics.jsonl up to `step`; a last line cut short by a kill is dropped."""
    kept = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    return "".join(kept)
