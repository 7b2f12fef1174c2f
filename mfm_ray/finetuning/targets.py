"""What a tuned drift is regressed on: states, targets and weights, all constants. Every tuning method ends here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mfm_ray.finetuning.tilt import Tilt
from mfm_ray.noise import Noise

Drift = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The drift that is being tuned: (x_t (B, *event), t (B,), label (B,) or None) to (B, *event)."""


class DivergedError(ValueError):
    """The tuned drift has run away: its own samples, or its loss, are no numbers to go on with."""


@dataclass(frozen=True)
class Anchors:
    """Clean samples that states are made around, one a row.

    x1: (B, *event) in model space; label: (B,) int64, the null class where it was dropped, or None; reward: (B,) of x1
    times the multiplier, NaN where it is not known. Any law of x1 with full support gives the same fixed point.
    """

    x1: Tensor
    label: Tensor | None
    reward: Tensor


@dataclass(frozen=True)
class DriftTargets:
    """Weighted regression of the drift: sum_b weight_b |b_ft(x_b, t_b) - target_b|^2.

    x_t, target: (B, *event); t, weight: (B,); label: (B,) or None. reward: (B,) mean reward of the draws that made the
    target, times the multiplier; effective_share: (B,) in (0, 1], effective sample size of their weights over their
    number. next_x1, next_reward: where the chain of each row goes on (`chain.TiltedChain`), None for methods without.
    """

    x_t: Tensor
    t: Tensor
    label: Tensor | None
    target: Tensor
    weight: Tensor
    reward: Tensor
    effective_share: Tensor
    next_x1: Tensor | None = None
    next_reward: Tensor | None = None

    def __len__(self) -> int:
        return self.x_t.shape[0]

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if value is not None]

    def split(self, size: int) -> Iterator[DriftTargets]:
        """Micro-batches of at most `size` rows, in order."""
        for first in range(0, len(self), size):
            yield self._each(lambda tensor: tensor[first : first + size])  # noqa: B023 (called at once)

    def to(self, device: torch.device | str) -> DriftTargets:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> DriftTargets:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


def regression_loss(prediction: Tensor, targets: DriftTargets) -> Tensor:
    """weight_b |prediction_b - target_b|^2 / (number of dimensions), (B,) float32."""
    error = (prediction.float() - targets.target).flatten(1).square().mean(1)
    return targets.weight * error


class TuningMethod(ABC):
    """A way to tune the drift of a flow map so that its samples follow the tilted law p(x_1) exp(r(x_1)).

    on_policy: whether targets depend on the drift that is being tuned, so that they cannot be made ahead.
    needs_gradient: whether the reward has to be differentiable. anchors_are_data: whether anchors must be drawn from
    the base's own law, so that chains would spoil the fixed point. group_rows: rows in succession whose targets are
    made together; how a batch is split does not matter where every part holds whole groups. group_keys: arguments that
    make it what it is.
    """

    on_policy: bool = False
    anchors_are_data: bool = False
    needs_gradient: bool = False
    group_rows: int = 1
    group_keys: tuple[str, ...] = ()

    @abstractmethod
    def targets(self, tilt: Tilt, anchors: Anchors, noise: Noise, *, drift: Drift | None = None) -> DriftTargets:
        """Targets of a batch, in float32 and without a graph.

        noise: of B rows, of this step. drift: the tuned one, for methods that are `on_policy`. ValueError naming the
        reward for values that are not finite.
        """
