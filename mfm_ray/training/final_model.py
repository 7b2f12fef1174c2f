"""The model directory at the end of a run: averaged weights of a checkpoint, a card, the data's own judge."""

from __future__ import annotations

import math
from typing import Any

from mfm_ray.config import TrainConfig
from mfm_ray.data.shards import load_split, read_manifest
from mfm_ray.data_space import DataSpace
from mfm_ray.networks import TUNED, build_network
from mfm_ray.networks.classifier import TrainedClassifier, train_classifier
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.pretrained import save_model
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import CheckpointModel, read_checkpoint_model
from mfm_ray.training.tuned_model import build_tuned, save_tuned_model, with_best

CLASSIFIER_BATCH = 64


def export_checkpoint(
    location: Storage,
    target: Storage,
    *,
    ema_decay: float | None = None,
    judge: TrainedClassifier | None = None,
    picture: bytes | None = None,
    best: Storage | None = None,
) -> dict[str, float]:
    """Write the model directory of any checkpoint in place of an older one; the figures on its card.

    ema_decay: which of the averages, by default the first of them. best: folder of the best weights of a fine-tuning,
    taken in the place of the checkpoint's. Nothing is unpickled. InputError naming the file when the checkpoint is
    damaged or none, and for a decay that it does not hold.
    """
    found = read_checkpoint_model(location, ema_decay=ema_decay)
    if best is not None:
        found = with_best(found, best)
    flow_map = build_from(found)
    figures = dict(found.state.figures)
    if judge is not None:
        figures["classifier_heldout_accuracy"] = judge.heldout_accuracy
    pictures = {"samples.png": picture} if picture is not None else {}
    if isinstance(flow_map, TunedFlowMap):
        save_tuned_model(target, flow_map, found, pictures=pictures)
        return figures
    save_model(
        target,
        flow_map,
        config={**found.state.model, "training": training_summary(found)},
        metrics=figures,
        pictures=pictures,
        classifier=judge.classifier if judge is not None else None,
        heldout_accuracy=judge.heldout_accuracy if judge is not None else None,
    )
    return figures


def build_from(found: CheckpointModel) -> Any:
    """The network that a checkpoint describes, with its averaged weights."""
    if found.state.model["network"]["name"] == TUNED:
        return build_tuned(found)
    data = found.state.model["data"]
    flow_map = build_network(
        found.state.model["network"], space=DataSpace.from_config(data), num_classes=data["num_classes"]
    )
    flow_map.load_state_dict(found.state_dict)
    return flow_map


def training_summary(found: CheckpointModel) -> dict[str, Any]:
    """What config.json tells about how the weights came to be."""
    state = found.state
    told = ("experiment", "objective", "global_batch_size", "optimizer", "precision", "seed")
    return {
        "steps": state.step,
        "seconds": round(state.seconds, 3),
        "num_workers": state.world_size,
        "zero_stage": state.stage,
        **{key: state.config[key] for key in told},
        "init_from": state.config.get("init_from"),
        "ema_decay": found.decay,
        "data_sha256": state.data_sha256,
    }


def train_judge(config: TrainConfig, data: Storage) -> TrainedClassifier | None:
    """The classifier of the training data, None where the configuration wants none."""
    if config.classifier_steps == 0:
        return None
    train, heldout = load_split(data, "train"), load_split(data, "heldout")
    epochs = math.ceil(config.classifier_steps / math.ceil(len(train) / CLASSIFIER_BATCH))
    return train_classifier(
        train.data,
        train.labels,
        heldout_data=heldout.data,
        heldout_labels=heldout.labels,
        num_classes=read_manifest(data).num_classes,
        seed=config.seed,
        epochs=epochs,
    )


def newest_picture(run: Storage) -> bytes | None:
    """The last sample grid of a run."""
    names = run.listdir("samples") if run.is_dir("samples") else []
    return run.read_bytes(f"samples/{names[-1]}") if names else None
