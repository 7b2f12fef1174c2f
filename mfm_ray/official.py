"""Files of bare weights: the official meta flow maps, DMF and SiT, as `.pt` or `.safetensors`, read strictly.

A `.pt` is opened with `weights_only=True`: a pickle that asks for code is refused. What a file is, and what its shapes
say, is in `networks/dit_layouts.py`; what they do not say is asked for by keyword, with XL/2's values as defaults.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError, require
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.networks.dit_layouts import Layout, as_flow_map, check_finite, check_tensors, layout_of, unwrap

if TYPE_CHECKING:
    from mfm_ray.storage import Storage

SAFETENSORS = ".safetensors"
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", SAFETENSORS)
LATENT_SCALE = 0.18215
"""Model units in a unit of Stable Diffusion's latents, which all published files were trained on."""
_DATA = "imagenet"
_NODES = ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "StringNode")
_SETTINGS = (
    "argparse.Namespace",  # of SiT's checkpoints
    "omegaconf.dictconfig.DictConfig",  # of Lightning's, in a project configured by Hydra, and what it is made of
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    *(f"omegaconf.nodes.{name}" for name in _NODES),
    "collections.defaultdict",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str")),
)
"""Classes of the settings that training scripts save beside weights; `_Settings` stands for each, none is imported."""
_BLOCK = 1 << 24


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a file by their bare names, with the layout that their shapes make. where: the file, for errors."""

    where: str
    tensors: Mapping[str, Tensor]
    layout: Layout

    def config(self, *, scale: float | None = None, **facts: Any) -> dict[str, Any]:
        """What config.json of a model directory would say. scale: of the latents; facts: of `Layout.network`."""
        with self._named():
            network = self.layout.network(**facts)
            require(scale is None or isinstance(scale, int | float), "scale", scale, "a number")
            space = DataSpace("latent", self.layout.event_shape, scale=LATENT_SCALE if scale is None else scale)
        classes = self.layout.num_classes
        data = {"name": _DATA, **space.config(), "num_classes": classes, "class_names": []}
        return {
            "network": network,
            "interpolant": "linear",
            "data": data,
            "cfg_scales": network["cfg_scales"],
            "training": {},
        }

    def check(self) -> None:
        """InputError for a value that is not finite; shapes and names were checked when the file was opened."""
        with self._named():
            check_finite(self.tensors)

    def flow_map(self, **facts: Any) -> FlowMap:
        """The flow map, on the CPU in float32; arguments of `config`."""
        config = self.config(**facts)
        with self._named(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of layers that weights with one time embedder leave silent
            space = DataSpace.from_config(config["data"])
            network = build_network(config["network"], space=space, num_classes=self.layout.num_classes)
        network.load_state_dict(self.state_dict(network))
        return network

    def state_dict(self, network: FlowMap) -> dict[str, Tensor]:
        """All weights of `network`, a DiT of these sizes at its initialisation. InputError for NaN and infinity."""
        self.check()
        return as_flow_map(self.tensors, self.layout, network.state_dict())

    def _named(self) -> _NamedErrors:
        return _NamedErrors(self.where)


def is_weights(place: Storage) -> bool:
    """Whether a place is a file of bare weights, by its name."""
    return place.name.endswith(SUFFIXES) and place.exists() and not place.is_dir()


def read_weights(place: Storage, *, ema: bool | None = None) -> WeightsFile:
    """Opens a file of bare weights and checks names, shapes and types; of a local file values are read when asked for.

    ema: as in `dit_layouts.unwrap`. InputError naming file and tensor for whatever is damaged or does not fit.
    """
    with _NamedErrors(place.uri):
        tensors = unwrap(_content(place), ema=ema)
        layout = layout_of(tensors)
        check_tensors(tensors, layout)
    return WeightsFile(where=place.uri, tensors=tensors, layout=layout)


def sha256_of(place: Storage) -> str:
    """SHA-256 of a file's bytes."""
    digest, at = hashlib.sha256(), 0
    file = place.open_for_parts("")
    with file:
        while block := file.read_at(_BLOCK, at):
            digest.update(block)
            at += len(block)
    return digest.hexdigest()


def only_weights_in(folder: Storage) -> Storage:
    """The one file of weights in a folder. InputError when there are none or several."""
    names = [name for name in folder.listdir() if name.endswith(SUFFIXES)]
    if len(names) != 1:
        found = f"{len(names)} weights files ({', '.join(names[:3])})" if names else "no weights file"
        raise InputError(f"{folder} holds {found}, expected a model directory or one file {_listed(SUFFIXES)}")
    return folder.child(names[0])


class _Settings(dict[Any, Any]):
    """What an object of settings becomes: an empty mapping, whatever its pickle hands over. Nothing of it is run."""

    def __new__(cls, *args: Any) -> _Settings:
        return dict.__new__(cls)

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...


class _NamedErrors:
    """Puts the file before what is wrong with it."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise InputError(f"{self._where}: {_one_line(error)}") from error


def _content(place: Storage) -> Any:
    return _safetensors(place) if place.name.endswith(SAFETENSORS) else _torch(place)


def _safetensors(place: Storage) -> dict[str, Tensor]:
    try:
        if place.local_path is not None:
            return safetensors.torch.load_file(place.local_path)
        return safetensors.torch.load(place.read_bytes(""))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"truncated or no safetensors file: {_one_line(error)}") from error


def _torch(place: Storage) -> Any:
    """What torch.load gives. Any exception is the file's: a damaged pickle raises whatever its bytes lead to."""
    local = place.local_path
    source: Any = io.BytesIO(place.read_bytes("")) if local is None else str(local)
    mmap = local is not None and zipfile.is_zipfile(local)
    try:
        with torch.serialization.safe_globals([(_Settings, name) for name in _SETTINGS]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)
    except Exception as error:
        text = str(error)
        if refused := re.search(r"GLOBAL ([\w.]+)", text):
            raise InputError(
                f"holds {refused[1]}, and nothing but tensors is unpickled; save its state_dict alone"
            ) from error
        raise InputError(f"truncated or no file of torch.save: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)
