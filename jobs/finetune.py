"""Tunes the drift of a model towards a reward on Ray Train with DeepSpeed, once, so that plain samples follow the
tilted law; leaves a model directory.

python -m jobs.finetune model=runs/digits/model reward=brightness
python -m jobs.finetune model=runs/digits/model reward=class_probability reward.label=3 reward_multiplier=2 name=threes
ray job submit --working-dir . -- python -m jobs.finetune model=/shared/model reward=symmetry storage=/shared/runs
"""

from dataclasses import dataclass
from typing import Any

from jobs.cluster import num_gpus, ray_cluster
from jobs.contract import JobRun, Outcome, run_job
from jobs.train import may_join
from jobs.workbench import Workbench
from mfm_ray.config import FinetuneConfig, to_dict
from mfm_ray.errors import InputError


def check(config: FinetuneConfig) -> None:
    """What can be known before a cluster is there: model, reward, method and data fit each other, the batch divides."""
    import torch

    from mfm_ray.training.finetune_launch import check_finetuning

    check_finetuning(config)
    if config.scaling.use_gpu and not may_join() and not torch.cuda.is_available():
        raise InputError("scaling.use_gpu=true: this machine has no CUDA device; expected false or null")
    bench = Workbench(config.model)
    bench.check_cfg_scale(config.cfg_scale)
    bench.reward(config.reward, seed=config.seed)


def body(run: JobRun) -> Outcome:
    from mfm_ray.training.finetune_launch import run_finetuning

    config: FinetuneConfig = run.config
    reward = Workbench(config.model).reward(config.reward, seed=config.seed)
    with ray_cluster(run.log):
        if config.scaling.use_gpu and num_gpus() == 0:
            raise InputError("scaling.use_gpu=true: the cluster has no GPU; expected false or null")
        result = run_finetuning(
            to_dict(config), run.storage, make_reward=LocalReward(reward), resume=config.resume, log=run.log
        )
    return Outcome(metrics=result.metrics, artifacts=result.artifacts)


@dataclass(frozen=True)
class LocalReward:
    """A reward that travels to the workers as it is."""

    reward: Any

    def __call__(self) -> Any:
        return self.reward


if __name__ == "__main__":
    run_job("finetune", body, check=check)
