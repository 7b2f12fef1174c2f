"""What Serve's own proxy refuses, in OpenAI's shape: no replica of the endpoint, its queue full, its time over.

Serve answers such requests in plain text, or not at all. It takes middlewares for its proxies from
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.edge:middlewares in the environment of the process that starts Ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware import Middleware

from .errors import ApiError, error_event, part_down, too_busy

_OF_SERVE = "/-/"
"""Paths that Serve answers for itself: /-/healthz, /-/routes."""


def middlewares() -> list[Middleware]:
    return [Middleware(Edge)]


class Edge:
    """ASGI middleware around Serve's proxy. The endpoint's own answers pass as they are."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_OF_SERVE):
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, f"{scope['method']} {scope['path']}")
        await self.app(scope, receive, answer)
        await answer.end(Headers(scope=scope).get("x-request-id", ""))


class _Answer:
    """`send` that keeps back what Serve says itself, and knows how far the answer came."""

    def __init__(self, send: Any, asked: str) -> None:
        self._send, self._asked = send, asked
        self._error: ApiError | None = None
        self._headers: Headers | None = None
        self._ended = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._headers = Headers(raw=message["headers"])
            if message["status"] >= 400 and not _is_json(self._headers):
                self._error = _error(message["status"], self._asked)
        if self._error is None:
            self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def end(self, request_id: str) -> None:
        """What is left to say once the proxy has said all."""
        if self._error is None and self._headers is None:  # the endpoint's replica died with the request
            self._error = _lost()
        if self._error is not None:
            await self._refuse(self._error, request_id)
        elif not self._ended and self._headers is not None and _is_stream(self._headers):
            await self._send({"type": "http.response.body", "body": error_event(_lost()).encode()})

    async def _refuse(self, error: ApiError, request_id: str) -> None:
        content = json.dumps(error.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(content)),
            "x-request-id": request_id,
            **error.headers(),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": content})


def _error(status: int, asked: str) -> ApiError:
    return _ERRORS.get(status, _lost)() if status != 404 else _no_route(asked)


def _lost() -> ApiError:
    return part_down("the endpoint is down; the same request can be sent again", code="endpoint_down")


def _late() -> ApiError:
    return ApiError(504, "the server's own limit of time has passed", code="deadline_exceeded", retry=False)


def _no_route(asked: str) -> ApiError:
    return ApiError(404, f"{asked}: nothing is served here", code="route_not_found", retry=False)


_ERRORS: dict[int, Callable[[], ApiError]] = {
    408: _late,
    429: lambda: too_busy("the endpoint's queue is full"),
}
"""By the status that Serve gives; any other one of its own says that the endpoint is not there."""


def _is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").startswith("application/json")


def _is_stream(headers: Headers) -> bool:
    return headers.get("content-type", "").startswith("text/event-stream")
