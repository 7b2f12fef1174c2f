"""`Idempotency-Key`: a request that is sent again gets the same answer.

The seed of a request without one follows from its key, so that any replica of the endpoint makes the same image; this
replica also remembers the answer, and a repetition joins what is still being made.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from .errors import ApiError
from .schema import MAX_SEED

HEADER = "idempotency-key"
MAX_LENGTH = 255


def seed_of(caller: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{caller}\0{key}".encode()).digest()[:8], "big") % (MAX_SEED + 1)


class Idempotency:
    """Answers by caller and key, the oldest leaving first. What failed is not kept: it may be tried again."""

    def __init__(self, capacity: int = 128) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, str], tuple[str, asyncio.Task[dict[str, Any]]]] = OrderedDict()

    async def answer(
        self, caller: str, key: str, body: str, make: Callable[[], Coroutine[Any, Any, dict[str, Any]]]
    ) -> dict[str, Any]:
        """The answer of make(), made once for a key. ApiError 400 for a key that came with another body.

        The work outlives the caller's connection: who sends such a key means to ask again.
        """
        place = (caller, key)
        if place in self._kept:
            known, task = self._kept[place]
            if known != body:
                message = f"{HEADER}: was used for another request; expected a new one"
                raise ApiError(400, message, param=HEADER, code="idempotency_key_reused", retry=False)
        else:
            # in a context of its own: Serve cancels what belongs to the context of a request whose client went away
            task = contextvars.Context().run(asyncio.create_task, make())
            self._kept[place] = (body, task)
            task.add_done_callback(lambda done: self._forget_failed(place, done))
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return await asyncio.shield(task)

    def _forget_failed(self, place: tuple[str, str], task: asyncio.Task[dict[str, Any]]) -> None:
        if (task.cancelled() or task.exception() is not None) and self._kept.get(place, ("", None))[1] is task:
            del self._kept[place]
