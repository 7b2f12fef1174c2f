"""What a device can do and what a process held on it: dense peaks in FLOP/s, memory."""

from __future__ import annotations

import re
import resource

import torch

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
