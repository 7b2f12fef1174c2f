"""One line for what ended a group of workers: the cause, not what its neighbours said about it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.exceptions import RayActorError

# what the survivors of a lost worker say; never the cause
_COLLATERAL = re.compile(r"Connection (reset|closed|refused)|Broken pipe|gloo|NCCL|aborted", re.IGNORECASE)
# why Ray says that an actor is dead, by a word of its message; the first that is found
_GONE = {
    "node has died": "its node is lost",
    "OUT_OF_MEMORY": "the process was killed because the node's memory ran out",
    "ray.kill": "the process was ended",
    "": "the process is gone: killed, or crashed without a word",
}


def root_cause(error: Exception) -> str:
    """One line for what went wrong first: the worker's own exception, else the worker that is gone."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return last_line(str(getattr(error, "controller_failure", error)))
    rank, line = next(iter(causes(failures).items()))
    return f"training worker {rank}: {line}"


def causes(failures: Mapping[int, BaseException]) -> dict[int, str]:
    """A line for each of the ranks that are to blame, among all that failed together.

    A worker's own exception comes before a process that is gone, and that before complaints about lost connections.
    """
    lines = {rank: _describe(failure) for rank, failure in sorted(failures.items())}
    gone = {rank: line for rank, line in lines.items() if _is_gone(failures[rank])}
    own = {rank: line for rank, line in lines.items() if rank not in gone and not _COLLATERAL.search(line)}
    return own or gone or lines


def last_line(text: str) -> str:
    """The exception's own line, which a traceback ends with."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "unknown error"


def _describe(failure: BaseException) -> str:
    return (
        next(reason for word, reason in _GONE.items() if word in str(failure))
        if _is_gone(failure)
        else (last_line(str(failure)))
    )


def _is_gone(failure: BaseException) -> bool:
    # Ray Train's controller wraps what its call of a dead worker raised
    return isinstance(getattr(failure, "health_check_failure", failure), RayActorError)
