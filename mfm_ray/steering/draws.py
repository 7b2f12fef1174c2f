"""How many posterior draws a step takes, and how draws made in parts add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import expand_time
from mfm_ray.steering.method import SteeringContext
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

    value: of their rewards; weighted: sum_i softmax(r)_i f_i of whatever f a method averages; plain: mean_i f_i.
    """

    value: RunningValue
    weighted: Tensor
    plain: Tensor | None = None

    def merge(self, other: DrawTotals) -> DrawTotals:
        """As if both sets had been one."""
        value = self.value.merge(other.value)
        weighted = _towards(self.weighted, other.weighted, torch.exp(other.value.first - value.first))
        if self.plain is None or other.plain is None:
            return DrawTotals(value, weighted)
        return DrawTotals(value, weighted, _towards(self.plain, other.plain, other.value.count / value.count))

    def rows(self, index: Tensor) -> DrawTotals:
        value = RunningValue(*(part[index] for part in (self.value.first, self.value.second, self.value.count)))
        return DrawTotals(value, self.weighted[index], None if self.plain is None else self.plain[index])

    def with_rows(self, index: Tensor, part: DrawTotals) -> DrawTotals:
        """These totals, those at `index` replaced."""
        value = RunningValue(
            self.value.first.index_copy(0, index, part.value.first),
            self.value.second.index_copy(0, index, part.value.second),
            self.value.count.index_copy(0, index, part.value.count),
        )
        plain = None if self.plain is None or part.plain is None else self.plain.index_copy(0, index, part.plain)
        return DrawTotals(value, self.weighted.index_copy(0, index, part.weighted), plain)


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
