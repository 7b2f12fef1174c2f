"""What every job has in common: configuration, exit code, result.json, and the RESULT line.

    def body(run: JobRun) -> Outcome:
        run.log(f"{run.config.max_steps} steps")
        return Outcome(metrics={"loss": 0.1}, artifacts={"model": run.storage.child("model").uri})

    if __name__ == "__main__":
        run_job("train", body, check=check)

Exit codes: 0 done; 2 the user's input or configuration is wrong, one line on stderr; 1 anything else, one line
on stderr and the traceback in `<storage>/<name>/error.log`. In all three `<storage>/<name>/result.json` is written
where storage allows, and then the last line of stdout is `RESULT <its absolute path or URI>`. Neither torch nor
Ray is imported here, so that a typo is answered at once.
"""

import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NoReturn

from jobs.command_line import answer_flags
from jobs.provenance import git_commit, versions
from jobs.run_folder import ERROR_LOG, RESULT, RunFolder
from jobs.stopping import GRACE_S, Stopped, StopSignals, end_now
from mfm_ray.config import JobConfig, load_config, to_dict
from mfm_ray.errors import InputError, StorageError
from mfm_ray.storage import Storage

EXIT_CODES = {"ok": 0, "failed": 1, "stopped": 1, "invalid": 2}
# The words that decide where a run writes; enough to say so even when the others cannot be understood.
_PLACE_KEYS = ("name", "storage", "experiment", "protocol", "data", "sweep")


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """What a body gets. `storage` is the run's own folder, `<storage>/<name>`; `config` the job's typed root.

    publish: the result of a job that has what it was asked for and then goes on until it is stopped, as a server does:
    result.json and the RESULT line come at once, and a signal is from then on its ordinary end (exit code 0).
    """

    config: Any
    storage: Storage
    log: Callable[[str], None]
    publish: Callable[["Outcome"], None] = field(default=lambda outcome: None)

    @property
    def seed(self) -> int:
        return int(self.config.seed)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a body returns: flat names to numbers, and names to absolute paths or URIs."""

    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)


def run_job(
    name: str,
    body: Callable[[JobRun], Outcome],
    *,
    check: Callable[[Any], None] | None = None,
    keeps_old_run: bool = False,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Runs one job as a process and exits with its code.

    name: of the job, its root in `mfm_ray.conf` and its result.
    body: the work. InputError from it is exit 2, anything else exit 1.
    check: looks at the configuration before any resource is taken and before anything is removed or written; there
        every ValueError is the user's (exit 2).
    keeps_old_run: with overwrite=true the old run's files stay, because the body reuses what is still valid.
    argv: the words of the command line, those of the process when None.
    """
    job = _Job(name, list(sys.argv[1:] if argv is None else argv), keeps_old_run=keeps_old_run)
    with StopSignals(on_stop=job.record_stop, on_deadline=job.report_stop) as signals:
        try:
            code = job.run(body, check, signals)
        except Stopped:  # in the instant between the error of a body and its record
            code = job.report_stop()
        if signals.received:
            end_now(code)
    sys.exit(code)


class _Job:
    """One call of a job: what is known about it so far, and its one result."""

    def __init__(self, name: str, words: list[str], *, keeps_old_run: bool) -> None:
        self.name = name
        self.words = words
        self.keeps_old_run = keeps_old_run
        self.started = datetime.now(timezone.utc)
        self.clock = time.monotonic()
        self.config: JobConfig | None = None
        self.folder: RunFolder | None = None
        self.may_write = False  # the folder is this run's
        self.holds_good = False  # and in it stands the result of an earlier run that went well
        self.status: str | None = None
        self.error: str | None = None
        self.written = False
        self.published: Outcome | None = None
        self.lock = threading.RLock()

    def run(self, body: Callable[[JobRun], Outcome], check: Callable[[Any], None] | None, signals: StopSignals) -> int:
        try:
            answer = answer_flags(self.name, self.words)
            if answer is not None:
                print(answer, flush=True)
                return 0
            outcome = body(self._prepare(check))
            signals.shield()
            self._settle("ok", outcome=outcome)
        except BaseException as error:
            signals.shield()
            self._settle_error(error, stopped=signals.received or isinstance(error, Stopped))
        return self._report()

    def record_stop(self) -> None:
        """Writes the result of a stopped run at once, should the process be killed before it ends by itself."""
        if self.published is not None:
            self._settle("ok", outcome=self.published)
        else:
            self._settle("stopped", error="stopped by a signal before it was done")

    def publish(self, outcome: Outcome) -> None:
        """As in `JobRun`. StorageError where result.json cannot be written."""
        assert self.folder is not None
        with self.lock:
            if self.status is not None:
                return  # a signal came first
            self._write(self.folder.storage, self._result(outcome, status="ok"))
            self.published = outcome
        self._print_result()

    def report_stop(self) -> int:
        self.record_stop()
        return self._report()

    def _prepare(self, check: Callable[[Any], None] | None) -> JobRun:
        """Everything that can be wrong before the work: configuration, folder, the job's own checks, storage."""
        config = self.config = load_config(self.name, self.words)
        self._claim(config)
        if check is not None:
            try:
                check(config)
            except ValueError as error:
                raise InputError(_one_line(error)) from error
        assert self.folder is not None
        clear = config.overwrite and not self.keeps_old_run
        self.folder.begin({"job": self.name, "started": _iso(self.started), "config": to_dict(config)}, clear=clear)
        self.holds_good = self.holds_good and not clear
        return JobRun(config=config, storage=self.folder.storage, log=_log, publish=self.publish)

    def _claim(self, config: JobConfig) -> None:
        if config.resume and config.overwrite and not self.keeps_old_run:
            raise InputError("resume=true: cannot be combined with overwrite=true; expected one of them")
        self.folder = RunFolder(self.name, config)
        found = self.folder.claim(resume=config.resume, overwrite=config.overwrite)
        self.may_write, self.holds_good = True, found.status == "ok"

    def _settle_error(self, error: BaseException, *, stopped: bool) -> None:
        if stopped:
            self.record_stop()
        elif isinstance(error, InputError):
            if self.config is None:
                self._claim_from_words()
            self._settle("invalid", error=_one_line(error))
        else:
            self._settle("failed", error=_one_line(error), trace=traceback.format_exc())

    def _claim_from_words(self) -> None:
        """Finds the folder of a run whose configuration has a mistake elsewhere; without one, none is used."""
        words = [word for word in self.words if word.partition("=")[0] in _PLACE_KEYS]
        with contextlib.suppress(InputError, StorageError):
            self._claim(load_config(self.name, words))

    def _settle(
        self, status: str, *, outcome: Outcome | None = None, error: str | None = None, trace: str | None = None
    ) -> None:
        """Decides how the run ended, once, and writes result.json where it may."""
        if not self.lock.acquire(timeout=GRACE_S / 2):
            return  # a storage that hangs holds up the thread that decided; the deadline must not wait for it
        try:
            if self.status is not None:
                return
            self.status, self.error = status, error
            if self.folder is None or not self.may_write or (status == "invalid" and self.holds_good):
                return
            self._write(self.folder.storage, self._result(outcome or Outcome(), status=status), trace)
            self.written = True
        except (StorageError, TypeError, ValueError) as refusal:
            if status == "ok":
                self.status, self.error = "failed", _one_line(refusal)
        finally:
            self.lock.release()

    def _write(self, storage: Storage, result: dict[str, Any], trace: str | None = None) -> None:
        if trace is not None:
            storage.write_bytes(ERROR_LOG, trace.encode())
        storage.write_json(RESULT, result)

    def _result(self, outcome: Outcome, *, status: str) -> dict[str, Any]:
        assert self.folder is not None
        return {
            "job": self.name,
            "status": status,
            "error": self.error,
            "name": self.folder.name,
            "seed": self.config.seed if self.config else None,
            "started": _iso(self.started),
            "seconds": round(time.monotonic() - self.clock, 3),
            "config": to_dict(self.config) if self.config else {},
            "versions": versions(),
            "git": git_commit(),
            "metrics": _finite(outcome.metrics),
            "artifacts": {key: _absolute(place) for key, place in outcome.artifacts.items()},
        }

    def _report(self) -> int:
        """The line on stderr, the last line on stdout, and the exit code."""
        if self.error is not None:
            print(f"jobs.{self.name}: {self.error}", file=sys.stderr, flush=True)
        if self.written:
            self._print_result()
        return EXIT_CODES[self.status or "failed"]

    def _print_result(self) -> None:
        assert self.folder is not None
        print(f"RESULT {self.folder.storage.uri_of(RESULT)}", flush=True)


def _log(line: str) -> None:
    print(line, flush=True)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """JSON has no NaN: a metric that is none is left out, and said to be."""
    numbers = {key: value if isinstance(value, int) else float(value) for key, value in metrics.items()}
    for key, value in numbers.items():
        if not math.isfinite(value):
            _log(f"metric {key} is {value} and is left out of {RESULT}")
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(place)


def _one_line(error: BaseException) -> str:
    """The reason in one line: the first line of the message, or the last of one that holds a remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[-1] if any("Traceback" in line for line in lines) else lines[0]
    return text if isinstance(error, ValueError | StorageError) else f"{type(error).__name__}: {text}"
