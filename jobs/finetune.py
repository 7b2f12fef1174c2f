"""Tunes the drift of a model towards a reward on Ray Train with DeepSpeed, once, so that plain samples follow the
tilted law; leaves a model directory.

python -m jobs.finetune model=runs/digits/model reward=brightness
python -m jobs.finetune model=runs/digits/model reward=class_probability reward.label=3 reward_multiplier=2 name=threes
ray job submit --working-dir . -- python -m jobs.finetune model=/shared/model reward=symmetry storage=/shared/runs
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.cluster import joins_a_cluster, num_gpus, ray_cluster
from jobs.contract import JobRun, Outcome, run_job
from jobs.served_reward import ServedReward
from jobs.train import may_join
from jobs.workbench import Workbench
from mfm_ray.config import FinetuneConfig, to_dict
from mfm_ray.errors import InputError
from mfm_ray.latent_models import Decoding

MakeReward = Callable[[], Any]


def check(config: FinetuneConfig) -> None:
    """What can be known before a cluster is there: model, reward, method and data fit each other, the batch divides."""
    from mfm_ray.training.finetune_launch import check_finetuning

    check_finetuning(config)
    check_parts(config)


def check_parts(config: FinetuneConfig) -> None:
    """The part of `check` that looks into the model: reward, judges and guidance scale are ones that it takes."""
    import torch

    if config.scaling.use_gpu and not may_join() and not torch.cuda.is_available():
        raise InputError("scaling.use_gpu=true: this machine has no CUDA device; expected false or null")
    bench = Workbench(config.model, Decoding.of(config))
    bench.check_cfg_scale(config.cfg_scale)
    bench.reward(config.reward, seed=config.seed)
    bench.judges(config.judges, seed=config.seed)
    if config.reward_app is not None:
        if not joins_a_cluster():
            raise InputError(
                f"reward_app={config.reward_app}: no cluster to join, this job would start its own; expected "
                "RAY_ADDRESS to be that of a cluster that serves it, or null"
            )
        ServedReward.of(config)
    elif config.reward_model is not None:
        raise InputError(f"reward_model={config.reward_model}: is of a served reward; expected null without reward_app")


def body(run: JobRun) -> Outcome:
    from mfm_ray.training.finetune_launch import run_finetuning

    config: FinetuneConfig = run.config
    judges = Workbench(config.model, Decoding.of(config)).judges(config.judges, seed=config.seed)
    with ray_cluster(run.log):
        if config.scaling.use_gpu and num_gpus() == 0:
            raise InputError("scaling.use_gpu=true: the cluster has no GPU; expected false or null")
        result = run_finetuning(
            to_dict(config),
            run.storage,
            make_reward=reward_of(config),
            judges=judges,
            resume=config.resume,
            log=run.log,
        )
    return Outcome(metrics=result.metrics, artifacts=result.artifacts)


def reward_of(config: FinetuneConfig) -> MakeReward:
    """What makes the reward on a worker. InputError for a served one that is not there."""
    if config.reward_app is None:
        return LocalReward(Workbench(config.model, Decoding.of(config)).reward(config.reward, seed=config.seed))
    served = ServedReward.of(config)
    served.require_running()
    return served


@dataclass(frozen=True)
class LocalReward:
    """A reward that travels to the workers as it is."""

    reward: Any

    def __call__(self) -> Any:
        return self.reward


if __name__ == "__main__":
    run_job("finetune", body, check=check)
