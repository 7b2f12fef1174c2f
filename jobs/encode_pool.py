"""Ray Data's pool of actors that encode the parts of a source; a part of a lost actor is done again by another."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from jobs.sample_maker import Log, Progress
from jobs.sample_pool import LostWorkersError, Workers, room_for
from mfm_ray.data.encoding import EncodingSettings, PartRecord, encode_part
from mfm_ray.errors import InputError, StorageError
from mfm_ray.storage import Storage

KeepPart = Callable[[PartRecord], None]
_POLL_S = 0.5
_END_S = 30.0
_GIVEN_UP = threading.Event()


class Tally:
    """A Ray actor that knows how many images of each unfinished part are done, and how often each was begun."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._begun: Counter[int] = Counter()
        self._workers: set[tuple[str, int]] = set()

    def join(self, node: str, pid: int) -> None:
        self._workers.add((node, pid))

    def begin(self, part: int) -> None:
        self._begun[part] += 1
        self._done[part] = 0

    def note(self, part: int, done: int) -> None:
        self._done[part] = done

    def seen(self) -> Seen:
        return Seen(dict(self._done), dict(self._begun), sorted(self._workers))


@dataclass(frozen=True)
class Seen:
    """Images done by part, how often each part was begun, and node and process id of all workers there have been."""

    done: dict[int, int]
    begun: dict[int, int]
    workers: list[tuple[str, int]]


class PartEncoder:
    """What an actor of the pool holds: the autoencoder, read once. threads: that decode images.

    A refusal is returned by the call, not raised: then it comes to the user in its own words.
    """

    def __init__(self, settings: EncodingSettings, output: Storage, device: str, threads: int, tally: Any) -> None:
        import torch

        self._settings, self._output, self._threads, self._tally = settings, output, threads, tally
        self._device = torch.device(device)
        self._refusal: InputError | None = None
        try:
            self._autoencoder = load_same_autoencoder(settings).to(self._device)
        except InputError as refusal:
            self._refusal = refusal
        tally.join.remote(os.uname().nodename, os.getpid())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The record of one part, or why there is none."""
        if self._refusal is not None:
            return _refused(self._refusal)
        part = int(batch["part"][0])
        entries = pa.ipc.open_stream(batch["entries"][0]).read_all().to_pylist()
        self._tally.begin.remote(part)
        try:
            record = encode_part(
                part,
                entries,
                self._autoencoder,
                self._settings,
                self._output,
                device=self._device,
                threads=self._threads,
                note=lambda done: self._tally.note.remote(part, done),
            )
        except (InputError, StorageError) as refusal:
            return _refused(refusal)
        return {"record": [asdict(record)], "refusal": [None], "by_storage": [None]}


def _refused(refusal: InputError | StorageError) -> dict[str, list[Any]]:
    return {"record": [None], "refusal": [str(refusal)], "by_storage": [isinstance(refusal, StorageError)]}


def load_same_autoencoder(settings: EncodingSettings) -> Any:
    """The autoencoder of the settings; InputError where this machine has another one under its name."""
    from mfm_ray.autoencoder import load_autoencoder

    found = load_autoencoder(settings.autoencoder)
    if found.fingerprint() != settings.fingerprint:
        raise InputError(f"autoencoder={settings.autoencoder}: {os.uname().nodename} has other weights there")
    return found


def encode_on_ray(
    parts: Sequence[int],
    entries_of: Callable[[int], pa.Table],
    settings: EncodingSettings,
    output: Storage,
    keep: KeepPart,
    progress: Progress,
    *,
    workers: Workers,
    log: Log,
) -> None:
    """Each finished part goes to `keep`.

    InputError where no worker starts in time, or one refuses; StorageError where one cannot read or write;
    LostWorkersError where a part was lost with its worker more often than `workers.max_failures`.
    """
    import ray

    remote: Any = ray.remote
    tally = remote(num_cpus=0)(Tally).remote()
    results: queue.Queue[Any] = queue.Queue()
    _GIVEN_UP.clear()
    dataset = _dataset(parts, entries_of, settings, output, tally, workers)
    thread = threading.Thread(target=_iterate, args=(dataset, results), name="ray-data", daemon=True)
    thread.start()
    log(f"encoding {len(parts)} parts with {workers.num} workers, {workers.resources} each")
    left, watch = set(parts), _Watch(tally, workers, progress, log)
    try:
        while left:
            record = _next_record(results)
            if record is not None and record.part in left:  # a part that was made twice counts once
                left.remove(record.part)
                keep(record)
            if watch.is_due:
                watch.look(left)
    except Exception:  # when the job is stopped there is no time for this
        _GIVEN_UP.set()
        thread.join(_END_S)  # what Ray Data does after the end of Ray would start another one
        raise
    thread.join(_END_S)
    ray.kill(tally)


class _Watch:
    """What the driver learns from the tally, about twice a second, and says of it."""

    def __init__(self, tally: Any, workers: Workers, progress: Progress, log: Log) -> None:
        self._tally, self._workers, self._progress, self._log = tally, workers, progress, log
        self._began = self._looked = time.monotonic()
        self._known = 0

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._looked >= _POLL_S

    def look(self, left: set[int]) -> None:
        """left: parts that are not finished."""
        import ray

        seen: Seen = ray.get(self._tally.seen.remote())
        self._looked = time.monotonic()
        waited = self._looked - self._began
        if seen.workers and not self._known:
            self._progress.restart()
            self._log(f"the first worker is ready after {waited:.0f} s")
        elif not seen.workers and waited > self._workers.start_timeout_s:
            raise InputError(_no_worker(self._workers))
        if (lost := len(seen.workers) - self._workers.num) > max(0, self._known - self._workers.num):
            self._log(f"{lost} workers were lost so far, others took their places")
        self._known = len(seen.workers)
        for part in sorted(left):
            if seen.begun.get(part, 0) > self._workers.max_failures + 1:
                raise LostWorkersError(_lost(part, self._workers))
        if self._known and self._progress.is_due:
            self._progress.tell(sum(number for part, number in seen.done.items() if part in left), self._workers.num)


def _next_record(results: queue.Queue[Any]) -> PartRecord | None:
    """What came in the meantime, None for nothing; an error that came is raised."""
    try:
        result = results.get(timeout=_POLL_S)
    except queue.Empty:
        return None
    if isinstance(result, BaseException):
        raise _cause(result)
    if result["refusal"] is not None:
        raise (StorageError if result["by_storage"] else InputError)(str(result["refusal"]))
    return PartRecord(**result["record"])


def _dataset(
    parts: Sequence[int],
    entries_of: Callable[[int], pa.Table],
    settings: EncodingSettings,
    output: Storage,
    tally: Any,
    workers: Workers,
) -> Any:
    """Ray Data restarts actors that are lost and gives their parts to others; that it is the default is why nothing
    is said of it here (saying it by max_restarts is deprecated). Each actor has its next part at hand."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    callbacks: list[Any] = context.custom_execution_callback_classes
    if _EndsWhenGivenUp not in callbacks:
        callbacks.append(_EndsWhenGivenUp)
    rows = [{"part": part, "entries": _packed(entries_of(part))} for part in parts]
    resources = dict(workers.resources)
    cpus, gpus = resources.pop("CPU", 0.0), resources.pop("GPU", 0.0)
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        PartEncoder,
        fn_constructor_args=(settings, output, workers.device, max(1, int(cpus)), tally),
        batch_size=1,
        compute=ActorPoolStrategy(size=workers.num, max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        num_gpus=gpus,
        resources=resources or None,
    )


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


class _EndsWhenGivenUp:
    """Called by Ray Data (an ExecutionCallback, whose base class is private): no other way ends it from outside."""

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        if _GIVEN_UP.is_set():
            raise RuntimeError("the job has given up")

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def _iterate(dataset: Any, results: queue.Queue[Any]) -> None:
    """In a thread, so that the job can speak and give up while Ray Data waits."""
    try:
        for row in dataset.iter_rows():
            results.put(row)
    except BaseException as error:
        results.put(error)


def _cause(error: BaseException) -> BaseException:
    """The user's error in what Ray Data wraps around it, else the error."""
    found: BaseException | None = error
    while found is not None:
        for candidate in (found, getattr(found, "cause", None)):
            if isinstance(candidate, InputError | StorageError):
                return candidate
        found = found.__cause__
    return error


def _lost(part: int, workers: Workers) -> str:
    return (
        f"part {part} was lost with its worker {workers.max_failures + 1} times (scaling.max_failures="
        f"{workers.max_failures}); finished parts stay, resume=true goes on"
    )


def _no_worker(workers: Workers) -> str:
    room = room_for(workers.resources)
    return (
        f"scaling.num_workers={workers.num}: no worker with resources_per_worker={workers.resources} is ready; the "
        f"cluster has room for {room}, waited {workers.start_timeout_s:g} s (scaling.start_timeout_s)"
    )
