"""How many posterior draws a step takes, and how draws made in parts add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import expand_time
from mfm_ray.noise import Noise, Stream
from mfm_ray.steering.method import SteeringContext, pick
from mfm_ray.values import RunningValue


@dataclass(frozen=True)
class AutoDraws:
    """Draw until enough draws count: `first` to begin with, doubled while the effective sample size is below
    `effective`, up to `most`. Decided for each row by itself, so that easy steps and easy images are cheap.
    """

    effective: float = 4.0
    first: int = 4
    most: int = 64

    def __post_init__(self) -> None:
        require_at_least_one(first=self.first, most=self.most)
        require(self.first <= self.most, "most", self.most, f"at least first={self.first}")
        require(1 <= self.effective <= self.most, "effective", self.effective, f"a number from 1 to most={self.most}")


NumDraws = int | str | AutoDraws
"""A fixed number, "auto" for the default `AutoDraws`, or one of them."""


def resolve_draws(num_draws: NumDraws) -> int | AutoDraws:
    """ValueError for what is no number of draws."""
    if num_draws == "auto":
        return AutoDraws()
    if not isinstance(num_draws, AutoDraws):
        require_at_least_one(num_draws=num_draws)  # type: ignore[arg-type]
    return num_draws  # type: ignore[return-value]


def most_draws(num_draws: NumDraws) -> int:
    """The most draws of one row at one step."""
    resolved = resolve_draws(num_draws)
    return resolved.most if isinstance(resolved, AutoDraws) else resolved


def fewer_draws(num_draws: NumDraws) -> int | None:
    """Half as many, None below one."""
    return most_draws(num_draws) // 2 or None


@dataclass(frozen=True)
class DrawTotals:
    """What a set of draws adds up to, (B, ...) each; sets merge exactly.

    value: of their rewards; mean and tilted_mean: of the draws, the latter by softmax(r); picked: one of the draws,
    taken with probability softmax(r), and its `ticket`, the perturbed reward that won it; gradient: sum_i w_i^p g_i,
    w = softmax(r), with p the gradient_power and g_i the gradient of draw i's reward, where a method takes it.
    """

    value: RunningValue
    mean: Tensor
    tilted_mean: Tensor
    picked: Tensor
    ticket: Tensor
    gradient: Tensor | None = None
    gradient_power: int = 1

    @classmethod
    def of(
        cls,
        draws: Tensor,
        rewards: Tensor,
        noise: Noise,
        *,
        first_draw: int = 0,
        gradient: Tensor | None = None,
        gradient_power: int = 1,
    ) -> DrawTotals:
        """Of draws (B, K, *event) and their rewards (B, K), both detached here; noise of the step."""
        draws, rewards = draws.detach(), rewards.detach()
        ticket, index = (rewards.double() + gumbel(noise, rewards.shape[1], first=first_draw)).max(1)
        return cls(
            value=RunningValue.of(rewards),
            mean=draws.mean(1),
            tilted_mean=torch.einsum("bk,bk...->b...", torch.softmax(rewards, dim=1), draws),
            picked=pick(draws, index),
            ticket=ticket,
            gradient=gradient,
            gradient_power=gradient_power,
        )

    @property
    def spread(self) -> Tensor:
        """How far a draw of the tilted posterior is from its mean, (B, *event): zero for a single draw."""
        return self.picked - self.tilted_mean

    def merge(self, other: DrawTotals) -> DrawTotals:
        """As if both sets had been one."""
        value = self.value.merge(other.value)
        share = torch.exp(other.value.first - value.first)
        better = other.ticket > self.ticket
        return DrawTotals(
            value=value,
            mean=_towards(self.mean, other.mean, other.value.count / value.count),
            tilted_mean=_towards(self.tilted_mean, other.tilted_mean, share),
            picked=torch.where(expand_time(better, self.picked), other.picked, self.picked),
            ticket=torch.maximum(self.ticket, other.ticket),
            gradient=self._merged_gradient(other, share),
            gradient_power=self.gradient_power,
        )

    def _merged_gradient(self, other: DrawTotals, share: Tensor) -> Tensor | None:
        """share: of the other set's weights in the sum of both."""
        if self.gradient is None or other.gradient is None:
            return None
        mine, theirs = ((part**self.gradient_power).to(self.gradient) for part in (1 - share, share))
        return expand_time(mine, self.gradient) * self.gradient + expand_time(theirs, self.gradient) * other.gradient

    def rows(self, index: Tensor) -> DrawTotals:
        return self._with_tensors([None if part is None else part[index] for part in self._tensors()])

    def with_rows(self, index: Tensor, part: DrawTotals) -> DrawTotals:
        """These totals, those at `index` replaced."""
        pairs = zip(self._tensors(), part._tensors(), strict=True)
        return self._with_tensors([None if a is None or b is None else a.index_copy(0, index, b) for a, b in pairs])

    def _tensors(self) -> list[Tensor | None]:
        value = self.value
        rest = (self.mean, self.tilted_mean, self.picked, self.ticket, self.gradient)
        return [value.first, value.second, value.count, *rest]

    def _with_tensors(self, parts: Sequence[Any]) -> DrawTotals:
        return replace(DrawTotals(RunningValue(*parts[:3]), *parts[3:]), gradient_power=self.gradient_power)


def gumbel(noise: Noise, num: int, *, first: int = 0) -> Tensor:
    """Standard Gumbel deviates (B, num) float64: the argmax of logits plus these is a draw of their softmax."""
    uniform = noise.fold_in(Stream.RESAMPLE).spread(num, first=first).uniform().double()
    return -torch.log(-torch.log(uniform))


def _towards(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return a + expand_time(share.to(a), a) * (b - a)


PartOfDraws = Callable[[Tensor, Tensor, int, int, SteeringContext], DrawTotals]
"""(x_t, t, first draw, number of draws, context) to their totals."""


def total_of_draws(
    part: PartOfDraws, x_t: Tensor, t: Tensor, num_draws: NumDraws, at_once: int | None, context: SteeringContext
) -> DrawTotals:
    """Totals over all draws of a step, `at_once` of them at a time."""
    resolved = resolve_draws(num_draws)
    if not isinstance(resolved, AutoDraws):
        return _fold(part, x_t, t, 0, resolved, at_once, context)
    total, done = _fold(part, x_t, t, 0, resolved.first, at_once, context), resolved.first
    while done < resolved.most:
        short = (total.value.effective_sample_size() < resolved.effective).nonzero().flatten()
        if len(short) == 0:
            break
        more = min(done, resolved.most - done)
        extra = _fold(part, x_t[short], t[short], done, more, at_once, context.rows(short))
        total, done = total.with_rows(short, total.rows(short).merge(extra)), done + more
    return total


def _fold(
    part: PartOfDraws,
    x_t: Tensor,
    t: Tensor,
    first: int,
    count: int,
    at_once: int | None,
    context: SteeringContext,
) -> DrawTotals:
    end, size = first + count, at_once or count
    total = part(x_t, t, first, min(size, count), context)
    for begin in range(first + size, end, size):
        total = total.merge(part(x_t, t, begin, min(size, end - begin), context))
    return total
