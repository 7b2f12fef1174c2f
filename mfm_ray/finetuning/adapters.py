"""Which weights of a network are tuned: all of them, or low-rank corrections of its layers (LoRA, arXiv 2106.09685).

A layer with the frozen weight W (out x in) computes (W + alpha / rank * B A) x, A (rank x in) drawn at random, B (out x
rank) zero, so that tuning begins at the frozen network to the bit. The layers are those of the library `peft`; what
they correct a convolution by is one too, A of its kernel and B of 1 x 1. Merged, the network is one like any other.
"""

from __future__ import annotations

import copy
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError, refuse_unknown_arguments, require
from mfm_ray.flow_map import FlowMap, require_at_least_one

ADAPTED = (nn.Linear, nn.Conv2d)
"""Layers that can be corrected."""
_NAME = "default"


class Adapter(ABC):
    """How a trainable network is made of a frozen one.

    backward_units: cost of the backward pass in forward passes.
    """

    backward_units: float

    @abstractmethod
    def trainable(self, base: FlowMap, *, seed: int) -> FlowMap:
        """A copy of `base`, of whose parameters those that are tuned require a gradient."""

    @abstractmethod
    def merged(self, base: FlowMap, weights: Mapping[str, Tensor]) -> FlowMap:
        """A network of the kind of `base` from the tuned parameters of `trainable` (and its buffers), on its device.

        ValueError for weights that are not those.
        """

    def check(self, base: FlowMap) -> None:  # noqa: B027 (nothing to be wrong unless a subclass says so)
        """InputError for a network that cannot be tuned so; its weights may be on the meta device."""

    @abstractmethod
    def facts(self, base: FlowMap) -> dict[str, Any]:
        """What a model directory tells about it."""


class WholeNetwork(Adapter):
    """Every weight is tuned."""

    backward_units = 2.0

    def trainable(self, base: FlowMap, *, seed: int) -> FlowMap:
        return copy.deepcopy(base).requires_grad_(True)

    def merged(self, base: FlowMap, weights: Mapping[str, Tensor]) -> FlowMap:
        network = copy.deepcopy(base)
        network.load_state_dict(weights)
        return network

    def facts(self, base: FlowMap) -> dict[str, Any]:
        count = _count(base)
        return {"name": "none", "parameters": count, "tuned_parameters": count}


class LowRank(Adapter):
    """Low-rank corrections of linear layers and convolutions; all else is frozen, embeddings and norms too.

    rank: of each correction. alpha: its scale times the rank, None for the rank. targets: layers by name or by the end
    of it; None: all there are. ValueError naming the argument.
    """

    # frozen weights have no gradient: one pass back to the inputs, and next to nothing for the corrections
    backward_units = 1.0

    def __init__(self, *, rank: int = 8, alpha: float | None = None, targets: Sequence[str] | None = None) -> None:
        require_at_least_one(rank=rank)
        require(alpha is None or alpha > 0, "alpha", alpha, "a number above 0, or null for the rank")
        strings = targets is None or (not isinstance(targets, str) and all(isinstance(name, str) for name in targets))
        require(strings and targets != [], "targets", targets, "names of layers, or null for all of them")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.targets = None if targets is None else tuple(targets)

    def layers(self, base: FlowMap) -> list[str]:
        """Names of the layers that are corrected. InputError for a target that is none."""
        known = [name for name, module in base.named_modules() if isinstance(module, ADAPTED)]
        if self.targets is None:
            return known
        for target in self.targets:
            if not any(_is_at_the_end(target, name) for name in known):
                ends = sorted({name.rpartition(".")[2] for name in known})
                raise InputError(
                    f"adapter.targets={target}: no linear layer or convolution of this model; expected names, or ends "
                    f"of names, such as {', '.join(end for end in ends if not end.isdigit())}"
                )
        return [name for name in known if any(_is_at_the_end(target, name) for target in self.targets)]

    def check(self, base: FlowMap) -> None:
        if importlib.util.find_spec("peft") is None:  # to import it takes seconds
            raise InputError("adapter=lora: peft is not installed; pip install 'mfm_ray[adapters]'")
        self.layers(base)

    def trainable(self, base: FlowMap, *, seed: int) -> FlowMap:
        network = copy.deepcopy(base)
        self._add_to(network, seed)
        return network

    def merged(self, base: FlowMap, weights: Mapping[str, Tensor]) -> FlowMap:
        network = copy.deepcopy(base)
        adapted = self._add_to(network, 0)
        missing, unexpected = network.load_state_dict(weights, strict=False)
        lacking = {name for name, tensor in network.named_parameters() if tensor.requires_grad} & set(missing)
        if lacking or unexpected:
            raise ValueError(f"adapter: weights of other layers, {sorted(lacking or unexpected)[0]} among them")
        adapted.merge_and_unload()
        return network

    def facts(self, base: FlowMap) -> dict[str, Any]:
        tuned = sum(self._size(base.get_submodule(name)) for name in self.layers(base))
        return {
            "name": "lora",
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": None if self.targets is None else list(self.targets),
            "layers": len(self.layers(base)),
            "parameters": _count(base),
            "tuned_parameters": tuned,
        }

    def _size(self, layer: nn.Module) -> int:
        """Parameters of a layer's correction: those of A and of B."""
        if isinstance(layer, nn.Conv2d):
            kernel = layer.kernel_size[0] * layer.kernel_size[1]
            return self.rank * (layer.in_channels * kernel + layer.out_channels)
        assert isinstance(layer, nn.Linear)
        return self.rank * (layer.in_features + layer.out_features)

    def _add_to(self, network: FlowMap, seed: int) -> Any:
        """Puts the corrections into `network` itself, the same from the same seed; returns what merges them."""
        from peft.tuners import lora

        shell = _Shell(network)
        names = [f"network.{name}" for name in self.layers(network)]
        alpha: Any = self.alpha  # an integer to peft, which divides it by the rank
        wanted = lora.LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = lora.LoraModel(shell, {_NAME: wanted}, _NAME)
        return adapted


class _Shell(nn.Module):
    """Holds a flow map, whose method `config` peft would take for its configuration."""

    def __init__(self, network: FlowMap) -> None:
        super().__init__()
        self.network = network


ADAPTERS: dict[str, type[Adapter]] = {"none": WholeNetwork, "lora": LowRank}


def build_adapter(adapter: Mapping[str, Any]) -> Adapter:
    """What a mapping {"name": ..., **constructor arguments} describes.

    ValueError for an unknown name, and for arguments that the constructor refuses, naming both.
    """
    arguments = dict(adapter)
    name = arguments.pop("name", None)
    if name not in ADAPTERS:
        raise ValueError(f"adapter.name={name!r}: expected one of {', '.join(sorted(ADAPTERS))}")
    refuse_unknown_arguments(arguments, ADAPTERS[name], group="adapter")
    return ADAPTERS[name](**arguments)


def _is_at_the_end(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
