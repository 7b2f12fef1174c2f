"""Sweeps over `jobs.finetune`: every trial tunes the same model to the same reward, measured on plain samples."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.contract import JobRun
from jobs.finetune import check_parts, reward_of
from jobs.swept_training import Prepared, SweptTraining
from jobs.workbench import Workbench
from mfm_ray.config import FinetuneConfig, FinetuneSweepConfig
from mfm_ray.errors import InputError
from mfm_ray.latent_models import Decoding, autoencoder_checksum
from mfm_ray.settings import shown
from mfm_ray.storage import Storage

# what a trial measures is what the sweep measures: no process of its own beside it, no weights chosen by it
_UNEVALUATED: dict[str, Any] = {"evaluate_every": 0, "best_metric": None, "stop_on_hacking": False}


class SweptFinetune(SweptTraining[FinetuneSweepConfig]):
    root = FinetuneConfig

    def sweepable(self) -> Any:
        from mfm_ray.tuning.training_space import FINETUNE

        return FINETUNE

    def common(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "judges": []}

    def check(self, config: FinetuneSweepConfig, trials: Sequence[FinetuneConfig]) -> None:
        from mfm_ray.training.finetune_launch import check_finetuning

        for key, only in _UNEVALUATED.items():
            given = getattr(config, key)
            if given != only:
                raise InputError(
                    f"{key}={shown(given)}: trials are measured at their checkpoints alone; expected {shown(only)}"
                )
        if config.preset is not None:
            raise InputError(
                f"preset={config.preset}: a sweep takes no recipe; expected null, and its words "
                "(method.estimator=pathwise, ...) on the command line or in the sweep file"
            )
        if config.reward_app is not None:
            raise InputError(f"reward_app={config.reward_app}: trials of a sweep make their reward; expected null")
        for trial in trials:
            check_finetuning(trial)
        check_parts(config)

    def figures(self, config: FinetuneSweepConfig) -> Mapping[str, str]:
        from mfm_ray.training.finetune_launch import metrics_of
        from mfm_ray.tuning.tuned_quality import figures_of

        return figures_of(metrics_of(config))

    def decisive(self, config: FinetuneSweepConfig) -> dict[str, Any]:
        from jobs.sample_shards import model_checksum

        model = Storage(str(config.model))
        autoencoder = autoencoder_checksum(model, Decoding.of(config))
        return {"model": model_checksum(model), **({} if autoencoder is None else {"autoencoder": autoencoder})}

    def prepare(self, run: JobRun, trials: Sequence[FinetuneConfig]) -> Prepared:
        from mfm_ray.training.finetune_launch import data_of, evaluation_plan, run_finetuning
        from mfm_ray.tuning.tuned_quality import TunedQuality

        config: FinetuneSweepConfig = run.config
        data = None if config.data.from_model else data_of(config, Storage(str(config.model)), run.storage, run.log)
        make_reward = reward_of(config)
        judges = Workbench(config.model, Decoding.of(config)).judges(config.judges, seed=config.seed)
        plan = evaluation_plan(config, run=run.storage, data=data, judges=judges, make_reward=make_reward)
        # trials run in processes elsewhere: places are whole
        places = {} if data is None else {"data": {**dataclasses.asdict(config.data), "path": data.uri}}
        return Prepared(
            own={"model": plan.base.uri, "autoencoder": plan.decoding.autoencoder, **places},
            measure=TunedQuality(plan),
            train=functools.partial(run_finetuning, make_reward=make_reward, judges={}),
        )
