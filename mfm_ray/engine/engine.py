"""The engine: steps all images in flight, lets finished jobs out and waiting ones in at every step."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_ray.dynamics import DYNAMICS
from mfm_ray.engine.job import Finished, ImageInFlight, Job, JobInFlight, joined_particles, particles_of
from mfm_ray.engine.merging import MergedNoise, Merger
from mfm_ray.engine.rendezvous import MAX_LANES
from mfm_ray.engine.schedule import Schedule
from mfm_ray.engine.snapshot import Snapshot
from mfm_ray.flow_map import FlowMap, require_at_least_one
from mfm_ray.noise import KeyedNoise
from mfm_ray.padding import PaddedFlowMap
from mfm_ray.samplers import finished_samples
from mfm_ray.steering import CallCounter, SteeringContext, Step

Unit = tuple[JobInFlight, ImageInFlight]
_LOG = logging.getLogger(__name__)


class EngineClosedError(RuntimeError):
    """The engine was closed, or died, before the job was finished."""


@dataclass(frozen=True)
class Pass:
    """One step of one wave, for whoever watches: images and network rows in it, seconds, and calls by kind.

    effective_share: mean effective sample size over draws, None where no method has draws.
    """

    images: int
    rows: int
    seconds: float
    calls: CallCounter
    effective_share: float | None


@dataclass
class Ticket:
    """What the asker of a job holds. future: `Finished`, or why not."""

    running: JobInFlight
    engine: Engine
    on_step: Callable[[int, int], None] | None = None
    future: Future[Finished] = field(default_factory=Future)

    def cancel(self) -> None:
        """At the next step boundary; the future is then cancelled."""
        self.running.cancelled = True
        self.engine.wake()

    def preview(self) -> Tensor:
        """One posterior draw from where each image stands, (num_images, *event) in data units: sharp, not a blur."""
        return self.engine.preview(self.running)

    def snapshot(self) -> Snapshot:
        """Of the last step boundary of each image."""
        return self.engine.snapshot(self.running)


class Engine:
    """Steers many jobs at once with few, large network calls.

    Every pass takes images of all jobs, each at its own time, and asks for all they need together: one drift call, one
    call for all posterior draws, one call of each reward, one backward pass. Steering methods are the library's own.
    Each image is equal, to the bit on a CPU in float32, to what `mfm_ray.sample` makes of the same seed and settings.

    Args:
        flow_map: in eval mode; never trained here.
        max_rows: of one network call, at least 1; an image that needs more goes alone.
        waves: passes in flight, each with its share of the images, so that one has the network while another waits for
            rewards elsewhere. 1 where rewards are computed in this process.
        watch: called after every pass, in the engine's thread.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        max_rows: int = 1024,
        waves: int = 2,
        watch: Callable[[Pass], None] | None = None,
    ) -> None:
        require_at_least_one(max_rows=max_rows, waves=waves)
        self.flow_map, self.max_rows, self.waves = flow_map.requires_grad_(False).eval(), max_rows, waves
        self.failure: BaseException | None = None
        self._watch = watch
        self._network, self._changed = threading.Lock(), threading.Condition()
        self._schedule, self._tickets = Schedule(), dict[int, Ticket]()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._finishers = ThreadPoolExecutor(waves, thread_name_prefix="finish")

    def start(self) -> Engine:
        self._threads = [
            threading.Thread(target=self._run, name=f"wave-{wave}", daemon=True) for wave in range(self.waves)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        """Ends after the passes in flight; what is not finished then gets an `EngineClosedError`."""
        self._closed = True
        self.wake()
        for thread in self._threads:
            thread.join()
        self._finishers.shutdown(wait=True)
        self._abandon(EngineClosedError("the engine was closed"))

    @property
    def healthy(self) -> bool:
        """Whether jobs still get on."""
        return self.failure is None and not self._closed and all(thread.is_alive() for thread in self._threads)

    def submit(
        self, job: Job, *, snapshot: Snapshot | None = None, on_step: Callable[[int, int], None] | None = None
    ) -> Ticket:
        """The job's ticket, at once. on_step: called with (steps that all images have done, num_steps), by the engine.

        Raises EngineClosedError, and InputError for a snapshot that is not the job's.
        """
        running = JobInFlight(job, self.flow_map.event_shape, _device(self.flow_map))
        if snapshot is not None:
            snapshot.restore(running)
        ticket = Ticket(running, self, on_step)
        with self._changed:
            if self.failure is not None or self._closed:
                raise EngineClosedError(f"the engine is not running: {self.failure or 'it was closed'}")
            self._schedule.add(running)
            self._tickets[id(running)] = ticket
            done = running.finished
            self._changed.notify_all()
        if done:
            self._finish(running)
        return ticket

    def load(self) -> dict[str, int]:
        """Rows of a step, and jobs, that run and that wait for their first step."""
        with self._changed:
            return {
                "rows_running": self._schedule.rows(begun=True),
                "rows_waiting": self._schedule.rows(begun=False),
                "jobs_running": self._schedule.count(begun=True),
                "jobs_waiting": self._schedule.count(begun=False),
            }

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def snapshot(self, running: JobInFlight) -> Snapshot:
        with self._changed:
            return Snapshot.of(running)

    @torch.no_grad()
    def preview(self, running: JobInFlight) -> Tensor:
        with self._changed:
            x = torch.stack([image.particles.x[0, 0] for image in running.images])
            steps = [min(image.step, running.job.num_steps - 1) for image in running.images]
            finished = running.finished
        space = self.flow_map.space
        if not finished:
            steps_taken = torch.tensor(steps, device=x.device)
            draws = PaddedFlowMap(self.flow_map)
            with self._network:
                x = draws.posterior_draws(
                    x,
                    torch.tensor([running.times[step] for step in steps], device=x.device),
                    num_draws=1,
                    generator=KeyedNoise(running.keys.keys[:, 0]).fold_in(steps_taken),
                    label=_labels(running.job, len(steps), x.device),
                    cfg_scale=running.job.cfg_scale,
                ).squeeze(1)
        return space.clamp(space.to_data_units(x))

    def _run(self) -> None:
        """A wave: passes until the engine is closed. What is not a reward's or a request's failure ends the engine."""
        merger = Merger(self.flow_map, self._network)
        try:
            while (units := self._take()) is not None:
                began = time.perf_counter()
                calls, shares = self._advance(merger, units)
                self._give_back(units)
                if self._watch is not None:
                    rows = sum(job.job.rows for job, _ in units)
                    share = sum(shares) / len(shares) if shares else None
                    self._watch(Pass(len(units), rows, time.perf_counter() - began, calls, share))
        except BaseException as error:
            self.failure = error
            _LOG.exception("the engine died")
            self._abandon(EngineClosedError(f"the engine died: {error!r}"))
            self.wake()
        finally:
            merger.close()

    def _take(self) -> list[Unit] | None:
        """Images of the next pass; None once the engine is closed or dead."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._closed or self.failure is not None:
                    return None
                total = self._schedule.rows(begun=True) + self._schedule.rows(begun=False)
                units = self._schedule.take(min(self.max_rows, max(1, math.ceil(total / self.waves))))
                if units:
                    return units
                self._changed.wait()

    def _drop_cancelled(self) -> None:
        for job in list(self._schedule.jobs):
            if job.cancelled and not any(image.busy for image in job.images):
                ticket = self._tickets[id(job)]
                self._forget(job)
                ticket.future.cancel()

    def _forget(self, job: JobInFlight) -> None:
        self._schedule.remove(job)
        del self._tickets[id(job)]

    def _advance(self, merger: Merger, units: list[Unit]) -> tuple[CallCounter, list[float]]:
        """One step of all units, lane by lane; calls made, and effective shares of draws."""
        lanes: dict[object, list[Unit]] = {}
        for job, image in units:
            key = (job.lane_key(), image.particles.memory is None)
            lanes.setdefault(key, []).append((job, image))
        groups = list(lanes.values())
        calls, shares = CallCounter(), list[float]()
        for first in range(0, len(groups), MAX_LANES):
            some = groups[first : first + MAX_LANES]
            steps = merger.lanes.run([_Lane(merger, group) for group in some])
            for group, outcome in zip(some, steps, strict=True):
                if isinstance(outcome, Exception):
                    self._fail_all(group, outcome)
                    continue
                made, step = outcome
                _add(calls, made, 1, 1)
                shares += _share(step, group[0][0].job)
                self._store(group, made, step)
        return calls, shares

    def _store(self, units: list[Unit], made: CallCounter, step: Step) -> None:
        with self._changed:
            for place, (_, image) in enumerate(units):
                image.particles = particles_of(step.particles, place)
                image.step += 1
                for name, values in step.diagnostics.items():
                    image.trace.setdefault(name, []).append(values[place : place + 1])
            jobs = {id(job): job for job, _ in units}
            for key, job in jobs.items():
                _add(job.calls, made, sum(id(other) == key for other, _ in units), len(units))

    def _give_back(self, units: list[Unit]) -> None:
        """Images are free again; jobs tell where they are, and leave when they are done."""
        jobs = {id(job): job for job, _ in units}
        with self._changed:
            for _, image in units:
                image.busy = False
            self._changed.notify_all()
            tickets = [(job, self._tickets.get(key)) for key, job in jobs.items()]
        for job, ticket in tickets:
            if ticket is None:
                continue
            if ticket.on_step is not None:
                ticket.on_step(job.steps_done, job.job.num_steps)
            if job.finished and not any(image.busy for image in job.images):
                self._finish(job)

    def _finish(self, job: JobInFlight) -> None:
        """Out of the schedule; images are scored in a thread of their own, so that passes go on."""
        with self._changed:
            ticket = self._tickets.get(id(job))
            if ticket is None:
                return
            self._forget(job)
        self._finishers.submit(_settle, ticket.future, lambda: self._finished(job))

    def _finished(self, job: JobInFlight) -> Finished:
        calls = CallCounter(**vars(job.calls))
        method = job.job.steering
        samples = finished_samples(method, job.all_particles(), job.full_trace(), self.flow_map.space, job.noise, calls)
        images = job.job.num_images
        return Finished(
            images=samples.images,
            rewards=samples.rewards,
            nfe=calls.total() / images,
            calls={kind: count / images for kind, count in vars(calls).items()},
            trace=samples.trace,
        )

    def _fail_all(self, units: list[Unit], error: Exception) -> None:
        """A lane's failure is that of its jobs."""
        with self._changed:
            jobs = {id(job): job for job, _ in units}
            tickets = [self._tickets.get(key) for key in jobs]
            for job, ticket in zip(jobs.values(), tickets, strict=True):
                if ticket is not None:
                    self._forget(job)
        for ticket in tickets:
            if ticket is not None:
                _settle(ticket.future, lambda: _raise(error))

    def _abandon(self, error: EngineClosedError) -> None:
        with self._changed:
            tickets = list(self._tickets.values())
            self._tickets.clear()
            self._schedule = Schedule()
        for ticket in tickets:
            _settle(ticket.future, lambda: _raise(error))


class _Lane:
    """One step of images that one method moves, each at its own time."""

    def __init__(self, merger: Merger, units: list[Unit]) -> None:
        self._merger, self._units = merger, units

    @torch.no_grad()
    def __call__(self) -> tuple[CallCounter, Step]:
        job, calls = self._units[0][0].job, CallCounter()
        particles = joined_particles([image.particles for _, image in self._units])
        device, count = particles.x.device, job.steering.num_particles
        now, then = (
            torch.tensor([run.times[image.step + later] for run, image in self._units], device=device)
            for later in (0, 1)
        )
        steps = torch.tensor([image.step for _, image in self._units], device=device)
        keys = torch.stack([run.keys.keys[image.index] for run, image in self._units])
        context = SteeringContext(
            self._merger.flow_map,
            MergedNoise(keys.flatten(), self._merger.lanes).fold_in(steps.repeat_interleave(count)),
            calls,
            self._labels(count, device),
            job.cfg_scale,
            DYNAMICS[job.dynamics](),
            differentiate=self._merger.differentiate,
        )
        method = self._merger.steering(job.steering)
        step = method.advance(particles, now.repeat_interleave(count), then.repeat_interleave(count), context)
        return calls, step

    def _labels(self, count: int, device: torch.device) -> Tensor | None:
        labels = [run.job.label for run, _ in self._units]
        if labels[0] is None:
            return None
        return torch.tensor(labels, dtype=torch.int64, device=device).repeat_interleave(count)


def _labels(job: Job, count: int, device: torch.device) -> Tensor | None:
    return None if job.label is None else torch.full((count,), job.label, dtype=torch.int64, device=device)


def _share(step: Step, job: Job) -> list[float]:
    """Effective sample size over draws, a mean over images; nothing for methods without draws."""
    size, draws = step.diagnostics.get("effective_sample_size"), getattr(job.steering, "num_draws", None)
    return [float(size.mean()) / draws] if size is not None and isinstance(draws, int) else []


def _add(total: CallCounter, made: CallCounter, part: int, of: int) -> None:
    """part / of of a lane's calls: its images cost the same, or are all of one job."""
    for kind, count in vars(made).items():
        setattr(total, kind, getattr(total, kind) + count * part // of)


def _settle(future: Future[Finished], work: Callable[[], Finished]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)


def _raise(error: Exception) -> Finished:
    raise error


def _device(flow_map: FlowMap) -> torch.device:
    parameter = next(flow_map.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
