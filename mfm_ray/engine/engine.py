"""The engine: steps all images in flight, lets finished jobs out and waiting ones in at every step."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_ray.dynamics import DYNAMICS
from mfm_ray.engine.job import Finished, ImageInFlight, Job, JobInFlight, joined_particles, single_particles
from mfm_ray.engine.merging import MergedNoise, Merger, StillWaitingError
from mfm_ray.engine.rendezvous import MAX_LANES
from mfm_ray.engine.schedule import Schedule
from mfm_ray.engine.snapshot import Snapshot
from mfm_ray.engine.waves import Waves
from mfm_ray.flow_map import FlowMap, require_at_least_one
from mfm_ray.noise import KeyedNoise
from mfm_ray.padding import PaddedFlowMap
from mfm_ray.samplers import finished_samples
from mfm_ray.steering import CallCounter, SteeringContext, Step

Unit = tuple[JobInFlight, ImageInFlight]
_FINISHERS = 1024
"""Threads that score finished images, made as they are needed: a reward that hangs must not hold back the others."""
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
            rewards elsewhere. None: one, and a second one while rewards outside of this process take long enough for
            that to pay.
        patience_s: so long a pass waits for rewards outside of this process. A step that needs a slower one is made
            again apart from the others, by a thread of that reward, until it answers in half the time.
        watch: called after every pass, in the engine's thread.

    A reward tells by `waits_on`, names of what it waits for, that it is outside of this process.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        max_rows: int = 1024,
        waves: int | None = None,
        patience_s: float = 0.5,
        watch: Callable[[Pass], None] | None = None,
    ) -> None:
        require_at_least_one(max_rows=max_rows, waves=waves or 1)
        self.flow_map, self.max_rows, self.patience_s = flow_map.requires_grad_(False).eval(), max_rows, patience_s
        self._waves = Waves(waves)
        self.failure: BaseException | None = None
        self._watch = watch
        self._network, self._changed = threading.Lock(), threading.Condition()
        self._schedule, self._tickets = Schedule(), dict[int, Ticket]()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._apart: dict[frozenset[str], threading.Thread] = {}  # by what their jobs wait on
        self._finishers = ThreadPoolExecutor(_FINISHERS, thread_name_prefix="finish")

    def start(self) -> Engine:
        self._threads = [
            threading.Thread(target=self._run, args=(wave,), name=f"wave-{wave}", daemon=True)
            for wave in range(self._waves.most)
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
        with self._changed:
            apart = list(self._apart.values())
        for thread in apart:
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

    def _run(self, wave: int) -> None:
        """A wave: passes until the engine is closed."""
        with self._merger(self.patience_s) as merger:
            while (units := self._take(wave)) is not None:
                network_s, rewards_s = merger.network_s, merger.rewards_s
                self._pass(merger, units)
                self._waves.took(merger.network_s - network_s, merger.rewards_s - rewards_s)

    def _run_apart(self, rewards: frozenset[str]) -> None:
        """Passes of the jobs that wait on slow rewards, until these are slow no more."""
        with self._merger(None) as merger:
            while (units := self._take_apart(rewards)) is not None:
                rewards_s = merger.rewards_s
                answered = self._pass(merger, units)
                if answered and merger.rewards_s - rewards_s < self.patience_s / 2:
                    with self._changed:
                        del self._apart[rewards]
                        self._changed.notify_all()
                    return

    @contextmanager
    def _merger(self, patience_s: float | None) -> Iterator[Merger]:
        """For one thread's passes. What is not a reward's or a request's failure ends the engine."""
        merger = Merger(self.flow_map, self._network, patience_s=patience_s)
        try:
            yield merger
        except BaseException as error:
            self.failure = error
            _LOG.exception("the engine died")
            self._abandon(EngineClosedError(f"the engine died: {error!r}"))
            self.wake()
        finally:
            merger.close()

    def _pass(self, merger: Merger, units: list[Unit]) -> bool:
        """One step of all units, unless a reward is still waited for or failed; whether none was or did."""
        began = time.perf_counter()
        calls, shares, answered = self._advance(merger, units)
        self._give_back(units)
        if self._watch is not None:
            rows = sum(job.job.rows for job, _ in units)
            share = sum(shares) / len(shares) if shares else None
            self._watch(Pass(len(units), rows, time.perf_counter() - began, calls, share))
        return answered

    def _take(self, wave: int) -> list[Unit] | None:
        """Images of a wave's next pass; None once the engine is closed or dead."""
        with self._changed:
            while self._goes_on():
                waves = self._waves.now
                units = self._schedule.take(self._share_of(waves), self._is_quick) if wave < waves else []
                if units:
                    return units
                self._changed.wait()
            return None

    def _share_of(self, waves: int) -> int:
        """Rows of one of so many waves."""
        if waves == 1:
            return self.max_rows
        total = self._schedule.rows(begun=True) + self._schedule.rows(begun=False)
        return min(self.max_rows, max(1, math.ceil(total / waves)))

    def _take_apart(self, rewards: frozenset[str]) -> list[Unit] | None:
        """The same for jobs that wait on slow rewards."""
        with self._changed:
            while self._goes_on():
                units = self._schedule.take(self.max_rows, lambda job: rewards <= job.waits_on)
                if units:
                    return units
                self._changed.wait()
            return None

    def _goes_on(self) -> bool:
        self._drop_cancelled()
        return not self._closed and self.failure is None

    def _is_quick(self, job: JobInFlight) -> bool:
        return not any(slow <= job.waits_on for slow in self._apart)

    def _set_apart(self, rewards: frozenset[str]) -> None:
        """Jobs that wait on all of these leave the waves. Which one of them is slow is not known."""
        with self._changed:
            if rewards in self._apart:
                return
            names = ", ".join(sorted(rewards))
            _LOG.warning("reward %s: no answer within %g s, its requests go on apart", names, self.patience_s)
            thread = threading.Thread(target=self._run_apart, args=(rewards,), name=f"apart-{names}", daemon=True)
            self._apart[rewards] = thread
            thread.start()

    def _drop_cancelled(self) -> None:
        for job in list(self._schedule.jobs):
            if job.cancelled and not any(image.busy for image in job.images):
                ticket = self._tickets[id(job)]
                self._forget(job)
                ticket.future.cancel()

    def _forget(self, job: JobInFlight) -> None:
        self._schedule.remove(job)
        del self._tickets[id(job)]

    def _advance(self, merger: Merger, units: list[Unit]) -> tuple[CallCounter, list[float], bool]:
        """One step of all units, lane by lane; calls made, effective shares of draws, and whether all steps were made.

        A lane whose reward has not answered in time stays where it is: its step is a function of its state and keys.
        """
        lanes: dict[object, list[Unit]] = {}
        for job, image in units:
            key = (job.lane_key, image.particles.memory is None)
            lanes.setdefault(key, []).append((job, image))
        groups = list(lanes.values())
        calls, shares, all_made = CallCounter(), list[float](), True
        for first in range(0, len(groups), MAX_LANES):
            some = groups[first : first + MAX_LANES]
            steps = merger.lanes.run([_Lane(merger, group) for group in some])
            for group, outcome in zip(some, steps, strict=True):
                if isinstance(outcome, Exception):
                    all_made = False
                    if isinstance(outcome, StillWaitingError):
                        self._set_apart(outcome.rewards)
                    else:
                        self._fail_all(group, outcome)
                    continue
                made, step = outcome
                _add(calls, made, 1, 1)
                shares += _share(step, group[0][0].job)
                self._store(group, made, step)
        return calls, shares, all_made

    def _store(self, units: list[Unit], made: CallCounter, step: Step) -> None:
        with self._changed:
            for (_, image), particles in zip(units, single_particles(step.particles), strict=True):
                image.particles = particles
                image.step += 1
            for name, values in step.diagnostics.items():
                for (_, image), value in zip(units, values.split(1), strict=True):
                    image.trace.setdefault(name, []).append(value)
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
