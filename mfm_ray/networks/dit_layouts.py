"""Weights of the DiT family: what a file's tensors are, what their shapes say, and the meta flow map that they make.

    "mfm"       the meta flow map's own layout (dit.py): nothing to convert
    "one_time"  one time embedder: DMF, whose encoder is told the first time and whose decoder the second, and SiT,
                which is told one time. SiT's files may predict a variance beside the velocity (learned sigma)

From weights of one time embedder E the meta flow map starts with (TE_s, TE_u: encoder; TE_s2, TE_u2: decoder)

    TE_s = TE_u2 = E,    TE_u = TE_s2 = TE_t = 0,    the outer state gated off,    no guidance

so that for every t, x_t and guidance scale, v_{s,u}(x) = -DMF(x, 1 - s, 1 - u) with time_flip, and v_{s,s}(x) =
SiT(x, s) without (Potaptchik et al., arXiv 2601.14430, and the code published with it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError, require
from mfm_ray.networks.dit import DiTFlowMap

PREFIXES = ("module.", "_orig_mod.", "model.", "dit.", "net.")
"""What wrappers put before the names: DDP, torch.compile, the official wrapper and Lightning modules."""
EMA_PREFIXES = ("ema.", "ema_model.", "model_ema.")
CONTAINERS = ("state_dict", "model_state_dict", "model")
EMA_CONTAINERS = ("ema_state_dict", "ema", "model_ema", "ema_model")
LEARNED_SIGMA = "a variance beside the velocity (learned sigma), as SiT's files do"

_OUTER = ("x_cond_embedder.", "x_cond_adaLN.", "t_cond_embedder.")
_SECOND = ("s_embedder.", "s_embedder_second.", "t_embedder_second.", "guidance_embedder.")
_OF_MFM = (*_OUTER, *_SECOND)
_COUNTER = "n_averaged"  # of torch's AveragedModel
_OF_TRAINING = ("logvar_linear.", "projectors.")
"""Beside weights of one time embedder, for their training alone: DMF's loss weights, the projections of REPA."""
_PUBLISHED_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
_PUBLISHED_ENCODERS = {(768, 12): 8, (1152, 28): 20}
_NUM_HEADS, _ENCODER_DEPTH, _CFG_SCALES = 16, 20, (2.5,)  # of XL/2
_SHOWN = 3


@dataclass(frozen=True)
class Layout:
    """What the tensors of a file say.

    kind: "mfm" or "one_time". grid: patches along a side. num_classes: labels beside the null class. guidance_rows: of
    the guidance table, None where there is none. learned_sigma: the output has twice the channels.
    """

    kind: str
    hidden_size: int
    depth: int
    patch_size: int
    channels: int
    grid: int
    num_classes: int
    guidance_rows: int | None
    learned_sigma: bool

    @property
    def event_shape(self) -> tuple[int, int, int]:
        side = self.grid * self.patch_size
        return self.channels, side, side

    def network(
        self,
        *,
        num_heads: int | None = None,
        encoder_depth: int | None = None,
        cfg_scales: Sequence[float] | None = None,
        time_flip: bool | None = None,
    ) -> dict[str, Any]:
        """What `networks.build_network` takes: the sizes, and what no shape says.

        Defaults: num_heads and encoder_depth of the published size that this is (S, B, L, XL), for others those of
        XL/2, 16 and 20; cfg_scales [2.5], or none where the table has the one row of scale 1; time_flip True, but False
        with a learned sigma. InputError, without the file's name, for what contradicts the shapes.
        """
        size = (self.hidden_size, self.depth)
        heads = _PUBLISHED_HEADS.get(size, _NUM_HEADS) if num_heads is None else num_heads
        encoder = _PUBLISHED_ENCODERS.get(size, _ENCODER_DEPTH) if encoder_depth is None else encoder_depth
        for name, value in (("num_heads", heads), ("encoder_depth", encoder)):
            require(type(value) is int, name, value, "a whole number")
        require(time_flip is None or isinstance(time_flip, bool), "time_flip", time_flip, "true or false")
        if heads < 1 or self.hidden_size % heads:
            raise InputError(f"num_heads={heads}: expected a divisor of the file's hidden size {self.hidden_size}")
        if not 1 <= encoder <= self.depth:
            raise InputError(f"encoder_depth={encoder}: expected 1 to {self.depth}, the file's number of blocks")
        if self.learned_sigma and time_flip:
            raise InputError(f"time_flip=true: the file predicts {LEARNED_SIGMA}, in time from noise to data")
        return {
            "name": "dit",
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "depth": self.depth,
            "num_heads": heads,
            "encoder_depth": encoder,
            "time_flip": (not self.learned_sigma) if time_flip is None else time_flip,
            "cfg_scales": self._scales(cfg_scales),
        }

    def _scales(self, given: Sequence[float] | None) -> list[float]:
        if given is None:
            scales = [] if self.guidance_rows == 1 else [float(scale) for scale in _CFG_SCALES]
        else:
            is_list = isinstance(given, Sequence) and all(isinstance(scale, int | float) for scale in given)
            require(is_list, "cfg_scales", given, "a list of numbers")
            scales = [float(scale) for scale in given]
        require(all(math.isfinite(scale) and scale > 0 for scale in scales), "cfg_scales", scales, "numbers above 0")
        if self.guidance_rows is not None and len(scales) + 1 != self.guidance_rows:
            raise InputError(
                f"cfg_scales={scales}: guidance_embedder.embedding_table.weight has {self.guidance_rows} rows, "
                f"expected {self.guidance_rows - 1} scales (row 0 is scale 1)"
            )
        return scales


def unwrap(content: Any, *, ema: bool | None = None) -> dict[str, Tensor]:
    """The tensors of a file by their bare names: containers opened, the prefixes of wrappers dropped.

    content: what a file holds: tensors by name, or a checkpoint with these below `state_dict`, `model` or `ema`.
    ema: averaged weights (True), those beside them (False), or (None) the averaged ones where there are any. InputError
    where there is nothing of the kind, or two tensors of one name.
    """
    require(ema is None or isinstance(ema, bool), "ema", ema, "true, false or null")
    entries = {False: dict(_open(content, CONTAINERS)), True: dict(_open(content, EMA_CONTAINERS))}
    for key in [key for key in entries[False] if _bare(key)[1]]:
        entries[True][key] = entries[False].pop(key)
    if not (entries[False] or entries[True]):
        raise InputError("holds no tensors by name")
    wanted = bool(entries[True]) if ema is None else ema
    if not entries[wanted]:
        what = "averaged weights" if wanted else "weights but averaged ones"
        raise InputError(f"ema={str(ema).lower()}: holds no {what}, expected null")
    tensors: dict[str, Tensor] = {}
    for key, value in entries[wanted].items():
        name, _ = _bare(key)
        if not isinstance(value, Tensor):
            raise InputError(f"{key} is a {type(value).__name__}, expected a tensor")
        if name in tensors:
            raise InputError(f"{key}: a second tensor of the name {name}")
        tensors[name] = value
    tensors.pop(_COUNTER, None)
    if _kind(tensors) == "mfm":
        return tensors
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_OF_TRAINING)}


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """What the shapes say. InputError naming the tensor for what is missing or contradicts another one."""
    patches = _shaped(tensors, "x_embedder.proj.weight", 4)
    hidden, channels, patch = patches[0], patches[1], patches[2]
    if patches[2] != patches[3]:
        raise InputError(f"x_embedder.proj.weight has shape {patches}, expected square patches")
    positions = _shaped(tensors, "pos_embed", 3)
    grid = math.isqrt(positions[1])
    if positions != (1, grid * grid, hidden) or grid < 1:
        raise InputError(f"pos_embed has shape {positions}, expected (1, side * side, {hidden}) of a square grid")
    outputs, of_velocity = _shaped(tensors, "final_layer.linear.weight", 2)[0], patch * patch * channels
    kind = _kind(tensors)
    if outputs not in (of_velocity, 2 * of_velocity) or (kind == "mfm" and outputs != of_velocity):
        raise InputError(
            f"final_layer.linear.weight has {outputs} rows, expected {of_velocity}: {channels} channels in patches of "
            f"{patch} x {patch}"
        )
    guidance = "guidance_embedder.embedding_table.weight"
    return Layout(
        kind=kind,
        hidden_size=hidden,
        depth=_depth(tensors),
        patch_size=patch,
        channels=channels,
        grid=grid,
        num_classes=_shaped(tensors, "y_embedder.embedding_table.weight", 2)[0] - 1,
        guidance_rows=_shaped(tensors, guidance, 2)[0] if kind == "mfm" else None,
        learned_sigma=outputs != of_velocity,
    )


def check_tensors(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """InputError unless the file holds every tensor of its layout, in its shape, as floats, and nothing else."""
    expected = _expected(layout)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(f"lacks {_listed(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"has {_listed(unexpected)} that this layout does not know")
    for name, shape in sorted(expected.items()):
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise InputError(f"{name} has type {tensors[name].dtype}, expected floats")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """InputError naming the first tensor that holds NaN or infinity: reads every value."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} holds NaN or infinity")


def as_flow_map(tensors: Mapping[str, Tensor], layout: Layout, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a `DiTFlowMap` of that layout, float32.

    start: its state dict at initialisation, from which weights with one time embedder take what they do not have. Of
    that only the first layers of embedders are random, behind second layers that are zero.
    """
    given = {name: tensor.float() for name, tensor in tensors.items()}
    if layout.kind == "mfm":
        return given
    if layout.learned_sigma:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            given[name] = _without_sigma(given[name], layout.channels)
    filled = {**start, **given}
    for target, source in (
        ("s_embedder.", "t_embedder."),
        ("t_embedder_second.", "t_embedder."),
        ("x_cond_embedder.", "x_embedder."),
    ):
        filled |= {target + name.removeprefix(source): given[name] for name in given if name.startswith(source)}
    for name in ("t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias"):
        filled[name] = torch.zeros_like(given[name])
    return filled


def _without_sigma(tensor: Tensor, channels: int) -> Tensor:
    """The rows of the velocity: of each position of a patch the first half of the channels, which are the fastest."""
    return tensor.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)


def _expected(layout: Layout) -> dict[str, tuple[int, ...]]:
    rows = 1 if layout.guidance_rows is None else layout.guidance_rows
    with torch.device("meta"):
        network = DiTFlowMap(
            space=DataSpace("latent", layout.event_shape),
            patch_size=layout.patch_size,
            hidden_size=layout.hidden_size,
            depth=layout.depth,
            num_heads=1,
            encoder_depth=1,
            num_classes=layout.num_classes,
            cfg_scales=[1.0] * (rows - 1),
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if layout.kind == "mfm":
        return shapes
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(_OF_MFM)}
    if layout.learned_sigma:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            kept[name] = (2 * shapes[name][0], *shapes[name][1:])
    return kept


def _kind(tensors: Mapping[str, Tensor]) -> str:
    return "mfm" if any(name.startswith(_OF_MFM) for name in tensors) else "one_time"


def _open(content: Any, names: Sequence[str]) -> Mapping[str, Any]:
    """The mapping of tensors below the first of the names that there is, else (of weights) the content itself."""
    if not isinstance(content, Mapping):
        raise InputError(f"holds a {type(content).__name__}, expected tensors by name")
    for name in names:
        if isinstance(content.get(name), Mapping):
            return content[name]
    is_flat = names is CONTAINERS and any(isinstance(value, Tensor) for value in content.values())
    return content if is_flat else {}


def _bare(key: Any) -> tuple[str, bool]:
    """A name without the prefixes of wrappers, and whether one of them said that it is an average."""
    name, averaged, found = str(key), False, True
    while found:
        found = False
        for prefix in (*PREFIXES, *EMA_PREFIXES):
            if name.startswith(prefix):
                name, found = name.removeprefix(prefix), True
                averaged = averaged or prefix in EMA_PREFIXES
    return name, averaged


def _shaped(tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        known = f"; its tensors begin with {_listed(sorted(tensors))}" if tensors else ""
        raise InputError(f"lacks {name}, which every MFM, DMF and SiT file has{known}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or min(shape) < 1:
        raise InputError(f"{name} has shape {shape}, expected {dims} dimensions")
    return shape


def _depth(tensors: Mapping[str, Tensor]) -> int:
    indices = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    depth = len(indices)
    if not depth or indices != {str(index) for index in range(depth)}:
        raise InputError(f"has the blocks {_listed(sorted(indices)) or 'none'}, expected 0, 1, ... without a gap")
    return depth


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
