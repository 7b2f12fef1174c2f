"""What a sweep says while it runs: a table that is redrawn on a terminal, a line for each ended trial elsewhere."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TextIO

from mfm_ray.tuning.front import HALF_WIDTH
from mfm_ray.tuning.space import Point
from mfm_ray.tuning.sweep import SweepPlan, TrialRecord, Watcher
from mfm_ray.tuning.trial import FIDELITY

_REDRAW_S = 0.5
_MOST_RUNNING = 12  # lines of a table that must fit on the screen


def live_progress(
    name: str, plan: SweepPlan, earlier: Mapping[int, TrialRecord], *, log: Callable[[str], None]
) -> Watcher:
    """The table where stdout is a terminal, else lines to `log`."""
    state = Progress(name, plan, earlier)
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return LiveTable(state, sys.stdout) if is_terminal else PlainLines(state, log)


class Progress:
    """How far a sweep is: trials that ended and that run, the best so far, and the time that is left."""

    def __init__(
        self,
        name: str,
        plan: SweepPlan,
        earlier: Mapping[int, TrialRecord],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.running: dict[int, tuple[Point, Mapping[str, float]]] = {}
        self.ended: dict[int, TrialRecord] = dict(earlier)
        self._name, self._plan, self._clock = name, plan, clock
        self._before, self._began = len(earlier), clock()

    def begin_or_report(self, index: int, point: Point, reported: Mapping[str, float]) -> None:
        self.running[index] = (point, reported)

    def end(self, record: TrialRecord) -> None:
        self.running.pop(record.index, None)
        self.ended[record.index] = record

    @property
    def best(self) -> TrialRecord | None:
        """The best whole trial by the first objective."""
        pruning = self._plan.pruning
        sign = 1.0 if pruning.mode == "max" else -1.0
        whole = [r for r in self.ended.values() if r.status == "ok" and pruning.metric in r.metrics]
        return max(whole, key=lambda record: sign * record.metrics[pruning.metric], default=None)

    @property
    def head(self) -> str:
        counts = Counter(record.status for record in self.ended.values())
        kinds = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        return (
            f"{self._name}: {len(self.ended)} of {self._plan.search.most} trials" + (f" ({kinds})" if kinds else "")
        ) + f", {len(self.running)} running, {self.left}"

    @property
    def left(self) -> str:
        """By the mean time of the trials that ended in this call."""
        done, total = len(self.ended), self._plan.search.most
        if done == self._before:
            return "time left not known yet"
        return f"{duration((self._clock() - self._began) / (done - self._before) * (total - done))} left"

    def figure(self, metrics: Mapping[str, float]) -> str:
        """The first objective with its interval."""
        name = self._plan.pruning.metric
        width = metrics.get(name + HALF_WIDTH)
        value = f"{name} {metrics.get(name, math.nan):.4g}"
        return value if width is None else f"{value} ± {width:.2g}"

    def table(self) -> list[str]:
        """Head, best, and a line for each running trial."""
        lines = [self.head]
        if (best := self.best) is not None:
            lines.append(f"  best     {best.index:>5}  {self.figure(best.metrics)}  {in_words(best.point)}")
        most = self._plan.pruning.rungs[-1]
        for index, (point, reported) in sorted(self.running.items())[:_MOST_RUNNING]:
            far = f"{int(reported.get(FIDELITY, 0)):>{len(str(most))}} of {most} samples"
            figure = f"  {self.figure(reported)}" if reported else ""
            lines.append(f"  running  {index:>5}  {far}{figure}  {in_words(point)}")
        return lines

    def line(self, record: TrialRecord) -> str:
        what = record.reason or f"{self.figure(record.metrics)}, {record.metrics.get('nfe')} calls an image"
        done, most = len(self.ended), self._plan.search.most
        return f"{done} of {most} trials, {self.left}: {in_words(record.point)}: {record.status}, {what}"


class PlainLines(Watcher):
    """A line for each trial that ended."""

    def __init__(self, state: Progress, log: Callable[[str], None]) -> None:
        self._state, self._log = state, log

    def on_progress(self, index: int, point: Point, reported: Mapping[str, float]) -> None:
        self._state.begin_or_report(index, point, reported)

    def on_end(self, record: TrialRecord) -> None:
        self._state.end(record)
        self._log(self._state.line(record))


class LiveTable(Watcher):
    """The table in place of its last state; a trial that failed leaves a line above it."""

    def __init__(self, state: Progress, out: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self._out, self._clock = state, out, clock
        self._height, self._drawn = 0, -math.inf

    def on_progress(self, index: int, point: Point, reported: Mapping[str, float]) -> None:
        self._state.begin_or_report(index, point, reported)
        self._draw()

    def on_end(self, record: TrialRecord) -> None:
        self._state.end(record)
        self._draw([self._state.line(record)] if record.reason else [])

    def on_tick(self) -> None:
        if self._clock() - self._drawn >= _REDRAW_S:
            self._draw()

    def _draw(self, above: list[str] | None = None) -> None:
        width = shutil.get_terminal_size().columns
        table = [line[: width - 1] for line in self._state.table()]
        up = f"\x1b[{self._height}A" if self._height else ""
        self._out.write(up + "\r\x1b[J" + "\n".join([*(above or []), *table]) + "\n")
        self._out.flush()
        self._height, self._drawn = len(table), self._clock()


def in_words(point: Point) -> str:
    """A point for the eye: `jobs.sample` takes the words of results.parquet, whose numbers are whole."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in point.items()
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
