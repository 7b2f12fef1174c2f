"""Steering methods side by side in lanes, one thread each; what they ask for is merged.

A lane runs the library's own code until it needs noise, the network, a reward or a gradient, and waits there. Once all
wait, the calls of the earliest phase are run as one. No lane knows of the others, and no row's result depends on them
(`mfm_ray.padding`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

MAX_LANES = 64
"""Lanes that run at once; each has a thread of its own."""
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
    answered: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None

    def answer(self) -> Any:
        self.answered.wait()
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
        self._changed = threading.Condition()
        self._waiting: list[Call] = []
        self._live = 0
        self._alone = False

    def run(self, lanes: Sequence[Callable[[], Result]]) -> list[Result | Exception]:
        """What each lane returned or raised, at most `MAX_LANES` of them."""
        assert len(lanes) <= MAX_LANES
        self._alone = len(lanes) == 1
        if self._alone:
            return [_outcome(lanes[0])]
        self._live = len(lanes)
        futures = [self._pool.submit(self._lane, lane) for lane in lanes]
        while calls := self._next_calls():
            self._answer(calls)
        return [future.result() for future in futures]

    def call(self, phase: Phase, payload: Any) -> Any:
        """From a lane: the answer, once all lanes wait."""
        call = Call(phase, payload)
        if self._alone:
            self._answer([call])
        else:
            with self._changed:
                self._waiting.append(call)
                self._changed.notify_all()
        return call.answer()

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _lane(self, lane: Callable[[], Result]) -> Result | Exception:
        try:
            return _outcome(lane)
        finally:
            with self._changed:
                self._live -= 1
                self._changed.notify_all()

    def _next_calls(self) -> list[Call]:
        """Calls of the earliest phase once every lane waits; none when all lanes have ended."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) == self._live)
            first = min((call.phase for call in self._waiting), default=None)
            calls = [call for call in self._waiting if call.phase == first]
            self._waiting = [call for call in self._waiting if call.phase != first]
            return calls

    def _answer(self, calls: Sequence[Call]) -> None:
        try:
            self._handlers[calls[0].phase](calls)
        except BaseException as error:
            for call in calls:
                call.error = error
        for call in calls:
            call.answered.set()


def _outcome(lane: Callable[[], Result]) -> Result | Exception:
    """A lane's failure is its own: it is returned, for whoever waits for that lane."""
    try:
        return lane()
    except Exception as error:
        return error
