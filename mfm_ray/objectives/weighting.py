"""Per-sample weights: from squared errors to losses."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_ray.errors import refuse_unknown_arguments, require


@dataclass(frozen=True)
class ErrorPoint:
    """Where a squared error was taken.

    s, t: inner and conditioning time, (B,). variance: total variance of the target given what the network sees, if the
    data were Gaussian, (B,). num_dims: data dimensions.
    """

    s: Tensor
    t: Tensor
    variance: Tensor
    num_dims: int


class Weighting(nn.Module):
    """Squared errors Delta = sum over dimensions of (prediction - target)^2, (B,), to losses, (B,)."""

    @abstractmethod
    def forward(self, squared_error: Tensor, point: ErrorPoint) -> Tensor: ...


class VarianceWeighting(Weighting):
    """Delta over the Gaussian target variance: every time contributes in units of its own noise.

    A weight that depends on (s, t) alone leaves the conditional mean the minimiser.
    """

    def forward(self, squared_error: Tensor, point: ErrorPoint) -> Tensor:
        return squared_error / point.variance


class AdaptiveWeighting(Weighting):
    """Delta / sg(Delta + constant)^power.

    power = 1 makes every sample's loss about 1, 0.5 is a norm. For a noisy target (diagonal matching, Mean Flow) a
    weight that depends on the target moves the minimiser off the conditional mean: keep power = 0 there.
    """

    def __init__(self, *, power: float = 1.0, constant: float = 0.01) -> None:
        super().__init__()
        require(0 <= power <= 1, "power", power, "a number in [0, 1]")
        require(constant > 0, "constant", constant, "a number above 0")
        self.power, self.constant = power, constant

    def forward(self, squared_error: Tensor, point: ErrorPoint) -> Tensor:
        return squared_error / (squared_error.detach() + self.constant) ** self.power


class LogWeighting(Weighting):
    """log(1 + e^-a Delta / D) + a / 2 with D dimensions; a = 0, or a learned function of (s, t).

    Its gradient falls off as 1 / Delta, so that it shares the adaptive weight's bias on noisy targets.
    """

    def __init__(self, *, learned: bool = False) -> None:
        super().__init__()
        self.log_variance = LogVariance() if learned else None

    def forward(self, squared_error: Tensor, point: ErrorPoint) -> Tensor:
        mean = squared_error / point.num_dims
        if self.log_variance is None:
            return torch.log1p(mean)
        a = self.log_variance(point.s, point.t)
        return torch.log1p(torch.exp(-a) * mean) + a / 2


class LearnedWeighting(Weighting):
    """e^-a Delta + a with a learned a(s, t): at its optimum e^a is the mean squared error at (s, t).

    A weight that depends on (s, t) alone leaves the conditional mean the minimiser.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = LogVariance()

    def forward(self, squared_error: Tensor, point: ErrorPoint) -> Tensor:
        a = self.log_variance(point.s, point.t)
        return torch.exp(-a) * squared_error + a


class LogVariance(nn.Module):
    """a(s, t) in [-10, 10], (B,); 0 at initialisation.

    Fixed random Fourier features of each time, a linear layer with rows of unit norm for each, their sum over sqrt 2,
    and a linear read-out that starts at zero.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, num_features: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(num_features, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_features, generator=generator))
        self.inner, self.outer = UnitLinear(num_features), UnitLinear(num_features)
        self.read_out = nn.Linear(num_features, 1)
        nn.init.zeros_(self.read_out.weight)
        nn.init.zeros_(self.read_out.bias)

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        hidden = (self.inner(self._features(s)) + self.outer(self._features(t))) / math.sqrt(2)
        return self.read_out(hidden).squeeze(-1).clamp(-10, 10)

    def _features(self, time: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(time.unsqueeze(-1) * self.frequencies + self.phases)


class UnitLinear(nn.Module):
    """Square linear map without bias whose rows have norm 1, whatever their parameters' norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(width, width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.normalize(self.weight, dim=1))


WEIGHTINGS: dict[str, type[Weighting]] = {
    "variance": VarianceWeighting,
    "adaptive": AdaptiveWeighting,
    "log": LogWeighting,
    "learned": LearnedWeighting,
}


def build_weighting(weighting: Mapping[str, Any] | str, *, group: str) -> Weighting:
    """The weighting of that name, or that a mapping {"name": ..., **arguments} describes.

    ValueError names group and key.
    """
    arguments: dict[str, Any] = {"name": weighting} if isinstance(weighting, str) else dict(weighting)
    name = str(arguments.pop("name", None))
    require(name in WEIGHTINGS, f"{group}.name", name, f"one of {', '.join(sorted(WEIGHTINGS))}")
    refuse_unknown_arguments(arguments, WEIGHTINGS[name], group=group)
    return WEIGHTINGS[name](**arguments)
