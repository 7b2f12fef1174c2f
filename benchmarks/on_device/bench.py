"""Where and how everything is measured, and the columns that tables share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.on_device.progress import Progress
from benchmarks.on_device.report import Column, Row, Section, gibibytes, milliseconds, percent
from benchmarks.on_device.timing import Call, Clock, Fitted, Spread, fit_batch, release_memory
from benchmarks.on_device.workloads import Size, Training

BATCH = Column("batch", "batch", str)
SECONDS = Column("seconds", "ms a call (lowest to highest)", milliseconds)
MFU = Column("mfu", "MFU", percent)
MEMORY = Column("peak_memory", "peak memory, GiB", gibibytes)
OUTCOME = Column("outcome", "remark", str)


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured.

    batch: where the search for a batch that fits starts. peak_flops: dense bf16 operations a second of the device,
    None where it is not known. backend: of torch.compile, None to leave it out.
    """

    size: Size
    device: torch.device
    clock: Clock
    batch: int
    optimizer: str
    peak_flops: float | None
    backend: str | None
    progress: Progress

    def fit(self, make: Callable[[int], Call], batch: int) -> Fitted:
        return fit_batch(make, max(1, batch), self.device)

    def training(self) -> Training:
        return Training(self.size, self.device, optimizer=self.optimizer)

    def mfu(self, flops_a_call: float, seconds: Spread) -> float | None:
        """Share of the device's peak that the operations of a call take."""
        return None if self.peak_flops is None else flops_a_call / seconds.median / self.peak_flops

    def row(self, section: Section, identity: Row, measure: Callable[[], Row]) -> None:
        """Add what `measure` finds to the section; what does not fit is a row that says so."""
        try:
            figures = measure()
        except torch.OutOfMemoryError:
            figures = {"outcome": "out of memory"}
        release_memory(self.device)
        section.rows.append({**identity, **figures})
        self.progress.done(f"{section.name}: {', '.join(str(value) for value in identity.values())}")


def remark(fitted: Fitted, times: int = 1) -> str | None:
    """What there is to say about the search for a batch; `times` things a unit of it."""
    return None if fitted.refused is None else f"{times * fitted.refused} did not fit"
