"""Concrete flow maps, by the name they carry in a configuration and in a model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.dit import DiTFlowMap
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap


def _residual_mlp(*, moments: Mapping[str, Tensor] | None, **arguments: Any) -> FlowMap:
    return ResidualMLPFlowMap(**{**arguments, **(moments or {})})


def _dit(*, moments: Mapping[str, Tensor] | None, **arguments: Any) -> FlowMap:
    if moments is not None:
        arguments.setdefault("data_std", float(moments["variances"].mean().sqrt()))
    return DiTFlowMap(**arguments)


NETWORKS: dict[str, Callable[..., FlowMap]] = {"residual_mlp": _residual_mlp, "dit": _dit}


def build_network(
    network: Mapping[str, Any],
    *,
    space: DataSpace,
    num_classes: int = 0,
    moments: Mapping[str, Tensor] | None = None,
) -> FlowMap:
    """The flow map that a mapping {"name": ..., **constructor arguments} describes.

    `moments` (mean, variances, basis of the data in model space) precondition it; without them the network has
    placeholder buffers of the right shape, to be overwritten by a checkpoint. Raises ValueError for an unknown name
    and for arguments that the constructor refuses, naming both.
    """
    arguments = dict(network)
    name = arguments.pop("name", None)
    if name not in NETWORKS:
        raise ValueError(f"network.name={name!r}: expected one of {', '.join(sorted(NETWORKS))}")
    try:
        return NETWORKS[name](space=space, num_classes=num_classes, moments=moments, **arguments)
    except TypeError as error:
        raise ValueError(f"network={dict(network)}: {error}") from error
