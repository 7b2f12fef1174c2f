"""Trains a meta flow map on Ray Train with DeepSpeed, from a recipe, and leaves a model directory.

python -m jobs.train experiment=digits
python -m jobs.train experiment=digits name=small max_steps=200 network.width=128 scaling.num_workers=1
ray job submit --working-dir . -- python -m jobs.train experiment=digits storage=/shared/runs
"""

import os

from jobs.cluster import num_gpus, ray_cluster
from jobs.contract import JobRun, Outcome, run_job
from jobs.run_folder import is_submitted
from mfm_ray.config import TrainConfig, to_dict
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError


def check(config: TrainConfig) -> None:
    """What can be known before a cluster is there: the batch divides, the data is whole, the network can be built."""
    check_settings(config, *data_of(config))


def check_settings(config: TrainConfig, space: DataSpace, num_classes: int) -> None:
    """`check` without a look at the data, whose space and number of classes are given."""
    import torch

    from mfm_ray.networks import build_network
    from mfm_ray.training.launch import check_config
    from mfm_ray.training.starting import check_start

    check_config(config)
    if config.scaling.use_gpu and not may_join() and not torch.cuda.is_available():
        raise InputError("scaling.use_gpu=true: this machine has no CUDA device; expected false or null")
    if config.classifier_steps and not num_classes:
        raise InputError(f"classifier_steps={config.classifier_steps}: {config.data.name} has no classes; expected 0")
    with torch.device("meta"):
        build_network(config.network, space=space, num_classes=num_classes)
    check_start(config.init_from, config.network, space=space, num_classes=num_classes)


def body(run: JobRun) -> Outcome:
    from mfm_ray.training.launch import run_training

    config: TrainConfig = run.config
    with ray_cluster(run.log):
        if config.scaling.use_gpu and num_gpus() == 0:
            raise InputError("scaling.use_gpu=true: the cluster has no GPU; expected false or null")
        result = run_training(to_dict(config), run.storage, resume=config.resume, log=run.log)
    return Outcome(metrics=result.metrics, artifacts=result.artifacts)


def data_of(config: TrainConfig) -> tuple[DataSpace, int]:
    """Space and number of classes of the training data, after a look at every byte of it."""
    from jobs.prepare_data import make_dataset
    from mfm_ray.data.shards import verify_shards

    if config.data.path is None:
        dataset = make_dataset(config.data.name)
        return dataset.space, dataset.num_classes
    manifest = verify_shards(config.data.path)
    if manifest.name != config.data.name:
        raise InputError(f"data.path={config.data.path}: holds {manifest.name}, expected data.name={config.data.name}")
    return manifest.space, manifest.num_classes


def may_join() -> bool:
    """Whether the GPUs that count may be those of another machine."""
    return is_submitted() or "RAY_ADDRESS" in os.environ


if __name__ == "__main__":
    run_job("train", body, check=check)
