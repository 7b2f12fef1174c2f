"""The endpoint's view of sampler and rewards: events of one request, whatever replicas come and go meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import ray.exceptions
from ray import serve

from .errors import from_input_error, part_down, reward_failed, too_busy
from .generation import Accepted, Event, Failed, Finished, Generation, Preview, Progress, Refused
from .remote_reward import refusal
from .reward import canonical

log = logging.getLogger(__name__)

READY_S = 5.0
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.RaySystemError,
    ray.exceptions.ObjectLostError,
    serve.exceptions.ReplicaUnavailableError,
    serve.exceptions.DeploymentUnavailableError,
)
"""A replica died, or the way to it did."""


class Backend(Protocol):
    """What routes need of whatever makes images."""

    def generate(self, generation: Generation) -> AsyncIterator[Event]:
        """`Accepted`, `Preview`s, `Finished`. ApiError where that cannot be."""

    async def score(self, name: str, model: str, params: Mapping[str, Any], images: np.ndarray) -> np.ndarray:
        """(N,) of images. ApiError where that cannot be."""

    async def ready(self) -> bool:
        """Whether a request would be taken up now."""


class ServeBackend:
    """Sampler and rewards behind Serve's handles.

    sampler: its handle. scorers: for each reward the handle and whether it is a reward's own deployment.
    resume_attempts: replicas that may be lost without a step of progress in between.
    """

    def __init__(self, sampler: Any, scorers: Mapping[str, Any], *, resume_attempts: int) -> None:
        self._sampler, self._scorers, self._resume_attempts = sampler, dict(scorers), resume_attempts

    async def generate(self, generation: Generation) -> AsyncIterator[Event]:
        """As in `Backend`; a request whose sampler is lost goes on at another from its last snapshot."""
        attempt = _Attempt(generation)
        while True:
            try:
                async for event in self._stream(attempt):
                    if isinstance(event, Finished):
                        yield replace(event, dropped=attempt.dropped)
                        return
                    if attempt.passes_on(event):
                        yield event
                attempt.begins_again()
            except serve.exceptions.BackPressureError as error:
                raise too_busy("the sampler's queue is full") from error
            except ray.exceptions.RayTaskError as error:
                log.exception("the sampler failed")
                raise part_down("the sampler failed; its log says why", code="sampler_failed") from error
            except LOST as error:
                attempt.lost(error, self._resume_attempts)

    async def _stream(self, attempt: _Attempt) -> AsyncIterator[Event]:
        handle = self._sampler.options(stream=True, multiplexed_model_id=attempt.generation.model)
        response = handle.generate.remote(attempt.generation, attempt.snapshot, attempt.accepted)
        try:
            async for event in response:
                yield event
        finally:
            response.cancel()  # of no effect on what is done

    async def score(self, name: str, model: str, params: Mapping[str, Any], images: np.ndarray) -> np.ndarray:
        own, handle = self._scorers[name]
        asked = (model, canonical(params), images)
        arguments = asked if own else (name, *asked)
        try:
            return await handle.score.remote(*arguments)
        except ray.exceptions.RayTaskError as error:
            raise reward_failed(str(refusal(name, error))) from error
        except serve.exceptions.BackPressureError as error:
            raise too_busy(f"reward {name}: its queue is full") from error
        except LOST as error:
            raise part_down(f"reward {name}: is down", code="reward_down") from error

    async def ready(self) -> bool:
        try:
            return await asyncio.wait_for(self._sampler.ready.remote(), timeout=READY_S)
        except (*LOST, asyncio.TimeoutError, ray.exceptions.RayTaskError, serve.exceptions.BackPressureError):
            return False


class _Attempt:
    """Where a request stands: what another sampler needs to go on, and what the client has seen."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.snapshot: bytes | None = None
        self.dropped: tuple[str, ...] = ()
        self.accepted = False
        self._restarts, self._previews, self._losses = False, 0, 0

    def passes_on(self, event: Event) -> bool:
        """Takes note of an event, and whether the client has not seen its like. ApiError for the end of a request."""
        if isinstance(event, Progress):
            self.snapshot, self._losses = event.snapshot, 0
            return False
        if isinstance(event, Refused):
            raise too_busy(event.message)
        if isinstance(event, Failed):
            self._failed(event)
            return False
        if isinstance(event, Accepted):
            first, self.accepted = not self.accepted, True
            return first
        if isinstance(event, Preview):
            new = event.number >= self._previews
            self._previews = max(self._previews, event.number + 1)
            return new
        return True

    def lost(self, error: BaseException, allowed: int) -> None:
        """A replica is gone; the next one goes on. ApiError 503 after too many."""
        self._losses += 1
        log.warning("a sampler was lost (%s), attempt %d goes on", type(error).__name__, self._losses + 1)
        if self._losses > allowed:
            raise part_down("the sampler is down; the same request can be sent again") from error

    def _failed(self, event: Failed) -> None:
        if event.kind == "lost":
            raise ray.exceptions.ActorDiedError()
        if event.kind == "invalid":
            raise from_input_error(ValueError(event.message), within="steering")
        if event.kind == "internal":
            raise part_down(event.message, code="sampler_failed")
        if self.generation.on_reward_failure == "drop" and event.reward is not None:
            self._drop(event.reward)
        elif event.kind == "reward_down":
            raise part_down(event.message, code="reward_down")
        else:
            raise reward_failed(event.message)

    def _drop(self, title: str) -> None:
        """Begins again: the image is that of the request without the reward."""
        log.warning("reward %s failed and is dropped", title)
        self.generation, self.dropped = self.generation.without(title), (*self.dropped, title)
        self.snapshot, self._restarts = None, True

    def begins_again(self) -> None:
        """The stream of a sampler is over; without a reason it was cut off."""
        if not self._restarts:
            raise ray.exceptions.ActorDiedError()
        self._restarts = False
