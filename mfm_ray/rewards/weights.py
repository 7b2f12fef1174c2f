"""Weights of other people's networks: read without pickles of code, checked name by name, put into a module whole."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError

_SHOWN = 3
_Module = TypeVar("_Module", bound=nn.Module)


def first_file(folder: Path, names: Sequence[str], *, what: str) -> Path:
    """The first of the files that the folder has. InputError naming all of them."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: no {what} there, expected {' or '.join(names)}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a safetensors file or one that torch saved; those of `state_dict` where it has such a part.

    InputError for a file that is damaged, holds more than tensors and plain values, or NaN.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
    ) as error:
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:160]
        raise InputError(f"{path} cannot be read as weights: {reason}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no tensors by name")
    for name, tensor in content.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: {name} holds NaN or infinity")
    return dict(content)


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names without a prefix that all of them have, such as the `model.` of a packaging; as they are otherwise."""
    if not all(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor that must be there. InputError naming it."""
    if name not in tensors:
        raise InputError(f"{path}: {name} is missing")
    if tensors[name].dim() != dims:
        raise InputError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, expected {dims} axes")
    return tuple(tensors[name].shape)


def count_layers(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> int:
    """Layers `prefix0.`, `prefix1.`, ... that the names have. InputError for none."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
    if not numbers or not all(number.isdigit() for number in numbers):
        raise InputError(f"{path}: {prefix}0 is missing")
    return max(map(int, numbers)) + 1


def filled(make: Callable[[], _Module], tensors: Mapping[str, Tensor], path: Path) -> _Module:
    """The module with these weights, in float32, frozen, in eval mode, made without initialising anything first.

    Buffers that no file holds must be `position_ids`, the numbers 0, 1, ... InputError naming tensors that are missing,
    unknown or of another shape.
    """
    with torch.device("meta"):
        module = make()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(f"{path}: missing {_listed(missing)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{path}: unknown {_listed(unknown)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    # copies in memory of their own: kernels compute other bits where a tensor begins at an odd place of a mapped file
    own = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    module.load_state_dict(own, assign=True)
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_meta:
                assert name == "position_ids", name
                setattr(owner, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.eval().requires_grad_(False)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
