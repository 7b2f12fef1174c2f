"""How far a run is, shown on the driver: rank 0 tells an actor, a thread of the driver asks it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from tqdm import tqdm

_POLL_S = 1.0
_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class ProgressState:
    """Optimiser steps done of `max_steps`, and the last logged figures."""

    step: int
    max_steps: int
    loss: float
    images_per_second: float
    steps_per_second: float

    def line(self) -> str:
        left = (self.max_steps - self.step) / self.steps_per_second if self.steps_per_second > 0 else float("inf")
        return (
            f"step {self.step}/{self.max_steps}  loss {self.loss:.4g}  {self.images_per_second:,.0f} images/s  "
            f"{_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@ray.remote(num_cpus=0, max_restarts=-1)
class ProgressActor:
    """Holds the last state."""

    def __init__(self) -> None:
        self._state: ProgressState | None = None

    def tell(self, state: ProgressState) -> None:
        self._state = state

    def ask(self) -> ProgressState | None:
        return self._state


class ProgressDisplay:
    """A bar on a terminal, one line every ten seconds elsewhere, while the block runs.

    Never fails a run: when the actor does not answer nothing is shown.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="training-progress", daemon=True)
        self.actor: Any = ProgressActor.remote()  # type: ignore[attr-defined]

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=5.0)
        ray.kill(self.actor)

    def _watch(self) -> None:
        bar = tqdm(unit="step", dynamic_ncols=True, file=sys.stderr) if sys.stderr.isatty() else None
        last_line, shown, ended = 0.0, -1, False
        while not ended:  # a last look after the end: the last step may be younger than the last one
            ended = self._done.wait(_POLL_S)
            state = self._ask()
            if state is None or state.step == shown:
                continue
            if bar is not None:
                bar.total = state.max_steps
                bar.set_postfix_str(f"loss {state.loss:.4g}, {state.images_per_second:,.0f} images/s", refresh=False)
                bar.update(state.step - bar.n)
            elif time.monotonic() - last_line > _LINE_EVERY_S or state.step == state.max_steps:
                self._log(state.line())
                last_line = time.monotonic()
            shown = state.step
        if bar is not None:
            bar.close()

    def _ask(self) -> ProgressState | None:
        try:
            return ray.get(self.actor.ask.remote(), timeout=5.0)
        except (ray.exceptions.RayError, TimeoutError):
            return None
