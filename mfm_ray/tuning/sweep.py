"""A sweep on Ray Tune: the trials that are not there yet, spread over workers, pruned, and recorded one by one.

Every ended trial leaves `trials/<index>.json` in the run's folder. A resumed sweep takes what those say and makes the
rest; a trial that was under way begins anew and, by common random numbers, comes to the same figures.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from mfm_ray.environment import environment_defaults
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.tuning.search import Search
from mfm_ray.tuning.space import Point
from mfm_ray.tuning.trial import (
    FAILURE,
    FIDELITY,
    LOADS,
    MEASURED,
    SETTINGS,
    TRIAL,
    WORKER,
    SamplingTrial,
    TrialSpec,
    packed,
)

TRIALS, TUNE = "trials", "tune"
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception)\b.*:")
_MOST_REASON = 400  # characters
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records are ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # so are signals
    "RAY_AIR_NEW_OUTPUT": "0",  # and what is said; the newer output has a banner at any verbosity
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that is refused at its first step has measured nothing
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """An ended trial. status: "ok", "pruned", "refused" (it would end like that again) or "lost"; reason: of the last
    two; history: the metrics at each rung; settings: hash of what decided the trial; losses: how often its worker was
    lost. A training that goes on leaves one that is "running"; exploits: what it took over from others (population
    based training).
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
    losses: int = 0
    exploits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def measured(self) -> dict[str, float]:
        """The metrics of a trial that came to its end or was pruned: what a failed one had reported counts nowhere."""
        return {} if self.reason is not None else self.metrics

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
    """The trials of a sweep: where points come from, and the hash of all that decides them beside their points."""

    search: Search
    decided_by: str
    pruning: Pruning


def finished_trials(run: Storage, plan: SweepPlan) -> dict[int, TrialRecord]:
    """Records of trials that need not be made again, by index.

    A lost trial is made again, unless later points were proposed from its loss: then it stays as it is.
    """
    read = (read_record(run, index) for index in range(plan.search.most))
    found = {record.index: record for record in read if record is not None and record.settings == plan.decided_by}
    newest = max(found, default=0)
    kept: dict[int, TrialRecord] = {}
    while True:
        points = plan.search.points(kept)
        more = {
            index: found[index]
            for index, point in enumerate(points)
            if index in found and index not in kept and found[index].point == point
            if found[index].is_final or newest - index >= plan.search.window
        }
        if not more:
            return kept
        kept |= more


def run_sweep(
    plan: SweepPlan,
    spec: TrialSpec,
    run: Storage,
    earlier: Mapping[int, TrialRecord],
    *,
    settings_of: Callable[[Point], Mapping[str, Any]],
    num_workers: int,
    resources: Mapping[str, float],
    max_failures: int,
    watchers: Sequence[Watcher] = (),
) -> dict[int, TrialRecord]:
    """All records by index, `earlier` ones included. Ray must be running; failing trials are recorded, not raised.

    settings_of: the plain settings of the job at a point; watchers: are told of trials as they come and go.
    """
    if is_complete(plan, earlier):
        return dict(earlier)
    book = _Book(plan, run, dict(earlier), watchers)
    trainable: Any = tune.with_parameters(SamplingTrial, spec=spec)
    with environment_defaults(TUNE_ENVIRONMENT):
        tune.Tuner(
            tune.with_resources(trainable, dict(resources)),
            tune_config=tune.TuneConfig(
                search_alg=_Queue(plan, book.records, settings_of),
                num_samples=plan.search.most - len(earlier),
                trial_dirname_creator=lambda trial: f"{trial.config[TRIAL]:05d}",
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
    run.delete(TUNE)
    return book.records


def is_complete(plan: SweepPlan, ended: Mapping[int, TrialRecord]) -> bool:
    """Whether every point that the search has to offer was tried."""
    return len(plan.search.points(ended)) == len(ended)


class _Queue(Searcher):
    """Hands Tune the points that were not tried yet, and waits where the next one hangs on a result.

    In their order, but shuffled where trials are pruned: ASHA compares a trial with those before it, and a grid that
    gets better from point to point would have none to prune.
    """

    def __init__(
        self, plan: SweepPlan, records: Mapping[int, TrialRecord], settings_of: Callable[[Point], Mapping[str, Any]]
    ) -> None:
        super().__init__()
        self._search, self._records, self._settings_of = plan.search, records, settings_of
        self._prunes = len(plan.pruning.rungs) > 1
        self._given: set[int] = set(records)

    def _rank(self, index: int) -> float:
        return random.Random(index).random() if self._prunes else index

    def suggest(self, trial_id: str) -> Any:
        points = self._search.points(self._records)
        waiting = (index for index in range(len(points)) if index not in self._given)
        index = min(waiting, key=self._rank, default=None)
        if index is not None:
            self._given.add(index)
            return {TRIAL: index, SETTINGS: packed(self._settings_of(points[index]))}
        return Searcher.FINISHED if len(self._given) == self._search.most else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The records say it all."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep is restored from its records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""


class Watcher:
    """Is told what happens in a sweep."""

    def on_progress(self, index: int, point: Point, reported: Mapping[str, float]) -> None:
        """A trial began (nothing is reported yet), or came to a rung."""

    def on_end(self, record: TrialRecord) -> None:
        """A trial ended and its record is written."""

    def on_tick(self) -> None:
        """Time passed: several times a second."""


class _Book(tune.Callback):
    """Writes the record of every trial when it ends, and tells the watchers."""

    def __init__(
        self, plan: SweepPlan, run: Storage, records: dict[int, TrialRecord], watchers: Sequence[Watcher]
    ) -> None:
        self.records = records
        self._plan, self._run, self._watchers = plan, run, watchers
        self._history: dict[int, list[dict[str, float]]] = {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for watcher in self._watchers:
            watcher.on_tick()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._history[trial.config[TRIAL]] = []  # a trial that lost its worker begins anew
        self._tell(trial.config[TRIAL], {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if FAILURE not in result:
            figures = _figures(result)
            self._history.setdefault(trial.config[TRIAL], []).append(figures)
            self._tell(trial.config[TRIAL], figures)

    def _tell(self, index: int, figures: Mapping[str, float]) -> None:
        for watcher in self._watchers:
            watcher.on_progress(index, self._point(index), figures)

    def _point(self, index: int) -> Point:
        return self._plan.search.points(self.records)[index]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        reason = result.get(FAILURE)
        whole = result.get(FIDELITY, 0) >= self._plan.pruning.rungs[-1]
        status = "refused" if reason is not None else "ok" if whole else "pruned"
        self._keep(trial, status, reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._keep(trial, "lost", why_lost(trial))

    def _keep(self, trial: Any, status: str, reason: str | None) -> None:
        index, result = trial.config[TRIAL], trial.last_result or {}
        history = self._history.get(index, [])
        record = TrialRecord(
            index=index,
            point=self._point(index),
            status=status,
            metrics=history[-1] if history else {},
            settings=self._plan.decided_by,
            reason=reason,
            history=history,
            worker=result.get(WORKER),
            model_loads=int(result.get(LOADS, 0)),
            losses=trial.num_failures,
        )
        self.records[index] = record
        self._run.write_json(record_name(index), asdict(record))
        for watcher in self._watchers:
            watcher.on_end(record)


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that the trial reported, without what Tune adds."""
    return {name: float(value) for name, value in result.items() if name.startswith((*MEASURED, FIDELITY))}


def why_lost(trial: Any) -> str:
    """What Tune noted on the driver of the error: the exception's own line, and the end of what it says in several."""
    noted = Path(trial.error_file).read_text() if trial.error_file else ""
    lines = [line.strip() for line in noted.splitlines() if line.strip()] or ["unknown error"]
    named = [line for line in lines if _EXCEPTION.match(line)]
    return " ".join(dict.fromkeys([*named[-1:], lines[-1]]))[:_MOST_REASON]


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
