"""A model by its recipe: trained below a run's folder, or taken from there when it is still what would be trained."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.cluster import ray_cluster
from jobs.contract import JobRun
from mfm_ray.config import TrainConfig, flatten, load_config, to_dict
from mfm_ray.errors import InputError
from mfm_ray.settings import shown
from mfm_ray.storage import Storage

TRAINING = "training.json"
# What belongs to the training in a run's folder, and goes when another one begins.
_LEFT_BY_TRAINING = ("checkpoints", "model", "samples", "metrics.jsonl", TRAINING)
# Where a run stands says nothing about what it trains.
_PLACE_KEYS = ("name", "storage", "resume", "overwrite")


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model directory, the data it was trained on, and how. seconds: of the training, whenever it was made."""

    model: Storage
    data: Storage
    history: list[dict[str, float]]
    seconds: float
    reused: bool
    config: TrainConfig


def training_config(experiment: str, training: Mapping[str, Any], *, seed: int, **fixed: Any) -> TrainConfig:
    """The recipe with further keys of `jobs.train`, nested or dotted; `fixed` ones are the calling job's own.

    Raises:
        InputError: a key or value that jobs.train does not take, or that the calling job decides itself.
    """
    given = {key: value for key, value in flatten(training).items() if not isinstance(value, Mapping)}
    own = {"experiment": experiment, "seed": seed, **{key.replace("__", "."): value for key, value in fixed.items()}}
    for key in given:
        if key in own or key in _PLACE_KEYS:
            raise InputError(f"training.{key}: is decided by the job itself")
    try:
        config = load_config("train", [f"{key}={shown(value)}" for key, value in (own | given).items()])
    except InputError as error:
        raise InputError(f"training: {error}") from error
    assert isinstance(config, TrainConfig)
    return config


def model_of_recipe(config: TrainConfig, run: JobRun) -> TrainedModel:
    """Trains on a Ray cluster unless the run's folder holds the same model already, whole; says which."""
    from mfm_ray.training.launch import run_training

    storage = run.storage
    data = prepared_data(config, run)
    wanted = _fingerprint(config, data)
    found = _read(storage)
    if found.get("recipe") == wanted and _is_whole(storage, found):
        run.log(f"the model in {storage.uri_of('model')} is of this recipe and data: nothing to train")
        return _trained(config, run, data, float(found["seconds"]), reused=True)
    goes_on = found.get("recipe") == wanted and storage.is_dir("checkpoints")
    if not goes_on:
        for name in _LEFT_BY_TRAINING:
            storage.delete(name)
        for name in storage.listdir():
            if name.startswith("events.out.tfevents"):
                storage.delete(name)
        storage.write_json(TRAINING, {"recipe": wanted})
    began = time.monotonic()
    words = to_dict(config) | {"data": {"name": config.data.name, "path": data.uri}}
    with ray_cluster(run.log):
        began_training = time.monotonic()
        run_training(words, storage, resume=goes_on, log=run.log)
        seconds = time.monotonic() - began_training
    run.log(f"trained in {seconds:.0f} s, with the cluster in {time.monotonic() - began:.0f} s")
    seconds += float(found.get("seconds", 0.0)) if goes_on else 0.0
    sums = _checksums(storage)
    storage.write_json(TRAINING, {"recipe": wanted, "seconds": seconds, "sha256": sums})
    return _trained(config, run, data, seconds, reused=False)


def prepared_data(config: TrainConfig, run: JobRun) -> Storage:
    """The shards: those the configuration names, or bundled data in the run's folder, written anew when damaged."""
    from jobs.prepare_data import make_dataset
    from mfm_ray.data.shards import verify_shards, write_shards

    if config.data.path is not None:
        verify_shards(config.data.path)
        return Storage(config.data.path)
    data = run.storage.child("data")
    if data.exists():
        try:
            if verify_shards(data).name == config.data.name:
                run.log(f"the data in {data} is whole: nothing to prepare")
                return data
        except InputError as error:
            run.log(f"{error}; preparing it again")
        data.delete()
    write_shards(data, make_dataset(config.data.name))
    run.log(f"wrote {data}")
    return data


def _trained(config: TrainConfig, run: JobRun, data: Storage, seconds: float, *, reused: bool) -> TrainedModel:
    import json

    lines = run.storage.read_bytes("metrics.jsonl").decode().splitlines()
    history = [json.loads(line) for line in lines]
    return TrainedModel(
        model=run.storage.child("model"), data=data, history=history, seconds=seconds, reused=reused, config=config
    )


def _fingerprint(config: TrainConfig, data: Storage) -> dict[str, Any]:
    """All that decides which model comes out: configuration and the hash of the data."""
    from mfm_ray.data.shards import read_manifest

    values = {key: value for key, value in to_dict(config).items() if key not in (*_PLACE_KEYS, "data")}
    return {"config": values, "data": config.data.name, "data_sha256": read_manifest(data).sha256}


def _read(storage: Storage) -> dict[str, Any]:
    if not storage.is_file(TRAINING):
        return {}
    try:
        found = storage.read_json(TRAINING)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_whole(storage: Storage, found: dict[str, Any]) -> bool:
    try:
        return bool(found.get("sha256")) and _checksums(storage) == found["sha256"]
    except FileNotFoundError:
        return False


def _checksums(storage: Storage) -> dict[str, str]:
    names = [f"model/{name}" for name in storage.listdir("model") if name.endswith((".safetensors", ".json"))]
    return {name: hashlib.sha256(storage.read_bytes(name)).hexdigest() for name in [*names, "metrics.jsonl"]}
