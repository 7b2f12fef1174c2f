"""The typed root of every job's configuration, and its composition from the YAML files of `mfm_ray/conf`.

A root covers what has no constructor: budget, cadence, storage, resources. `network`, `objective`, `reward` and
`steering` are plain dicts, because the constructor that they name is their schema. Default values stand in the YAML
files alone; types, bounds and meaning stand here. With `mfm_ray/jobs` contract aside, nothing else imports Hydra.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mfm_ray.errors import InputError
from mfm_ray.settings import setting


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job takes."""

    name: str = setting("folder of this run below storage")
    storage: str = setting("folder or URI that holds the runs; absolute when submitted with ray job submit")
    seed: int = setting("seed of every random choice", minimum=0, maximum=2**31 - 1)
    resume: bool = setting("go on with the run of this name")
    overwrite: bool = setting("replace the run of this name")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    name: str = setting("name of the data set")
    path: str | None = setting("prepared shards; null: bundled data, prepared below the run's own folder")
    source: str | None = setting("folder of raw files; null for bundled data")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = setting("optimiser", choices=("radam", "adam", "adamw"))
    learning_rate: float = setting("learning rate after warm-up", above=0, maximum=10)
    betas: list[float] = setting("decay of the two moments", minimum=0, below=1)
    eps: float = setting("added to the root of the second moment", above=0)
    weight_decay: float = setting("decoupled for adamw and radam, L2 for adam", minimum=0)


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    stage: int = setting("DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    offload: bool = setting("keep optimiser state (stage 3: parameters too) in host memory; GPUs only")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    num_workers: int | list[int] = setting("training workers", minimum=1)
    use_gpu: bool | None = setting("one GPU for each worker; null: when there are enough of them")
    resources_per_worker: dict[str, float] = setting("Ray resources of one worker", minimum=0)
    start_timeout_s: float = setting("seconds to wait for the workers' resources", above=0)
    max_failures: int = setting("how often a lost worker restarts the group from its last checkpoint", minimum=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(JobConfig):
    """Root of `jobs.train`. Its plain form (`to_dict`) is what workers get and every checkpoint carries."""

    experiment: str | None = setting("recipe that the defaults come from")
    data: DataConfig = setting("training data")
    network: dict[str, Any] = setting("network by name, with its constructor's arguments")
    objective: dict[str, Any] = setting("objective by name, with its constructor's arguments")
    max_steps: int = setting("optimiser steps", minimum=1)
    max_seconds: float | None = setting("stop after so many seconds of training; null: never", above=0)
    global_batch_size: int = setting("rows of one optimiser step, all workers together", minimum=1)
    micro_batch_size: int | None = setting("rows of one forward pass of one worker; null: all of its part", minimum=1)
    optimizer: OptimizerConfig = setting("optimiser")
    warmup_steps: int = setting("steps in which the learning rate rises linearly from 0", minimum=0)
    learning_rate_schedule: str = setting(
        "after warm-up: constant, or a cosine to 0 at max_steps", choices=("constant", "cosine")
    )
    gradient_clipping: float = setting("largest global gradient norm; 0: no clipping", minimum=0)
    ema_decay: float = setting("decay of the averaged weights, fp32; 0: the last weights", minimum=0, below=1)
    precision: str = setting("arithmetic of the network", choices=("fp32", "bf16"))
    zero: ZeroConfig = setting("sharding")
    scaling: ScalingConfig = setting("workers and their resources")
    checkpoint_every: int = setting("steps between checkpoints", minimum=1)
    checkpoints_to_keep: int = setting("checkpoints kept, the newest", minimum=1)
    log_every: int = setting("steps between lines of metrics.jsonl", minimum=1)
    sample_every: int = setting("steps between sample grids; 0: none", minimum=0)
    classifier_steps: int = setting("training steps of the class judge saved beside the model; 0: none", minimum=0)


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig(JobConfig):
    data: DataConfig = setting("data to prepare")
    output: str = setting("folder or URI of the shards")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(JobConfig):
    checkpoint: str | None = setting("checkpoint folder of a training run")
    output: str | None = setting("folder or URI of the model; null: model/ in the run's own folder")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(JobConfig):
    model: str | None = setting("model directory: folder or URI")
    num_samples: int = setting("samples", minimum=1)
    num_steps: int = setting("steps of the sampler", minimum=1)
    dynamics: str = setting("deterministic or stochastic sampler", choices=("ode", "sde"))
    preset: str | None = setting("named recipe of the sampler", choices=("paper",))
    label: int | None = setting("class of all samples; null: unconditional", minimum=0)
    cfg_scale: float | None = setting("classifier-free guidance; null: none")
    batch_size: int = setting("samples that share one network call", minimum=1)
    steering: dict[str, Any] = setting("steering method by name, with its constructor's arguments")
    reward: dict[str, Any] = setting("reward by name, with its constructor's arguments")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JobConfig):
    protocol: dict[str, Any] = setting("what is measured, by name, with its settings")
    model: str | None = setting("model directory; null: the protocol's own recipe is trained")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(JobConfig):
    experiment: str = setting("training recipe of the demo's model")
    protocol: dict[str, Any] = setting("what is measured and drawn in the report")
    num_workers: int = setting("training workers", minimum=1)


ROOTS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "prepare_data": PrepareDataConfig,
    "export": ExportConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "demo": DemoConfig,
}


def to_dict(config: JobConfig) -> dict[str, Any]:
    """The plain nested form: dicts, lists, numbers, texts; JSON-able."""
    return dataclasses.asdict(config)
