"""The driver's side of a fine-tuning: checks before resources are taken, the workers, the tuned model at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import torch

from mfm_ray.config import FinetuneConfig
from mfm_ray.data.shards import Manifest, read_manifest
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.finetuning import TuningMethod, WholeNetwork, build_adapter, build_method
from mfm_ray.flow_map import FlowMap
from mfm_ray.latent_models import Decoding, settled
from mfm_ray.networks import TUNED, build_network
from mfm_ray.pretrained import CLASSIFIER_CONFIG, read_model_config
from mfm_ray.settings import from_dict, nearest, shown
from mfm_ray.steering import Reward
from mfm_ray.storage import Storage
from mfm_ray.training.evaluation import EvaluationPlan, start_evaluator
from mfm_ray.training.final_model import export_checkpoint, newest_picture
from mfm_ray.training.finetuning import Finetuning, MakeReward
from mfm_ray.training.launch import (
    Additions,
    Log,
    TrainingResult,
    artifacts_of,
    bundled_data,
    check_training,
    is_bundled,
    splits,
    train_to_the_end,
    uses_gpu,
)
from mfm_ray.training.session import Plan
from mfm_ray.training.tuned_model import BEST, best_step, weights_sha256


def check_finetuning(config: FinetuneConfig) -> None:
    """Everything that can be wrong before a cluster is there: batch, method, model, data. ValueError, one line."""
    check_training(config)
    check_groups(config, build_method(config.method))
    if config.model is None:
        raise InputError("model=null: expected a model directory")
    check_model(config.model, read_model_config(config.model))
    if config.reward.get("name") == "none":
        raise InputError("reward=none: expected a reward to tune towards")
    build_adapter(config.adapter).check(outline_of(read_model_config(config.model)))
    check_data(config, read_model_config(config.model)["data"])
    check_evaluation(config)


def check_groups(config: FinetuneConfig, method: TuningMethod) -> None:
    """InputError unless every micro-batch holds whole groups of the method, so that no split changes its targets."""
    for split in splits(config):
        sizes = {size for rank in range(split.num_workers) for size in split.sizes(rank)}
        if wrong := sorted(size for size in sizes if size % method.group_rows):
            keys = " x ".join(f"method.{key}={getattr(method, key)}" for key in method.group_keys)
            raise InputError(
                f"micro_batch_size={wrong[-1]}: the targets of {method.group_rows} rows are made together ({keys}); "
                f"expected a multiple of {method.group_rows} (global_batch_size={config.global_batch_size} / "
                f"scaling.num_workers={split.num_workers} where micro_batch_size is null)"
            )


def check_model(place: str, model: Mapping[str, Any]) -> None:
    """InputError for a model that is tuned already."""
    if model["network"]["name"] == TUNED:
        raise InputError(
            f"model={place}: is a tuned model, whose posterior draws are those of the law before tuning; expected the "
            "model it was tuned from with both rewards (reward=weighted_sum), or a flow map distilled from it "
            "(jobs.train objective=lagrangian_teacher)"
        )


def outline_of(model: Mapping[str, Any]) -> FlowMap:
    """The network that a config.json describes, without its weights."""
    space, num_classes = DataSpace.from_config(model["data"]), model["data"].get("num_classes", 0)
    with torch.device("meta"):
        return build_network(model["network"], space=space, num_classes=num_classes)


def check_evaluation(config: FinetuneConfig) -> None:
    """InputError for keys that need evaluations where there are none."""
    needing = {"best_metric": config.best_metric, "stop_on_hacking": config.stop_on_hacking, "judges": config.judges}
    for key, value in needing.items():
        if value and not config.evaluate_every:
            raise InputError(f"{key}={shown(value)}: needs evaluations; expected evaluate_every above 0")
    if config.stop_on_hacking and not config.judges:
        raise InputError("stop_on_hacking=true: needs a judge that could fall; expected judges=[...]")
    known = metrics_of(config)
    if config.best_metric is not None and config.best_metric not in known:
        close = nearest(config.best_metric, known)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"best_metric={config.best_metric}: expected one of {', '.join(known)}{hint}")


def metrics_of(config: FinetuneConfig) -> list[str]:
    """Figures of an evaluation that can decide which weights are the best."""
    judges = Counter(str(judge.get("name") if isinstance(judge, Mapping) else judge) for judge in config.judges)
    titles = [name if number == 1 else f"{name}_{number}" for name in judges for number in range(1, judges[name] + 1)]
    has_judge = Storage(str(config.model)).is_file(CLASSIFIER_CONFIG)
    kind = read_model_config(str(config.model))["data"]["kind"]  # stored latents are not what samples are
    return [
        "reward",
        *(f"judge.{title}" for title in titles),
        "diversity",
        "drift_change",
        *(["class_confidence"] if has_judge else []),
        *([] if config.data.from_model or kind == "latent" else ["frechet_distance"]),
    ]


def check_data(config: FinetuneConfig, described: Mapping[str, Any]) -> None:
    """InputError unless there are data where anchors can begin, of the kind that the model was trained on."""
    name, data = described["name"], config.data
    if data.from_model:
        if data.path is not None:
            raise InputError(f"data.path={data.path}: data.from_model=true needs no data, expected null")
        return
    if data.path is None:
        if not is_bundled(name):
            raise InputError(
                f"data.path=null: {name} is not bundled; expected a folder of prepared data, or data.from_model=true"
            )
        return
    check_manifest(data.path, read_manifest(data.path), described)


def check_manifest(place: str, manifest: Manifest, described: Mapping[str, Any]) -> None:
    """InputError for data of another shape or other classes than the model has."""
    theirs = (manifest.space, manifest.num_classes)
    ours = (DataSpace.from_config(described), described.get("num_classes", 0))
    if theirs != ours:
        raise InputError(
            f"data.path={place}: holds {manifest.name}, {theirs[0]} with {theirs[1]} classes; expected {ours[0]} with "
            f"{ours[1]}, as the model was trained on"
        )


def run_finetuning(
    config: Mapping[str, Any],
    storage: Storage,
    *,
    make_reward: MakeReward,
    judges: Mapping[str, Reward],
    resume: bool,
    log: Log,
    additions: Additions | None = None,
) -> TrainingResult:
    """Tune the model that `config` (the plain form of FinetuneConfig) names below `storage`, the run's folder.

    additions: of a sweep's trial. Ray must be running. InputError for what the user can mend, TrainingError when
    training failed.
    """
    typed = from_dict(FinetuneConfig, config)
    check_finetuning(typed)
    base = Storage(str(typed.model))
    sha256 = weights_sha256(base)
    data = None if typed.data.from_model else data_of(typed, base, storage, log)
    added = additions or Additions()
    plan = Plan(
        config={**config, "model": base.uri, "autoencoder": settled(base, Decoding.of(typed)).autoencoder},
        data=data,
        run=storage,
        model=tuned_config(typed, read_model_config(base), base_sha256=sha256),
        cuda=uses_gpu(typed),
        task=Finetuning(base=base, base_sha256=sha256, make_reward=make_reward),
        measure=added.measure,
        start_from=added.start_from,
    )
    data_sha256 = sha256 if data is None else read_manifest(data).sha256
    with evaluator(typed, plan, judges, make_reward) as actor:
        plan = replace(plan, evaluator=actor)
        found = train_to_the_end(
            plan,
            typed,
            data_sha256=data_sha256,
            resume=resume,
            log=log,
            callbacks=added.callbacks,
            shows_progress=added.shows_progress,
        )
    if found.state.figures.get("evaluation.hacked"):
        log(f"ended at step {found.state.step} of {typed.max_steps}: a judge falls while the reward rises")
    if typed.best_metric is not None:
        log(f"the model is that of step {best_step(storage)}, the best by {typed.best_metric}")
    figures = export_checkpoint(
        found.storage,
        storage.child("model"),
        picture=newest_picture(storage),
        best=None if typed.best_metric is None else storage.child(BEST),
    )
    return TrainingResult(metrics=figures, artifacts=artifacts_of(storage))


@contextmanager
def evaluator(
    config: FinetuneConfig, plan: Plan, judges: Mapping[str, Reward], make_reward: MakeReward
) -> Iterator[Any]:
    """The actor that evaluates while the block runs, None where nothing is to be evaluated."""
    if not config.evaluate_every:
        yield None
        return
    actor = start_evaluator(
        evaluation_plan(config, run=plan.run, data=plan.data, judges=judges, make_reward=make_reward)
    )
    try:
        ready, _ = ray.wait([actor.ready.remote()], timeout=config.scaling.start_timeout_s)
        if not ready:
            raise InputError(
                f"evaluate_cpus={config.evaluate_cpus:g}: the cluster had no room for the process that evaluates, "
                f"waited {config.scaling.start_timeout_s:g} s (scaling.start_timeout_s)"
            )
        ray.get(ready)
        yield actor
    finally:
        ray.kill(actor)


def evaluation_plan(
    config: FinetuneConfig,
    *,
    run: Storage,
    data: Storage | None,
    judges: Mapping[str, Reward],
    make_reward: MakeReward,
) -> EvaluationPlan:
    """What a fine-tuning is evaluated by, in the words of its configuration."""
    base = Storage(str(config.model))
    return EvaluationPlan(
        base=base,
        decoding=settled(base, Decoding.of(config)),
        adapter=build_adapter(config.adapter),
        run=run,
        data=data,
        make_reward=make_reward,
        judges=judges,
        num_samples=config.evaluate_samples,
        num_steps=config.evaluate_steps,
        cfg_scale=config.cfg_scale,
        labelled=config.label_dropout == 0,
        seed=config.seed,
        num_cpus=config.evaluate_cpus,
        best_metric=config.best_metric,
    )


def data_of(config: FinetuneConfig, base: Storage, storage: Storage, log: Log) -> Storage:
    """Where the shards are; bundled data is written into the run's folder the first time."""
    if config.data.path is not None:
        return Storage(config.data.path)
    return bundled_data(read_model_config(base)["data"]["name"], storage, log)


def tuned_config(config: FinetuneConfig, base: Mapping[str, Any], *, base_sha256: str) -> dict[str, Any]:
    """The config.json of the tuned model, and what a checkpoint must agree with to be gone on from."""
    flow_map, adapter = outline_of(base), build_adapter(config.adapter)
    network = flow_map.config()  # its own words: a config.json may leave out what has a default
    return {
        "network": {"name": TUNED, "base": network, "tuned": network},
        "interpolant": base.get("interpolant", "linear"),
        "data": base["data"],
        "cfg_scales": base.get("cfg_scales", []),
        "tuning": {
            "base_sha256": base_sha256,
            "reward": config.reward,
            "reward_multiplier": config.reward_multiplier,
            "method": config.method,
            "adapter": None if isinstance(adapter, WholeNetwork) else adapter.facts(flow_map),
            "cfg_scale": config.cfg_scale,
            "guided_drifts": None if config.guided_drifts else False,  # null, as in checkpoints of before there was it
            "label_dropout": config.label_dropout,
            "data_from_model": config.data.from_model,
        },
    }
