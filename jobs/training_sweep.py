"""The side of `jobs.tune` that trains: every trial is a run of `jobs.train` or `jobs.finetune`, its settings a
difference from it."""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from jobs.cluster import num_gpus, ray_cluster
from jobs.contract import JobRun, Outcome
from jobs.run_folder import RunFolder
from jobs.sample_pool import room_for
from jobs.sample_shards import checksum, refuse_other_settings
from jobs.sweep_outcome import finish_sweep
from jobs.swept_finetune import SweptFinetune
from jobs.swept_train import SweptTrain
from jobs.swept_training import Prepared, SweptTraining
from mfm_ray.config import TrainingSweepConfig, to_dict
from mfm_ray.errors import InputError
from mfm_ray.settings import from_dict, nearest
from mfm_ray.storage import Storage

SWEEP = "sweep.json"
# where and how fast trials are made, and how much of them stays, decides nothing of what they find
_UNDECIDED = ("name", "storage", "resume", "overwrite", "models_to_keep", "concurrent_trials", "trackers", "log_every")
_UNDECIDED_SCALING = ("start_timeout_s", "max_failures", "resources_per_worker")


def check(config: TrainingSweepConfig) -> None:
    """Every trial could be trained, and an earlier call of this name had the same settings."""
    if config.checkpoint_every > config.max_steps:
        raise InputError(
            f"checkpoint_every={config.checkpoint_every}: trials are measured at their checkpoints; expected at most "
            f"max_steps={config.max_steps}"
        )
    scheduling, race = _race(config)
    scheduling.check(race)
    _swept(config).check(config, _typed_trials(config))
    _check_objectives(config)
    if config.resume:
        run = RunFolder("tune", config).storage
        refuse_other_settings(_earlier_sweep(run), sweep_settings(config), where=run.uri)


def body(run: JobRun) -> Outcome:
    """Trains what is not trained yet, keeps the best models, and writes what all trials say."""
    from mfm_ray.tuning.training_sweep import kept_trials, known_records

    began = time.monotonic()
    config: TrainingSweepConfig = run.config
    plan = sweep_plan(config)
    run.storage.write_json(SWEEP, {"settings": sweep_settings(config)})
    known = known_records(run.storage, plan) if config.resume else {}
    if config.resume:
        ended = sum(record.is_final for record in known.values())
        run.log(f"{ended} of {len(plan.points)} trials are there already, {len(known) - ended} were begun")
    prepared = _swept(config).prepare(run, _typed_trials(config))
    records = _run_missing(run, plan, known, prepared)
    models = {index: _write_model(run, index, prepared.judge) for index in kept_trials(records, plan)}
    settings = {index: _as_trained(run, index, value) for index, value in trial_settings(config).items()}
    outcome = finish_sweep(run, settings, records, began=began, models=models)
    best = next(iter(models.values()))
    return dataclasses.replace(outcome, artifacts={"model": best, **outcome.artifacts})


def _swept(config: TrainingSweepConfig) -> SweptTraining[Any]:
    return SWEPT[config.job]


def _typed_trials(config: TrainingSweepConfig) -> list[Any]:
    return [from_dict(_swept(config).root, settings) for settings in trial_settings(config).values()]


def _run_missing(run: JobRun, plan: Any, known: Mapping[int, Any], prepared: Prepared) -> dict[int, Any]:
    from mfm_ray.training.launch import uses_gpu, wait_for_resources, worker_range, worker_resources
    from mfm_ray.tuning.training_sweep import run_training_sweep
    from mfm_ray.tuning.training_trial import TrainingSpec

    config: TrainingSweepConfig = run.config
    own = {**prepared.own, "storage": run.storage.uri}
    spec = TrainingSpec(
        settings={index: {**settings, **own} for index, settings in trial_settings(config).items()},
        run=run.storage,
        measure=prepared.measure,
        train=prepared.train,
    )
    if all(index in known and known[index].is_final for index in range(len(plan.points))):
        return run_training_sweep(plan, spec, known, concurrent=1, max_failures=0, log=run.log)
    with ray_cluster(run.log):
        if config.scaling.use_gpu and num_gpus() == 0:
            raise InputError("scaling.use_gpu=true: the cluster has no GPU; expected false or null")
        each, workers = worker_resources(config, uses_gpu(config)), worker_range(config)[-1]
        wait_for_resources(workers, each, config.scaling.start_timeout_s, run.log)
        room = room_for(each, own_cpus=len(os.sched_getaffinity(0)))
        concurrent = config.concurrent_trials or max(1, room // workers)
        missing = sum(not (index in known and known[index].is_final) for index in range(len(plan.points)))
        concurrent = min(concurrent, missing)
        run.log(f"{missing} trials of {workers} workers, {each} each, {concurrent} at once")
        return run_training_sweep(
            plan, spec, known, concurrent=concurrent, max_failures=config.scaling.max_failures, log=run.log
        )


def sweep_plan(config: TrainingSweepConfig) -> Any:
    """Points in their order, what stops trials, and the hash of what decides them."""
    from mfm_ray.tuning.space import plan_points
    from mfm_ray.tuning.training_sweep import TrainingPlan

    scheduling, race = _race(config)
    return TrainingPlan(
        points=plan_points(race.space, num_trials=config.num_trials, seed=config.seed),
        decided_by=checksum(sweep_settings(config)),
        race=race,
        scheduling=scheduling,
        models_to_keep=config.models_to_keep,
    )


def _race(config: TrainingSweepConfig) -> tuple[Any, Any]:
    """What stops or perturbs trials, and what it is told of the sweep."""
    from mfm_ray.tuning.scheduling import Race, build_scheduling
    from mfm_ray.tuning.space import parse_space

    if not config.objectives:
        raise InputError("objectives: empty; expected figures of a model such as {seconds: min}")
    metric, mode = next(iter(config.objectives.items()))
    space = parse_space(config.space)
    race = Race(metric=metric, mode=mode, max_steps=config.max_steps, every=config.checkpoint_every, space=space)
    return build_scheduling(config.scheduler), race


def trial_settings(config: TrainingSweepConfig) -> dict[int, dict[str, Any]]:
    """The plain configuration of the swept job of every trial, by index. InputError naming the key that is wrong."""
    from mfm_ray.tuning.space import parse_space, plan_points
    from mfm_ray.tuning.training_space import training_settings

    swept = _swept(config)
    names = {field.name for field in dataclasses.fields(swept.root)}
    common = swept.common({key: value for key, value in to_dict(config).items() if key in names})
    common |= {"resume": False, "overwrite": False}
    points = plan_points(parse_space(config.space), num_trials=config.num_trials, seed=config.seed)
    return {index: training_settings(common, point, swept.sweepable()) for index, point in enumerate(points)}


def sweep_settings(config: TrainingSweepConfig) -> dict[str, Any]:
    """Everything that the table of the sweep depends on."""
    values = {key: value for key, value in to_dict(config).items() if key not in (*_UNDECIDED, "objectives")}
    values["scaling"] = {key: value for key, value in values["scaling"].items() if key not in _UNDECIDED_SCALING}
    values |= _swept(config).decisive(config)
    return {**values, "objective_of_the_sweep": list(next(iter(config.objectives.items())))}


def _check_objectives(config: TrainingSweepConfig) -> None:
    known = _swept(config).figures(config)
    for name in config.objectives:
        if name not in known:
            close = nearest(name, known)
            hint = f"; did you mean {close}?" if close else ""
            if name == "loss":
                hint = "; losses of different objectives cannot be compared"
            raise InputError(f"objectives.{name}: expected figures of {', '.join(known)}{hint}")


def _write_model(run: JobRun, index: int, judge: Any) -> str:
    """The model directory of a trial that is kept, now with the judge beside it."""
    from mfm_ray.training.checkpoint_store import newest_checkpoint
    from mfm_ray.training.final_model import export_checkpoint, newest_picture
    from mfm_ray.tuning.training_trial import training_folder

    folder = training_folder(run.storage, index)
    found = newest_checkpoint(folder)
    assert found is not None, "a trial that is kept has a checkpoint"
    export_checkpoint(found.storage, folder.child("model"), judge=judge, picture=newest_picture(folder))
    return folder.uri_of("model")


def _as_trained(run: JobRun, index: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a trial ended with, which a scheduler may have changed."""
    from mfm_ray.tuning.training_trial import changes_of, training_folder, with_changes

    return with_changes(settings, changes_of(training_folder(run.storage, index)))


def _earlier_sweep(run: Storage) -> dict[str, Any] | None:
    return run.read_json(SWEEP) if run.is_file(SWEEP) else None


SWEPT: dict[str, SweptTraining[Any]] = {"train": SweptTrain(), "finetune": SweptFinetune()}
"""By the job that is swept."""
