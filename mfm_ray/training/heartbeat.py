"""What each worker says of itself while it trains: where it stands, and when it is alive though nothing moves.

A step costs a worker two assignments. A thread of its own tells the monitor of the run (monitor.py), every few seconds,
where the training thread stands and, when it has not moved since the last time, in which function it is.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START, DATA, STEP, SAMPLE, CHECKPOINT, END = "start", "data", "step", "sample", "checkpoint", "end"
_LOG = logging.getLogger(__name__)
PHASES = (DATA, STEP, SAMPLE, CHECKPOINT)
"""What a worker does after one another in a step; START is before the first one, END after the last."""

_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "ray/train/collective/", "execution/train_fn_utils.py")


def beat_every(hang_timeout_s: float, world_size: int) -> float:
    """Seconds between two beats of a worker: often enough for the timeout, and 200 a second at most of all together."""
    return max(min(2.0, hang_timeout_s / 10), world_size / 200)


@dataclass(frozen=True)
class Member:
    """A process of the group. attempt: the same for all that train together, another after each restart; born: when the
    process began, by which it is known from a later one of the same number.
    """

    attempt: str
    rank: int
    world_size: int
    node: str
    node_id: str
    pid: int
    born: str


@dataclass(frozen=True)
class Beat:
    """Where a worker stands. step: optimiser steps done; still_s: seconds since it last entered a phase.

    started_from: the step that the attempt began with; stepped_at: the time (UNIX) of its first step's end, 0 before.
    checkpoint: the last step that it wrote a checkpoint of, None before. waiting: whether it is inside a collective;
    function: where it is, when it has not moved since the last beat.
    """

    member: Member
    step: int
    phase: str
    still_s: float
    started_from: int
    stepped_at: float = 0.0
    checkpoint: int | None = None
    waiting: bool = False
    function: str = ""


@dataclass
class Heartbeat:
    """One worker's account of itself; a context while which it is sent to the monitor, where the plan names one.

    monitor: handle of the `Monitor` actor or None; every_s: seconds between two beats.
    """

    monitor: Any = None
    every_s: float = 1.0
    checkpoint: int | None = None
    _step: int = 0
    _phase: str = START
    _moved: float = field(default_factory=time.monotonic)
    _started_from: int = 0
    _stepped_at: float = 0.0

    def begin(self, step: int) -> None:
        """The attempt goes on from `step`."""
        self._started_from = self._step = step
        self.moved()

    def at(self, phase: str, step: int) -> None:
        """The worker enters a phase with `step` steps done."""
        self._step, self._phase, self._moved = step, phase, time.monotonic()
        if not self._stepped_at and step > self._started_from:
            self._stepped_at = time.time()

    def moved(self) -> None:
        """Not a new phase, but a sign that the worker is at work: it tries again, or reads on."""
        self._moved = time.monotonic()

    def say(self, line: str) -> None:
        """A line for the driver's log; for this process' where there is no driver."""
        if self.monitor is None:
            _LOG.warning(line)
        else:
            self.monitor.say.remote(f"training worker {_rank()}: {line}")

    def __enter__(self) -> Heartbeat:
        self.moved()
        if self.monitor is not None:
            self._thread_id = threading.get_ident()
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.monitor is None:
            return
        if kind is None:
            self.at(END, self._step)
        self._done.set()
        self._thread.join(timeout=5.0)

    def _beat(self) -> None:
        member, seen = this_member(), -1.0
        while True:
            function, waiting = ("", False)
            if self._moved == seen:
                function, waiting = whereabouts(self._thread_id)
            seen = self._moved
            self.monitor.beat.remote(
                Beat(
                    member=member,
                    step=self._step,
                    phase=self._phase,
                    still_s=time.monotonic() - seen,
                    started_from=self._started_from,
                    stepped_at=self._stepped_at,
                    checkpoint=self.checkpoint,
                    waiting=waiting,
                    function=function,
                )
            )
            if self._done.is_set():
                return
            self._done.wait(self.every_s)


def this_member() -> Member:
    """Who this process is. The attempt has the name of its group's rendezvous, which each restart makes anew."""
    import ray

    context = ray.get_runtime_context()
    return Member(
        attempt=f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}",
        rank=_rank(),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        node=ray.util.get_node_ip_address() or socket.gethostname(),
        node_id=context.get_node_id(),
        pid=os.getpid(),
        born=birth(os.getpid()),
    )


def birth(pid: int) -> str:
    """When a process of this machine began, in ticks since boot, empty for one that is not there."""
    try:
        # pid (name) state ppid ...; the name may hold anything, so read from its closing bracket
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def whereabouts(thread_id: int) -> tuple[str, bool]:
    """The innermost function of the thread, and whether this process is inside a collective in any of its threads.

    Autograd may run the hooks that reduce gradients in threads of its own.
    """
    frames = sys._current_frames()
    waiting = False
    for number, innermost in frames.items():
        if number == threading.get_ident():
            continue
        frame: Any = innermost
        while frame is not None:
            waiting = waiting or any(part in frame.f_code.co_filename for part in _COLLECTIVES)
            frame = frame.f_back
    mine = frames.get(thread_id)
    if mine is None:
        return "", waiting
    return f"{mine.f_code.co_name} ({os.path.basename(mine.f_code.co_filename)}:{mine.f_lineno})", waiting


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
