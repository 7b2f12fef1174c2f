"""A reward behind a deployment handle, which code that steers cannot tell from one in its own process."""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import ray.exceptions
import torch
from ray import serve
from torch import Tensor

from mfm_ray.rewards import RewardError
from mfm_ray.steering.reward_gradient import with_gradient

log = logging.getLogger(__name__)

SMALL_BYTES = 2**20
"""Below this, arrays travel inside the call (gRPC, at most 4 MB); above, through the object store."""
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

    timeout_s: of one call. attempts: calls before giving up.
    """

    def __init__(self, handle: Any, *, name: str, timeout_s: float, attempts: int) -> None:
        self.name, self._handle, self._timeout_s, self._attempts = name, handle, timeout_s, attempts
        self._handles: dict[tuple[str, bool], Any] = {}
        self._down_until = 0.0

    def call(self, method: str, *arguments: Any, by_reference: bool) -> Any:
        """What the replica answers. RewardDownError when none does; RewardError when the reward itself refused."""
        if time.monotonic() < self._down_until:
            raise RewardDownError(self.name, "is down, as it was a moment ago")
        handle = self._handle_of(method, by_reference)
        try:
            return attempt(
                lambda: _result(handle.remote(*arguments), self._timeout_s), name=self.name, attempts=self._attempts
            )
        except RewardDownError:
            self._down_until = time.monotonic() + _REST_S
            raise

    def _handle_of(self, method: str, by_reference: bool) -> Any:
        """Kept, since to make one takes a millisecond."""
        key = (method, by_reference)
        if key not in self._handles:
            self._handles[key] = self._handle.options(method_name=method, _by_reference=by_reference)
        return self._handles[key]


class RemoteReward:
    """From samples (N, *event) in data units to (N,) float32, differentiable: value and gradient come in one call.

    Blocks, so it is called in a thread of the engine and never on an event loop.

    name: in results and errors. params: canonical. Raises what `Line.call` raises.
    """

    composes_gradients = True

    def __init__(self, line: Line, *, name: str, model: str, params: str) -> None:
        self.name, self._line, self._model, self._params = name, line, model, params

    def __call__(self, samples: Tensor) -> Tensor:
        if not (samples.requires_grad and torch.is_grad_enabled()):
            return _like(self._call("value", samples), samples)
        values, *gradient = self._call("value_and_gradient", samples)
        if not gradient:
            return _like(values, samples)
        return with_gradient(samples, _like(values, samples), _like(gradient[0], samples))

    def _call(self, method: str, samples: Tensor) -> Any:
        array = samples.detach().cpu().float().contiguous().numpy()
        large = array.nbytes > SMALL_BYTES
        return self._line.call(method, self._model, self._params, array, by_reference=large)


def attempt(call: Callable[[], Any], *, name: str, attempts: int) -> Any:
    """call(), again where another replica may answer. RewardDownError, RewardError."""
    for number in range(1, attempts + 1):
        try:
            return call()
        except ray.exceptions.RayTaskError as error:
            raise refusal(name, error) from error
        except _AGAIN as error:
            log.warning("reward %s: call %d of %d failed: %r", name, number, attempts, error)
            if number == attempts:
                raise RewardDownError(name, f"is down, {attempts} calls failed ({type(error).__name__})") from error
            time.sleep(_PAUSE_S * number)
    raise AssertionError("attempts is at least 1")


def refusal(name: str, error: ray.exceptions.RayTaskError) -> RewardError:
    """What the reward raised, in one line that names it."""
    cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
    line = (str(cause).splitlines() or [type(cause).__name__])[0]
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
