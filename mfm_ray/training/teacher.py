"""The teacher of a distilled objective: named by the configuration, checked before the cluster is asked, replicated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mfm_ray.data.shards import Manifest
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError, require
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.objectives import build_objective, needs_teacher
from mfm_ray.pretrained import load_flow_map, read_model_config
from mfm_ray.storage import Storage
from mfm_ray.training.loss_module import AutocastFlowMap


def teacher_location(objective: Mapping[str, Any]) -> Storage | None:
    """The model directory that the objective distils, None when it distils none."""
    if not needs_teacher(objective):
        return None
    path = objective.get("teacher")
    require(isinstance(path, str), "objective.teacher", "null" if path is None else path, "a model directory")
    return Storage(str(path))


def check_objective(objective: Mapping[str, Any]) -> None:
    """Build the objective once, with the teacher's network on no device. ValueError, one line."""
    location = teacher_location(objective)
    build_objective(objective, teacher=None if location is None else _without_weights(location))


def check_teacher(objective: Mapping[str, Any], data: Manifest) -> None:
    """InputError unless the teacher speaks of the data that are trained on."""
    location = teacher_location(objective)
    if location is None:
        return
    teacher = _without_weights(location)
    theirs, ours = (teacher.event_shape, teacher.num_classes), (data.space.event_shape, data.num_classes)
    if theirs != ours:
        raise InputError(
            f"objective.teacher={location}: made for shape {theirs[0]} and {theirs[1]} classes, "
            f"expected {ours[0]} and {ours[1]}, as {data.name} has"
        )


def load_teacher(location: Storage | None, *, precision: str, device: torch.device) -> FlowMap | None:
    """The frozen teacher on this worker's device, in the precision of the training."""
    if location is None:
        return None
    teacher = load_flow_map(location, autoencoder=None).to(device)
    return AutocastFlowMap(teacher) if precision == "bf16" else teacher


def _without_weights(location: Storage) -> FlowMap:
    config = read_model_config(location)
    with torch.device("meta"):
        return build_network(
            config["network"],
            space=DataSpace.from_config(config["data"]),
            num_classes=int(config["data"].get("num_classes", 0)),
        )
