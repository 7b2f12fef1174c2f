"""A UNet that corrects the closed form of a Gaussian: the network for images, from 8x8 upwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.attention import attention
from mfm_ray.networks.guidance import guidance_index
from mfm_ray.networks.preconditioning import GaussianPreconditioner, GaussianVelocity
from mfm_ray.networks.residual_mlp import HIGHEST_FREQUENCY, TimeFeatures

_GROUPS = 8  # of every GroupNorm; widths are multiples of it
_TIMES = 5  # s, u, t, u - s and the time of the merged observation


class FiLMBlock(nn.Module):
    """skip(h) + C_2 silu((1 + a) N_2(C_1 silu(N_1 h)) + b), with (a, b) linear in the condition c.

    h (B, in, H, W), c (B, condition_width) to (B, out, H, W). C_2, a and b start at zero: the block starts as its skip.
    """

    def __init__(self, num_inputs: int, num_outputs: int, condition_width: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(_GROUPS, num_inputs)
        self.first = nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1)
        self.modulation = _silent(nn.Linear(condition_width, 2 * num_outputs))
        self.second_norm = nn.GroupNorm(_GROUPS, num_outputs)
        self.second = _silent(nn.Conv2d(num_outputs, num_outputs, kernel_size=3, padding=1))
        same = num_inputs == num_outputs
        self.skip = nn.Identity() if same else nn.Conv2d(num_inputs, num_outputs, kernel_size=1)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).unsqueeze(-1).unsqueeze(-1).chunk(2, 1)
        inner = self.first(functional.silu(self.first_norm(h)))
        inner = self.second_norm(inner) * (1 + scale) + shift
        return self.skip(h) + self.second(functional.silu(inner))


class SelfAttention(nn.Module):
    """h + O attention(N h) over all positions of (B, width, H, W); O starts at zero."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = _silent(nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = attention(query, key, value).transpose(1, 2).flatten(2)
        return h + self.project(mixed).transpose(1, 2).reshape(h.shape)


class Stage(nn.Module):
    """A FiLM block, and attention after it where the level has it."""

    def __init__(self, num_inputs: int, width: int, condition_width: int, num_heads: int | None) -> None:
        super().__init__()
        self.block = FiLMBlock(num_inputs, width, condition_width)
        self.attend = None if num_heads is None else SelfAttention(width, num_heads)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        h = self.block(h, condition)
        return h if self.attend is None else self.attend(h)


class Upsample(nn.Module):
    """To the size (height, width), nearest neighbour, then a convolution: odd sizes come back as they were."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, h: Tensor, size: tuple[int, int]) -> Tensor:
        return self.convolve(functional.interpolate(h, size=size, mode="nearest"))


class UNet(nn.Module):
    """(B, in, H, W) and a condition (B, c) to (B, out, H, W); zero at initialisation.

    The image is cut into patches, `widths[l]` channels at level l of half the side of the level above (rounded up);
    every stage on the way down hands its result to one on the way up.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        patch_size: int,
        widths: Sequence[int],
        blocks_per_level: int,
        attention_levels: Sequence[int],
        num_heads: int,
        condition_width: int,
    ) -> None:
        super().__init__()
        heads = [num_heads if level in attention_levels else None for level in range(len(widths))]
        self.patch_size = patch_size
        kernel, padding = (3, 1) if patch_size == 1 else (patch_size, 0)
        self.stem = nn.Conv2d(num_inputs, widths[0], kernel, stride=patch_size, padding=padding)
        self.down, skips = _way_down(widths, blocks_per_level, heads, condition_width)
        self.middle = Stage(widths[-1], widths[-1], condition_width, heads[-1])
        self.up = _way_up(widths, blocks_per_level, heads, condition_width, skips)
        self.final_norm = nn.GroupNorm(_GROUPS, widths[0])
        self.project = _silent(nn.Conv2d(widths[0], num_outputs * patch_size**2, kernel_size=3, padding=1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.stem(x)
        kept = [h]
        for part in self.down:
            h = part(h, condition) if isinstance(part, Stage) else part(h)
            kept.append(h)
        h = self.middle(h, condition)
        for part in self.up:
            if isinstance(part, Upsample):
                h = part(h, kept[-1].shape[-2:])
            else:
                h = part(torch.cat([h, kept.pop()], 1), condition)
        return functional.pixel_shuffle(self.project(functional.silu(self.final_norm(h))), self.patch_size)


def _way_down(
    widths: Sequence[int], num_blocks: int, heads: Sequence[int | None], condition_width: int
) -> tuple[nn.ModuleList, list[int]]:
    """The modules in order, and the channels of everything that is kept for the way up."""
    modules, kept = nn.ModuleList(), [widths[0]]
    for level, width in enumerate(widths):
        if level > 0:
            modules.append(nn.Conv2d(kept[-1], kept[-1], kernel_size=3, stride=2, padding=1))
            kept.append(kept[-1])
        for _ in range(num_blocks):
            modules.append(Stage(kept[-1], width, condition_width, heads[level]))
            kept.append(width)
    return modules, kept


def _way_up(
    widths: Sequence[int], num_blocks: int, heads: Sequence[int | None], condition_width: int, kept: Sequence[int]
) -> nn.ModuleList:
    modules, left, current = nn.ModuleList(), list(kept), widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(num_blocks + 1):
            modules.append(Stage(current + left.pop(), width, condition_width, heads[level]))
            current = width
        if level > 0:
            modules.append(Upsample(width))
    return modules


class UNetFlowMap(FlowMap):
    """Gaussian closed form plus a correction that a UNet makes in pixel space:

        v_{s,u}(x_s; t, x_t) = v_gauss + c(s, t) * unet(inner, outer and merged state; s, u, t, label, cfg_scale),

    c the posterior standard deviation of x_1 - eps, its root mean square over the principal directions. At
    initialisation it is the exact meta flow map of the Gaussian with the data's moments; nothing blows up near t = 1,
    and at t = 0 the outer state is gated off exactly. Built from smooth operations only, so that forward-mode
    derivatives exist.

    Images (C, H, H) of any size that patch_size divides. ValueError, naming it, for an argument that cannot be.

    Args:
        space: the model's space.
        base_width: channels of the first level, a multiple of 8.
        channel_multipliers: channels of each level over base_width; a level has half the side of the one before.
        blocks_per_level: residual blocks on the way down; one more on the way up.
        attention_levels: levels whose blocks attend, 0 the finest.
        num_heads: of the attention.
        patch_size: pixels a side that share one position; 1 keeps every pixel, 4 is what a CPU likes at 28x28.
        condition_width: size of the embedding of times, label and guidance scale.
        num_classes: 0 for unconditional; cfg_scales: guidance scales to be told, none by default;
            max_time_frequency: of the time features, in cycles over [0, 1].
        mean, variances, basis: moments of the data in model space, (D,), (D,), (D, D), D = C H W; standard normal when
            omitted (a loaded checkpoint brings its own).
    """

    def __init__(
        self,
        *,
        space: DataSpace,
        base_width: int,
        channel_multipliers: Sequence[int],
        blocks_per_level: int,
        attention_levels: Sequence[int] = (),
        num_heads: int = 4,
        patch_size: int = 1,
        condition_width: int = 128,
        num_classes: int = 0,
        cfg_scales: Sequence[float] = (),
        max_time_frequency: float = HIGHEST_FREQUENCY,
        mean: Tensor | None = None,
        variances: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> None:
        super().__init__(space, num_classes=num_classes, cfg_scales=tuple(cfg_scales))
        self.base_width, self.blocks_per_level, self.num_heads = base_width, blocks_per_level, num_heads
        self.channel_multipliers, self.attention_levels = tuple(channel_multipliers), tuple(attention_levels)
        self.patch_size, self.condition_width = patch_size, condition_width
        self.max_time_frequency = max_time_frequency
        self._check()
        size = math.prod(space.event_shape)
        self.gaussian = GaussianPreconditioner(
            mean=torch.zeros(size) if mean is None else mean,
            variances=torch.ones(size) if variances is None else variances,
            basis=torch.eye(size) if basis is None else basis,
        )
        self.time_features = TimeFeatures(highest=max_time_frequency)
        self.embed_times = nn.Sequential(
            nn.Linear(_TIMES * 16, condition_width), nn.SiLU(), nn.Linear(condition_width, condition_width)
        )
        self.embed_label = nn.Embedding(num_classes + 1, condition_width) if num_classes else None
        self.embed_guidance = nn.Embedding(1 + len(self.cfg_scales), condition_width) if self.cfg_scales else None
        channels = space.event_shape[0]
        self.network = UNet(
            3 * channels,
            channels,
            patch_size=patch_size,
            widths=[base_width * multiplier for multiplier in self.channel_multipliers],
            blocks_per_level=blocks_per_level,
            attention_levels=self.attention_levels,
            num_heads=num_heads,
            condition_width=condition_width,
        )

    def velocity(
        self,
        x_s: Tensor,
        s: Tensor,
        u: Tensor,
        *,
        t: Tensor,
        x_t: Tensor,
        label: Tensor | None = None,
        cfg_scale: float | Tensor | None = None,
    ) -> Tensor:
        if cfg_scale is not None and self.embed_guidance is None:
            raise ValueError(f"cfg_scale={cfg_scale}: this model was trained without guidance scales; leave it out")
        g = self.gaussian(self.gaussian.rotate(x_s), s, u, y_t=self.gaussian.rotate(x_t), t=t)
        condition = self._condition(s, u, t, g.merged_time, label, cfg_scale)
        correction = self.network(self._features(g, x_s), functional.silu(condition))
        size = g.scale.square().mean(-1).sqrt().reshape(-1, 1, 1, 1)
        return self.gaussian.rotate_back(g.velocity, x_s) + size * correction.float()

    def posterior_spread(self, t: Tensor) -> Tensor:
        return self.gaussian.posterior_variances(t).sum(-1).sqrt()

    def config(self) -> dict[str, Any]:
        sizes = ("base_width", "blocks_per_level", "num_heads", "patch_size", "condition_width", "max_time_frequency")
        lists = ("channel_multipliers", "attention_levels", "cfg_scales")
        return {
            "name": "unet",
            **{name: getattr(self, name) for name in sizes},
            **{name: list(getattr(self, name)) for name in lists},
        }

    def _condition(
        self,
        s: Tensor,
        u: Tensor,
        t: Tensor,
        merged_time: Tensor,
        label: Tensor | None,
        cfg_scale: float | Tensor | None,
    ) -> Tensor:
        times = torch.cat([self.time_features(time) for time in (s, u, t, u - s, merged_time)], dim=-1)
        condition = self.embed_times(times)
        if self.embed_label is not None:
            condition = condition + self.embed_label(self.label_or_null(label, s))
        if self.embed_guidance is not None:
            condition = condition + self.embed_guidance(guidance_index(cfg_scale, self.cfg_scales, s))
        return condition

    def _features(self, g: GaussianVelocity, like: Tensor) -> Tensor:
        """What the network sees, (B, 3 C, H, W): each whitened in principal coordinates and turned back to pixels.

        The outer and the merged state are weighted by the data's own deviation along each direction, as an image is:
        in directions where the data hardly vary there is nothing but noise to see. Unlike the states themselves they
        may be turned in half precision.
        """
        deviation = torch.sqrt(self.gaussian.variances / self.gaussian.variances.mean())
        parts = (g.inner, deviation * g.outer, deviation * g.merged)
        return torch.cat([(part @ self.gaussian.basis.T).reshape(like.shape) for part in parts], dim=1)

    def _check(self) -> None:
        shape = self.space.event_shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"event_shape={list(shape)}: expected square images (C, H, H)")
        sizes = ("base_width", "blocks_per_level", "num_heads", "patch_size", "condition_width")
        for name, value in [(name, getattr(self, name)) for name in sizes]:
            _require(isinstance(value, int) and value >= 1, name, value, "an integer of at least 1")
        multipliers, levels = self.channel_multipliers, self.attention_levels
        _require(self.base_width % _GROUPS == 0, "base_width", self.base_width, f"a multiple of {_GROUPS}")
        _require(shape[1] % self.patch_size == 0, "patch_size", self.patch_size, f"a divisor of the side {shape[1]}")
        _require(
            bool(multipliers) and all(isinstance(value, int) and value >= 1 for value in multipliers),
            "channel_multipliers",
            list(multipliers),
            "integers of at least 1, one for each level",
        )
        _require(
            all(level in range(len(multipliers)) for level in levels),
            "attention_levels",
            list(levels),
            f"levels from 0 to {len(multipliers) - 1}",
        )
        widths = [self.base_width * multipliers[level] for level in levels]
        _require(
            all(width % self.num_heads == 0 for width in widths),
            "num_heads",
            self.num_heads,
            f"a divisor of the channels {widths} that attend",
        )


def _silent(layer: Any) -> Any:
    """The layer with zero weights: what it feeds is there from the start and says nothing yet."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value}: expected {allowed}")
