"""What is asked of the engine, what comes back, and the images in flight between."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_ray.dynamics import DYNAMICS, Grid, TimeGrid
from mfm_ray.errors import require
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.noise import KeyedNoise
from mfm_ray.samplers import starting_particles
from mfm_ray.steering import AutoDraws, CallCounter, Particles, Steering
from mfm_ray.steering.draws import most_draws


@dataclass(frozen=True)
class Job:
    """`num_images` images, 0 .. num_images - 1 of `seed`, sampled by one method: what `mfm_ray.sample` would return.

    key: who asks; work is shared evenly between keys. grid: outer times. Raises ValueError naming the argument.
    """

    steering: Steering
    num_images: int
    num_steps: int
    dynamics: str
    seed: int
    label: int | None = None
    cfg_scale: float | None = None
    key: str = ""
    grid: Grid = field(default_factory=TimeGrid)

    def __post_init__(self) -> None:
        require_at_least_one(num_images=self.num_images, num_steps=self.num_steps)
        require(self.dynamics in DYNAMICS, "dynamics", repr(self.dynamics), f"one of {', '.join(DYNAMICS)}")

    @functools.cached_property
    def rows(self) -> int:
        """The most network rows of one image in one call."""
        return self.steering.num_particles * most_draws(getattr(self.steering, "num_draws", 1))


@dataclass(frozen=True)
class Finished:
    """As `mfm_ray.samplers.Samples`: images (n, *event) in data units, rewards (n,) or None, calls an image by kind."""

    images: Tensor
    rewards: Tensor | None
    nfe: float
    calls: dict[str, float]
    trace: dict[str, Tensor]


@dataclass
class ImageInFlight:
    """One image of a job: its particles (1, P, *event) before step `step`, and its diagnostics so far."""

    index: int
    step: int
    particles: Particles
    trace: dict[str, list[Tensor]] = field(default_factory=dict)
    busy: bool = False


class JobInFlight:
    """A job, where its images stand, and what they have cost so far."""

    def __init__(self, job: Job, event_shape: tuple[int, ...], device: torch.device) -> None:
        self.job = job
        self.times = job.grid.times(job.num_steps)
        self.noise = KeyedNoise.for_images(job.seed, job.num_images, device=device)
        self.keys = self.noise.spread(job.steering.num_particles)
        start = starting_particles(self.keys, event_shape)
        self.images = [ImageInFlight(i, 0, own) for i, own in enumerate(single_particles(start))]
        self.calls = CallCounter()
        self.waits_on = waits_on(job.steering.scored_by)
        self.served = 0.0
        self.begun = self.cancelled = False

    @property
    def steps_done(self) -> int:
        """Steps that all images have behind them."""
        return min(image.step for image in self.images)

    @property
    def finished(self) -> bool:
        return self.steps_done == self.job.num_steps

    def ready(self) -> list[ImageInFlight]:
        """Images that wait for their next step, those that are behind first; none of a cancelled job."""
        if self.cancelled:
            return []
        waiting = [image for image in self.images if not image.busy and image.step < self.job.num_steps]
        return sorted(waiting, key=lambda image: image.step)

    @functools.cached_property
    def lane_key(self) -> Hashable:
        """Images of equal keys are moved by one method together.

        A method that decides its draws as it goes has a lane of its own, so that its calls are known to be its job's.
        """
        job, method = self.job, self.job.steering
        own = id(self) if isinstance(getattr(method, "num_draws", 1), str | AutoDraws) else None
        values = tuple(_identity(getattr(method, part.name)) for part in _fields(method))
        return (type(method), values, job.dynamics, job.cfg_scale, job.label is None, own)

    def all_particles(self) -> Particles:
        return joined_particles([image.particles for image in self.images])

    def full_trace(self) -> dict[str, Tensor]:
        """Diagnostics (num_steps, num_images) by name."""
        names = self.images[0].trace
        return {name: torch.stack([torch.cat(image.trace[name]) for image in self.images], dim=1) for name in names}


def waits_on(reward: object) -> frozenset[str]:
    """What a reward waits for outside of this process, by name: its attribute `waits_on`, nothing where it has none."""
    return frozenset(getattr(reward, "waits_on", ()))


def single_particles(particles: Particles) -> list[Particles]:
    """Those of each image, (1, P, *event): the inverse of `joined_particles`."""
    count = len(particles.x)
    memories = [None] * count if particles.memory is None else particles.memory.split(1)
    # one call for all images: slices, image by image, were a twentieth of a step of 64 images
    parts = zip(particles.x.split(1), particles.log_weights.split(1), memories, strict=True)
    return [Particles(x, log_weights, memory) for x, log_weights, memory in parts]


def joined_particles(parts: list[Particles]) -> Particles:
    """Images side by side, (I, P, *event). memory: what methods carry an image, (I, ...), or None for all."""
    memories = [part.memory for part in parts]
    memory = None if memories[0] is None else torch.cat(memories)
    return Particles(torch.cat([p.x for p in parts]), torch.cat([p.log_weights for p in parts]), memory)


def _fields(method: Steering) -> tuple[dataclasses.Field[object], ...]:
    return dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()


def _identity(value: object) -> Hashable:
    """Settings by value, rewards by identity."""
    return value if isinstance(value, int | float | str | AutoDraws | None) else id(value)
