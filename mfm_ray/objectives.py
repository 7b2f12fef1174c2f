"""Training objectives: what a flow map must satisfy, one small class a condition.

A condition (`Term`) compares the network with a stop-gradient target at states sampled from the data; an `Objective`
adds terms, weights them per sample and reduces nothing: the mean over the batch is taken once, by the trainer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mfm_ray.errors import refuse_unknown_arguments
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import LinearInterpolant, expand_time
from mfm_ray.noise import Noise, Stream


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
    by term, detached: they stay comparable whatever the weighting does. `time` is the conditioning time t of each
    sample, by which errors are sorted into buckets.
    """

    total: Tensor
    squared_errors: dict[str, Tensor]
    time: Tensor


@dataclass(frozen=True)
class TrainingStates:
    """Where the conditions are checked: one outer state and one inner interpolant for each sample.

    x_t = t x_1 + (1 - t) e and J_s = s x_1 + (1 - s) eps share x_1, with independent e and eps, so that (J_s, x_t) has
    the law it has along the inner flow towards p(x_1 | x_t), without a posterior sample being needed.
    """

    x1: Tensor
    x_t: Tensor
    t: Tensor
    inner_noise: Tensor
    label: Tensor | None

    def inner_state(self, s: Tensor) -> Tensor:
        return LinearInterpolant().sample(self.inner_noise, self.x1, s).x_t


class ConditioningTimes:
    """Outer times: t = max_time * U^power, and exactly 0 with probability zero_rate. (B,) in [0, max_time].

    The atom at 0 trains the marginal drift and the unconditional map. The posterior collapses at t = 1, hence
    max_time below 1.
    """

    def __init__(self, *, power: float = 1.0, zero_rate: float = 0.1, max_time: float = 0.999) -> None:
        _require(power > 0, "power", power, "a number above 0")
        _require(0 <= zero_rate < 1, "zero_rate", zero_rate, "a number in [0, 1)")
        _require(0 < max_time < 1, "max_time", max_time, "a number in (0, 1)")
        self.power, self.zero_rate, self.max_time = power, zero_rate, max_time

    def __call__(self, noise: Noise) -> Tensor:
        noise = noise.fold_in(Stream.TIME)
        t = self.max_time * noise.fold_in(1).uniform() ** self.power
        return torch.where(noise.fold_in(2).uniform() < self.zero_rate, torch.zeros_like(t), t)


class IntervalTimes:
    """Inner times: s <= u, the sorted pair of two uniforms, (B,) each."""

    def __call__(self, noise: Noise) -> tuple[Tensor, Tensor]:
        noise = noise.fold_in(Stream.TIME)
        a, b = noise.fold_in(3).uniform(), noise.fold_in(4).uniform()
        return torch.minimum(a, b), torch.maximum(a, b)


class Term(ABC):
    """One condition on the flow map."""

    name: str

    @abstractmethod
    def residual(self, flow_map: FlowMap, states: TrainingStates, noise: Noise) -> tuple[Tensor, Tensor]:
        """prediction - stop-gradient target, (B, *event), and the inner time s it is taken at, (B,)."""


class DiagonalTerm(Term):
    """Flow matching of the inner velocity: v_{s,s}(J_s; t, x_t) against x_1 - eps, s ~ U(0, 1).

    The minimiser is the conditional mean E[x_1 - eps | J_s, x_t]; the residual keeps the target's own variance.
    """

    name = "diagonal"

    def residual(self, flow_map: FlowMap, states: TrainingStates, noise: Noise) -> tuple[Tensor, Tensor]:
        s = noise.fold_in(Stream.TIME).fold_in(5).uniform()
        x_s = states.inner_state(s)
        prediction = flow_map.velocity(x_s, s, s, t=states.t, x_t=states.x_t, label=states.label)
        return prediction.float() - (states.x1 - states.inner_noise), s


class SemigroupTerm(Term):
    """Progressive self-distillation: one long step equals two short ones.

        v_{s,u}(J_s) = g v_{s,w}(J_s) + (1 - g) v_{w,u}(X_{s,w}(J_s)),   w = s + g (u - s),  g ~ U(0, 1).

    The right side is the target and carries no graph; no derivative of the network is needed. Zero for an exact map.
    """

    name = "semigroup"

    def __init__(self, *, times: IntervalTimes | None = None) -> None:
        self.times = times or IntervalTimes()

    def residual(self, flow_map: FlowMap, states: TrainingStates, noise: Noise) -> tuple[Tensor, Tensor]:
        s, u = self.times(noise)
        share = noise.fold_in(Stream.SPLIT).uniform()
        x_s = states.inner_state(s)
        target = self._target(flow_map, states, x_s, s, u, share)
        prediction = flow_map.velocity(x_s, s, u, t=states.t, x_t=states.x_t, label=states.label)
        return prediction.float() - target, s

    @torch.no_grad()
    def _target(
        self, flow_map: FlowMap, states: TrainingStates, x_s: Tensor, s: Tensor, u: Tensor, share: Tensor
    ) -> Tensor:
        w = s + share * (u - s)
        first = flow_map.velocity(x_s, s, w, t=states.t, x_t=states.x_t, label=states.label).float()
        x_w = x_s + expand_time(w - s, x_s) * first
        second = flow_map.velocity(x_w, w, u, t=states.t, x_t=states.x_t, label=states.label).float()
        part = expand_time(share, x_s)
        return part * first + (1 - part) * second


class Weighting(ABC):
    """Turns squared errors (B,) into losses (B,); the weight itself never carries a gradient."""

    @abstractmethod
    def __call__(self, squared_error: Tensor, *, variance: Tensor) -> Tensor:
        """`variance` (B,): total variance of the target given what the network sees, if the data were Gaussian."""


class VarianceWeighting(Weighting):
    """scale times squared error over the Gaussian target variance: every time contributes in units of its own noise.

    A weight that depends on (s, t) alone leaves the conditional mean the minimiser.
    """

    def __init__(self, *, scale: float = 1.0) -> None:
        _require(scale > 0, "scale", scale, "a number above 0")
        self.scale = scale

    def __call__(self, squared_error: Tensor, *, variance: Tensor) -> Tensor:
        return self.scale * squared_error / variance


class AdaptiveWeighting(Weighting):
    """Squared error over (itself + constant)^power, the divisor without gradient.

    power = 1 makes every sample's loss about 1, 0.5 is a norm. For a noisy target (diagonal matching) a weight that
    depends on the target moves the minimiser off the conditional mean: keep power = 0 there.
    """

    def __init__(self, *, power: float, constant: float = 0.01) -> None:
        _require(0 <= power <= 1, "power", power, "a number in [0, 1]")
        _require(constant > 0, "constant", constant, "a number above 0")
        self.power, self.constant = power, constant

    def __call__(self, squared_error: Tensor, *, variance: Tensor) -> Tensor:
        return squared_error / (squared_error.detach() + self.constant) ** self.power


class Objective:
    """A sum of terms at shared training states.

    Args:
        terms: the conditions, each with its weighting.
        times: law of the conditioning time t.
        label_dropout: probability with which a label is replaced by the null class.

    Calling it with a flow map, a batch and noise of one row a sample returns per-sample `Losses`; the losses of a
    sample depend on its own noise row alone, so any split of a batch over workers gives the same numbers.
    """

    def __init__(
        self,
        terms: Sequence[tuple[Term, Weighting]],
        *,
        times: ConditioningTimes | None = None,
        label_dropout: float = 0.1,
    ) -> None:
        _require(0 <= label_dropout <= 1, "label_dropout", label_dropout, "a number in [0, 1]")
        self.terms, self.times, self.label_dropout = terms, times or ConditioningTimes(), label_dropout

    def __call__(self, flow_map: FlowMap, batch: Examples, *, noise: Noise) -> Losses:
        states = self.sample_states(flow_map, batch, noise)
        total = torch.zeros(batch.data.shape[0], device=batch.data.device)
        squared_errors = {}
        for term, weighting in self.terms:
            residual, s = term.residual(flow_map, states, noise)
            error = residual.flatten(1).square().sum(1)
            total = total + weighting(error, variance=target_variance(flow_map, s, states.t))
            squared_errors[term.name] = error.detach()
        return Losses(total=total, squared_errors=squared_errors, time=states.t)

    def sample_states(self, flow_map: FlowMap, batch: Examples, noise: Noise) -> TrainingStates:
        """Conditioning times, outer and inner noise, and labels after dropout."""
        x1, event = batch.data, batch.data.shape[1:]
        t = self.times(noise)
        outer_noise = noise.fold_in(Stream.OUTER).normal(*event)
        return TrainingStates(
            x1=x1,
            x_t=LinearInterpolant().sample(outer_noise, x1, t).x_t,
            t=t,
            inner_noise=noise.fold_in(Stream.INNER).normal(*event),
            label=self._drop_labels(flow_map, batch.label, noise),
        )

    def _drop_labels(self, flow_map: FlowMap, label: Tensor | None, noise: Noise) -> Tensor | None:
        if label is None or flow_map.num_classes == 0:
            return None
        dropped = noise.fold_in(Stream.LABEL).uniform() < self.label_dropout
        return torch.where(dropped, torch.full_like(label, flow_map.num_classes), label)


def target_variance(flow_map: FlowMap, s: Tensor, t: Tensor) -> Tensor:
    """Total variance of x_1 - eps given (J_s, x_t) for Gaussian data, (B,).

    With C the total posterior variance given x_t and D the number of dimensions, C / ((1 - s)^2 + s^2 C / D).
    """
    total = flow_map.posterior_spread(t) ** 2
    per_dimension = total / max(1, torch.Size(flow_map.event_shape).numel())
    return total / ((1 - s) ** 2 + s**2 * per_dimension)


def semigroup(
    *,
    consistency_scale: float = 5.0,
    label_dropout: float = 0.5,
    time_power: float = 1.0,
    time_zero_rate: float = 0.1,
    max_time: float = 0.999,
) -> Objective:
    """Diagonal matching from data plus the semigroup condition: trains a meta flow map with no teacher.

    consistency_scale: weight of the semigroup term against the diagonal one. On digits 5 makes one-step draws sharper
    than 1 does; a weight that grows as the error falls keeps the map at its Gaussian start, which is consistent too.
    label_dropout as in `Objective`; time_power, time_zero_rate and max_time as in `ConditioningTimes`.
    """
    consistency = VarianceWeighting(scale=consistency_scale)
    terms = [(DiagonalTerm(), VarianceWeighting()), (SemigroupTerm(), consistency)]
    times = ConditioningTimes(power=time_power, zero_rate=time_zero_rate, max_time=max_time)
    return Objective(terms, times=times, label_dropout=label_dropout)


OBJECTIVES: dict[str, Callable[..., Objective]] = {"semigroup": semigroup}


def build_objective(objective: Mapping[str, Any]) -> Objective:
    """The objective that a mapping {"name": ..., **arguments} describes.

    Raises ValueError for an unknown name and for arguments that its constructor refuses, naming both.
    """
    arguments = dict(objective)
    name = arguments.pop("name", None)
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name!r}: expected one of {', '.join(sorted(OBJECTIVES))}")
    refuse_unknown_arguments(arguments, OBJECTIVES[name], group="objective")
    try:
        return OBJECTIVES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"objective={dict(objective)}: {error}") from error


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value}: expected {allowed}")
