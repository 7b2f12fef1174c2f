"""A reward behind a deployment handle, which code that steers cannot tell from one in its own process."""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import grpc
import numpy as np
import ray.exceptions
import torch
from ray import serve
from torch import Tensor

from mfm_ray.rewards import Combination, Minimum, RewardError, WeightedSum
from mfm_ray.steering import Reward
from mfm_ray.steering.reward_gradient import evaluate, with_gradient

from .direct import DirectPath, RefusedError, UnreachableError
from .errors import first_line

log = logging.getLogger(__name__)
Result = TypeVar("Result")

SMALL_BYTES = 2**20
"""Below this, arrays travel inside the call (gRPC, at most 4 MB); above, through the object store."""
_ASKING = concurrent.futures.ThreadPoolExecutor(1024, thread_name_prefix="asking")
_PAUSE_S = 0.2
_REST_S = 2.0
"""After all attempts have failed, so long is nothing asked of the reward: requests behind the first fail at once."""
_AGAIN = (
    ray.exceptions.RayActorError,
    ray.exceptions.GetTimeoutError,
    ray.exceptions.RaySystemError,
    ray.exceptions.ObjectLostError,
    serve.exceptions.BackPressureError,
    serve.exceptions.ReplicaUnavailableError,
    serve.exceptions.DeploymentUnavailableError,
    TimeoutError,
    concurrent.futures.TimeoutError,  # another class before Python 3.11
    ConnectionError,
    grpc.RpcError,
)
"""What another replica, or the same one a moment later, may do better."""


class RewardDownError(RuntimeError):
    """A reward did not answer, after all attempts. The message names it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"reward {name}: {message}")
        self.name, self.message = name, message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.message)


class Line:
    """The way to one reward's deployment, shared by all its parameters, so that they know together when it is down.

    timeout_s: of one call. attempts: calls before giving up. direct: asked first, once; what it cannot do the handle
    does. background: calls through the handle let those of samplers pass, as those of such a `DirectPath`.
    """

    def __init__(
        self,
        handle: Any,
        *,
        name: str,
        timeout_s: float,
        attempts: int,
        direct: DirectPath | None = None,
        background: bool = False,
    ) -> None:
        self.name, self._handle, self._timeout_s, self._attempts = name, handle, timeout_s, attempts
        self._direct, self._further = direct, (True,) if background else ()
        self._handles: dict[tuple[str, bool], Any] = {}
        self._down_until = 0.0

    def call(self, method: str, model: str, params: str, samples: np.ndarray) -> Sequence[np.ndarray]:
        """Arrays of the answer. RewardDownError when no replica does; RewardError when the reward itself refused."""
        if time.monotonic() < self._down_until:
            raise RewardDownError(self.name, "is down, as it was a moment ago")
        ways = [self._through_handle] * self._attempts
        if self._direct is not None:
            ways[0] = self._directly
        try:
            return attempt([partial(way, method, model, params, samples) for way in ways], name=self.name)
        except RewardDownError:
            self._down_until = time.monotonic() + _REST_S
            raise

    def _directly(self, method: str, model: str, params: str, samples: np.ndarray) -> Sequence[np.ndarray]:
        assert self._direct is not None
        try:
            return self._direct.call(method, model, params, samples)
        except UnreachableError as error:
            log.debug("reward %s: through Serve, since %s", self.name, error)
            return self._through_handle(method, model, params, samples)

    def _through_handle(self, method: str, model: str, params: str, samples: np.ndarray) -> Sequence[np.ndarray]:
        handle = self._handle_of(method, samples.nbytes > SMALL_BYTES)
        answer = _result(handle.remote(model, params, samples, *self._further), self._timeout_s)
        return (answer,) if isinstance(answer, np.ndarray) else answer

    def _handle_of(self, method: str, by_reference: bool) -> Any:
        """Kept, since to make one takes a millisecond."""
        key = (method, by_reference)
        if key not in self._handles:
            self._handles[key] = self._handle.options(method_name=method, _by_reference=by_reference)
        return self._handles[key]


class RemoteReward:
    """From samples (N, *event) in data units to (N,) float32, differentiable: value and gradient come in one call.

    Blocks, so it is called in a thread of the engine and never on an event loop.

    name: in results and errors. params: canonical. waits_on: the deployment, for the engine. Raises what `Line.call`
    raises.
    """

    composes_gradients = True

    def __init__(self, line: Line, *, name: str, model: str, params: str) -> None:
        self.name, self._line, self._model, self._params = name, line, model, params
        self.waits_on = frozenset({line.name})

    def __call__(self, samples: Tensor) -> Tensor:
        if not (samples.requires_grad and torch.is_grad_enabled()):
            return _like(self._call("value", samples)[0], samples)
        values, *gradient = self._call("value_and_gradient", samples)
        if not gradient:
            return _like(values, samples)
        return with_gradient(samples, _like(values, samples), _like(gradient[0], samples))

    def _call(self, method: str, samples: Tensor) -> Sequence[np.ndarray]:
        array = samples.detach().cpu().float().contiguous().numpy()
        return self._line.call(method, self._model, self._params, array)


class _AskedTogether(Combination):
    """Remote parts are asked at the same time."""

    def evaluated(self, samples: Tensor) -> dict[str, Tensor]:
        graded = torch.is_grad_enabled()
        asked = {
            name: _ASKING.submit(_evaluated, reward, samples, graded)
            for name, reward in self.rewards.items()
            if isinstance(reward, RemoteReward)
        }
        here = {name: evaluate(reward, samples) for name, reward in self.rewards.items() if name not in asked}
        return {name: asked[name].result() if name in asked else here[name] for name in self.rewards}


class SumOfParts(_AskedTogether, WeightedSum):
    """A weighted sum, remote parts of which are asked at the same time."""


class SmallestPart(_AskedTogether, Minimum):
    """A minimum, remote parts of which are asked at the same time."""


def _evaluated(reward: Reward, samples: Tensor, graded: bool) -> Tensor:
    with torch.set_grad_enabled(graded):
        return evaluate(reward, samples)


def attempt(calls: Sequence[Callable[[], Result]], *, name: str) -> Result:
    """Of the first call, or of the next one where another replica may answer. RewardDownError, RewardError."""
    for number, call in enumerate(calls, start=1):
        try:
            return call()
        except (ray.exceptions.RayTaskError, RefusedError) as error:
            raise refusal(name, error) from error
        except _AGAIN as error:
            log.warning("reward %s: call %d of %d failed: %r", name, number, len(calls), error)
            if number == len(calls):
                raise RewardDownError(name, f"is down, {number} calls failed ({type(error).__name__})") from error
            time.sleep(_PAUSE_S * number)
    raise AssertionError("attempts is at least 1")


def refusal(name: str, error: Exception) -> RewardError:
    """What the reward raised, in one line that names it."""
    cause = getattr(error, "cause", None)
    line = first_line(cause if isinstance(cause, Exception) else error)
    return RewardError(line if line.startswith("reward ") else f"reward {name}: {line}")


def _result(response: Any, timeout_s: float) -> Any:
    try:
        return response.result(timeout_s=timeout_s)
    except (ray.exceptions.GetTimeoutError, TimeoutError):
        response.cancel()
        raise


def _like(array: np.ndarray, samples: Tensor) -> Tensor:
    """A tensor of its own: arrays out of the object store are read-only."""
    return torch.tensor(array, device=samples.device)
