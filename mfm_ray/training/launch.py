"""The driver's side of a training run: checks before resources are taken, Ray Train, and the model at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from mfm_ray.config import TrainConfig, TrainingConfig
from mfm_ray.data import datasets
from mfm_ray.data.shards import Manifest, read_manifest, write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.environment import environment_defaults
from mfm_ray.errors import InputError
from mfm_ray.latent_models import AUTO, Decoding, autoencoder_of, decoded_space
from mfm_ray.networks import build_network, check_recomputation
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training import checkpoint, zero
from mfm_ray.training.checkpoint_store import CHECKPOINTS, Found, newest_checkpoint
from mfm_ray.training.comm_op import check_comm_op
from mfm_ray.training.ema import ema_decays
from mfm_ray.training.failures import root_cause
from mfm_ray.training.final_model import export_checkpoint, newest_picture, train_judge
from mfm_ray.training.loop import train_worker
from mfm_ray.training.metrics_log import METRICS_FILE
from mfm_ray.training.monitor import Watchdog
from mfm_ray.training.notice import SigtermIsNotice
from mfm_ray.training.pretraining import Pretraining
from mfm_ray.training.progress import ProgressDisplay
from mfm_ray.training.sample_grid import can_be_shown
from mfm_ray.training.session import Measure, Plan
from mfm_ray.training.starting import absolute
from mfm_ray.training.teacher import check_objective, check_teacher, teacher_location
from mfm_ray.training.trackers import check_trackers

_BUNDLED = {"digits": datasets.digits, "gmm": datasets.gmm}
_RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # a group that loses a node should not wait a minute for resources that are gone
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}

Log = Callable[[str], None]


class TrainingError(RuntimeError):
    """A run that ended before its time; one line with the cause. Its checkpoints stay.

    would_repeat: whether another attempt would end in the same way, as a loss that is not finite does.
    """

    would_repeat = False


class DivergedError(TrainingError):
    """A loss, gradient or measured figure became NaN or infinite."""

    would_repeat = True


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What a trial of a sweep adds to a training. measure, start_from: see `Plan`; callbacks: of Ray Train, which get
    the figures of every checkpoint; shows_progress: whether the run tells how far it is.
    """

    measure: Measure | None = None
    start_from: Storage | None = None
    callbacks: Sequence[Any] = ()
    shows_progress: bool = True


@dataclass(frozen=True)
class TrainingResult:
    """metrics: the last figures; artifacts: absolute paths or URIs of model, checkpoints, metrics and samples."""

    metrics: dict[str, float]
    artifacts: dict[str, str]


def check_config(config: TrainConfig) -> None:
    """Everything that can be wrong with the configuration alone, without data or a cluster. ValueError, one line."""
    check_training(config)
    check_objective(config.objective)
    check_recomputation(config.network, wanted=config.activation_checkpointing)
    if config.data.path is None and not is_bundled(config.data.name):
        raise InputError(
            f"data.path=null: data.name={config.data.name} is not bundled ({', '.join(_BUNDLED)} are); "
            "prepare it with jobs.prepare_data and give its folder"
        )


def is_bundled(name: str) -> bool:
    return name in _BUNDLED


def check_training(config: TrainingConfig) -> None:
    """What every training has in common: batch, sharding, averages, trackers. ValueError, one line."""
    splits(config)
    zero.check_sharding(stage=config.zero.stage, offload=config.zero.offload)
    ema_decays(config.ema_decay)
    check_trackers(config.trackers)
    if config.execution == "compiled" and config.zero.stage == 3:
        raise InputError(
            "execution=compiled: a compiled network cannot gather its weights layer by layer as zero.stage=3 does; "
            "expected zero.stage=0, 1 or 2, or execution=eager"
        )


def check_images(config: TrainConfig, data: Manifest) -> None:
    """InputError for keys that ask for images where the data are none."""
    for key, value in {
        "augmentation.rate": config.augmentation.rate,
        "classifier_steps": config.classifier_steps,
    }.items():
        if value > 0 and data.space.kind != "image":
            raise InputError(f"{key}={value}: {data.name} holds no images, expected 0")
    name = config.network.get("name")
    if data.moments_sha256 is None and name != "dit":
        raise InputError(f"network.name={name}: {data.name} was prepared without moments, which it needs; expected dit")


def worker_range(config: TrainingConfig) -> range:
    """The numbers of workers that a run may have: one, or in elastic training all from the least to the most.

    InputError for a list that is no such pair.
    """
    asked = config.scaling.num_workers
    if isinstance(asked, int):
        return range(asked, asked + 1)
    if len(asked) != 2 or asked[0] > asked[1]:
        raise InputError(f"scaling.num_workers={asked}: expected one number, or [least, most] for elastic training")
    return range(asked[0], asked[1] + 1)


def splits(config: TrainingConfig) -> list[zero.BatchSplit]:
    """How the global batch is shared out among each number of workers that a run may have. ValueError, one line."""
    return [
        zero.split_batch(
            config.global_batch_size,
            num_workers=number,
            micro_batch_size=config.micro_batch_size,
            even=isinstance(config.scaling.num_workers, int),
        )
        for number in worker_range(config)
    ]


def run_training(
    config: Mapping[str, Any], storage: Storage, resume: bool, log: Log, *, additions: Additions | None = None
) -> TrainingResult:
    """Train the model that `config` (the plain form of TrainConfig) describes below `storage`, the run's folder.

    Ray must be running. InputError for what the user can mend, TrainingError when training failed.
    """
    typed = from_dict(TrainConfig, config)
    check_config(typed)
    data = prepare_data(typed, storage, log)
    manifest = read_manifest(data)
    model = model_config(typed, manifest)
    check_images(typed, manifest)
    check_teacher(typed.objective, manifest)
    task = Pretraining(teacher=teacher_location(typed.objective), start=absolute(typed.init_from))
    added = additions or Additions()
    plan = Plan(
        config={**config, "autoencoder": autoencoder_of_pictures(typed, model["data"], data, log)},
        data=data,
        run=storage,
        model=model,
        cuda=uses_gpu(typed),
        task=task,
        measure=added.measure,
        start_from=added.start_from,
    )
    found = train_to_the_end(
        plan,
        typed,
        data_sha256=manifest.sha256,
        resume=resume,
        log=log,
        callbacks=added.callbacks,
        shows_progress=added.shows_progress,
    )
    return finish(typed, storage, data, found, log)


def autoencoder_of_pictures(config: TrainConfig, described: Mapping[str, Any], data: Storage, log: Log) -> str | None:
    """Where the autoencoder is that sample pictures of latents are decoded by, None for none, which is told.

    InputError for one that was asked for by name and cannot be had; training itself needs none.
    """
    decoding = Decoding.of(config)
    place = autoencoder_of(data, described, decoding)
    if described["kind"] != "latent" or config.sample_every == 0:
        return place
    try:
        space = decoded_space(DataSpace.from_config(described), data, described, decoding)
    except InputError as error:
        if decoding.autoencoder != AUTO:
            raise
        log(f"no pictures of samples: {error}")
        return None
    if not can_be_shown(space):
        log("no pictures of samples: they are latents, and no autoencoder is known (autoencoder=<folder>)")
    return place


def train_to_the_end(
    plan: Plan,
    config: TrainingConfig,
    *,
    data_sha256: str,
    resume: bool,
    log: Log,
    callbacks: Sequence[Any] = (),
    shows_progress: bool = True,
) -> Found:
    """The last checkpoint of a run, which goes on from the newest one that is there, if it may.

    InputError for a checkpoint that is in the way or of another run, and as `fit` raises.
    """
    found = newest_checkpoint(plan.run, log)
    if found is not None and not resume:
        raise InputError(f"{plan.run.uri_of(CHECKPOINTS)}: holds checkpoints already; resume=true, or another name")
    if found is not None:
        checkpoint.check_compatible(
            found.storage,
            found.state,
            model=plan.model,
            data_sha256=data_sha256,
            ema_decays=ema_decays(config.ema_decay),
        )
        log(f"going on from step {found.state.step}")
    elif resume:
        log("nothing to resume, starting from the beginning")
    if found is None or not is_complete(config, found.state):
        fit(plan, config, log, callbacks=callbacks, shows_progress=shows_progress)
        found = newest_checkpoint(plan.run)
    assert found is not None, "a finished run has a checkpoint"
    return found


def prepare_data(config: TrainConfig, storage: Storage, log: Log) -> Storage:
    """Where the shards are; bundled data is written into the run's folder the first time."""
    if config.data.path is not None:
        read_manifest(config.data.path)
        return Storage(config.data.path)
    return bundled_data(config.data.name, storage, log)


def bundled_data(name: str, storage: Storage, log: Log) -> Storage:
    """Bundled data of that name as shards in the run's folder."""
    target = storage.child("data")
    if not target.exists():
        log(f"preparing {name}")
        write_shards(target, _BUNDLED[name]())
    return target


def model_config(config: TrainConfig, data: Manifest) -> dict[str, Any]:
    """The config.json of the model; the network is built once on no device, so that a mistake shows here."""
    with torch.device("meta"):
        flow_map = build_network(config.network, space=data.space, num_classes=data.num_classes)
    return {
        "network": flow_map.config(),
        "interpolant": "linear",
        "data": data.description(),
        "cfg_scales": list(flow_map.cfg_scales),
    }


def is_complete(config: TrainingConfig, state: checkpoint.CheckpointState) -> bool:
    out_of_time = config.max_seconds is not None and state.seconds >= config.max_seconds
    return state.step >= config.max_steps or out_of_time


def uses_gpu(config: TrainingConfig) -> bool:
    """What scaling.use_gpu says, or, where it is null, whether the cluster has a GPU for each of the least workers."""
    if config.scaling.use_gpu is not None:
        return config.scaling.use_gpu
    return ray.cluster_resources().get("GPU", 0) >= worker_range(config)[0]


def fit(
    plan: Plan, config: TrainingConfig, log: Log, *, callbacks: Sequence[Any] = (), shows_progress: bool = True
) -> None:
    """Run the workers to the end. InputError for a cluster too small or a bad checkpoint, TrainingError otherwise."""
    if not plan.cuda:
        check_comm_op()
    workers, each = worker_range(config), worker_resources(config, plan.cuda)
    wait_for_resources(workers[0], each, config.scaling.start_timeout_s, log)
    display = ProgressDisplay(log) if shows_progress else nullcontext()
    watchdog = Watchdog(plan.run, log, hang_timeout_s=config.faults.hang_timeout_s)
    with environment_defaults(_RAY_ENVIRONMENT), display as progress, watchdog:
        watched = replace(plan, monitor=watchdog.monitor, reports=bool(callbacks))
        trainer = TorchTrainer(
            train_worker,  # type: ignore[arg-type]
            train_loop_config={"plan": watched if progress is None else replace(watched, progress=progress.actor)},
            torch_config=TorchConfig(backend="nccl" if plan.cuda else "gloo"),
            scaling_config=ScalingConfig(  # type: ignore[call-arg] # mypy sees that of Ray Train's first version
                num_workers=workers[0] if len(workers) == 1 else (workers[0], workers[-1]),  # type: ignore[arg-type]
                use_gpu=plan.cuda,
                resources_per_worker=each,
                elastic_resize_monitor_interval_s=config.scaling.resize_interval_s,
            ),
            run_config=RunConfig(
                name=CHECKPOINTS,
                **plan.run.for_ray,
                failure_config=FailureConfig(max_failures=config.scaling.max_failures),
                callbacks=[*callbacks, watchdog.callback, SigtermIsNotice()],  # type: ignore[list-item]
            ),
        )
        try:
            result: Any = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingError(root_cause(error)) from error
    problem = result.return_value.get("error")
    if problem is not None:
        raise problem if isinstance(problem, InputError) else DivergedError(str(problem))


def worker_resources(config: TrainingConfig, cuda: bool) -> dict[str, float]:
    return {**config.scaling.resources_per_worker, **({"GPU": 1.0} if cuda else {})}


def wait_for_resources(workers: int, each: Mapping[str, float], timeout_s: float, log: Log) -> None:
    """Return when `workers` bundles of resources can be had at once; InputError when they cannot within the time.

    Ray itself would wait for ever for a worker that no node will ever hold.
    """
    group = ray.util.placement_group([dict(each)] * workers, strategy="PACK")
    began, said = time.monotonic(), False
    try:
        while not group.wait(timeout_seconds=min(2.0, timeout_s)):
            room, waited = room_for(each), time.monotonic() - began
            if waited >= timeout_s:
                raise InputError(
                    f"scaling.num_workers={workers}: the cluster has room for {room} workers with "
                    f"resources_per_worker={dict(each)} ({'busy' if room >= workers else 'too small'}), waited "
                    f"{timeout_s:g} s (scaling.start_timeout_s)"
                )
            if not said:
                log(f"waiting up to {timeout_s:g} s for {workers} workers; the cluster has room for {room}")
                said = True
    finally:
        ray.util.remove_placement_group(group)


def room_for(each: Mapping[str, float]) -> int:
    """How many bundles the cluster's nodes hold when nothing else runs."""
    wanted = {name: amount for name, amount in each.items() if amount > 0}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) // amount) for name, amount in wanted.items()) for node in alive)


def finish(config: TrainConfig, storage: Storage, data: Storage, found: Found, log: Log) -> TrainingResult:
    """Write the model directory from the newest checkpoint."""
    if config.classifier_steps:
        log(f"training the classifier of {config.data.name}")
    figures = export_checkpoint(
        found.storage, storage.child("model"), judge=train_judge(config, data), picture=newest_picture(storage)
    )
    return TrainingResult(metrics=figures, artifacts=artifacts_of(storage))


def artifacts_of(storage: Storage) -> dict[str, str]:
    """What a finished run has left, by name."""
    return {
        "model": storage.uri_of("model"),
        "checkpoints": storage.uri_of(CHECKPOINTS),
        "metrics": storage.uri_of(METRICS_FILE),
        **({"samples": storage.uri_of("samples")} if storage.is_dir("samples") else {}),
    }
