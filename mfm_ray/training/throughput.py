"""What a step costs and what the hardware makes of it: FLOP/s, by term, against the peak; memory."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mfm_ray.config import TrainConfig
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.flops import forward_flops
from mfm_ray.objectives import Term

# Dense peaks in TFLOP/s, (bf16 with float32 accumulation, fp32 without tensor cores), of the vendor's data sheets, by
# the name that CUDA gives the device. The first pattern that is found counts.
_PEAKS = (
    (r"\bA100\b", 312.0, 19.5),
    (r"\bH100 NVL\b", 835.0, 60.0),
    (r"\bH100 PCIe\b", 756.0, 51.0),
    (r"\bH100\b", 989.4, 66.9),
    (r"\bH200 NVL\b", 835.0, 60.0),
    (r"\bH200\b", 989.4, 66.9),
    (r"\bL4\b", 121.0, 30.3),
    (r"\bL40S\b", 362.0, 91.6),
    (r"\bRTX 4090$", 165.2, 82.6),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a GPU in FLOP/s for precision fp32 or bf16, None for one that the table does not have."""
    for pattern, bf16, fp32 in _PEAKS:
        if re.search(pattern, device_name):
            return (bf16 if precision == "bf16" else fp32) * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """As `peak_flops` for the GPU at hand; a CPU has no figure worth comparing with."""
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def memory_peak(device: torch.device) -> int:
    """Bytes: what tensors held at most on this GPU, or the largest resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Throughput:
    """Turns steps and seconds into rates.

    forward_flops: of one row of one velocity call. rows: of one step, all workers together. peak: FLOP/s of all
    workers' devices together, None where it is not known.
    """

    terms: tuple[Term, ...]
    forward_flops: float
    rows: int
    peak: float | None

    @classmethod
    def count(cls, flow_map: FlowMap, terms: Sequence[Term], config: TrainConfig, *, workers: int) -> Throughput:
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
