"""The driver's side of a fine-tuning: checks before resources are taken, the workers, the tuned model at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mfm_ray.config import FinetuneConfig
from mfm_ray.data.shards import Manifest, read_manifest
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.finetuning import build_method
from mfm_ray.networks import TUNED, build_network
from mfm_ray.pretrained import read_model_config
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training.final_model import export_checkpoint, newest_picture
from mfm_ray.training.finetuning import Finetuning, MakeReward
from mfm_ray.training.launch import (
    Log,
    TrainingResult,
    artifacts_of,
    bundled_data,
    check_training,
    is_bundled,
    train_to_the_end,
    uses_gpu,
)
from mfm_ray.training.session import Plan
from mfm_ray.training.tuned_model import weights_sha256


def check_finetuning(config: FinetuneConfig) -> None:
    """Everything that can be wrong before a cluster is there: batch, method, model, data. ValueError, one line."""
    check_training(config)
    build_method(config.method)
    if config.model is None:
        raise InputError("model=null: expected a model directory")
    check_model(config.model, read_model_config(config.model))
    if config.reward.get("name") == "none":
        raise InputError("reward=none: expected a reward to tune towards")
    check_data(config, read_model_config(config.model)["data"])


def check_model(place: str, model: Mapping[str, Any]) -> None:
    """InputError for a model that is tuned already."""
    if model["network"]["name"] == TUNED:
        raise InputError(
            f"model={place}: is a tuned model, whose posterior draws are those of the law before tuning; expected the "
            "model it was tuned from with both rewards (reward=weighted_sum), or a flow map distilled from it "
            "(jobs.train objective=lagrangian_teacher)"
        )


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
    config: Mapping[str, Any], storage: Storage, *, make_reward: MakeReward, resume: bool, log: Log
) -> TrainingResult:
    """Tune the model that `config` (the plain form of FinetuneConfig) names below `storage`, the run's folder.

    Ray must be running. InputError for what the user can mend, TrainingError when training failed.
    """
    typed = from_dict(FinetuneConfig, config)
    check_finetuning(typed)
    base = Storage(str(typed.model))
    sha256 = weights_sha256(base)
    data = None if typed.data.from_model else data_of(typed, base, storage, log)
    plan = Plan(
        config={**config, "model": base.uri},
        data=data,
        run=storage,
        model=tuned_config(typed, read_model_config(base), base_sha256=sha256),
        cuda=uses_gpu(typed),
        task=Finetuning(base=base, base_sha256=sha256, make_reward=make_reward),
    )
    data_sha256 = sha256 if data is None else read_manifest(data).sha256
    found = train_to_the_end(plan, typed, data_sha256=data_sha256, resume=resume, log=log)
    figures = export_checkpoint(found.storage, storage.child("model"), picture=newest_picture(storage))
    return TrainingResult(metrics=figures, artifacts=artifacts_of(storage))


def data_of(config: FinetuneConfig, base: Storage, storage: Storage, log: Log) -> Storage:
    """Where the shards are; bundled data is written into the run's folder the first time."""
    if config.data.path is not None:
        return Storage(config.data.path)
    return bundled_data(read_model_config(base)["data"]["name"], storage, log)


def tuned_config(config: FinetuneConfig, base: Mapping[str, Any], *, base_sha256: str) -> dict[str, Any]:
    """The config.json of the tuned model, and what a checkpoint must agree with to be gone on from."""
    space, num_classes = DataSpace.from_config(base["data"]), base["data"].get("num_classes", 0)
    with torch.device("meta"):  # its own words: a config.json may leave out what has a default
        network = build_network(base["network"], space=space, num_classes=num_classes).config()
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
            "cfg_scale": config.cfg_scale,
            "label_dropout": config.label_dropout,
            "data_from_model": config.data.from_model,
        },
    }
