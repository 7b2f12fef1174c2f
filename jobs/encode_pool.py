"""Ray Data's pool of actors that encode the parts of a source; a part of a lost actor is done again by another."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from jobs.sample_maker import Log, Progress
from jobs.sample_pool import Workers, room_for
from mfm_ray.data.encoding import EncodingSettings, PartRecord, encode_part
from mfm_ray.errors import InputError, StorageError
from mfm_ray.storage import Storage

KeepPart = Callable[[PartRecord], None]
_POLL_S = 0.5


class Tally:
    """A Ray actor that knows how many images of each unfinished part are done, and who works."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._workers: set[int] = set()

    def join(self, pid: int) -> None:
        self._workers.add(pid)

    def note(self, part: int, done: int) -> None:
        self._done[part] = done

    def seen(self) -> tuple[dict[int, int], list[int]]:
        """Images done by part, and the process ids of all workers there have been."""
        return dict(self._done), sorted(self._workers)


class PartEncoder:
    """What an actor of the pool holds: the autoencoder, read once."""

    def __init__(self, settings: EncodingSettings, output: Storage, device: str, threads: int, tally: Any) -> None:
        import torch

        torch.set_num_threads(threads)
        self._settings, self._output, self._threads, self._tally = settings, output, threads, tally
        self._device = torch.device(device)
        self._autoencoder = load_same_autoencoder(settings).to(self._device)
        tally.join.remote(os.getpid())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The record of one part; a refusal is returned, because the next worker would say the same."""
        import torch

        torch.set_num_threads(self._threads)  # here as well, because the number belongs to the thread that calculates
        part = int(batch["part"][0])
        entries = pa.ipc.open_stream(batch["entries"][0]).read_all().to_pylist()
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
            return {"record": [None], "refusal": [str(refusal)]}
        return {"record": [asdict(record)], "refusal": [None]}


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
    """Each finished part goes to `keep`. InputError where no worker starts in time, or one refuses."""
    import ray

    remote: Any = ray.remote
    tally = remote(num_cpus=0)(Tally).remote()
    results: queue.Queue[Any] = queue.Queue()
    dataset = _dataset(parts, entries_of, settings, output, tally, workers)
    threading.Thread(target=_iterate, args=(dataset, results), name="ray-data", daemon=True).start()
    log(f"encoding {len(parts)} parts with {workers.num} workers, {workers.resources} each")
    left, began, ready = set(parts), time.monotonic(), False
    finished: set[int] = set()
    while left:
        try:
            result = results.get(timeout=_POLL_S)
        except queue.Empty:
            result = None
        if isinstance(result, BaseException):
            raise _cause(result)
        if result is not None:
            if result["refusal"] is not None:
                raise InputError(str(result["refusal"]))
            record = PartRecord(**result["record"])
            if record.part in left:  # a part that was made twice counts once
                left.remove(record.part)
                finished.add(record.part)
                keep(record)
        elif not ready or progress.is_due:
            done, pids = ray.get(tally.seen.remote())
            if pids and not ready:
                ready = True
                progress.restart()
                log(f"the first worker is ready after {time.monotonic() - began:.0f} s")
            elif not ready and time.monotonic() - began > workers.start_timeout_s:
                raise InputError(_no_worker(workers))
            if ready and progress.is_due:
                progress.tell(sum(number for part, number in done.items() if part not in finished), workers.num)
    ray.kill(tally)


def _dataset(
    parts: Sequence[int],
    entries_of: Callable[[int], pa.Table],
    settings: EncodingSettings,
    output: Storage,
    tally: Any,
    workers: Workers,
) -> Any:
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"part": part, "entries": _packed(entries_of(part))} for part in parts]
    resources = dict(workers.resources)
    cpus, gpus = resources.pop("CPU", 0.0), resources.pop("GPU", 0.0)
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        PartEncoder,
        fn_constructor_args=(settings, output, workers.device, max(1, int(cpus)), tally),
        batch_size=1,
        compute=ActorPoolStrategy(size=workers.num, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=gpus,
        resources=resources or None,
        max_restarts=-1,
        max_task_retries=workers.max_failures,
    )


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


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


def _no_worker(workers: Workers) -> str:
    room = room_for(workers.resources)
    return (
        f"scaling.num_workers={workers.num}: no worker with resources_per_worker={workers.resources} is ready; the "
        f"cluster has room for {room}, waited {workers.start_timeout_s:g} s (scaling.start_timeout_s)"
    )
