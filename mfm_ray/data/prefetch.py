"""Work of the next steps done by a thread while this step computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """What `make(step)` returns for one step after another, made by a thread while earlier ones are in use.

    At most `ahead` items are made before they are taken, and none for `end` or later. A function of the step alone
    gives the same items as when it is called directly. An exception of `make` is raised by the `take` that asks for its
    step, with the traceback of the thread.
    """

    def __init__(self, make: Callable[[int], Item], *, end: int, ahead: int = 2) -> None:
        assert ahead >= 1
        self._make, self._end, self._ahead = make, end, ahead
        self._run: _Run[Item] | None = None

    def take(self, step: int) -> Item:
        """The item of `step`; waits until it is made. Any step may be asked for, the one after the last is ready."""
        if self._run is None or self._run.next_step != step or step >= self._run.end:
            self.close()
            self._run = _Run(self._make, step, max(self._end, step + 1), self._ahead)
        try:
            return self._run.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the thread, after the item that it is making. The next `take` starts another."""
        if self._run is not None:
            self._run.close()
            self._run = None


class _Run(Generic[Item]):
    """One thread and the items of consecutive steps that it has made."""

    def __init__(self, make: Callable[[int], Item], first: int, end: int, ahead: int) -> None:
        self.next_step, self.end = first, end
        self._make, self._ahead = make, ahead
        self._items: deque[Item] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, args=(first,), name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> Item:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._error is not None)
            if not self._items:
                assert self._error is not None
                raise self._error
            self.next_step += 1
            self._changed.notify()
            return self._items.popleft()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self, first: int) -> None:
        for step in range(first, self.end):
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._items) < self._ahead)
                if self._closed:
                    return
            try:
                item = self._make(step)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify()
                return
            with self._changed:
                self._items.append(item)
                self._changed.notify()
