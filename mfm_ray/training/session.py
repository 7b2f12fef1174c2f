"""What one worker holds while it trains: the sharded network, its data, the plan that the driver made."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_ray.config import TrainingConfig
from mfm_ray.flow_map import FlowMap
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training.ema import ShardedEMA, ema_decays
from mfm_ray.training.heartbeat import Heartbeat
from mfm_ray.training.metrics_log import StepWindow
from mfm_ray.training.patience import Patience
from mfm_ray.training.pretraining import Pretraining
from mfm_ray.training.task import Feed, Task, Work
from mfm_ray.training.throughput import Throughput
from mfm_ray.training.time_buckets import BucketWindow
from mfm_ray.training.zero import BatchSplit, LearningRate, ZeroEngine, prepare, split_batch, zero_config

# M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD (its largest value) of malloc.h, in bytes
_MALLOC_OPTIONS = {-1: 1 << 30, -2: 64 << 20, -3: 32 << 20}

Measure = Callable[[FlowMap], dict[str, float]]
"""Figures of a model, by name; travels to the workers."""


@dataclass(frozen=True)
class Plan:
    """What the driver tells every worker; plain values, so that it travels and is kept in checkpoints.

    config: the resolved training configuration; data, run: locations of the shards, None where there are none, and of
    the run's folder; model: the config.json of the model; task: which kind of training it is; progress, evaluator:
    handles of the actors that show progress and evaluate, or None; measure: what is measured on the averaged model at
    each checkpoint, on rank 0, or None; start_from: a checkpoint of another run that this one goes on from, or None;
    reports: whether callbacks of Ray Train wait for the figures of each checkpoint; monitor: handle of the actor that
    workers send heartbeats to, or None.
    """

    config: dict[str, Any]
    data: Storage | None
    run: Storage
    model: dict[str, Any]
    cuda: bool
    task: Task = field(default_factory=Pretraining)
    progress: Any = None
    evaluator: Any = None
    measure: Measure | None = None
    start_from: Storage | None = None
    reports: bool = False
    monitor: Any = None

    @property
    def source(self) -> Storage:
        """Where the data are, of a task that has data."""
        assert self.data is not None
        return self.data


@dataclass
class Training:
    """Everything one worker holds."""

    plan: Plan
    config: TrainingConfig
    work: Work
    engine: ZeroEngine
    ema: ShardedEMA
    data: Any
    feed: Feed
    split: BatchSplit
    learning_rate: LearningRate
    window: StepWindow
    buckets: BucketWindow
    throughput: Throughput
    rank: int
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)
    data_seconds: float = 0.0
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def flow_map(self) -> FlowMap:
        """What is trained."""
        return self.work.flow_map

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier attempts included."""
        return self.seconds_before + time.monotonic() - self.started

    def say(self, line: str) -> None:
        """A line for whoever watches the run, from rank 0."""
        if self.rank == 0:
            self.heartbeat.say(line)

    @property
    def patience(self) -> Patience:
        """For whatever is written to the run's storage."""
        beat = self.heartbeat
        return Patience(timeout_s=self.config.faults.storage_timeout_s, say=beat.say, alive=beat.moved)

    def note(self, step: int, figures: Tensor) -> None:
        """Keep the figures of a step, (micro-steps, n) as `Work.module` returns them, without waiting for them."""
        weights = torch.tensor(self.split.weights(self.rank), dtype=torch.float32, device=figures.device)
        norm = torch.as_tensor(self.engine.gradient_norm, dtype=torch.float32, device=self.engine.device)
        means, sums = figures.tensor_split([len(self.work.columns)], dim=1)
        self.window.add(step + 1, torch.cat([(means * weights.unsqueeze(1)).mean(0), norm.reshape(1)]))
        self.buckets.add(sums.sum(0))


def set_up(plan: Plan) -> Training:
    """Read the data, build the network from the seed, shard it. Collective."""
    keep_freed_memory()
    config = from_dict(plan.task.config_type, plan.config)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(max(1, int(config.scaling.resources_per_worker.get("CPU", 1))))
    split = split_batch(
        config.global_batch_size,
        num_workers=world_size,
        micro_batch_size=config.micro_batch_size,
        even=isinstance(config.scaling.num_workers, int),
    )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if plan.cuda else torch.device("cpu")
    work = plan.task.begin(plan, config, device)
    throughput = Throughput.count(work.flow_map, work.terms, config, workers=world_size)
    engine = prepare(
        work.module,
        optimizer=vars(config.optimizer),
        config=zero_config(
            stage=config.zero.stage,
            offload=config.zero.offload,
            split=split,
            gradient_clipping=config.gradient_clipping,
            num_parameters=sum(each.numel() for each in work.flow_map.parameters() if each.requires_grad),
            cuda=plan.cuda,
        ),
        gradient_clipping=config.gradient_clipping,
    )
    data = work.data(split, rank=rank, device=engine.device)
    return Training(
        plan=plan,
        config=config,
        work=work,
        engine=engine,
        ema=ShardedEMA(engine, decays=ema_decays(config.ema_decay)),
        data=data,
        feed=work.feed(data, engine, split, rank=rank),
        split=split,
        learning_rate=LearningRate(
            peak=config.optimizer.learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.learning_rate_schedule,
            max_steps=config.max_steps,
        ),
        window=StepWindow([*work.columns, "gradient_norm"]),
        buckets=BucketWindow([term.name for term in work.terms]),
        throughput=throughput,
        rank=rank,
    )


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed blocks of up to 32 MB for the next step.

    By default it hands them back to the system and pays for fresh pages in every step: on a CPU a fifth of the time
    of a small model's step. Nothing happens where malloc is another one.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in _MALLOC_OPTIONS.items():
            set_option(option, value)
