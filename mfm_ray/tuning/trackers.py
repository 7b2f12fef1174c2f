"""Other places that trials go to when asked: TensorBoard, MLflow, and a study that optuna-dashboard opens.

A trial is written whole when it has ended, and only where it is not there yet: a resumed sweep fills the gaps.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.tuning.search import DIRECTIONS, import_optuna
from mfm_ray.tuning.space import Point, Setting, ask_point
from mfm_ray.tuning.sweep import TrialRecord, Watcher
from mfm_ray.tuning.trial import FIDELITY

_TENSORBOARD, _MLFLOW, _STUDY = "tensorboard", "mlflow.db", "optuna.db"


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What a tracker knows of a sweep."""

    name: str
    settings: Mapping[str, Setting]
    objectives: Mapping[str, str]
    run: Storage


class TensorBoardTracker(Watcher):
    """`tensorboard/<index>/`: a scalar a metric over the number of samples, and the point as hyperparameters."""

    def __init__(self, sweep: Tracked) -> None:
        self._folder = _local(sweep.run) / _TENSORBOARD

    def on_end(self, record: TrialRecord) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder, partial = (self._folder / f"{dot}{record.index:05d}" for dot in ("", "."))
        if folder.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)  # of a sweep that was killed while it wrote
        with SummaryWriter(str(partial)) as writer:
            for reported in record.history:
                for name, value in _metrics(reported).items():
                    writer.add_scalar(name, value, int(reported[FIDELITY]))
            point = {**_plain(record.point), "status": record.status}
            finals = {f"final/{name}": value for name, value in _metrics(record.metrics).items()}
            writer.add_hparams(point, finals, run_name=".", global_step=int(record.metrics.get(FIDELITY, 0)))
        partial.rename(folder)


class MLflowTracker(Watcher):
    """A run a trial in the experiment of the sweep's name, at MLFLOW_TRACKING_URI or else in `mlflow.db`."""

    def __init__(self, sweep: Tracked) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_local(sweep.run) / _MLFLOW}")
        self._sweep = sweep.run.uri
        found = self._client.get_experiment_by_name(sweep.name)
        place = None if "MLFLOW_TRACKING_URI" in os.environ else (_local(sweep.run) / "mlflow").as_uri()
        self._experiment = found.experiment_id if found else self._client.create_experiment(sweep.name, place)
        # by the sweep's place: an experiment of this name may hold other sweeps as well
        runs = self._client.search_runs([self._experiment], f"tags.sweep = '{self._sweep}'", max_results=50_000)
        self._there = {run.data.tags["trial"] for run in runs if run.info.status != "RUNNING"}

    def on_end(self, record: TrialRecord) -> None:
        if str(record.index) in self._there:
            return
        tags = {"sweep": self._sweep, "trial": str(record.index), "status": record.status}
        run = self._client.create_run(self._experiment, run_name=f"{record.index:05d}", tags=tags).info.run_id
        for key, value in _plain(record.point).items():
            self._client.log_param(run, key, value)
        for reported in record.history:
            for name, value in _metrics(reported).items():
                self._client.log_metric(run, name, value, step=int(reported[FIDELITY]))
        self._client.set_terminated(run, "FINISHED" if record.reason is None else "FAILED")
        self._there.add(str(record.index))


class OptunaTracker(Watcher):
    """`optuna.db`: a study of the sweep's name with the objectives, whatever search made the points."""

    def __init__(self, sweep: Tracked) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._sweep, self._states = sweep, optuna.trial.TrialState
        self._study = optuna.create_study(
            study_name=sweep.name,
            storage=f"sqlite:///{_local(sweep.run) / _STUDY}",
            directions=[DIRECTIONS[mode] for mode in sweep.objectives.values()],
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # names of the dashboard's axes
            self._study.set_metric_names(list(sweep.objectives))
        done = (trial for trial in self._study.trials if trial.state.is_finished())
        self._there = {trial.user_attrs["trial"] for trial in done}

    def on_end(self, record: TrialRecord) -> None:
        if record.index in self._there:
            return
        noted = {"trial": record.index, "status": record.status, "reason": record.reason, **_metrics(record.metrics)}
        self._study.enqueue_trial(_plain(record.point, none_is_text=False), user_attrs=noted)
        trial = self._study.ask()
        ask_point(self._sweep.settings, trial)
        values = [record.measured.get(name, math.nan) for name in self._sweep.objectives]
        if all(map(math.isfinite, values)):
            self._study.tell(trial, values)
        else:
            self._study.tell(trial, state=self._states.FAIL)
        self._there.add(record.index)


@dataclass(frozen=True)
class _Kind:
    open: Callable[[Tracked], Watcher]
    needs: Callable[[str], None]
    writes_files: Callable[[], bool]


def check_trackers(names: Sequence[str], run: Storage) -> None:
    """InputError for a tracker whose package is not installed, and for files in a storage that is not local."""
    for name in names:
        TRACKERS[name].needs(name)
        if TRACKERS[name].writes_files() and run.local_path is None:
            raise InputError(f"log_to=[{name}]: {run.uri} is not local, and {name} writes files; expected a folder")


def open_trackers(names: Sequence[str], sweep: Tracked) -> list[Watcher]:
    return [TRACKERS[name].open(sweep) for name in names]


def _needs_mlflow(name: str) -> None:
    if importlib.util.find_spec("mlflow") is None:
        raise InputError("log_to=[mlflow]: mlflow is not installed; pip install 'mfm_ray[tune]'")


TRACKERS: Mapping[str, _Kind] = {
    "tensorboard": _Kind(TensorBoardTracker, lambda name: None, lambda: True),
    "mlflow": _Kind(MLflowTracker, _needs_mlflow, lambda: "MLFLOW_TRACKING_URI" not in os.environ),
    "optuna": _Kind(OptunaTracker, lambda name: import_optuna("[optuna]", key="log_to"), lambda: True),
}


def _local(run: Storage) -> Any:
    assert run.local_path is not None, "check_trackers was not called"
    run.local_path.mkdir(parents=True, exist_ok=True)
    return run.local_path.resolve()


def _metrics(reported: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in reported.items() if name != FIDELITY}


def _plain(point: Point, *, none_is_text: bool = True) -> dict[str, Any]:
    """Values that a table of hyperparameters takes; as `Dimension.ask` names them."""
    kinds = (str, bool, int, float) if none_is_text else (str, bool, int, float, type(None))
    return {key: value if isinstance(value, kinds) else json.dumps(value) for key, value in point.items()}
