"""A sweep on Ray Tune: the trials that are not there yet, spread over workers, pruned, and recorded one by one.

Every ended trial leaves `trials/<index>.json` in the run's folder. A resumed sweep takes what those say and makes the
rest; a trial that was under way begins anew and, by common random numbers, comes to the same figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from mfm_ray.environment import environment_defaults
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.tuning.space import Point
from mfm_ray.tuning.trial import FAILURE, FIDELITY, LOADS, WORKER, SamplingTrial, TrialSpec

TRIALS, TUNE = "trials", "tune"
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records are ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # so are signals
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that is refused at its first step has measured nothing
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """An ended trial. status: "ok", "pruned", "refused" (it would end like that again) or "lost"; reason: of the last
    two; history: the metrics at each rung; settings: hash of what decided the trial. A training that goes on leaves
    one that is "running"; exploits: what it took over from others (population based training).
    """

    index: int
    point: Point
    status: str
    metrics: dict[str, float]
    settings: str
    reason: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    worker: int | None = None
    model_loads: int = 0
    exploits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_final(self) -> bool:
        return self.status not in ("lost", "running")


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """ASHA: a trial goes on beyond a rung when it is among the best 1 / reduction_factor of those that came there."""

    metric: str
    mode: str
    rungs: Sequence[int]
    reduction_factor: int

    def scheduler(self, earlier: Sequence[TrialRecord]) -> TrialScheduler:
        """With the rungs as earlier trials left them."""
        if len(self.rungs) == 1:
            return FIFOScheduler()
        asha = AsyncHyperBandScheduler(
            time_attr=FIDELITY,
            metric=self.metric,
            mode=self.mode,
            max_t=self.rungs[-1],
            grace_period=self.rungs[0],
            reduction_factor=self.reduction_factor,
        )
        for record in earlier:
            trial: Any = SimpleNamespace(trial_id=f"earlier-{record.index}")
            asha.on_trial_add(None, trial)  # type: ignore[arg-type]
            for reported in record.history:
                asha.on_trial_result(None, trial, reported)  # type: ignore[arg-type]
        return asha


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The trials of a sweep: points by index, and the hash of all that decides them beside their points."""

    points: Sequence[Point]
    decided_by: str
    pruning: Pruning


def finished_trials(run: Storage, plan: SweepPlan) -> dict[int, TrialRecord]:
    """Records of trials that need not be made again, by index."""
    found = (read_record(run, index) for index in range(len(plan.points)))
    return {
        record.index: record
        for record in found
        if record is not None
        and record.is_final
        and record.settings == plan.decided_by
        and record.point == plan.points[record.index]
    }


def run_sweep(
    plan: SweepPlan,
    spec: TrialSpec,
    run: Storage,
    earlier: Mapping[int, TrialRecord],
    *,
    num_workers: int,
    resources: Mapping[str, float],
    max_failures: int,
    log: Log,
) -> dict[int, TrialRecord]:
    """All records by index, `earlier` ones included. Ray must be running; failing trials are recorded, not raised."""
    missing = [index for index in range(len(plan.points)) if index not in earlier]
    if not missing:
        return dict(earlier)
    book = _Book(plan, run, dict(earlier), log)
    trainable: Any = tune.with_parameters(SamplingTrial, spec=spec)
    with environment_defaults(TUNE_ENVIRONMENT):
        tune.Tuner(
            tune.with_resources(trainable, dict(resources)),
            param_space={"trial": tune.grid_search(missing)},
            tune_config=tune.TuneConfig(
                scheduler=plan.pruning.scheduler(list(earlier.values())),
                max_concurrent_trials=num_workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                **run.for_ray,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[book],
                failure_config=tune.FailureConfig(max_failures=max_failures),
            ),
        ).fit()
    return book.records


class _Book(tune.Callback):
    """Writes the record of every trial when it ends, and says how far the sweep is."""

    def __init__(self, plan: SweepPlan, run: Storage, records: dict[int, TrialRecord], log: Log) -> None:
        self.records = records
        self._plan, self._run, self._log = plan, run, log
        self._history: dict[int, list[dict[str, float]]] = {}
        self._before, self._began = len(records), time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._history[trial.config["trial"]] = []  # a trial that lost its worker begins anew

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if FAILURE not in result:
            self._history.setdefault(trial.config["trial"], []).append(_figures(result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        reason = result.get(FAILURE)
        whole = result.get(FIDELITY, 0) >= self._plan.pruning.rungs[-1]
        status = "refused" if reason is not None else "ok" if whole else "pruned"
        self._keep(trial, status, reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._keep(trial, "lost", why_lost(trial))

    def _keep(self, trial: Any, status: str, reason: str | None) -> None:
        index, result = trial.config["trial"], trial.last_result or {}
        history = self._history.get(index, [])
        record = TrialRecord(
            index=index,
            point=self._plan.points[index],
            status=status,
            metrics=history[-1] if history else {},
            settings=self._plan.decided_by,
            reason=reason,
            history=history,
            worker=result.get(WORKER),
            model_loads=int(result.get(LOADS, 0)),
        )
        self.records[index] = record
        self._run.write_json(record_name(index), asdict(record))
        self._log(self._line(record))

    def _line(self, record: TrialRecord) -> str:
        done, total = len(self.records), len(self._plan.points)
        left = (time.monotonic() - self._began) / (done - self._before) * (total - done)
        name = self._plan.pruning.metric
        figures = {"reward": f"{name} {record.metrics.get(name, math.nan):.4g}", "nfe": f"{record.metrics.get('nfe')}"}
        what = record.reason or f"{figures['reward']}, {figures['nfe']} calls an image"
        point = " ".join(f"{key}={value}" for key, value in record.point.items())
        return f"{done} of {total} trials, {left:.0f} s left: {point}: {record.status}, {what}"


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that the trial reported, without what Tune adds."""
    own = ("reward", "judge.", "confidence", "diversity", "nfe", "seconds", FIDELITY)
    return {name: float(value) for name, value in result.items() if name.startswith(own)}


def why_lost(trial: Any) -> str:
    """What Tune noted on the driver of the error: the exception's own line ends it."""
    noted = Path(trial.error_file).read_text() if trial.error_file else ""
    lines = [line.strip() for line in noted.splitlines() if line.strip()]
    return lines[-1] if lines else "unknown error"


def record_name(index: int) -> str:
    return f"{TRIALS}/{index:05d}.json"


def read_record(run: Storage, index: int) -> TrialRecord | None:
    """None where there is none that can be read: the trial is made again."""
    if not run.is_file(record_name(index)):
        return None
    try:
        return TrialRecord(**run.read_json(record_name(index)))
    except (InputError, TypeError):
        return None
