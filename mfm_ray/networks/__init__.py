"""Concrete flow maps, by the name they carry in a configuration and in a model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError, refuse_unknown_arguments
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.dit import DiTFlowMap
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.networks.unet import UNetFlowMap


def _data_std(moments: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"data_std": float(moments["variances"].mean().sqrt())}


@dataclass(frozen=True)
class Entry:
    """A network's class, and what its constructor takes of the data's moments."""

    network: Callable[..., FlowMap]
    from_moments: Callable[[Mapping[str, Tensor]], dict[str, Any]]


NETWORKS = {
    "residual_mlp": Entry(ResidualMLPFlowMap, dict),
    "dit": Entry(DiTFlowMap, _data_std),
    "unet": Entry(UNetFlowMap, dict),
}
TUNED = "tuned"
"""The name of a pair of networks, {"name": "tuned", "base": {...}, "tuned": {...}}: no configuration begins there."""
_PARTS = ("base", "tuned")
_SUPPLIED = ("space", "num_classes", "mean", "variances", "basis")  # from the data, not from a configuration


def check_recomputation(network: Mapping[str, Any], *, wanted: bool) -> None:
    """InputError where activation checkpointing is wanted of a network that has no blocks for it."""
    able = [name for name, entry in sorted(NETWORKS.items()) if getattr(entry.network, "recomputes", False)]
    name = network.get("name")
    if wanted and name in NETWORKS and name not in able:
        raise InputError(
            f"activation_checkpointing=true: network={name} has no blocks to compute again; expected false, or "
            f"network={' or '.join(able)}"
        )


def build_network(
    network: Mapping[str, Any],
    *,
    space: DataSpace,
    num_classes: int = 0,
    moments: Mapping[str, Tensor] | None = None,
) -> FlowMap:
    """The flow map that a mapping {"name": ..., **constructor arguments} describes.

    `moments` (mean, variances, basis of the data in model space) precondition it; without them the network has
    placeholder buffers of the right shape, to be overwritten by a checkpoint; both parts of a tuned network are made
    without. Raises ValueError for an unknown name
    and for arguments that the constructor refuses, naming both.
    """
    arguments = dict(network)
    name = arguments.pop("name", None)
    if name == TUNED:
        parts = {part: build_network(arguments[part], space=space, num_classes=num_classes) for part in _PARTS}
        return TunedFlowMap(**parts)
    if name not in NETWORKS:
        raise ValueError(f"network.name={name!r}: expected one of {', '.join(sorted(NETWORKS))}")
    entry = NETWORKS[name]
    refuse_unknown_arguments(arguments, entry.network, group="network", supplied=_SUPPLIED)
    from_data = {} if moments is None else entry.from_moments(moments)
    try:
        return entry.network(space=space, num_classes=num_classes, **{**from_data, **arguments})
    except TypeError as error:
        raise ValueError(f"network={dict(network)}: {error}") from error
