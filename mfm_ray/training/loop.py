"""The training loop: what Ray Train runs in each worker, the same on one CPU and on many GPUs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from mfm_ray.config import TrainConfig
from mfm_ray.data.augment import AffineJitter
from mfm_ray.data.batch import Batch
from mfm_ray.data.order import SampleOrder
from mfm_ray.data.shards import load_moments, load_split, read_manifest
from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import Objective, build_objective
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training import checkpoint
from mfm_ray.training.ema import ShardedEMA
from mfm_ray.training.loss_module import LossModule
from mfm_ray.training.metrics_log import MetricsLog, StepWindow, TrainingDiverged
from mfm_ray.training.progress import ProgressState
from mfm_ray.training.sample_grid import write_sample_grid
from mfm_ray.training.zero import BatchSplit, LearningRate, ZeroEngine, prepare, split_batch, zero_config


@dataclass(frozen=True)
class Plan:
    """What the driver tells every worker; plain values, so that it travels and is kept in checkpoints.

    config: the resolved training configuration; data, run: locations of the shards and of the run's folder;
    model: the config.json of the model; progress: handle of the actor that shows progress, or None.
    """

    config: dict[str, Any]
    data: Storage
    run: Storage
    model: dict[str, Any]
    cuda: bool
    progress: Any = None


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train to the end, or report an error that another attempt would meet again.

    Such an error is raised on all ranks alike, so returning it ends the group at once; anything else is raised, and
    Ray Train restarts the group from its last checkpoint.
    """
    try:
        return {"metrics": train(settings["plan"])}
    except (checkpoint.CheckpointError, TrainingDiverged) as error:
        return {"error": error}


def train(plan: Plan) -> dict[str, float]:
    """The run of one worker; the last figures, which all ranks share."""
    training = set_up(plan)
    start = restore(training)
    recorder = Recorder(training, start)
    deadline = Deadline(training.config.max_seconds, already=training.seconds_before, device=training.engine.device)
    config, last = training.config, start >= training.config.max_steps
    for step in range(start, config.max_steps):
        training_step(training, step)
        done = step + 1
        last = done == config.max_steps or deadline.reached(done)
        sample = config.sample_every > 0 and (last or done % config.sample_every == 0)
        save = last or done % config.checkpoint_every == 0
        if sample or save or done % config.log_every == 0:
            recorder.record(done)
        if sample:
            recorder.draw_samples(done)
        if save:
            recorder.save_checkpoint(done)
        if last:
            break
    recorder.close()
    return recorder.figures


@dataclass
class Training:
    """Everything one worker holds."""

    plan: Plan
    config: TrainConfig
    engine: ZeroEngine
    ema: ShardedEMA
    flow_map: FlowMap
    data: TrainingData
    split: BatchSplit
    learning_rate: LearningRate
    window: StepWindow
    rank: int
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)
    data_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier attempts included."""
        return self.seconds_before + time.monotonic() - self.started


def set_up(plan: Plan) -> Training:
    """Read the data, build the network from the seed, shard it. Collective."""
    config = from_dict(TrainConfig, plan.config)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.set_num_threads(max(1, int(config.scaling.resources_per_worker.get("CPU", 1))))
    split = split_batch(config.global_batch_size, num_workers=world_size, micro_batch_size=config.micro_batch_size)
    flow_map = build_flow_map(plan, config)
    objective = build_objective(config.objective)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if plan.cuda else torch.device("cpu")
    engine = prepare(
        LossModule(flow_map.to(device), objective, precision=config.precision),
        optimizer=vars(config.optimizer),
        config=zero_config(
            stage=config.zero.stage,
            offload=config.zero.offload,
            split=split,
            gradient_clipping=config.gradient_clipping,
            cuda=plan.cuda,
        ),
        gradient_clipping=config.gradient_clipping,
    )
    return Training(
        plan=plan,
        config=config,
        engine=engine,
        ema=ShardedEMA(engine, decay=config.ema_decay),
        flow_map=flow_map,
        data=TrainingData.load(plan.data, config, split, rank=rank, device=engine.device),
        split=split,
        learning_rate=LearningRate(
            peak=config.optimizer.learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.learning_rate_schedule,
            max_steps=config.max_steps,
        ),
        window=StepWindow(metric_names(objective)),
        rank=rank,
    )


def build_flow_map(plan: Plan, config: TrainConfig) -> FlowMap:
    """The network at initialisation, the same on every rank."""
    manifest, moments = read_manifest(plan.data), load_moments(plan.data)
    torch.manual_seed(config.seed)
    return build_network(
        config.network, space=manifest.space, num_classes=manifest.num_classes, moments=moments.preconditioning()
    )


def metric_names(objective: Objective) -> list[str]:
    """The columns of a step's metrics: mean loss, raw squared error by term, gradient norm."""
    return ["loss", *(f"squared_error.{term.name}" for term, _ in objective.terms), "gradient_norm"]


@dataclass
class TrainingData:
    """The training split in memory, in data units, and this worker's way through it."""

    x: Tensor
    space: DataSpace
    jitter: AffineJitter
    labels: Tensor | None
    sha256: str
    order: SampleOrder
    seed: int
    split: BatchSplit
    rank: int
    device: torch.device

    @classmethod
    def load(
        cls, source: Storage, config: TrainConfig, split: BatchSplit, *, rank: int, device: torch.device
    ) -> TrainingData:
        rows, manifest = load_split(source, "train"), read_manifest(source)
        return cls(
            x=rows.data,
            space=manifest.space,
            jitter=AffineJitter(**vars(config.augmentation)),
            labels=rows.labels if bool((rows.labels >= 0).any()) else None,
            sha256=manifest.sha256,
            order=SampleOrder(num_rows=len(rows), seed=config.seed, global_batch_size=config.global_batch_size),
            seed=config.seed,
            split=split,
            rank=rank,
            device=device,
        )

    def micro_batches(self, step: int) -> Iterator[tuple[Batch, KeyedNoise]]:
        """This worker's micro-batches of a step, each with its noise.

        Noise is keyed by (seed, row of the global batch, step), that of the jitter too: the losses of a step do not
        depend on how many workers and micro-steps share it.
        """
        index = self.order.rows(step, self.rank, self.split.num_workers)
        positions = self.order.positions(self.rank, self.split.num_workers)
        rows = torch.arange(positions.start, positions.stop)
        images = self.jitter(self.x[index], KeyedNoise.for_rows(self.seed, rows).fold_in(step))
        mine = Batch(
            data=self.space.to_model_space(images),
            label=None if self.labels is None else self.labels[index],
            rows=rows,
        )
        for micro in mine.to(self.device).split(self.split.micro_batch_size):
            yield micro, KeyedNoise.for_rows(self.seed, micro.rows).fold_in(step)


def restore(training: Training) -> int:
    """Go on from the checkpoint that Ray Train hands out, if there is one; the steps that are done. Collective."""
    found = ray.train.get_checkpoint()
    if found is None:
        return 0
    with found.as_directory() as folder:
        return read_checkpoint(training, Path(folder))


def read_checkpoint(training: Training, directory: Path) -> int:
    """Take weights, optimiser state and average from the ranks' merged folder; the steps that are done. Collective."""
    verify_on_all_ranks(directory, training.rank)
    state = checkpoint.read_state(Storage(directory))
    training.engine.load(directory)
    training.ema.load(directory / checkpoint.ema_name(training.rank))
    training.seconds_before, training.started = state.seconds, time.monotonic()
    return state.step


def write_checkpoint(training: Training, directory: Path, *, done: int, figures: dict[str, float]) -> None:
    """Put this rank's part of a checkpoint into an empty folder of its own. Collective."""
    rank = training.rank
    training.engine.save(directory)
    training.ema.save(directory / checkpoint.ema_name(rank))
    model_file = directory / checkpoint.MODEL_FILE if rank == 0 else None
    checkpoint.write_tensors(model_file, training.ema.full_tensors(training.flow_map))
    state = checkpoint.CheckpointState(
        step=done,
        seconds=training.seconds,
        world_size=training.split.num_workers,
        stage=training.engine.stage,
        config=training.plan.config,
        model=training.plan.model,
        data_sha256=training.data.sha256,
        figures=figures,
    )
    checkpoint.write_manifest(directory, rank=rank, state=state)


def verify_on_all_ranks(directory: Path, rank: int) -> None:
    """Check the hashes of what this rank is about to unpickle; when any rank finds damage, all raise. Collective."""
    error: str | None = None
    try:
        for writer in sorted({0, rank}):
            checkpoint.verify_rank(directory, writer)
    except checkpoint.CheckpointError as found:
        error = str(found)
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    first = next((text for text in errors if text is not None), None)
    if first is not None:
        raise checkpoint.CheckpointError(first)


def training_step(training: Training, step: int) -> None:
    """One optimiser step: this worker's micro-batches, the update, the moving average."""
    engine, rows, began = training.engine, [], time.perf_counter()
    for batch, noise in training.data.micro_batches(step):
        training.data_seconds += time.perf_counter() - began
        loss, terms = engine.forward(batch, noise)
        engine.backward(loss)
        engine.step(training.learning_rate(step))
        rows.append(terms)
        began = time.perf_counter()
    training.ema.update()
    norm = torch.as_tensor(engine.gradient_norm, dtype=torch.float32, device=engine.device)
    training.window.add(step + 1, torch.cat([torch.stack(rows).mean(0), norm.reshape(1)]))


class Deadline:
    """Whether the time for training is up: rank 0's clock decides for all, asked about once a second."""

    def __init__(self, max_seconds: float | None, *, already: float, device: torch.device) -> None:
        self._max_seconds = max_seconds
        self._already = already
        self._device = device
        self._started = time.monotonic()
        self._steps = 0
        self._ask_again_in = 1

    def reached(self, step: int) -> bool:
        """Called after every step. Collective in the steps in which rank 0 is asked."""
        self._steps += 1
        self._ask_again_in -= 1
        if self._max_seconds is None or self._ask_again_in > 0:
            return False
        spent = time.monotonic() - self._started
        left = self._max_seconds - self._already - spent
        wait = max(1, int(self._steps / max(spent, 1e-6) * min(1.0, left / 2)))
        answer = torch.tensor([left <= 0, wait], dtype=torch.int64, device=self._device)
        torch.distributed.broadcast(answer, src=0)
        over, self._ask_again_in = bool(answer[0]), int(answer[1])
        return over


class Recorder:
    """What leaves the worker: metrics, progress, sample grids, checkpoints. All methods are collective."""

    def __init__(self, training: Training, start: int) -> None:
        self._training = training
        self._log = MetricsLog(training.plan.run, resume_step=start) if training.rank == 0 else None
        self._last_step = start
        self._interval_began = time.monotonic()
        self.figures: dict[str, float] = {"step": start, "seconds": training.seconds}

    def record(self, done: int) -> None:
        """Average the figures since the last call; write a line of history."""
        training = self._training
        means = training.window.flush()
        interval, steps = time.monotonic() - self._interval_began, done - self._last_step
        numbers = {
            **means,
            "learning_rate": training.learning_rate(done - 1),
            "images_per_second": steps * training.config.global_batch_size / interval,
            "data_seconds": training.data_seconds,
            "seconds": training.seconds,
        }
        training.data_seconds = 0.0
        self.figures = {"step": done, **numbers}
        if self._log is not None:
            self._log.write(done, numbers)
            self._tell_progress(done, numbers, steps / interval)
        self._begin_interval(done)

    def draw_samples(self, done: int) -> None:
        """A picture of samples of the averaged model; rank 0 draws, all take part in gathering the weights."""
        training = self._training
        weights = {}
        for name, tensor in training.ema.full_tensors(training.flow_map):
            if training.rank == 0:
                weights[name] = tensor.to("cpu", copy=True)
        if training.rank == 0:
            model = build_flow_map(training.plan, training.config)
            model.load_state_dict(weights)
            write_sample_grid(training.plan.run, done, model.to(training.engine.device), seed=training.config.seed)
        self._begin_interval(done)

    def save_checkpoint(self, done: int) -> None:
        with tempfile.TemporaryDirectory(prefix="mfm-ray-checkpoint-") as folder:
            write_checkpoint(self._training, Path(folder), done=done, figures=self.figures)
            if self._log is not None:
                self._log.sync()
            ray.train.report({"step": done}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self._begin_interval(done)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _tell_progress(self, done: int, numbers: dict[str, float], steps_per_second: float) -> None:
        if self._training.plan.progress is not None:
            state = ProgressState(
                step=done,
                max_steps=self._training.config.max_steps,
                loss=numbers["loss"],
                images_per_second=numbers["images_per_second"],
                steps_per_second=steps_per_second,
            )
            self._training.plan.progress.tell.remote(state)

    def _begin_interval(self, done: int) -> None:
        self._last_step, self._interval_began = done, time.monotonic()
