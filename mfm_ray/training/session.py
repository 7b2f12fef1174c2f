"""What one worker holds while it trains: the sharded network, its data, the plan that the driver made."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_ray.config import TrainConfig
from mfm_ray.data.shards import load_moments, read_manifest
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.objectives import Term, build_objective
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training.ema import ShardedEMA, ema_decays
from mfm_ray.training.feed import Feed, TrainingData
from mfm_ray.training.loss_module import LossModule
from mfm_ray.training.metrics_log import StepWindow
from mfm_ray.training.teacher import load_teacher
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

    config: the resolved training configuration; data, run: locations of the shards and of the run's folder;
    model: the config.json of the model; teacher: the model directory that is distilled, or None; progress: handle of
    the actor that shows progress, or None; measure: what is measured on the averaged model at each checkpoint, on rank
    0, or None; start_from: a checkpoint of another run that this one goes on from, or None.
    """

    config: dict[str, Any]
    data: Storage
    run: Storage
    model: dict[str, Any]
    cuda: bool
    teacher: Storage | None = None
    progress: Any = None
    measure: Measure | None = None
    start_from: Storage | None = None


@dataclass
class Training:
    """Everything one worker holds."""

    plan: Plan
    config: TrainConfig
    engine: ZeroEngine
    ema: ShardedEMA
    flow_map: FlowMap
    data: TrainingData
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

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier attempts included."""
        return self.seconds_before + time.monotonic() - self.started

    def note(self, step: int, figures: Tensor) -> None:
        """Keep the figures of a step, (micro-steps, n) as `LossModule` returns them, without waiting for them."""
        norm = torch.as_tensor(self.engine.gradient_norm, dtype=torch.float32, device=self.engine.device)
        means, sums = figures.split([self.buckets.start, figures.shape[1] - self.buckets.start], dim=1)
        self.window.add(step + 1, torch.cat([means.mean(0), norm.reshape(1)]))
        self.buckets.add(sums.sum(0))


def set_up(plan: Plan) -> Training:
    """Read the data, build the network from the seed, shard it. Collective."""
    keep_freed_memory()
    config = from_dict(TrainConfig, plan.config)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(max(1, int(config.scaling.resources_per_worker.get("CPU", 1))))
    split = split_batch(config.global_batch_size, num_workers=world_size, micro_batch_size=config.micro_batch_size)
    flow_map = build_flow_map(plan, config)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if plan.cuda else torch.device("cpu")
    teacher = load_teacher(plan.teacher, precision=config.precision, device=device)
    objective = build_objective(config.objective, teacher=teacher)
    terms = [weighted.term for weighted in objective.terms]
    throughput = Throughput.count(flow_map.to(device), terms, config, workers=world_size)
    engine = prepare(
        LossModule(flow_map.to(device), objective.to(device), precision=config.precision),
        optimizer=vars(config.optimizer),
        config=zero_config(
            stage=config.zero.stage,
            offload=config.zero.offload,
            split=split,
            gradient_clipping=config.gradient_clipping,
            num_parameters=sum(parameter.numel() for parameter in flow_map.parameters()),
            cuda=plan.cuda,
        ),
        gradient_clipping=config.gradient_clipping,
    )
    data = TrainingData.load(plan.data, config, split, rank=rank, device=engine.device)
    return Training(
        plan=plan,
        config=config,
        engine=engine,
        ema=ShardedEMA(engine, decays=ema_decays(config.ema_decay)),
        flow_map=flow_map,
        data=data,
        feed=Feed(data, end=config.max_steps),
        split=split,
        learning_rate=LearningRate(
            peak=config.optimizer.learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.learning_rate_schedule,
            max_steps=config.max_steps,
        ),
        window=StepWindow(metric_names(terms)),
        buckets=BucketWindow([term.name for term in terms]),
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


def build_flow_map(plan: Plan, config: TrainConfig) -> FlowMap:
    """The network at initialisation, the same on every rank."""
    manifest, moments = read_manifest(plan.data), load_moments(plan.data)
    torch.manual_seed(config.seed)
    return build_network(
        config.network, space=manifest.space, num_classes=manifest.num_classes, moments=moments.preconditioning()
    )


def metric_names(terms: Sequence[Term]) -> list[str]:
    """The columns of a step's metrics: mean loss, raw squared error by term, gradient norm."""
    return ["loss", *(f"squared_error.{term.name}" for term in terms), "gradient_norm"]
