"""A residual MLP over principal coordinates: the network for 2D data and 8x8 images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import require
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.guidance import guidance_index
from mfm_ray.networks.preconditioning import GaussianPreconditioner

LOWEST_FREQUENCY, HIGHEST_FREQUENCY = 0.25, 0.25 * 2.0**5.25


class TimeFeatures(nn.Module):
    """cos and sin of a time in [0, 1] at geometric frequencies up to `highest`, in cycles, (B,) to (B, 2 num).

    The derivative of the network in time is as large as its fastest feature: conditions with tangents (Eulerian,
    Lagrangian) want a slow one, below 1.
    """

    frequencies: Tensor

    def __init__(self, num_frequencies: int = 8, *, highest: float = HIGHEST_FREQUENCY) -> None:
        super().__init__()
        require(highest >= LOWEST_FREQUENCY, "max_time_frequency", highest, f"at least {LOWEST_FREQUENCY}")
        octaves = torch.arange(num_frequencies) / (num_frequencies - 1) * math.log2(highest / LOWEST_FREQUENCY)
        self.register_buffer("frequencies", 2 * math.pi * LOWEST_FREQUENCY * 2.0**octaves, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        angle = time.unsqueeze(-1) * self.frequencies
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class ResidualBlock(nn.Module):
    """h + W_2 silu(W_1 h + E c), with c the embedding of times and label; W_2 starts at zero."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, width)
        self.condition = nn.Linear(condition_width, width, bias=False)
        self.contract = nn.Linear(width, width)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return h + self.contract(nn.functional.silu(self.expand(h) + self.condition(condition)))


class ResidualMLP(nn.Module):
    """Features (B, in) and condition (B, c) to (B, out); zero at initialisation."""

    def __init__(self, num_inputs: int, num_outputs: int, *, width: int, num_blocks: int, condition_width: int) -> None:
        super().__init__()
        self.lift = nn.Linear(num_inputs, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, condition_width) for _ in range(num_blocks))
        self.project = nn.Linear(width, num_outputs)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        h = self.lift(features)
        for block in self.blocks:
            h = block(h, condition)
        return self.project(nn.functional.silu(h))


class ResidualMLPFlowMap(FlowMap):
    """Gaussian closed form plus a learned correction in principal coordinates:

        v_{s,u}(x_s; t, x_t) = v_gauss + scale * net(whitened x_s, x_t and their merger; s, u, t, label).

    At initialisation it is the exact meta flow map of the Gaussian with the data's moments; there is no blow-up near
    t = 1, and at t = 0 the outer state is gated off exactly, as it must be. Built from smooth operations only, so that
    forward-mode derivatives exist.

    Args:
        space: the model's space; width, num_blocks: of the residual network; num_classes: 0 for unconditional;
            cfg_scales: guidance scales to be told, none by default; max_time_frequency: of the time features, in
            cycles over [0, 1].
        mean, variances, basis: moments of the data in model space, (D,), (D,), (D, D); standard normal when omitted (a
            loaded checkpoint brings its own).
    """

    def __init__(
        self,
        *,
        space: DataSpace,
        width: int,
        num_blocks: int,
        num_classes: int = 0,
        cfg_scales: Sequence[float] = (),
        max_time_frequency: float = HIGHEST_FREQUENCY,
        mean: Tensor | None = None,
        variances: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> None:
        super().__init__(space, num_classes=num_classes, cfg_scales=tuple(cfg_scales))
        _require_positive(width=width, num_blocks=num_blocks)
        size = math.prod(space.event_shape)
        self.width, self.num_blocks, self.max_time_frequency = width, num_blocks, max_time_frequency
        self.gaussian = GaussianPreconditioner(
            mean=torch.zeros(size) if mean is None else mean,
            variances=torch.ones(size) if variances is None else variances,
            basis=torch.eye(size) if basis is None else basis,
        )
        condition_width = 128
        self.time_features = TimeFeatures(highest=max_time_frequency)
        self.embed_times = nn.Sequential(nn.Linear(5 * 16, condition_width), nn.SiLU())
        self.embed_label = nn.Embedding(num_classes + 1, condition_width) if num_classes else None
        self.embed_guidance = nn.Embedding(1 + len(self.cfg_scales), condition_width) if self.cfg_scales else None
        self.network = ResidualMLP(3 * size, size, width=width, num_blocks=num_blocks, condition_width=condition_width)

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
        times = torch.cat([self.time_features(time) for time in (s, u, t, u - s, g.merged_time)], dim=-1)
        condition = self.embed_times(times)
        if self.embed_label is not None:
            condition = condition + self.embed_label(self.label_or_null(label, s))
        if self.embed_guidance is not None:
            condition = condition + self.embed_guidance(guidance_index(cfg_scale, self.cfg_scales, s))
        correction = self.network(torch.cat([g.inner, g.outer, g.merged], dim=-1), condition)
        return self.gaussian.rotate_back(g.velocity + g.scale * correction.float(), x_s)

    def posterior_spread(self, t: Tensor) -> Tensor:
        return self.gaussian.posterior_variances(t).sum(-1).sqrt()

    def config(self) -> dict[str, Any]:
        size = {"width": self.width, "num_blocks": self.num_blocks}
        told = {"cfg_scales": list(self.cfg_scales), "max_time_frequency": self.max_time_frequency}
        return {"name": "residual_mlp", **size, **told}


def _require_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected an integer of at least 1")
