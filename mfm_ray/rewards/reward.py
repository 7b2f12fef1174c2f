"""What all our own rewards share: a name, checked input, float32 out. (The protocol is `steering.Reward`.)"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError


class DifferentiableReward(nn.Module, ABC):
    """A reward in torch whose gradient reaches the samples.

    Called with samples (N, *event) in data units it returns (N,) float32. Half precision is raised to float32 before
    anything is computed, since squares of residuals over small noises leave its range; float64 stays, for tests.

    name: stands in results and errors. event_shape: what samples must look like, None for any.
    """

    def __init__(self, *, name: str, event_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if not name:
            raise InputError("a reward's name is empty, expected a text")
        self.name = name
        self.event_shape = event_shape

    @abstractmethod
    def log_weight(self, samples: Tensor) -> Tensor:
        """The reward itself, (N,) in the samples' precision."""

    def forward(self, samples: Tensor) -> Tensor:
        expected = self.event_shape
        if samples.dim() < 2 or (expected is not None and samples.shape[1:] != expected):
            wanted = "(N, *event)" if expected is None else f"(N, {', '.join(map(str, expected))})"
            raise InputError(f"reward {self.name}: samples of shape {tuple(samples.shape)}, expected {wanted}")
        precise = samples if samples.dtype == torch.float64 else samples.float()
        return self.log_weight(precise).float()


class RewardError(ValueError):
    """A reward returned what is no reward; the message names it."""


def check_rewards(values: Tensor, name: str, *, num_samples: int | None = None) -> Tensor:
    """The rewards (N,) as float32; RewardError naming the reward for another shape, NaN or infinity.

    A reward that fails is never taken for a zero, nor for the worst or best there is.
    """
    if not isinstance(values, Tensor) or values.dim() != 1 or num_samples not in (None, len(values)):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        expected = "(N,)" if num_samples is None else f"({num_samples},)"
        raise RewardError(f"reward {name}: returned {shape}, expected one number for each sample, {expected}")
    wrong = ~values.detach().isfinite()
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise RewardError(
            f"reward {name}: returned {float(values[row].detach())} for sample {row}, not a finite number"
        )
    return values.float()


def require_positive(**values: float) -> None:
    """InputError naming the first argument that is not a finite number above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}={value}: expected a finite number above 0")


def finite_tensor(value: Any, *, name: str) -> Tensor:
    """float32 tensor of numbers given as a tensor or nested lists; InputError naming the argument otherwise."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: expected numbers of one shape, got {type(value).__name__}") from error
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{name}: holds NaN or infinity")
    return tensor.detach().clone()
