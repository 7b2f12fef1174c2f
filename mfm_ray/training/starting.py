"""The weights that a training begins with: those of a model directory, or of an official MFM, DMF or SiT file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.flow_map import FlowMap
from mfm_ray.hub import is_hub
from mfm_ray.networks import build_network
from mfm_ray.networks.dit_layouts import LEARNED_SIGMA
from mfm_ray.official import WeightsFile, is_weights, read_weights
from mfm_ray.pretrained import WEIGHTS, checked_weights, model_place, read_model_config
from mfm_ray.storage import Storage

_FROM_DATA = ("data_std",)
"""Settings of a network that its data decide."""


def absolute(source: str | None) -> str | None:
    """A source as any process finds it, from whatever working directory."""
    return source if source is None or is_hub(source) else Storage(source).uri


def check_start(source: str | None, network: Mapping[str, Any], *, space: DataSpace, num_classes: int) -> None:
    """InputError unless training of this network can begin at `source`; every value of it is looked at."""
    if source is None:
        return
    with torch.device("meta"):
        flow_map = build_network(network, space=space, num_classes=num_classes)
    starting_weights(flow_map, source)


def begin_at(flow_map: FlowMap, source: str | None) -> FlowMap:
    """The same flow map with the weights of `source`, as it is where there is none."""
    if source is not None:
        flow_map.load_state_dict(starting_weights(flow_map, source))
    return flow_map


def starting_weights(flow_map: FlowMap, source: str) -> dict[str, Tensor]:
    """State dict for a flow map at its initialisation, which may be on no device.

    InputError naming the key that contradicts the source, or what of it is damaged.
    """
    place = model_place(source, key="init_from")
    if is_weights(place):
        return _of_bare_weights(flow_map, read_weights(place))
    config = _config_of(place)
    _check_same(flow_map.config(), config["network"], where=place.uri)
    described = DataSpace.from_config(config["data"])
    if described.event_shape != flow_map.event_shape:
        raise InputError(f"init_from={place}: of shape {described.event_shape}, the data's is {flow_map.event_shape}")
    return checked_weights(flow_map, place.read_bytes(WEIGHTS), where=place.uri_of(WEIGHTS))


def check_weights(source: str, *, key: str, ema: bool | None = None) -> None:
    """InputError for a file of bare weights that is damaged anywhere; model directories are left to their reader."""
    place = model_place(source, key=key)
    if is_weights(place):
        read_weights(place, ema=ema).check()


def _of_bare_weights(flow_map: FlowMap, file: WeightsFile) -> dict[str, Tensor]:
    """Sizes, classes and guidance rows must be those of the network that is trained; the rest is the network's."""
    layout, own = file.layout, flow_map.config()
    if own["name"] != "dit":
        raise InputError(f"network.name={own['name']}: {file.where} holds a DiT, expected network=dit")
    for name in ("hidden_size", "depth", "patch_size"):
        if own[name] != getattr(layout, name):
            raise InputError(f"network.{name}={own[name]}: {file.where} has {getattr(layout, name)}")
    if layout.learned_sigma and own["time_flip"]:
        raise InputError(
            f"network.time_flip=true: {file.where} predicts {LEARNED_SIGMA}, in time from noise to data; expected false"
        )
    if layout.guidance_rows not in (None, 1 + len(own["cfg_scales"])):
        raise InputError(
            f"network.cfg_scales={own['cfg_scales']}: {file.where} has {layout.guidance_rows} rows of guidance, "
            f"expected {layout.guidance_rows - 1} scales"
        )
    theirs, ours = (layout.event_shape, layout.num_classes), (flow_map.event_shape, flow_map.num_classes)
    if theirs != ours:
        raise InputError(
            f"init_from={file.where}: of shape {theirs[0]} and {theirs[1]} classes, "
            f"the data's are {ours[0]} and {ours[1]}"
        )
    return file.state_dict(flow_map)


def _config_of(place: Storage) -> dict[str, Any]:
    if not place.exists():
        raise InputError(f"init_from={place} does not exist, expected a model directory or a file of weights")
    return read_model_config(place)


def _check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, where: str) -> None:
    """What only one of them says is of another version; missing tensors would show."""
    for name in sorted((ours.keys() & theirs.keys()) - set(_FROM_DATA)):
        if ours[name] != theirs[name]:
            wanted, given = json.dumps(theirs[name]), json.dumps(ours[name])
            raise InputError(f"network.{name}={given}: init_from={where} has {wanted}")
