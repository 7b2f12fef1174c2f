"""Lines on stderr while it runs: what is done, and about how long the rest takes."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts `total` parts, which are taken to be about equally long."""

    def __init__(self, total: int) -> None:
        self.total, self._done, self._began = total, 0, time.monotonic()

    def done(self, name: str) -> None:
        self._done += 1
        elapsed = time.monotonic() - self._began
        left = elapsed / self._done * max(0, self.total - self._done)
        print(
            f"[{self._done}/{self.total}] {name}; {elapsed:.0f} s, about {left:.0f} s left", file=sys.stderr, flush=True
        )
