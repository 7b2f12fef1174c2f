"""Ray actors that share a queue of shards.

A shard whose worker is lost goes back to the queue and a new worker takes the lost one's place. A refusal of the
sampler (a reward that returns NaN) ends the job at once: the next worker would say the same.
"""

import math
import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.sample_maker import Keep, Log, MakesShards, Progress
from jobs.sample_shards import Record, Shard
from mfm_ray.config import SampleScalingConfig
from mfm_ray.errors import InputError

_POLL_S = 1.0


class LostWorkersError(RuntimeError):
    """Workers were lost more often than scaling.max_failures allows; finished shards stay."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Number of Ray workers and the resources of each."""

    num: int
    resources: dict[str, float]
    start_timeout_s: float
    max_failures: int

    @property
    def device(self) -> str:
        return "cuda" if self.resources.get("GPU", 0.0) > 0 else "cpu"


def choose_workers(scaling: SampleScalingConfig, num_shards: int) -> Workers:
    """What the configuration asks of the joined cluster; where it is null, all that the cluster has room for."""
    import ray

    cuda, gpus = scaling.use_gpu, ray.cluster_resources().get("GPU", 0.0)
    if cuda and not gpus:
        raise InputError("scaling.use_gpu=true: the cluster has no GPU; expected false or null")
    if cuda is None:
        cuda = gpus >= max(1, scaling.num_workers or 1)
    resources = {**({"GPU": 1.0} if cuda else {}), **scaling.resources_per_worker}
    if not cuda:
        resources.pop("GPU", None)
    wanted = scaling.num_workers
    if wanted is None:  # a local cluster has more places than cores, and two workers on one core are slower than one
        wanted = room_for(resources, own_cpus=len(os.sched_getaffinity(0)))
    return Workers(
        num=max(1, min(wanted, num_shards)),
        resources=resources,
        start_timeout_s=scaling.start_timeout_s,
        max_failures=scaling.max_failures,
    )


def room_for(resources: Mapping[str, float], *, own_cpus: float = math.inf) -> int:
    """Workers that the cluster's nodes hold when nothing else runs. own_cpus: limit of the CPUs of this machine."""
    import ray

    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = dict(node["Resources"])
            if node.get("NodeManagerHostname") == socket.gethostname():
                has["CPU"] = min(has.get("CPU", 0.0), own_cpus)
            room += min((int(has.get(name, 0.0) // amount) for name, amount in wanted.items()), default=0)
    return room


def _reason(error: Exception) -> str:
    """Why a worker was lost, in one line: the error of its constructor, or what Ray knows of its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    has_trace = any(line.startswith(("Traceback", "File ")) for line in lines)
    return (lines[-1] if has_trace else " ".join(lines))[:300]


def make_on_ray(
    maker: MakesShards, shards: Sequence[Shard], keep: Keep, progress: Progress, *, workers: Workers, log: Log
) -> None:
    """The shards by workers of the joined cluster, in the order in which they finish."""
    pool = _Pool(maker, workers, progress, log)
    try:
        pool.run(shards, keep)
    finally:
        pool.close()


class ShardWorker:
    """A Ray actor. Its calls run in two threads: one makes shards, the other says how far the first one is."""

    def __init__(self, maker: MakesShards, threads: int) -> None:
        self._maker, self._threads, self._done = maker, threads, 0
        maker.move()

    def ready(self) -> int:
        """Its process id."""
        return os.getpid()

    def make(self, shard: Shard) -> Record | InputError:
        """A refusal is returned, not raised: it is no failure of the worker."""
        import torch

        torch.set_num_threads(self._threads)  # here, because the number belongs to the thread that calculates
        self._done = 0
        try:
            return self._maker.make(shard, self._note)
        except InputError as refusal:
            return InputError(str(refusal))

    def images_done(self) -> int:
        return self._done

    def _note(self, done: int) -> None:
        self._done = done


class _Pool:
    """The queue of shards, and the workers that take from it."""

    def __init__(self, maker: MakesShards, workers: Workers, progress: Progress, log: Log) -> None:
        import ray

        self._workers, self._progress, self._log, self._storage = workers, progress, log, maker.run
        self._queue: deque[Shard] = deque()
        self._calls: dict[Any, tuple[Any, Shard | None]] = {}  # result -> worker, and its shard or None: it is starting
        self._idle: list[Any] = []
        self._losses: dict[int, int] = {}
        self._lost_starts = 0
        self._any_ready = False
        self._maker = ray.put(maker)
        self._threads = max(1, int(workers.resources.get("CPU", 1.0)))
        remote: Any = ray.remote
        self._actor_class = remote(
            num_cpus=workers.resources.get("CPU", 0.0),
            num_gpus=workers.resources.get("GPU", 0.0),
            resources={name: amount for name, amount in workers.resources.items() if name not in ("CPU", "GPU")},
            max_concurrency=2,
            scheduling_strategy="SPREAD",
        )(ShardWorker)

    def run(self, shards: Sequence[Shard], keep: Keep) -> None:
        import ray

        self._queue.extend(shards)
        self._log(f"starting {self._workers.num} workers, {self._workers.resources} each")
        for _ in range(self._workers.num):
            self._start()
        left, last_seen = len(shards), time.monotonic()
        while left:
            for result in ray.wait(list(self._calls), num_returns=1, timeout=_POLL_S)[0]:
                record = self._take(result)
                if isinstance(record, Record):
                    keep(*self._seen(record, shards))
                    left -= 1
            while self._queue and self._idle:
                worker, shard = self._idle.pop(), self._queue.popleft()
                self._calls[worker.make.remote(shard)] = (worker, shard)
            if self._num_ready:
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > self._workers.start_timeout_s:
                raise (LostWorkersError if self._any_ready else InputError)(self._no_worker())
            if self._any_ready and self._progress.is_due:
                self._progress.tell(self._unfinished(), self._num_ready)

    def close(self) -> None:
        """Gives the workers' places back at once; the cluster may live longer than this job."""
        import ray

        for worker in [*self._idle, *(worker for worker, _ in self._calls.values())]:
            ray.kill(worker)

    @property
    def _num_ready(self) -> int:
        return len(self._idle) + sum(shard is not None for _, shard in self._calls.values())

    def _start(self) -> None:
        worker = self._actor_class.remote(self._maker, self._threads)
        self._calls[worker.ready.remote()] = (worker, None)

    def _take(self, result: Any) -> Record | None:
        """What a worker made; None for a worker that is ready now, or lost. Raises what must end the job."""
        import ray
        from ray import exceptions

        worker, shard = self._calls.pop(result)
        try:
            value = ray.get(result)
        except (exceptions.RayActorError, exceptions.NodeDiedError, exceptions.ObjectLostError) as error:
            self._replace(worker, shard, error)
            return None
        except exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        self._idle.append(worker)
        if isinstance(value, InputError):
            raise value
        if shard is not None:
            return value
        self._lost_starts = 0
        if not self._any_ready:
            self._any_ready = True
            self._progress.restart()
            self._log(f"the first of {self._workers.num} workers is ready")
        return None

    def _replace(self, worker: Any, shard: Shard | None, error: Exception) -> None:
        """Another worker for one that was lost, and its shard to the head of the queue, a limited number of times."""
        import ray

        ray.kill(worker)  # one that is only out of reach must not go on
        if shard is None:
            times = self._lost_starts = self._lost_starts + 1
            what = "a worker was lost while it started"
        else:
            times = self._losses[shard.index] = self._losses.get(shard.index, 0) + 1
            what = f"the worker of {shard.file} was lost"
            self._queue.appendleft(shard)
        reason, limit = _reason(error), self._workers.max_failures
        if times > limit:
            raise LostWorkersError(f"{what} {times} times, scaling.max_failures={limit}: {reason}")
        self._log(f"{what}, another takes its place ({times} of at most {limit} times): {reason}")
        self._start()

    def _seen(self, record: Record, shards: Sequence[Shard]) -> tuple[Shard, Record]:
        """The shard of a record, when its file is to be seen from here as well."""
        if not self._storage.is_file(record.file):
            raise InputError(
                f"storage: {self._storage.uri_of(record.file)} was written by a worker and cannot be seen from here; "
                "expected a folder that all nodes share, or a URI"
            )
        return next(shard for shard in shards if shard.file == record.file), record

    def _unfinished(self) -> int:
        """Images done of the shards in work, as far as the workers answer."""
        import ray

        calls = [worker.images_done.remote() for worker, shard in self._calls.values() if shard is not None]
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=_POLL_S) if calls else ([], [])
        total = 0
        for call in answered:
            try:
                total += ray.get(call)
            except ray.exceptions.RayError:
                continue  # the shard's own result says what became of the worker
        return total

    def _no_worker(self) -> str:
        asked, room = self._workers, room_for(self._workers.resources)
        why = "busy or slow" if room else "too small"
        return (
            f"scaling.num_workers={asked.num}: no worker with resources_per_worker={asked.resources} is ready; the "
            f"cluster has room for {room} ({why}), waited {asked.start_timeout_s:g} s "
            "(scaling.start_timeout_s)"
        )
