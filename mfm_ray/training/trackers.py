"""Experiment trackers beside metrics.jsonl and TensorBoard: MLflow and W&B, through Ray's own integrations."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mfm_ray.config import TrainConfig, TrainingConfig, flatten, to_dict
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage

PROJECT = "mfm-ray"


class Tracker(Protocol):
    """Where figures go, on rank 0 alone."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class MLflowTracker:
    """A run of MLflow experiment `mfm-ray`, with every key of the configuration as a parameter.

    It goes to MLFLOW_TRACKING_URI, and without that to mlflow.db in the run's folder where it is a local one.
    """

    def __init__(self, config: TrainingConfig, run: Storage) -> None:
        from ray.air.integrations.mlflow import setup_mlflow

        self._mlflow: Any = setup_mlflow(
            parameters(config),
            tracking_uri=mlflow_uri(run),
            experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
            run_name=config.name,
            create_experiment_if_not_exists=True,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self, *, failed: bool) -> None:
        self._mlflow.end_run(status="FAILED" if failed else "FINISHED")


class WandbTracker:
    """A run of W&B project `mfm-ray`; account and mode come from W&B's own environment variables."""

    def __init__(self, config: TrainingConfig, run: Storage) -> None:
        from ray.air.integrations.wandb import setup_wandb

        project = os.environ.get("WANDB_PROJECT_NAME") or os.environ.get("WANDB_PROJECT") or PROJECT
        group = config.experiment if isinstance(config, TrainConfig) else "finetune"
        self._run: Any = setup_wandb(
            parameters(config), project=project, trial_name=config.name, group=group, dir=_folder(run)
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


TRACKERS: dict[str, type[MLflowTracker] | type[WandbTracker]] = {"mlflow": MLflowTracker, "wandb": WandbTracker}


def check_trackers(names: Sequence[str]) -> None:
    """InputError for a tracker whose package is not installed, with the command that installs it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"trackers=[{','.join(names)}]: {name} is not installed; pip install {name}")


def open_trackers(config: TrainingConfig, run: Storage) -> list[Tracker]:
    """The trackers that the configuration asks for; each attempt of a run is a run of its own there."""
    return [TRACKERS[name](config, run) for name in config.trackers]


def parameters(config: TrainingConfig) -> dict[str, Any]:
    """The configuration by dotted key."""
    return {key: value for key, value in flatten(to_dict(config)).items() if not isinstance(value, Mapping)}


def mlflow_uri(run: Storage) -> str | None:
    """Where MLflow's run goes; None for what MLflow itself decides from its environment."""
    if "MLFLOW_TRACKING_URI" in os.environ or run.local_path is None:
        return None
    return f"sqlite:///{run.local_path / 'mlflow.db'}"


def _folder(run: Storage) -> str | None:
    """Where W&B keeps its own files: a worker's working directory does not outlive the cluster."""
    return None if run.local_path is None else str(run.local_path)
