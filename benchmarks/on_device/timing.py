"""Seconds and bytes on one device: repeats in turns, the batch that fits, the peak of a call."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
"""One unit of work, ready to run: it neither takes nor gives anything that matters."""

_WARM_UP_CALLS = 2  # the first call makes the optimiser's state, compiles, chooses kernels; the second finds all that


@dataclass(frozen=True)
class Spread:
    """Repeats of one figure: their median, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def inverse(self, amount: float) -> Spread:
        """amount / figure: from seconds a call to `amount` things a second."""
        return Spread(amount / self.median, amount / self.high, amount / self.low)


@dataclass(frozen=True)
class Clock:
    """Times calls on a device: `repeats` repeats of a figure that together take about `seconds`."""

    device: torch.device
    repeats: int
    seconds: float

    def alternate(self, calls: Sequence[Call]) -> list[list[float]]:
        """Seconds of one call, `repeats` figures for each of `calls`, taken in turns so that drift hits all alike.

        A repeat is as many calls as fill its share of the seconds, at least one.
        """
        counts = [self._calls_a_repeat(call) for call in calls]
        taken: list[list[float]] = [[] for _ in calls]
        for _ in range(self.repeats):
            for call, count, seconds in zip(calls, counts, taken, strict=True):
                seconds.append(self._seconds(call, count) / count)
        return taken

    def spread(self, call: Call) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.alternate([call])[0])

    def _calls_a_repeat(self, call: Call) -> int:
        for _ in range(_WARM_UP_CALLS):
            call()
        return max(1, round(self.seconds / self.repeats / max(self._seconds(call, 1), 1e-9)))

    def _seconds(self, call: Call, count: int) -> float:
        if self.device.type == "cuda":
            return self._seconds_by_events(call, count)
        began = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - began

    def _seconds_by_events(self, call: Call, count: int) -> float:
        """Between two marks in the device's own queue: what the host does after the last launch is not in it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Quotient of two figures that were taken in turns, repeat by repeat."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes at the peak of a call: what torch has allocated on the device; on a CPU the process's largest so far."""
    if device.type != "cuda":
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


@dataclass(frozen=True)
class Fitted:
    """A call at the batch that fits, and the smallest batch that did not (None where the first one did)."""

    call: Call
    batch: int
    refused: int | None


def fit_batch(make: Callable[[int], Call], batch: int, device: torch.device) -> Fitted:
    """The call that `make` gives for the largest of batch, batch / 2, ... 1 that the memory holds.

    Raises torch.OutOfMemoryError when it does not hold one.
    """
    refused = None
    while batch >= 1:
        if (call := _try(make, batch)) is not None:
            return Fitted(call, batch, refused)
        release_memory(device)  # out of the except clause, whose traceback holds every tensor of the failed call
        refused, batch = batch, batch // 2
    raise torch.OutOfMemoryError("out of memory at batch 1")


def _try(make: Callable[[int], Call], batch: int) -> Call | None:
    try:
        call = make(batch)
        for _ in range(_WARM_UP_CALLS):  # the first one also makes what stays, such as the optimiser's state
            call()
    except torch.OutOfMemoryError:
        return None
    return call


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
