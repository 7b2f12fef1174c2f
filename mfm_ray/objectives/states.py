"""Where a flow map is trained: outer states, inner interpolants, and the laws of their times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import Noise, Stream


@dataclass(frozen=True)
class TrainingStates:
    """Where the conditions are checked: one outer state and one inner interpolant for each sample.

    x_t = t x_1 + (1 - t) e and J_s = s x_1 + (1 - s) eps share x_1, with independent e and eps, so that (J_s, x_t) has
    the law it has along the inner flow towards p(x_1 | x_t), without a posterior sample being needed.

    x1, x_t, inner_noise: (B, *event); t: (B,); label: (B,) int64 after dropout, or None; cfg_scale: (B,) guidance scale
    that the network is told, or None for a network that was not built with any.
    """

    x1: Tensor
    x_t: Tensor
    t: Tensor
    inner_noise: Tensor
    label: Tensor | None
    cfg_scale: Tensor | None = None

    def inner_state(self, s: Tensor) -> Tensor:
        return LinearInterpolant().sample(self.inner_noise, self.x1, s).x_t


class ConditioningTimes:
    """Outer times: t = max_time * U^power, and exactly 0 with probability zero_rate. (B,) in [0, max_time].

    The atom at 0 trains the marginal drift and the unconditional map. The posterior collapses at t = 1, hence
    max_time below 1. In the first `warmup_steps` steps t is 0 for all: an ordinary flow map comes first.
    """

    def __init__(
        self, *, power: float = 1.0, zero_rate: float = 0.1, max_time: float = 0.999, warmup_steps: int = 0
    ) -> None:
        require(power > 0, "power", power, "a number above 0")
        require(0 <= zero_rate < 1, "zero_rate", zero_rate, "a number in [0, 1)")
        require(0 < max_time < 1, "max_time", max_time, "a number in (0, 1)")
        require(warmup_steps >= 0, "warmup_steps", warmup_steps, "an integer of at least 0")
        self.power, self.zero_rate, self.max_time, self.warmup_steps = power, zero_rate, max_time, warmup_steps

    def __call__(self, noise: Noise, step: int) -> Tensor:
        noise = noise.fold_in(Stream.TIME)
        t = self.max_time * noise.fold_in(1).uniform() ** self.power
        if step < self.warmup_steps:
            return torch.zeros_like(t)
        return torch.where(noise.fold_in(2).uniform() < self.zero_rate, torch.zeros_like(t), t)


class IntervalTimes:
    """Inner times: s <= u, the sorted pair of two uniforms, (B,) each.

    While step < warmup_steps, consistency is off: the velocity is learned first. Until `anneal_steps`, intervals are
    shrunk around their midpoint by step / anneal_steps, so that long steps come after the short ones they are made of.
    With probability `end_rate` s is 0, and independently u is 1: the ends that one-step draws are made from.
    """

    def __init__(self, *, warmup_steps: int = 0, anneal_steps: int = 0, end_rate: float = 0.0) -> None:
        require(0 <= end_rate <= 1, "end_rate", end_rate, "a number in [0, 1]")
        require(warmup_steps >= 0, "warmup_steps", warmup_steps, "an integer of at least 0")
        require(anneal_steps >= 0, "anneal_steps", anneal_steps, "an integer of at least 0")
        self.warmup_steps, self.anneal_steps, self.end_rate = warmup_steps, anneal_steps, end_rate

    def active(self, step: int) -> bool:
        """Whether there are intervals to be consistent over yet."""
        return step >= self.warmup_steps

    def __call__(self, noise: Noise, step: int) -> tuple[Tensor, Tensor]:
        noise = noise.fold_in(Stream.TIME)
        a, b = noise.fold_in(3).uniform(), noise.fold_in(4).uniform()
        s, u = torch.minimum(a, b), torch.maximum(a, b)
        if self.end_rate > 0:
            s = torch.where(noise.fold_in(6).uniform() < self.end_rate, torch.zeros_like(s), s)
            u = torch.where(noise.fold_in(7).uniform() < self.end_rate, torch.ones_like(u), u)
        if step >= self.anneal_steps:
            return s, u
        middle, half = (s + u) / 2, (u - s) / 2 * (step / self.anneal_steps)
        return middle - half, middle + half


class Labels:
    """Class dropout, and the guidance scale that a sample is trained at.

    A label becomes the null class with probability `dropout`; the rest are told a scale drawn evenly from the flow
    map's `cfg_scales`, except with probability `base_rate`, and whenever the label was dropped, scale 1.
    """

    def __init__(self, *, dropout: float = 0.1, base_rate: float = 0.0) -> None:
        require(0 <= dropout <= 1, "label_dropout", dropout, "a number in [0, 1]")
        require(0 <= base_rate <= 1, "guidance_base_rate", base_rate, "a number in [0, 1]")
        self.dropout, self.base_rate = dropout, base_rate

    def __call__(
        self, label: Tensor | None, noise: Noise, *, num_classes: int, cfg_scales: tuple[float, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Label (B,) after dropout and scale (B,); None for what the flow map does not have."""
        if label is None or num_classes == 0:
            return None, None
        noise = noise.fold_in(Stream.LABEL)
        dropped = noise.uniform() < self.dropout
        kept = torch.where(dropped, torch.full_like(label, num_classes), label)
        if not cfg_scales:
            return kept, None
        scales = torch.tensor(cfg_scales, device=label.device)
        choice = (noise.fold_in(1).uniform() * len(cfg_scales)).long().clamp_max(len(cfg_scales) - 1)
        base = dropped | (noise.fold_in(2).uniform() < self.base_rate)
        return kept, torch.where(base, torch.ones_like(scales[choice]), scales[choice])
