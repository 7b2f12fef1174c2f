"""SIGTERM and SIGINT end a job within seconds and on the record, whatever its main thread is doing."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

# Ray's job supervisor kills 3 s after SIGTERM; what has not ended by itself before that is cut short.
GRACE_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Raised in the main thread by the first SIGTERM or SIGINT; not an Exception, so that no one swallows it."""


class StopSignals:
    """While open: the first signal raises `Stopped` in the main thread, and a second thread keeps the promise.

    Python runs handlers only between two bytecodes of the main thread, and Ray installs handlers of its own. The
    interpreter's wake-up pipe hears of every signal at once, whichever handler there is: its reader calls
    `on_stop` immediately and, when the block has not been left after `GRACE_S`, `on_deadline`, then ends the process.
    """

    def __init__(self, *, on_stop: Callable[[], None], on_deadline: Callable[[], object]) -> None:
        self.received = False
        self._raised = False
        self._on_stop = on_stop
        self._on_deadline = on_deadline
        self._left = threading.Event()

    def __enter__(self) -> "StopSignals":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous = {number: signal.signal(number, self._raise) for number in SIGNALS}
        self._previous_pipe = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._previous_pipe)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._write_end)

    def shield(self) -> None:
        """From here on no signal raises: the result is being written. The deadline holds all the same."""
        self._raised = True

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self._raised:
            self._raised = True
            raise Stopped(signal.Signals(number).name)

    def _watch(self) -> None:
        while heard := os.read(self._read_end, 1):
            if heard[0] in SIGNALS:
                self.received = True
                self._on_stop()
                if not self._left.wait(GRACE_S):
                    self._on_deadline()
                    end_now(1)
                return


def end_now(code: int) -> NoReturn:
    """Ends this process and all below it (a local Ray takes longer than there is to say good-bye)."""
    for process in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _descendants(ancestor: int) -> list[int]:
    """Ids of all processes below one, from /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # pid (name) state ppid ...; the name may hold anything, so read from its closing bracket
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(ancestor, []))
    for process in found:
        found.extend(children.get(process, []))
    return found
