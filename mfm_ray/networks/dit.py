"""The diffusion transformer of the MFM paper, in the layout of its official weight files.

Parameter names and shapes are those of the official `DiTMFM`, so that a checkpoint's keys are this module's keys. Two
ideas separate it from an ordinary DiT: the outer state x_t enters as extra patch embeddings, modulated by the
conditioning time, and the blocks are split into an encoder that is told (s, u, t, label, cfg_scale) through one set of
embedders and a decoder that is told (s, u, t, label) through another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.attention import attention
from mfm_ray.networks.guidance import guidance_index
from mfm_ray.networks.recomputation import recomputed

_FREQUENCIES = 128


class TimestepEmbedder(nn.Module):
    """Raw time in [0, 1], (B,), to (B, width): cos and sin at 10000^(-k/128), two linear layers; all in float32."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.arange(_FREQUENCIES) / _FREQUENCIES
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * exponents), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        with torch.autocast(time.device.type, enabled=False):  # bfloat16 would take times 0.04 apart for one
            angle = time.float().unsqueeze(-1) * self.frequencies
            features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
            return self.mlp(features)


class TableEmbedder(nn.Module):
    """Index (B,) to a row of a learned table, (B, width)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, index: Tensor) -> Tensor:
        return self.embedding_table(index)


class PatchEmbedder(nn.Module):
    """(B, C, H, W) to tokens (B, H W / p^2, width), raster order."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return self.proj(attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def _normalise(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """h + g1 attention(LN(h)(1 + sc1) + sh1), then h + g2 mlp(LN(h)(1 + sc2) + sh2); h (B, T, D), c (B, 1, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        h = h + gate_a * self.attn(_normalise(h, shift_a, scale_a))
        return h + gate_m * self.mlp(_normalise(h, shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        normal = _normalise(h, shift, scale)
        with torch.autocast(normal.device.type, enabled=False):
            return self.linear(normal)


class DiTFlowMap(FlowMap):
    """DiT-MFM. Images or latents (C, H, W), H = W divisible by patch_size.

    Args:
        space: the model's space, kind image.
        patch_size, hidden_size, depth, num_heads: of the transformer; encoder_depth: blocks before the split.
        num_classes: labels; the null class is one more row of the table.
        cfg_scales: guidance scales trained with; the guidance table has one row more, for scale 1.
        time_flip: the network's own inner time runs from data to noise (weights that descend from DMF).
        data_std: standard deviation of the data in model space, for the scale of the posterior.
    """

    pos_embed: Tensor
    recomputes = True
    _recompute = False  # how it is computed, not what it is: no part of its config

    def __init__(
        self,
        *,
        space: DataSpace,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        encoder_depth: int,
        num_classes: int = 0,
        cfg_scales: Sequence[float] = (),
        time_flip: bool = False,
        data_std: float = 1.0,
    ) -> None:
        super().__init__(space, num_classes=num_classes, cfg_scales=tuple(cfg_scales))
        channels, height, _ = _check_shape(space, patch_size, hidden_size, num_heads)
        if not 0 < encoder_depth <= depth:
            raise ValueError(f"encoder_depth={encoder_depth}: expected an integer from 1 to depth={depth}")
        self.patch_size, self.hidden_size, self.depth, self.num_heads = patch_size, hidden_size, depth, num_heads
        self.encoder_depth, self.time_flip, self.data_std = encoder_depth, time_flip, data_std
        self.x_embedder = PatchEmbedder(channels, patch_size, hidden_size)
        self.x_cond_embedder = PatchEmbedder(channels, patch_size, hidden_size)
        self.x_cond_adaLN = _modulation(hidden_size, 2)
        self.s_embedder, self.t_embedder = TimestepEmbedder(hidden_size), TimestepEmbedder(hidden_size)
        self.s_embedder_second, self.t_embedder_second = TimestepEmbedder(hidden_size), TimestepEmbedder(hidden_size)
        self.t_cond_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = TableEmbedder(num_classes + 1, hidden_size)
        self.guidance_embedder = TableEmbedder(1 + len(self.cfg_scales), hidden_size)
        self.register_buffer("pos_embed", position_embedding(hidden_size, height // patch_size).unsqueeze(0))
        self.blocks: Iterable[Block] = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))  # type: ignore[assignment]
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * channels)
        self._initialise()

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
        s, u = (1 - s, 1 - u) if self.time_flip else (s, u)  # the conditioning time is never flipped
        outer_time = self.t_cond_embedder(t)
        shift, scale = self.x_cond_adaLN(outer_time).unsqueeze(1).chunk(2, dim=-1)
        h = self.x_embedder(x_s) + self.x_cond_embedder(x_t) * (1 + scale) + shift + self.pos_embed
        shared = outer_time + self.y_embedder(self.label_or_null(label, s))
        encoder = self.s_embedder(s) + self.t_embedder(u) + shared + self._guidance_row(cfg_scale, s)
        decoder = self.s_embedder_second(s) + self.t_embedder_second(u) + shared  # no guidance here, as in the original
        for index, block in enumerate(self.blocks):
            h = self._run(block, h, (encoder if index < self.encoder_depth else decoder).unsqueeze(1))
        output = self._unpatchify(self.final_layer(h, decoder.unsqueeze(1)))
        return -output if self.time_flip else output

    def recompute_activations(self, on: bool = True) -> None:
        self._recompute = on

    def _run(self, block: Block, h: Tensor, c: Tensor) -> Tensor:
        return recomputed(block, h, c) if self._recompute else block(h, c)

    def posterior_spread(self, t: Tensor) -> Tensor:
        variance = self.data_std**2
        posterior = variance * (1 - t) ** 2 / (t**2 * variance + (1 - t) ** 2)
        return torch.sqrt(posterior * math.prod(self.event_shape))

    def config(self) -> dict[str, Any]:
        names = ("patch_size", "hidden_size", "depth", "num_heads", "encoder_depth", "time_flip", "data_std")
        return {"name": "dit", **{name: getattr(self, name) for name in names}, "cfg_scales": list(self.cfg_scales)}

    def _guidance_row(self, cfg_scale: float | Tensor | None, like: Tensor) -> Tensor:
        return self.guidance_embedder(guidance_index(cfg_scale, self.cfg_scales, like))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, T, p p C) with the channel fastest to (B, C, H, W)."""
        channels, height, width = self.event_shape
        p = self.patch_size
        grid = tokens.unflatten(1, (height // p, width // p)).unflatten(-1, (p, p, channels))
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)

    def _initialise(self) -> None:
        """Xavier linears, zero modulation and output, outer state gated off (scale -1); the map starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.hidden_size, -1))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        silent: list[nn.Module] = [self.final_layer, self.x_cond_embedder, self.x_cond_adaLN, self.guidance_embedder]
        silent += [block.adaLN_modulation for block in self.blocks]
        silent += [e.mlp[2] for e in (self.t_cond_embedder, self.t_embedder, self.s_embedder_second)]
        for module in silent:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.x_embedder.get_parameter("proj.bias"))
        nn.init.constant_(self.x_cond_adaLN.get_parameter("1.bias")[self.hidden_size :], -1.0)


def position_embedding(width: int, size: int) -> Tensor:
    """Fixed 2D sine-cosine embedding of a size x size grid, (size^2, width): column index first, then row index."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    line = torch.arange(size, dtype=torch.float64)[:, None] * omega
    table = torch.cat([torch.sin(line), torch.cos(line)], dim=-1)
    columns, rows = table.repeat(size, 1), table.repeat_interleave(size, dim=0)
    return torch.cat([columns, rows], dim=-1).float()


def _check_shape(space: DataSpace, patch_size: int, hidden_size: int, num_heads: int) -> tuple[int, int, int]:
    shape = space.event_shape
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % patch_size:
        raise ValueError(f"event_shape={shape}: expected (C, H, H) with H divisible by patch_size={patch_size}")
    if hidden_size % 4 or hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size}: expected a multiple of 4 and of num_heads={num_heads}")
    return shape[0], shape[1], shape[2]
