"""The driver's eye on the workers: who trains where, who is gone, who hangs. See heartbeat.py for the workers' side.

    Monitor (an actor)      keeps the last beat of every worker, and lines for the driver's log
    Watchdog (a thread)     asks it once a second; says what happened, writes `attempts.jsonl`, ends a worker that hangs
    find_hang               the rule

A worker that hangs is ended, so that a hang becomes a failure and Ray Train's failure policy restarts the group.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mfm_ray.errors import StorageError
from mfm_ray.storage import Storage
from mfm_ray.training.failures import causes
from mfm_ray.training.heartbeat import END, PHASES, START, Beat, beat_every, birth

ATTEMPTS_FILE = "attempts.jsonl"
FIRST_STEP_FACTOR = 3.0
"""The first step compiles, and reads the data: it may take so many times `faults.hang_timeout_s`."""
_POLL_S = 1.0
_KILL_TIMEOUT_S = 60.0

Log = Callable[[str], None]


@dataclass(frozen=True)
class Heard:
    """The last beat of a worker, and the seconds since it came."""

    beat: Beat
    age_s: float

    @property
    def still_s(self) -> float:
        """Seconds for which the worker has not moved as far as anybody knows."""
        return self.beat.still_s + self.age_s

    @property
    def position(self) -> tuple[int, int]:
        """How far it is; comparable between workers."""
        return self.beat.step, PHASES.index(self.beat.phase) if self.beat.phase in PHASES else -1


@dataclass(frozen=True)
class Hang:
    """Workers that keep the others waiting, and why it is they."""

    culprits: list[Heard]
    reason: str
    seconds: float

    def line(self) -> str:
        names = ", ".join(describe(heard.beat) for heard in self.culprits)
        return f"hang: {names} {self.reason}; nothing has moved for {self.seconds:.0f} s"


def describe(beat: Beat) -> str:
    """Rank, node, process and step."""
    member = beat.member
    return f"training worker {member.rank} (node {member.node}, process {member.pid}) in step {beat.step + 1}"


def find_hang(heard: Iterable[Heard], *, timeout_s: float) -> Hang | None:
    """The workers that hang, None as long as any of the group moves.

    Workers go in step, so one that hangs stops all of them within a step. It is the one that has gone silent (stopped,
    or its machine is), else the one that is behind the others, else the one that is not waiting for them in a
    collective. When all wait in the same one, nobody is to blame: the network between them is, and all are named.
    """
    group = list(heard)
    if not group or len(group) < group[0].beat.member.world_size:
        return None
    if any(one.beat.phase == END for one in group):
        return None  # the others are a barrier away from their end, which Ray Train waits for
    still = min(one.still_s for one in group)
    starting = any(one.beat.phase == START or not one.beat.stepped_at for one in group)
    if still < timeout_s * (FIRST_STEP_FACTOR if starting else 1.0):
        return None
    quiet_after = max(3 * beat_every(timeout_s, len(group)), timeout_s / 2)
    furthest = max(one.position for one in group)
    choices = {
        "has gone silent": [one for one in group if one.age_s > quiet_after],
        "is behind the others": [one for one in group if one.position < furthest],
        "is not where the others wait for it": [one for one in group if not one.beat.waiting],
    }
    for reason, chosen in choices.items():
        if 0 < len(chosen) < len(group) or (chosen and len(group) == 1):
            where = next((f", in {one.beat.function}" for one in chosen if one.beat.function), "")
            return Hang(chosen, reason + where, still)
    return Hang(group, "wait for each other; the network between them may be cut", still)


@dataclass(frozen=True)
class Report:
    """What the monitor knows: the workers of the newest attempt and its number, and what is new for the log.

    failures: groups of (rank, cause), each with the beats of the time.
    """

    attempt: int
    heard: list[Heard]
    lines: list[str]
    failures: list[tuple[dict[int, str], list[Heard]]]


@ray.remote(num_cpus=0, max_restarts=-1)
class Monitor:
    """Keeps what the workers say; on the driver's node, with which the run ends anyway."""

    def __init__(self) -> None:
        self._attempts: list[str] = []
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._lines: list[str] = []
        self._failures: list[tuple[dict[int, str], list[Heard]]] = []

    def beat(self, beat: Beat) -> None:
        name = beat.member.attempt
        if name not in self._attempts:
            self._attempts.append(name)
            self._beats = {}
        if name == self._attempts[-1]:  # else a last word of a group that is gone
            self._beats[beat.member.rank] = (beat, time.monotonic())

    def say(self, line: str) -> None:
        self._lines.append(line)

    def failed(self, blamed: dict[int, str]) -> None:
        self._failures.append((blamed, self._heard()))

    def report(self) -> Report:
        """What is new is told once."""
        lines, self._lines = self._lines, []
        failures, self._failures = self._failures, []
        return Report(len(self._attempts), self._heard(), lines, failures)

    def _heard(self) -> list[Heard]:
        now = time.monotonic()
        return [Heard(beat, now - at) for _, (beat, at) in sorted(self._beats.items())]


class FailureNotice(UserCallback):
    """Tells the monitor, from Ray Train's controller, which workers failed and why."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        self._monitor.failed.remote(causes(worker_exceptions))


@dataclass
class AttemptsLog:
    """attempts.jsonl of a run: one object a line, when the workers started and where, who was lost and why.

    A line that the storage does not take is written with the next one.
    """

    run: Storage
    log: Log
    _lines: list[str] | None = None
    _refused: bool = False
    _pending: bool = False

    def write(self, event: str, **what: Any) -> None:
        moment = time.time()
        self._entries().append(json.dumps({"time": round(moment, 3), "event": event, **what}))
        self._pending = True
        self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        try:
            self.run.write_bytes(ATTEMPTS_FILE, "".join(f"{line}\n" for line in self._entries()).encode())
            self._pending = self._refused = False
        except StorageError as error:
            if not self._refused:
                self.log(f"{error}; it is tried again")
            self._refused = True

    def _entries(self) -> list[str]:
        if self._lines is None:
            try:
                self._lines = self.run.read_bytes(ATTEMPTS_FILE).decode().splitlines()
            except FileNotFoundError:
                self._lines = []
        return self._lines


class Watchdog:
    """Watches a run while the block runs. hang_timeout_s: as in the configuration.

    Never fails a run: when the monitor does not answer, that is said once.
    """

    def __init__(self, run: Storage, log: Log, *, hang_timeout_s: float) -> None:
        self._log, self._timeout_s = log, hang_timeout_s
        self._record = AttemptsLog(run, log)
        self._done = threading.Event()
        self._attempt, self._ended, self._stepped, self._lost_since = 0, False, False, 0.0
        self._thread = threading.Thread(target=self._watch, name="training-watchdog", daemon=True)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.monitor: Any = Monitor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    @property
    def callback(self) -> FailureNotice:
        """For Ray Train."""
        return FailureNotice(self.monitor)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=_KILL_TIMEOUT_S)
        self._look()  # the last words
        self._record.flush()
        ray.kill(self.monitor)

    def _watch(self) -> None:
        unheard_since: float | None = None
        while not self._done.wait(_POLL_S):
            if self._look():
                unheard_since = None
                continue
            unheard_since = unheard_since or time.monotonic()
            if time.monotonic() - unheard_since > self._timeout_s:
                self._log(f"the monitor of the workers has not answered for {self._timeout_s:g} s")
                unheard_since = float("inf")

    def _look(self) -> bool:
        """One round; False when the monitor did not answer."""
        try:
            report: Report = ray.get(self.monitor.report.remote(), timeout=5.0)
        except (ray.exceptions.RayError, TimeoutError):
            return False
        for line in report.lines:
            self._log(line)
        for blamed, heard in report.failures:
            self._note_failure(blamed, heard)
        self._note_start(report)
        if not self._ended and (hang := find_hang(report.heard, timeout_s=self._timeout_s)) is not None:
            self._end(hang)
        self._record.flush()
        return True

    def _note_start(self, report: Report) -> None:
        heard = report.heard
        if not heard or len(heard) < heard[0].beat.member.world_size:
            return
        if report.attempt != self._attempt:
            self._attempt, self._ended, self._stepped = report.attempt, False, False
            members = [one.beat.member for one in heard]
            workers = [{"rank": one.rank, "node": one.node, "process": one.pid} for one in members]
            self._record.write("start", attempt=self._attempt, workers=workers)
        first = min(heard, key=lambda one: one.beat.member.rank).beat
        if first.stepped_at and not self._stepped:
            self._stepped = True
            self._record.write("step", attempt=self._attempt, start=first.started_from, first_step_at=first.stepped_at)
            if self._lost_since:
                waited = first.stepped_at - self._lost_since
                self._log(f"going on from step {first.started_from} with {len(heard)} workers, {waited:.0f} s later")
                self._lost_since = 0.0

    def _note_failure(self, blamed: Mapping[int, str], heard: Iterable[Heard]) -> None:
        beats = {one.beat.member.rank: one.beat for one in heard}
        written = [beat.checkpoint for beat in beats.values() if beat.checkpoint is not None]
        started = [beat.started_from for beat in beats.values()]
        last = max([*written, *started], default=0)
        for rank, cause in blamed.items():
            beat = beats.get(rank)
            who = describe(beat) if beat is not None else f"training worker {rank}"
            self._log(f"{who} failed: {cause}; last checkpoint: {f'step {last}' if last else 'none'}")
            place = {"node": beat.member.node, "process": beat.member.pid, "step": beat.step} if beat else {}
            self._record.write("failure", attempt=self._attempt, rank=rank, cause=cause, checkpoint=last, **place)
        self._lost_since = self._lost_since or time.time()
        self._ended = True

    def _end(self, hang: Hang) -> None:
        """Say who hangs, and end those processes: the rest is what happens to any worker that is lost."""
        self._ended = True
        self._log(f"{hang.line()}; ending {'it' if len(hang.culprits) == 1 else 'them'}")
        for one in hang.culprits:
            member = one.beat.member
            self._record.write(
                "hang",
                attempt=self._attempt,
                rank=member.rank,
                node=member.node,
                process=member.pid,
                step=one.beat.step,
                reason=hang.reason,
            )
            there = NodeAffinitySchedulingStrategy(member.node_id, soft=False)
            try:
                ray.get(
                    end_process.options(scheduling_strategy=there).remote(member.pid, member.born),
                    timeout=_KILL_TIMEOUT_S,
                )
            except (ray.exceptions.RayError, TimeoutError) as error:
                self._log(f"{describe(one.beat)} cannot be ended from here ({type(error).__name__}): its node is lost")


@ray.remote(num_cpus=0, max_retries=0)
def end_process(pid: int, born: str) -> None:
    """SIGKILL, on the node where the task runs, to that very process: one that is stopped hears nothing else."""
    if birth(pid) == born:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)
