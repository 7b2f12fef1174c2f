"""Sweeps over `jobs.train`: every trial trains a model on the same data, measured on what was held out."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.contract import JobRun
from jobs.recipe import prepared_data
from jobs.swept_training import Prepared, SweptTraining
from jobs.train import check_settings, data_of
from mfm_ray.config import TrainConfig, TrainSweepConfig
from mfm_ray.storage import Storage


class SweptTrain(SweptTraining[TrainSweepConfig]):
    root = TrainConfig

    def sweepable(self) -> Any:
        from mfm_ray.tuning.training_space import TRAIN

        return TRAIN

    def common(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings

    def check(self, config: TrainSweepConfig, trials: Sequence[TrainConfig]) -> None:
        space, num_classes = data_of(config)
        for trial in trials:
            check_settings(trial, space, num_classes)

    def figures(self, config: TrainSweepConfig) -> Mapping[str, str]:
        from mfm_ray.tuning.training_quality import figures_of

        return figures_of(config.data.name, has_classifier=config.classifier_steps > 0)

    def decisive(self, config: TrainSweepConfig) -> dict[str, Any]:
        return {}

    def prepare(self, run: JobRun, trials: Sequence[TrainConfig]) -> Prepared:
        from mfm_ray.training.launch import run_training
        from mfm_ray.tuning.training_quality import HeldOutQuality

        config: TrainSweepConfig = run.config
        data = prepared_data(config, run)
        _check_on(data, trials)
        judge = _judge_of(config, data, run)
        return Prepared(
            # the sweep measures with one judge of its own, and gives it to the models that stay
            own={"data": {"name": config.data.name, "path": data.uri}, "classifier_steps": 0},
            measure=HeldOutQuality(
                data=data,
                num_rows=config.heldout.num_rows,
                num_draws=config.heldout.num_draws,
                seed=config.seed,
                classifier=None if judge is None else judge.classifier,
            ),
            train=run_training,
            judge=judge,
        )


def _check_on(data: Storage, trials: Sequence[TrainConfig]) -> None:
    """What only the prepared data show of the trials' settings: images to jitter, a teacher of the same data."""
    from mfm_ray.data.shards import read_manifest
    from mfm_ray.training.launch import check_images
    from mfm_ray.training.teacher import check_teacher

    manifest = read_manifest(data)
    for trial in trials:
        check_images(trial, manifest)
        check_teacher(trial.objective, manifest)


def _judge_of(config: TrainSweepConfig, data: Storage, run: JobRun) -> Any:
    """The classifier of the training data, one for the whole sweep; None where the recipe wants none."""
    from mfm_ray.training.final_model import train_judge

    if config.classifier_steps:
        run.log(f"training the classifier of {config.data.name}")
    return train_judge(config, data)
