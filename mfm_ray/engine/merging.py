"""Calls of many lanes as one: noise, a flow map, rewards and gradients that meet the others at a rendezvous."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mfm_ray.engine.job import waits_on
from mfm_ray.engine.rendezvous import Call, Handler, Phase, Rendezvous
from mfm_ray.flow_map import FlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.padding import PaddedFlowMap
from mfm_ray.steering import Reward, Steering
from mfm_ray.steering.reward_gradient import evaluate
from mfm_ray.steering.scoring import name_of

_REWARDS_AT_ONCE = 64
"""Threads that score: one for each reward of a pass, and those that still wait for a reward that a pass left."""


class StillWaitingError(Exception):
    """The rewards that a step needs have not answered in time; the step can be made again."""

    def __init__(self, rewards: frozenset[str]) -> None:
        super().__init__(f"no answer yet of {', '.join(sorted(rewards))}")
        self.rewards = rewards


@dataclass(frozen=True)
class VelocityCall:
    """Arguments of `FlowMap.velocity`; differentiable: a gradient will be asked of it."""

    x_s: Tensor
    s: Tensor
    u: Tensor
    t: Tensor
    x_t: Tensor
    label: Tensor | None
    cfg_scale: float | Tensor | None
    differentiable: bool


@dataclass(frozen=True)
class NoiseCall:
    keys: Tensor
    event: tuple[int, ...]


@dataclass(frozen=True)
class RewardCall:
    reward: Reward
    samples: Tensor
    differentiable: bool


@dataclass(frozen=True)
class GradientCall:
    total: Tensor
    x: Tensor


class Merger:
    """A rendezvous around one flow map, and the stand-ins that lanes are given.

    network: held during network calls, so that several mergers share a device. patience_s: so long rewards outside of
    this process are waited for; lanes then get a `StillWaitingError`. None waits for ever.

    network_s, rewards_s: seconds in calls of the network, and in waiting for rewards outside, until now.
    """

    def __init__(self, flow_map: FlowMap, network: threading.Lock, *, patience_s: float | None = None) -> None:
        self._network, self._inner, self._patience_s = network, PaddedFlowMap(flow_map), patience_s
        self.network_s = self.rewards_s = 0.0
        self._scorers = ThreadPoolExecutor(_REWARDS_AT_ONCE, thread_name_prefix="reward")
        handlers: dict[Phase, Handler] = {
            Phase.NOISE: _normals,
            Phase.DRIFT: self._velocities,
            Phase.DRAW: self._velocities,
            Phase.REWARD: self._rewards,
            Phase.GRADIENT: self._gradients,
        }
        self.lanes = Rendezvous(handlers)
        self.flow_map = MergedFlowMap(self._inner, self.lanes)

    def steering(self, method: Steering) -> Steering:
        """The method with its reward's calls merged."""
        reward = method.scored_by
        return method if reward is None else replace(method, reward=MergedReward(reward, self.lanes))  # type: ignore[type-var]

    def differentiate(self, total: Tensor, x: Tensor) -> Tensor:
        result: Tensor = self.lanes.call(Phase.GRADIENT, GradientCall(total, x))
        return result

    def close(self) -> None:
        self.lanes.close()
        self._scorers.shutdown(wait=False)

    def _velocities(self, calls: Sequence[Call]) -> None:
        for group in grouped(calls, lambda asked: (asked.differentiable, asked.label is None, asked.cfg_scale is None)):
            asked: list[VelocityCall] = [call.payload for call in group]
            with self._on_network(), torch.set_grad_enabled(asked[0].differentiable):
                velocities = self._inner.velocity(
                    _joined(call.x_s for call in asked),
                    _joined(call.s for call in asked),
                    _joined(call.u for call in asked),
                    t=_joined(call.t for call in asked),
                    x_t=_joined(call.x_t for call in asked),
                    label=None if asked[0].label is None else _joined(_given(call.label) for call in asked),
                    cfg_scale=_joined_scale(asked),
                )
            for call, part in zip(group, velocities.split([len(call.x_s) for call in asked]), strict=True):
                call.result = part

    def _rewards(self, calls: Sequence[Call]) -> None:
        """Rewards side by side; those outside of this process for as long as patience lasts."""
        groups = grouped(calls, lambda asked: (id(asked.reward), asked.differentiable))
        outside = [waits_on(group[0].payload.reward) for group in groups]
        if len(groups) == 1 and not outside[0]:
            return _score_together(groups[0])
        began = time.perf_counter()
        # on copies: a call that is left may be answered when its lane is gone
        asked = [[replace(call) for call in group] for group in groups]
        futures = [self._scorers.submit(_score_together, copies) for copies in asked]
        for group, copies, names, future in zip(groups, asked, outside, futures, strict=True):
            left = None if self._patience_s is None else max(0.0, began + self._patience_s - time.perf_counter())
            if not wait([future], timeout=left if names else None).done:
                for call in group:
                    call.error = StillWaitingError(names)
                continue
            future.result()
            for call, copy in zip(group, copies, strict=True):
                call.result, call.error = copy.result, copy.error
        if any(outside):
            self.rewards_s += time.perf_counter() - began
        return None

    @contextmanager
    def _on_network(self) -> Iterator[None]:
        with self._network:
            began = time.perf_counter()
            yield
            self.network_s += time.perf_counter() - began

    def _gradients(self, calls: Sequence[Call]) -> None:
        asked: list[GradientCall] = [call.payload for call in calls]
        with self._on_network():
            gradients = torch.autograd.grad([call.total for call in asked], [call.x for call in asked])
        for call, gradient in zip(calls, gradients, strict=True):
            call.result = gradient


class MergedFlowMap(FlowMap):
    """A flow map whose calls are made together with those of other lanes."""

    def __init__(self, flow_map: FlowMap, lanes: Rendezvous) -> None:
        super().__init__(flow_map.space, num_classes=flow_map.num_classes, cfg_scales=flow_map.cfg_scales)
        self.flow_map, self._lanes = flow_map, lanes

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
        return self._call(Phase.DRAW, x_s, s, u, t=t, x_t=x_t, label=label, cfg_scale=cfg_scale)

    def drift(
        self, x_t: Tensor, t: Tensor, *, label: Tensor | None = None, cfg_scale: float | Tensor | None = None
    ) -> Tensor:
        # with a gradient it is what a draw is to other methods: a network call that a backward pass follows
        phase = Phase.DRAW if _differentiable(x_t) else Phase.DRIFT
        zero = torch.zeros_like(t)
        return self._call(phase, x_t, t, t, t=zero, x_t=torch.zeros_like(x_t), label=label, cfg_scale=cfg_scale)

    def _call(
        self,
        phase: Phase,
        x_s: Tensor,
        s: Tensor,
        u: Tensor,
        *,
        t: Tensor,
        x_t: Tensor,
        label: Tensor | None,
        cfg_scale: float | Tensor | None,
    ) -> Tensor:
        differentiable = _differentiable(x_s) or _differentiable(x_t)
        result: Tensor = self._lanes.call(phase, VelocityCall(x_s, s, u, t, x_t, label, cfg_scale, differentiable))
        return result

    def posterior_spread(self, t: Tensor) -> Tensor:
        return self.flow_map.posterior_spread(t)

    def config(self) -> dict[str, Any]:
        return self.flow_map.config()


class MergedNoise(KeyedNoise):
    """Keyed noise whose deviates are computed together with those of other lanes: for a few rows its many small
    operations would cost more than a network call."""

    def __init__(self, keys: Tensor, lanes: Rendezvous) -> None:
        super().__init__(keys)
        self._lanes = lanes

    def _of(self, keys: Tensor) -> MergedNoise:
        return MergedNoise(keys, self._lanes)

    def normal(self, *event: int) -> Tensor:
        result: Tensor = self._lanes.call(Phase.NOISE, NoiseCall(self.keys, event))
        return result


class MergedReward:
    """A reward whose calls are made together with those of other lanes that have the same reward."""

    composes_gradients = True

    def __init__(self, reward: Reward, lanes: Rendezvous) -> None:
        self.reward, self._lanes, self.name = reward, lanes, name_of(reward)

    def __call__(self, samples: Tensor) -> Tensor:
        asked = RewardCall(self.reward, samples, _differentiable(samples))
        result: Tensor = self._lanes.call(Phase.REWARD, asked)
        return result


def _normals(calls: Sequence[Call]) -> None:
    for group in grouped(calls, lambda asked: asked.event):
        asked: list[NoiseCall] = [call.payload for call in group]
        keys = [call.keys.reshape(-1) for call in asked]
        normals = KeyedNoise(_joined(keys)).normal(*asked[0].event)
        for call, wanted, part in zip(group, asked, normals.split([len(own) for own in keys]), strict=True):
            call.result = part.reshape(*wanted.keys.shape, *wanted.event)


def _score_together(calls: Sequence[Call]) -> None:
    """Answers calls of one reward in one call; where that fails, one by one, so that each failure finds its request."""
    asked: list[RewardCall] = [call.payload for call in calls]
    counts = [len(call.samples) for call in asked]
    try:
        with torch.set_grad_enabled(asked[0].differentiable):
            values = evaluate(asked[0].reward, _joined(call.samples for call in asked))
        if len(calls) == 1:
            calls[0].result = values  # of whatever shape: the lane checks it and names the reward
            return
        for call, part in zip(calls, values.split(counts), strict=True):
            call.result = part
    except Exception as error:
        if len(calls) == 1:
            calls[0].error = error
            return
        for call in calls:
            _score_together([call])


def grouped(calls: Sequence[Call], key: Callable[[Any], Hashable]) -> list[list[Call]]:
    """Calls whose payloads have equal keys, each group and the groups in the order of the calls."""
    groups: dict[Hashable, list[Call]] = {}
    for call in calls:
        groups.setdefault(key(call.payload), []).append(call)
    return list(groups.values())


def _differentiable(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _joined(parts: Iterable[Tensor]) -> Tensor:
    listed = list(parts)
    return listed[0] if len(listed) == 1 else torch.cat(listed)


def _given(label: Tensor | None) -> Tensor:
    assert label is not None
    return label


def _joined_scale(asked: Sequence[VelocityCall]) -> float | Tensor | None:
    """One scale where all rows have the same, else one a row."""
    scales = {call.cfg_scale for call in asked if not isinstance(call.cfg_scale, Tensor)}
    if len(scales) == 1 and not any(isinstance(call.cfg_scale, Tensor) for call in asked):
        return asked[0].cfg_scale
    return torch.cat([torch.as_tensor(call.cfg_scale).expand(len(call.x_s)) for call in asked])
