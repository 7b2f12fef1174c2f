"""A reward as a deployment of its own: value, value with gradient, scores; batched over callers and prompts."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from mfm_ray.padding import padded_index
from mfm_ray.rewards.preference import SCORERS
from mfm_ray.rewards.prompt import Scorer, shared
from mfm_ray.steering import Reward, score
from mfm_ray.steering.reward_gradient import evaluate, value_and_gradient

from .autoscaling import CALLS, ROWS, with_policy
from .batching import Batcher
from .catalogue import RewardSource, network_arguments
from .listener import Listener
from .metrics import reward_seconds
from .models import ModelCard
from .settings import RewardSettings
from .wire import Address

VALUE, GRADIENT, SCORE = "value", "gradient", "score"
DIRECT = {"value": VALUE, "value_and_gradient": GRADIENT}
"""Methods that a sampler may call directly."""
LOOPBACK = "127.0.0.1"


def canonical(params: Mapping[str, Any]) -> str:
    """Equal parameters as equal texts."""
    return json.dumps(params, sort_keys=True)


class BuiltRewards:
    """Rewards by model, name and parameters, the least recently used one leaving first."""

    def __init__(
        self, cards: Sequence[ModelCard], *, capacity: int, weights: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._sources = {card.id: RewardSource(card, weights) for card in cards}
        self._capacity = capacity
        self._built: OrderedDict[tuple[str, str, str], Reward] = OrderedDict()

    def get(self, model: str, name: str, params: str) -> Reward:
        """The one object of these parameters (canonical). InputError for parameters that do not fit together."""
        key = (model, name, params)
        if key not in self._built:
            self._built[key] = self._sources[model].build(name, json.loads(params))
            while len(self._built) > self._capacity:
                self._built.popitem(last=False)
        self._built.move_to_end(key)
        return self._built[key]


class RewardServer:
    """One reward of all served models. Samples (N, C, H, W) in data units, float32, in and out as numpy arrays.

    background: of calls that let those of samplers pass (`Batcher`).
    """

    def __init__(self, cards: Sequence[ModelCard], settings: RewardSettings) -> None:
        self.name = settings.name
        self._listeners: dict[str, Listener] = {}
        self._rewards = BuiltRewards(
            cards, capacity=settings.rewards_in_memory, weights={settings.name: settings.weights}
        )
        self._batcher = Batcher(
            self._evaluate, max_rows=settings.max_batch_rows, name=self.name, patience_s=settings.patience_s
        )
        self._seconds = reward_seconds()
        # loaded before the replica counts as ready, and on the GPU where Ray gave it one
        self._scorer = _scorer(settings)

    async def address(self, caller: str) -> Address:
        """Where this replica listens for samplers on the node of this address.

        A port on the network is opened only once a sampler on another node asks; those of this node use loopback.
        """
        own = ray.util.get_node_ip_address()
        host = LOOPBACK if caller == own else own
        if host not in self._listeners:
            backlog = self._batcher.backlog
            self._listeners[host] = Listener(host, self._direct, load=lambda: backlog.rows, name=self.name)
        return self._listeners[host].address

    async def value(self, model: str, params: str, samples: np.ndarray, background: bool = False) -> np.ndarray:
        """(N,) float32."""
        (values,) = await self._answer((VALUE, model, params), samples, background)
        return values

    async def value_and_gradient(
        self, model: str, params: str, samples: np.ndarray, background: bool = False
    ) -> tuple[np.ndarray, ...]:
        """(N,) and the gradient of each value in its own sample, (N, C, H, W); values alone where there is none."""
        return await self._answer((GRADIENT, model, params), samples, background)

    async def score(self, model: str, params: str, images: np.ndarray) -> np.ndarray:
        """(N,) of images as a client has them; ValueError naming the reward for NaN or infinity."""
        (values,) = await self._answer((SCORE, model, params), images)
        return values

    def check_health(self) -> None:
        if not self._batcher.healthy:
            raise RuntimeError(f"reward {self.name}: its thread is dead")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What waits and runs here, by whichever way it came; read by `autoscaling.LoadPolicy`."""
        rows, calls = self._batcher.backlog.means()
        return {ROWS: rows, CALLS: calls}

    def __del__(self) -> None:
        """Called by Serve once this replica has no calls through handles any more: direct ones are answered too."""
        for listener in self._listeners.values():
            listener.close()
        self._batcher.close()

    def _direct(
        self, method: str, model: str, params: str, samples: np.ndarray, background: bool
    ) -> Future[tuple[np.ndarray, ...]]:
        if method not in DIRECT:
            raise ValueError(f"method {method!r}: expected one of {', '.join(DIRECT)}")
        return self._submit((DIRECT[method], model, params), samples, background)

    async def _answer(
        self, asked: tuple[str, str, str], samples: np.ndarray, background: bool = False
    ) -> tuple[np.ndarray, ...]:
        return await asyncio.wrap_future(self._submit(asked, samples, background))

    def _submit(
        self, asked: tuple[str, str, str], samples: np.ndarray, background: bool
    ) -> Future[tuple[np.ndarray, ...]]:
        """A network scores rows with a prompt each: only the shape of images must be equal to be scored together."""
        if self._scorer is None:
            return self._batcher.submit(asked, samples, background=background)
        kind, _, params = asked
        return self._batcher.submit((kind, samples.shape[1:]), samples, label=params, background=background)

    def _evaluate(self, key: tuple[Any, ...], rows: np.ndarray, labels: Sequence[Any]) -> tuple[np.ndarray, ...]:
        kind, began = key[0], time.perf_counter()
        reward = self._rewards.get(key[1], self.name, key[2]) if self._scorer is None else _Rows(self._scorer, labels)
        results = _KINDS[kind](reward, torch.tensor(rows))
        self._seconds.observe(time.perf_counter() - began, tags={"reward": self.name, "pass": kind})
        return tuple(result.numpy() for result in results)


class _Rows:
    """The reward of a batch: row i has the prompt and the threshold of the parameters (canonical) labels[i]."""

    composes_gradients = True

    def __init__(self, scorer: Scorer, labels: Sequence[str]) -> None:
        self.name, self._scorer = scorer.name, scorer
        read = {label: json.loads(label) for label in set(labels)}
        self._prompts = [read[label].get("prompt", "") for label in labels]
        ceilings = [read[label].get("threshold") for label in labels]
        self._ceilings = [math.inf if ceiling is None else float(ceiling) for ceiling in ceilings]

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        missing = len(samples) - len(self._prompts)  # rows that stand in for row 0 (`mfm_ray.padding`)
        prompts = self._prompts + self._prompts[:1] * missing
        ceilings = torch.tensor(self._ceilings + self._ceilings[:1] * missing, device=samples.device)
        # not torch.minimum, which halves the gradient where a value is at its ceiling, as `Thresholded` does not
        return self._scorer(samples, prompts).float().clamp(max=ceilings)


def _scorer(settings: RewardSettings) -> Scorer | None:
    arguments = network_arguments(settings.name, settings.weights)
    if not arguments:
        return None
    scorer: Scorer = shared(SCORERS[settings.name].load, **arguments)
    return scorer.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _value(reward: Reward, samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    padded = samples[padded_index(len(samples), samples.device)]
    return (reward(padded)[: len(samples)].float(),)


def _gradient(reward: Reward, samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    padded = samples[padded_index(len(samples), samples.device)]
    values, gradients = value_and_gradient(lambda inner: evaluate(reward, inner), padded)
    kept = values.detach()[: len(samples)].float()
    return (kept,) if gradients is None else (kept, gradients[: len(samples)])


@torch.no_grad()
def _score(reward: Reward, samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (score(reward, samples.clamp(0, 1)),)


_KINDS = {VALUE: _value, GRADIENT: _gradient, SCORE: _score}


def reward_deployment(cards: Sequence[ModelCard], settings: RewardSettings) -> serve.Application:
    """The deployment `reward_<name>`, each with its own resources and scaling."""
    # a call a step of every request in flight: a line for each would cost more than the call
    quiet = {"enable_access_log": False}
    options: dict[str, Any] = {"name": f"reward_{settings.name}", "max_ongoing_requests": 64, "logging_config": quiet}
    scaled = with_policy(settings.options(), settings.target_rows)
    return serve.deployment(**options, **scaled)(RewardServer).bind(list(cards), settings)
