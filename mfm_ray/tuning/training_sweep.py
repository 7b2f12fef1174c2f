"""A sweep over trainings on Ray Tune: resumed where it was left, stopped early or perturbed, the best models kept.

Every trial has its folder `trainings/<number>/`, laid out as that of `jobs.train`, and its record
`trials/<number>.json`, written at each of its checkpoints. A resumed sweep takes what ended trials say, tells the
scheduler what all of them have reported, and goes on with the others from their newest checkpoints.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray import tune

from mfm_ray.environment import environment_defaults
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint_store import CHECKPOINTS
from mfm_ray.tuning.front import HALF_WIDTH
from mfm_ray.tuning.scheduling import Race, Scheduling
from mfm_ray.tuning.space import Point
from mfm_ray.tuning.sweep import TUNE, TUNE_ENVIRONMENT, TrialRecord, read_record, record_name, why_lost
from mfm_ray.tuning.training_trial import (
    FAILURE,
    FOLDER,
    INHERITED,
    LOST,
    STEP,
    TRIAL,
    WHOLE,
    WORKER,
    Mailbox,
    TrainingSpec,
    TrainingTrial,
    changes_of,
    exploits_of,
    training_folder,
)

Log = Callable[[str], None]
MODEL = "model"
_HISTORY = (CHECKPOINTS, MODEL, INHERITED)  # what goes when a trial is not among the best
# a trial only waits for its workers, which have resources of their own; Tune wants some resource above 0
_TRIAL_RESOURCES = {"CPU": 0.0, "memory": float(1 << 20)}
# of what a training reports: the measured figures by the beginning of their names, and these
_MEASURED = ("posterior_", "sample_", "confidence", "frechet", "judge.", "diversity", "drift_change")
# a fine-tuning's own `reward`, of its rows, gives way to the measured one; its `reward.anchors` is none of a model
_TOLD = (STEP, "seconds", "loss", "learning_rate", "reward", "reward" + HALF_WIDTH)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The trials of a sweep: points by index, the hash of all that decides them beside their points, and the race."""

    points: Sequence[Point]
    decided_by: str
    race: Race
    scheduling: Scheduling
    models_to_keep: int


def known_records(run: Storage, plan: TrainingPlan) -> dict[int, TrialRecord]:
    """What earlier calls of this sweep wrote of trials, ended or not, by index."""
    found = (read_record(run, index) for index in range(len(plan.points)))
    return {
        record.index: record
        for record in found
        if record is not None and record.settings == plan.decided_by and record.point == plan.points[record.index]
    }


def run_training_sweep(
    plan: TrainingPlan,
    spec: TrainingSpec,
    known: Mapping[int, TrialRecord],
    *,
    concurrent: int,
    max_failures: int,
    log: Log,
) -> dict[int, TrialRecord]:
    """All records by index, those that had ended included. Ray must be running; failing trials are recorded."""
    missing = [index for index in range(len(plan.points)) if index not in known or not known[index].is_final]
    book = TrainingBook(plan, spec.run, known, log)
    book.keep_the_best()
    if not missing:
        return book.records
    for index in missing:
        if index not in known:  # of another sweep of this name
            training_folder(spec.run, index).delete()
    history = {index: record.history for index, record in known.items()}
    told = replace(
        spec,
        mailbox=Mailbox.remote(),  # type: ignore[attr-defined]
        reported={index: int(reports[-1][STEP]) for index, reports in history.items() if reports},
    )
    trainable: Any = tune.with_parameters(TrainingTrial, spec=told)
    with environment_defaults(TUNE_ENVIRONMENT), warnings.catch_warnings():
        # an actor cannot be kept: the training that runs in it ends with its process
        warnings.filterwarnings("ignore", message="Consider boosting PBT performance", category=UserWarning)
        tune.Tuner(
            tune.with_resources(trainable, _TRIAL_RESOURCES),
            param_space={TRIAL: tune.grid_search(missing), **_changeable(plan, spec.run)},
            tune_config=tune.TuneConfig(
                scheduler=plan.scheduling.scheduler(plan.race, history),
                max_concurrent_trials=concurrent,
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                **spec.run.for_ray,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, num_to_keep=3),
                callbacks=[book],
                failure_config=tune.FailureConfig(max_failures=max_failures),
            ),
        ).fit()
    book.keep_the_best()  # a trial that was stopped may have written a checkpoint while it ended
    spec.run.delete(TUNE)
    return book.records


def _changeable(plan: TrainingPlan, run: Storage) -> dict[str, Any]:
    """The settings that the scheduler may change, as each trial has them now."""
    now = {index: {**point, **changes_of(training_folder(run, index))} for index, point in enumerate(plan.points)}

    def value_of(key: str) -> Any:
        return tune.sample_from(lambda config: now[config[TRIAL]][key])

    return {key: value_of(key) for key in plan.scheduling.perturbed(plan.race)}


class TrainingBook(tune.Callback):
    """Writes the record of every trial at each report and at its end, keeps the best models, says how far it all is."""

    def __init__(self, plan: TrainingPlan, run: Storage, known: Mapping[int, TrialRecord], log: Log) -> None:
        self.records = {index: record for index, record in known.items() if record.is_final}
        self._plan, self._run, self._log = plan, run, log
        self._history = {index: list(record.history) for index, record in known.items()}
        self._before, self._began = len(self.records), time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._write(self._record(trial.config[TRIAL], "running", None, {}))  # from here on its folder is its own

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if FAILURE in result:
            return
        index, history = trial.config[TRIAL], self._history.setdefault(trial.config[TRIAL], [])
        # a trial that took over another one's checkpoint, or lost its own newest one, passes the same steps again
        history[:] = [reported for reported in history if reported[STEP] < result[STEP]]
        history.append(_figures(result))
        self._write(self._record(index, "running", None, result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        reason = result.get(FAILURE)
        status = "ok" if result.get(WHOLE) else "pruned"
        if reason is not None:
            status = "lost" if result.get(LOST) else "refused"
        # files are named from the sweep's folder on: what is told of a trial does not depend on where it ran
        self._end(trial, status, reason and reason.replace(self._run.uri_of(FOLDER), FOLDER))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "lost", why_lost(trial))

    def keep_the_best(self) -> None:
        """Removes the checkpoints of ended trials that are not among the best; a lost one needs its own to go on."""
        kept = kept_trials(self.records, self._plan)
        for index, record in self.records.items():
            if index not in kept and record.is_final:
                for name in _HISTORY:
                    training_folder(self._run, index).delete(name)

    def _end(self, trial: Any, status: str, reason: str | None) -> None:
        index = trial.config[TRIAL]
        record = self._record(index, status, reason, trial.last_result or {})
        self._write(record)
        self.records[index] = record
        self.keep_the_best()
        self._log(self._line(record))

    def _record(self, index: int, status: str, reason: str | None, result: Mapping[str, Any]) -> TrialRecord:
        history = self._history.get(index, [])
        return TrialRecord(
            index=index,
            point=self._plan.points[index],
            status=status,
            metrics=history[-1] if history else {},
            settings=self._plan.decided_by,
            reason=reason,
            history=history,
            worker=result.get(WORKER),
            exploits=exploits_of(training_folder(self._run, index)),
        )

    def _write(self, record: TrialRecord) -> None:
        self._run.write_json(record_name(record.index), asdict(record))

    def _line(self, record: TrialRecord) -> str:
        done, total, name = len(self.records), len(self._plan.points), self._plan.race.metric
        left = (time.monotonic() - self._began) / max(1, done - self._before) * (total - done)
        steps, value = record.metrics.get(STEP, 0), record.metrics.get(name, math.nan)
        point = " ".join(f"{key}={value}" for key, value in record.point.items())
        what = record.reason or f"{name} {value:.4g} after {steps:.0f} steps"
        return f"{done} of {total} trials, {left:.0f} s left: {point}: {record.status}, {what}"


def kept_trials(records: Mapping[int, TrialRecord], plan: TrainingPlan) -> list[int]:
    """The best finished trials by the first objective, the best one first."""
    sign = 1.0 if plan.race.mode == "min" else -1.0
    finished = [record for record in records.values() if record.status == "ok" and plan.race.metric in record.metrics]
    finished.sort(key=lambda record: (sign * record.metrics[plan.race.metric], record.index))
    return [record.index for record in finished[: plan.models_to_keep]]


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """What the training reported, without what Tune adds."""
    return {name: float(value) for name, value in result.items() if name in _TOLD or name.startswith(_MEASURED)}
