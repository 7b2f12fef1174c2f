"""Storage that is away for a while: what was to be written is tried again until it is back, or too long away."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pyarrow

from mfm_ray.errors import StorageError

Result = TypeVar("Result")

REFUSALS = (OSError, pyarrow.ArrowException)
"""What storages raise: full, gone, read-only, not answering. `StorageError` is one of them."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0


@dataclass(frozen=True)
class Patience:
    """How long is long. timeout_s: seconds for which a storage may refuse; say: takes a line for the driver's log;
    alive: called before each new try, so that waiting is not taken for a hang.
    """

    timeout_s: float
    say: Callable[[str], None]
    alive: Callable[[], None] = lambda: None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def insist(self, what: str, action: Callable[[], Result]) -> Result:
        """The result of `action`, tried again with growing pauses. StorageError when it is still refused in the end.

        what: names the action in the log: "the checkpoint of step 50".
        """
        began, pause = self.clock(), _FIRST_PAUSE_S
        refused = False
        while True:
            try:
                result = action()
            except REFUSALS as error:
                waited = self.clock() - began
                if waited >= self.timeout_s:
                    raise StorageError(f"{what}: {reason(error)}; given up after {waited:.0f} s") from error
                if not refused:
                    self.say(f"{what}: {reason(error)}; trying again for up to {self.timeout_s:g} s")
                refused = True
                self.alive()
                self.sleep(min(pause, max(0.0, self.timeout_s - waited)))
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            if refused:
                self.say(f"{what}: done after {self.clock() - began:.0f} s")
            return result


def reason(error: BaseException) -> str:
    """One line, which names the kind of error where its message does not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, StorageError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
