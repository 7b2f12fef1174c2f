"""Samples of the tilted law that no steering made: annealed Markov chains in the noise that the ODE starts from.

The model's law is that of T(z), z ~ N(0, Id), with T the probability-flow ODE; the tilted law p(x) exp r(x) is that
of T(z) under the density N(z) exp r(T(z)). Chains on z need no estimate of a value function, and are right in the
limit of many moves, where reweighting a pool is hopeless.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mfm_ray.dynamics import ProbabilityFlow, TimeGrid, extrapolate
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import LinearInterpolant
from mfm_ray.metrics import effective_sample_size
from mfm_ray.noise import KeyedNoise, Stream
from mfm_ray.steering import Reward, score

_SURVIVING = 0.7
"""Effective share of the chains that the next temperature is chosen to keep."""
_ACCEPTED = 0.3
_MOVES_A_TEMPERATURE = 2
_ROWS_AT_ONCE = 1024
_LARGEST_RATE, _SMALLEST_RATE = 1.0, 0.02


@dataclass(frozen=True)
class Annealed:
    """Chains at the end. samples: (M, *event) in data units, clamped; rewards: (M,); log_normaliser: an estimate of
    log E exp r; temperatures, moves: how many; acceptance: of the moves at the end.
    """

    samples: Tensor
    rewards: Tensor
    log_normaliser: float
    temperatures: int
    moves: int
    acceptance: float


@dataclass(frozen=True)
class Start:
    """Fresh samples that chains of every reward start from: noise z and T(z), both (S, *event), T of num_steps."""

    z: Tensor
    samples: Tensor
    num_steps: int


def draw_start(
    flow_map: FlowMap, *, size: int, num_steps: int, seed: int, advance: Callable[[float], None] = lambda rows: None
) -> Start:
    z = KeyedNoise.for_images(seed, size).fold_in(Stream.START).normal(*flow_map.event_shape)
    return Start(z, _push_forward(flow_map, z, num_steps, advance), num_steps)


def anneal(
    flow_map: FlowMap,
    reward: Reward,
    start: Start,
    *,
    count: int,
    final_moves: int,
    seed: int,
    advance: Callable[[float], None] = lambda rows: None,
) -> Annealed:
    """`count` chains at p(x) exp(b r(x)), b raised from 0 to 1 so that 0.7 of them stay effective each time.

    The first b is the one at which `count` of the fresh samples are effective. At each b: systematic resampling, then
    two moves z' = sqrt(1 - s^2) z + s e (preconditioned Crank-Nicolson, which leaves N(0, Id) as it is) accepted with
    probability min(1, exp b(r' - r)); s follows the acceptance rate towards 0.3. `final_moves` more at b = 1.
    advance: told network rows.
    """
    generator = torch.Generator().manual_seed(seed)
    chains = _Chains(flow_map, reward, start, generator, advance)
    inverse, normaliser, temperatures = 0.0, 0.0, 0
    while inverse < 1:
        wanted = _SURVIVING * count if temperatures else min(count, _SURVIVING * len(start.z))
        step = _next_step(chains.rewards, wanted, 1 - inverse)
        log_weights = step * chains.rewards
        normaliser += float(torch.logsumexp(log_weights, 0)) - math.log(len(log_weights))
        inverse, temperatures = min(1.0, inverse + step), temperatures + 1
        chains.resample(torch.softmax(log_weights, 0), count)
        for _ in range(_MOVES_A_TEMPERATURE):
            chains.move(inverse)
    accepted = [chains.move(1.0) for _ in range(final_moves)]
    return Annealed(
        samples=chains.samples,
        rewards=chains.rewards.float(),
        log_normaliser=normaliser,
        temperatures=temperatures,
        moves=_MOVES_A_TEMPERATURE * temperatures + final_moves,
        acceptance=sum(accepted) / max(1, len(accepted)),
    )


def _push_forward(flow_map: FlowMap, z: Tensor, num_steps: int, advance: Callable[[float], None]) -> Tensor:
    parts = []
    for part in z.split(_ROWS_AT_ONCE):
        parts.append(push_forward(flow_map, part, num_steps))
        advance(float(len(part) * num_steps))
    return torch.cat(parts)


@torch.no_grad()
def push_forward(flow_map: FlowMap, z: Tensor, num_steps: int) -> Tensor:
    """T(z): the ODE of second order from noise (B, *event) to samples in data units, clamped; one call a step."""
    times, x, before = TimeGrid().times(num_steps), z, None
    for now, then in pairwise(times):
        t, t_next = (torch.full((len(z),), time) for time in (now, then))
        mean = LinearInterpolant().posterior_mean(x, flow_map.drift(x, t), t)
        clean = mean if before is None else mean + extrapolate(mean, before[1], before[0], t, t_next)
        before = (t, mean)
        x = ProbabilityFlow().step(x, clean, t, t_next, KeyedNoise.for_images(0, len(z)))
    return flow_map.space.clamp(flow_map.space.to_data_units(x))


class _Chains:
    """M chains on z with their samples and rewards (M,) in float64."""

    def __init__(
        self,
        flow_map: FlowMap,
        reward: Reward,
        start: Start,
        generator: torch.Generator,
        advance: Callable[[float], None],
    ) -> None:
        self._flow_map, self._reward, self._num_steps = flow_map, reward, start.num_steps
        self._generator, self._advance, self._rate = generator, advance, 0.5
        self.z, self.samples = start.z, start.samples
        self.rewards = self._score(start.samples)

    def resample(self, weights: Tensor, count: int) -> None:
        places = (torch.arange(count, dtype=torch.float64) + self._uniform(1)) / count
        chosen = torch.searchsorted(weights.cumsum(0), places).clamp_max(len(weights) - 1)
        self.z, self.samples, self.rewards = self.z[chosen], self.samples[chosen], self.rewards[chosen]

    def move(self, inverse: float) -> float:
        """One move of every chain; the share that was accepted."""
        fresh = torch.randn(self.z.shape, generator=self._generator)
        proposed = math.sqrt(1 - self._rate**2) * self.z + self._rate * fresh
        samples = _push_forward(self._flow_map, proposed, self._num_steps, self._advance)
        rewards = self._score(samples)
        taken = self._uniform(len(rewards)).log() < inverse * (rewards - self.rewards)
        shape = (-1, *[1] * (self.z.dim() - 1))
        self.z = torch.where(taken.reshape(shape), proposed, self.z)
        self.samples = torch.where(taken.reshape(shape), samples, self.samples)
        self.rewards = torch.where(taken, rewards, self.rewards)
        share = float(taken.double().mean())
        self._rate = min(_LARGEST_RATE, max(_SMALLEST_RATE, self._rate * math.exp(share - _ACCEPTED)))
        return share

    def _score(self, samples: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([score(self._reward, part).double() for part in samples.split(_ROWS_AT_ONCE)])

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator, dtype=torch.float64)


def _next_step(rewards: Tensor, wanted: float, most: float) -> float:
    """The largest step of the inverse temperature, at most `most`, at which `wanted` chains are effective."""

    def kept(step: float) -> float:
        return float(effective_sample_size(torch.softmax(step * rewards, 0)))

    if kept(most) >= wanted:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) >= wanted else (low, middle)
    return high
