"""The training loss: terms, their weights, and the states that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.noise import Noise, Stream
from mfm_ray.objectives.conditions import Term
from mfm_ray.objectives.states import ConditioningTimes, Labels, TrainingStates
from mfm_ray.objectives.weighting import ErrorPoint, Weighting


class Examples(Protocol):
    """What an objective reads of a batch: model-space data (B, *event) and labels (B,) or None."""

    @property
    def data(self) -> Tensor: ...

    @property
    def label(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Losses:
    """Per-sample losses, (B,) float32 each.

    `total` carries the gradient; `squared_errors` are the raw sums over data dimensions of (prediction - target)^2
    by term, detached: they stay comparable whatever the weighting does, and are 0 while a term is not active. `time` is
    the conditioning time t of each sample, by which errors are sorted into buckets.
    """

    total: Tensor
    squared_errors: dict[str, Tensor]
    time: Tensor


@dataclass(frozen=True)
class WeightedTerm:
    """A condition, how its errors are weighted, and its factor in the sum."""

    term: Term
    weighting: Weighting
    scale: float = 1.0


class Objective(nn.Module):
    """A sum of terms at shared training states. A module, because weightings may be learned.

    Args:
        terms: the conditions, each with its weighting.
        times: law of the conditioning time t.
        labels: class dropout and guidance scales.

    Calling it with a flow map, a batch, noise of one row a sample and the training step returns per-sample `Losses`;
    the losses of a sample depend on its own noise row alone, so any split of a batch over workers gives the same
    numbers.
    """

    def __init__(
        self,
        terms: Sequence[WeightedTerm],
        *,
        times: ConditioningTimes | None = None,
        labels: Labels | None = None,
    ) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.weightings = nn.ModuleList(weighted.weighting for weighted in terms)
        self.times, self.labels = times or ConditioningTimes(), labels or Labels()

    def forward(self, flow_map: FlowMap, batch: Examples, *, noise: Noise, step: int = 0) -> Losses:
        states = self.sample_states(flow_map, batch, noise, step)
        total = torch.zeros(batch.data.shape[0], device=batch.data.device)
        squared_errors = {}
        for weighted in self.terms:
            term = weighted.term
            if not term.active(step):
                squared_errors[term.name] = torch.zeros_like(total)
                continue
            residual = term.residual(flow_map, states, noise, step)
            error = residual.value.flatten(1).square().sum(1)
            total = total + weighted.scale * weighted.weighting(error, error_point(flow_map, residual.s, states.t))
            squared_errors[term.name] = error.detach()
        return Losses(total=total, squared_errors=squared_errors, time=states.t)

    def sample_states(self, flow_map: FlowMap, batch: Examples, noise: Noise, step: int = 0) -> TrainingStates:
        """Conditioning times, outer and inner noise, labels after dropout and their guidance scales."""
        x1, event = batch.data, batch.data.shape[1:]
        t = self.times(noise, step)
        outer_noise = noise.fold_in(Stream.OUTER).normal(*event)
        label, cfg_scale = self.labels(
            batch.label, noise, num_classes=flow_map.num_classes, cfg_scales=flow_map.cfg_scales
        )
        return TrainingStates(
            x1=x1,
            x_t=LinearInterpolant().sample(outer_noise, x1, t).x_t,
            t=t,
            inner_noise=noise.fold_in(Stream.INNER).normal(*event),
            label=label,
            cfg_scale=cfg_scale,
        )


def error_point(flow_map: FlowMap, s: Tensor, t: Tensor) -> ErrorPoint:
    """What weightings may know of errors at (s, t)."""
    num_dims = max(1, torch.Size(flow_map.event_shape).numel())
    return ErrorPoint(s=s, t=t, variance=target_variance(flow_map, s, t), num_dims=num_dims)


def target_variance(flow_map: FlowMap, s: Tensor, t: Tensor) -> Tensor:
    """Total variance of x_1 - eps given (J_s, x_t) for Gaussian data, (B,).

    With C the total posterior variance given x_t and D the number of dimensions, C / ((1 - s)^2 + s^2 C / D).
    """
    total = flow_map.posterior_spread(t) ** 2
    per_dimension = total / max(1, torch.Size(flow_map.event_shape).numel())
    return total / ((1 - s) ** 2 + s**2 * per_dimension)
