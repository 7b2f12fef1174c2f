"""Dynamic batching: what several callers ask at the same time of the same reward is one evaluation."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Evaluate = Callable[[Any, np.ndarray, Sequence[Any]], tuple[np.ndarray, ...]]
"""Arrays (N, ...) of N rows under a key, each row with its caller's own label; rows must not depend on each other."""


@dataclass(eq=False)
class _Item:
    """Compared by identity: `key` and `rows` of two callers may be equal. due: whose is least is taken first."""

    key: Hashable
    rows: np.ndarray
    label: Any
    background: bool
    due: float
    future: Future[tuple[np.ndarray, ...]] = field(default_factory=Future)


class Backlog:
    """Rows and calls that wait or are computed: now, and their mean over the time since the mean was last asked for.

    A mean and not a look: calls of milliseconds would mostly be missed, and a busy reward be taken for an idle one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self.rows = self.calls = 0
        self._row_seconds = self._call_seconds = 0.0
        self._since = self._last = clock()

    def begin(self, rows: int) -> None:
        self._change(rows, 1)

    def end(self, rows: int) -> None:
        self._change(-rows, -1)

    def means(self) -> tuple[float, float]:
        """Rows and calls."""
        with self._lock:
            self._advance()
            seconds = self._last - self._since
            if seconds <= 0:
                return float(self.rows), float(self.calls)
            means = self._row_seconds / seconds, self._call_seconds / seconds
            self._row_seconds = self._call_seconds = 0.0
            self._since = self._last
            return means

    def _change(self, rows: int, calls: int) -> None:
        with self._lock:
            self._advance()
            self.rows += rows
            self.calls += calls

    def _advance(self) -> None:
        now = self._clock()
        self._row_seconds += self.rows * (now - self._last)
        self._call_seconds += self.calls * (now - self._last)
        self._last = now


class Batcher:
    """One thread that evaluates what has piled up since the last time, all rows of equal keys together.

    The key is what must be equal for that; what may differ from caller to caller, such as a prompt, is the label.

    Nothing waits for a batch to fill: while one is computed, the next one gathers.

    Items in the background let pass what comes within `patience_s` after them, and nothing that comes later: each waits
    for those alone, however many follow. They share no evaluation with others, which would take longer for it.

    max_rows: of one evaluation; a single item with more goes alone.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        *,
        max_rows: int,
        name: str,
        patience_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._evaluate, self._max_rows, self._patience_s, self._clock = evaluate, max_rows, patience_s, clock
        self._items: deque[_Item] = deque()
        self.backlog = Backlog()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"batcher-{name}", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting_rows(self) -> int:
        with self._changed:
            return sum(len(item.rows) for item in self._items)

    def submit(
        self, key: Hashable, rows: np.ndarray, *, label: Any = None, background: bool = False
    ) -> Future[tuple[np.ndarray, ...]]:
        """The future of evaluate(key, rows, labels), or of the error that these rows cause."""
        item = _Item(key, rows, label, background, self._clock() + (self._patience_s if background else 0.0))
        self.backlog.begin(len(rows))
        item.future.add_done_callback(lambda _: self.backlog.end(len(rows)))
        with self._changed:
            self._items.append(item)
            self._changed.notify()
        return item.future

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while batch := self._take():
            alive = [item for item in batch if item.future.set_running_or_notify_cancel()]
            if alive:
                self._answer(alive)

    def _take(self) -> list[_Item]:
        """The item that is due first and all that can go with it; nothing once closed."""
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
            if not self._items:
                return []
            first = min(self._items, key=lambda item: item.due)
            self._items.remove(first)
            batch, rows = [first], len(first.rows)
            alike = [other for other in self._items if (other.key, other.background) == (first.key, first.background)]
            for item in alike:
                if rows + len(item.rows) > self._max_rows:
                    break
                self._items.remove(item)
                batch.append(item)
                rows += len(item.rows)
            return batch

    def _answer(self, batch: Sequence[_Item]) -> None:
        try:
            labels = [item.label for item in batch for _ in item.rows]
            results = self._evaluate(batch[0].key, np.concatenate([item.rows for item in batch]), labels)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for item in batch:  # one caller's samples are not another's error
                self._answer([item])
            return
        edges = np.cumsum([len(item.rows) for item in batch])[:-1]
        parts = [np.split(result, edges) for result in results]
        for index, item in enumerate(batch):
            item.future.set_result(tuple(part[index] for part in parts))
