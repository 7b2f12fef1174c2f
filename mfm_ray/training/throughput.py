"""What a step costs and what the hardware makes of it: FLOP/s, by term and against the peak."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mfm_ray.config import TrainingConfig
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.flops import forward_flops
from mfm_ray.training.device_peaks import device_peak


class Cost(Protocol):
    """A part of a step with a cost of its own, in forward passes of the batch, such as a term of an objective."""

    @property
    def name(self) -> str: ...

    @property
    def forward_units(self) -> float: ...

    def active(self, step: int) -> bool: ...


@dataclass(frozen=True)
class Throughput:
    """Turns steps and seconds into rates.

    forward_flops: of one row of one velocity call. rows: of one step, all workers together. peak: FLOP/s of all
    workers' devices together, None where it is not known.
    """

    terms: tuple[Cost, ...]
    forward_flops: float
    rows: int
    peak: float | None

    @classmethod
    def count(cls, flow_map: FlowMap, terms: Sequence[Cost], config: TrainingConfig, *, workers: int) -> Throughput:
        """Counts the FLOPs of a network that is whole on its device; once sharded it could not be counted."""
        device = next(flow_map.parameters()).device
        peak = device_peak(device, config.precision)
        return cls(
            terms=tuple(terms),
            forward_flops=forward_flops(flow_map),
            rows=config.global_batch_size,
            peak=None if peak is None else peak * workers,
        )

    def flops(self, steps: Iterable[int]) -> dict[str, float]:
        """FLOPs of those steps by term; a term costs nothing while it is not active."""
        counts = {term.name: 0 for term in self.terms}
        for step in steps:
            for term in self.terms:
                counts[term.name] += term.active(step)
        each = self.forward_flops * self.rows
        return {term.name: counts[term.name] * term.forward_units * each for term in self.terms}

    def rates(self, steps: range, seconds: float) -> dict[str, float]:
        """Metrics of `steps` steps that took `seconds`: steps, images and FLOPs in a second, and MFU."""
        by_term = {f"flops_per_second.{name}": flops / seconds for name, flops in self.flops(steps).items()}
        total = sum(by_term.values())
        return {
            "steps_per_second": len(steps) / seconds,
            "images_per_second": len(steps) * self.rows / seconds,
            "flops_per_second": total,
            **by_term,
            **mfu(total, self.peak),
        }


def mfu(flops_per_second: float, peak: float | None) -> Mapping[str, float]:
    """Model FLOPs utilisation under its metric name; nothing where the peak is not known."""
    return {} if peak is None else {"mfu": flops_per_second / peak}
