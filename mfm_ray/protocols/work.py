"""What a long evaluation says while it runs: the stage, and the time left from the work still planned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_QUIET_S = 10.0


class Work:
    """Planned work in network rows (one network call on one sample), stage by stage.

    A stage is announced with the time left; within it a line every ten seconds. Stages that were never planned cost
    nothing in the estimate.
    """

    def __init__(self, planned: dict[str, float], log: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._planned, self._log = dict(planned), log
        self._total, self._done = sum(planned.values()), 0.0
        self._began = self._spoke = time.monotonic()
        self._stage, self._in_stage = "", 0.0

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        began = time.monotonic()
        self._stage, self._in_stage = title, 0.0
        self._say()
        yield
        self._done += self._planned.get(name, 0.0)
        self._in_stage = 0.0
        self.seconds[name] = time.monotonic() - began

    def advance(self, rows: float) -> None:
        """Tell that so many rows of the current stage are done."""
        self._in_stage += rows
        if time.monotonic() - self._spoke >= _QUIET_S:
            self._say()

    def _say(self) -> None:
        self._spoke = now = time.monotonic()
        done, spent = self._done + self._in_stage, now - self._began
        left = f", about {spent * (self._total - done) / done:.0f} s left" if done > 0.02 * self._total else ""
        self._log(f"  {self._stage} ({min(1.0, done / max(self._total, 1.0)):.0%} done{left})")
