"""Steering methods side by side in lanes; what they ask for is merged.

A lane runs the library's own code until it needs noise, the network, a reward or a gradient, and waits there. Once all
wait, the calls of the earliest phase are run as one. No lane knows of the others, and no row's result depends on them
(`mfm_ray.padding`).

Lanes are threads only so that ordinary code can wait in the middle; one of them runs at a time. Side by side they would
fight over the interpreter at each of their many small operations, at several times the cost of the operations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

MAX_LANES = 64
"""Lanes of one run; each has a thread of its own."""
Result = TypeVar("Result")


class Phase(IntEnum):
    """What is waited for. Earlier phases go first, so that lanes that need both meet at the later one.

    A backward pass goes last: all lanes that shared a network call have then come to it, and one pass serves them.
    """

    NOISE = 0
    DRIFT = 1
    DRAW = 2
    REWARD = 3
    GRADIENT = 4


@dataclass
class Call:
    """One lane's call, and its answer."""

    phase: Phase
    payload: Any
    result: Any = None
    error: BaseException | None = None

    def answer(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


Handler = Callable[[Sequence[Call]], None]
"""Answers calls of one phase: sets `result` or `error` of each."""


class Rendezvous:
    """Runs lanes and answers their calls, in the thread that called `run`."""

    def __init__(self, handlers: dict[Phase, Handler]) -> None:
        self._handlers = handlers
        self._pool = ThreadPoolExecutor(MAX_LANES, thread_name_prefix="lane")
        self._here = threading.local()

    def run(self, tasks: Sequence[Callable[[], Result]]) -> list[Result | Exception]:
        """What each task returned or raised, at most `MAX_LANES` of them."""
        assert len(tasks) <= MAX_LANES
        if len(tasks) == 1:
            return [_outcome(tasks[0])]
        lanes = [_Lane(task, self._here) for task in tasks]
        for lane in lanes:
            self._pool.submit(lane.run)
            lane.go_on()
        while asking := _earliest(lanes):
            self._answer([lane.call for lane in asking if lane.call is not None])
            for lane in asking:
                lane.go_on()
        return [lane.outcome for lane in lanes]

    def call(self, phase: Phase, payload: Any) -> Any:
        """From a lane: the answer, once all lanes wait. From a single task: the answer, at once."""
        call, lane = Call(phase, payload), getattr(self._here, "lane", None)
        if lane is None:
            self._answer([call])
        else:
            lane.wait_with(call)
        return call.answer()

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _answer(self, calls: Sequence[Call]) -> None:
        try:
            self._handlers[calls[0].phase](calls)
        except BaseException as error:
            for call in calls:
                call.error = error


class _Lane(Generic[Result]):
    """A task that is handed the turn, and hands it back with a call or its end.

    call: what it waits for, None once it has ended; its outcome is known then.
    """

    def __init__(self, task: Callable[[], Result], here: threading.local) -> None:
        self._task, self._here = task, here
        self._turn, self._returned = _taken_lock(), _taken_lock()
        self.call: Call | None = None
        self.outcome: Any = None

    def run(self) -> None:
        """In the lane's thread."""
        self._turn.acquire()
        self._here.lane = self
        self.outcome = _outcome(self._task)
        self._here.lane = self.call = None
        self._returned.release()

    def go_on(self) -> None:
        """Gives the lane its turn; returns when it waits or has ended."""
        self._turn.release()
        self._returned.acquire()

    def wait_with(self, call: Call) -> None:
        """From the lane itself: hands the turn back until the call is answered."""
        self.call = call
        self._returned.release()
        self._turn.acquire()


def _taken_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _earliest(lanes: Sequence[_Lane[Any]]) -> list[_Lane[Any]]:
    """Lanes whose calls are of the earliest phase; none when all have ended."""
    phases = [lane.call.phase for lane in lanes if lane.call is not None]
    return [lane for lane in lanes if lane.call is not None and lane.call.phase == min(phases)]


def _outcome(task: Callable[[], Result]) -> Result | Exception:
    """A task's failure is its own: it is returned, for whoever waits for it."""
    try:
        return task()
    except Exception as error:
        return error
