"""A job at a step boundary: small, and enough to go on elsewhere to the same images."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mfm_ray.engine.job import JobInFlight
from mfm_ray.errors import InputError
from mfm_ray.steering import CallCounter, Particles

_X, _WEIGHTS, _MEMORY, _TRACE = "x", "log_weights", "memory", "trace"


@dataclass(frozen=True)
class Snapshot:
    """steps: done by each image; calls: made so far, by kind; tensors: states and diagnostics, `<what>.<image>`."""

    steps: list[int]
    calls: dict[str, int]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, running: JobInFlight) -> Snapshot:
        """Where the job stands. Nothing is copied: states are never written to."""
        tensors: dict[str, Tensor] = {}
        for image in running.images:
            tensors[f"{_X}.{image.index}"] = image.particles.x
            tensors[f"{_WEIGHTS}.{image.index}"] = image.particles.log_weights
            if image.particles.memory is not None:
                tensors[f"{_MEMORY}.{image.index}"] = image.particles.memory
            for name, values in image.trace.items():
                tensors[f"{_TRACE}.{name}.{image.index}"] = torch.cat(values)
        return cls([image.step for image in running.images], dict(vars(running.calls)), tensors)

    def restore(self, running: JobInFlight) -> None:
        """The job as it was. InputError for a snapshot of another job."""
        if len(self.steps) != len(running.images) or max(self.steps) > running.job.num_steps:
            raise InputError(
                f"snapshot: of {len(self.steps)} images at step {max(self.steps)}, the job has "
                f"{len(running.images)} images and {running.job.num_steps} steps"
            )
        running.calls = CallCounter(**self.calls)
        for image, step in zip(running.images, self.steps, strict=True):
            x = self._of(_X, image.index)
            if x.shape != image.particles.x.shape:
                raise InputError(
                    f"snapshot: a state of shape {list(x.shape)}, expected {list(image.particles.x.shape)}"
                )
            device = image.particles.x.device
            memory = self.tensors.get(f"{_MEMORY}.{image.index}")
            image.step = step
            image.particles = Particles(
                x.to(device),
                self._of(_WEIGHTS, image.index).to(device),
                None if memory is None else memory.to(device),
            )
            image.trace = self._trace(image.index, device)

    def to_bytes(self) -> bytes:
        header = json.dumps({"steps": self.steps, "calls": self.calls})
        return save({name: value.cpu().contiguous() for name, value in self.tensors.items()}, {"snapshot": header})

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """InputError for what is no snapshot."""
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["snapshot"])
            return cls(header["steps"], header["calls"], load(data))
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"snapshot: damaged or of another kind ({error})") from error

    def _of(self, what: str, image: int) -> Tensor:
        try:
            return self.tensors[f"{what}.{image}"]
        except KeyError:
            raise InputError(f"snapshot: has no {what} of image {image}") from None

    def _trace(self, image: int, device: torch.device) -> dict[str, list[Tensor]]:
        trace: dict[str, list[Tensor]] = {}
        for key, values in self.tensors.items():
            kind, _, rest = key.partition(".")
            name, _, index = rest.rpartition(".")
            if kind == _TRACE and int(index) == image:
                trace[name] = list(values.to(device).split(1))
        return trace
