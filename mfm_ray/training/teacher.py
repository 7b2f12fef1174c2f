"""The teacher of a distilled objective: named by the configuration, checked before the cluster is asked, replicated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mfm_ray.data.shards import Manifest
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError, refuse_unknown_arguments, require
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.objectives import build_objective, needs_teacher
from mfm_ray.pretrained import load_flow_map, read_model_config
from mfm_ray.training.loss_module import AutocastFlowMap
from mfm_ray.training.starting import absolute, check_weights


@dataclass(frozen=True)
class TeacherPlace:
    """A model directory, or bare weights (official MFM, DMF, SiT) with what their shapes do not say.

    facts: keywords of `load_flow_map`. Every worker reads it itself, from the hub's local cache where it is there.
    """

    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.source


def teacher_location(objective: Mapping[str, Any]) -> TeacherPlace | None:
    """The model that the objective distils, None when it distils none.

    `objective.teacher` is its place, or {source: place, num_heads: ..., time_flip: ...} for bare weights.
    """
    if not needs_teacher(objective):
        return None
    given = objective.get("teacher")
    facts = dict(given) if isinstance(given, Mapping) else {"source": given}
    source = facts.pop("source", None)
    is_place = isinstance(source, str)
    require(is_place, "objective.teacher", "null" if source is None else source, "a model directory or weights file")
    refuse_unknown_arguments(
        facts, load_flow_map, group="objective.teacher", supplied=("source", "autoencoder"), further=("source",)
    )
    return TeacherPlace(str(absolute(source)), facts)


def check_objective(objective: Mapping[str, Any]) -> None:
    """Build the objective once, with the teacher's network on no device; of bare weights every value is looked at.

    ValueError, one line.
    """
    location = teacher_location(objective)
    build_objective(objective, teacher=None if location is None else _without_weights(location))
    if location is not None:
        check_weights(location.source, key="objective.teacher", ema=location.facts.get("ema"))


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


def load_teacher(location: TeacherPlace | None, *, precision: str, device: torch.device) -> FlowMap | None:
    """The frozen teacher on this worker's device, in the precision of the training."""
    if location is None:
        return None
    teacher = load_flow_map(location.source, autoencoder=None, **location.facts).to(device)
    return AutocastFlowMap(teacher) if precision == "bf16" else teacher


def _without_weights(location: TeacherPlace) -> FlowMap:
    config = read_model_config(location.source, **location.facts)
    with torch.device("meta"):
        return build_network(
            config["network"],
            space=DataSpace.from_config(config["data"]),
            num_classes=int(config["data"].get("num_classes", 0)),
        )
