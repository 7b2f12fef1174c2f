"""The errors that a job turns into exit codes: what the user can mend, and what the storage refused."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


class InputError(ValueError):
    """The user's input is wrong; one line names the file or field and what is allowed. A job exits 2."""


class StorageError(OSError):
    """The storage refused to read or write in the middle of the work (disk full, gone); a job exits 1.

    The message is one line that names the location and the reason.
    """


class UnusableStorageError(StorageError, InputError):
    """The storage named by the user cannot be written, found out before the work began; a job exits 2."""


def refuse_unknown_arguments(
    given: Iterable[str],
    constructor: Callable[..., Any],
    *,
    group: str,
    supplied: Iterable[str] = (),
    further: Iterable[str] = (),
) -> None:
    """InputError for the first name that a constructor does not take: `group.name`, what it takes, the nearest one.

    supplied: parameters that the caller fills in itself and no user gives. further: names that the caller reads.
    """
    known = [name for name in inspect.signature(constructor).parameters if name not in set(supplied)]
    known += further
    for name in sorted(set(given) - set(known)):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{group}.{name}: unknown key; expected {', '.join(known) or 'no further keys'}{hint}")


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """InputError `name=value: expected allowed` unless ok."""
    if not ok:
        raise InputError(f"{name}={value}: expected {allowed}")
