"""What every request passes before a route sees it: its id, the caller's key, the size of its body."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from datetime import datetime, timezone
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from .errors import ApiError, internal
from .keys import Keys
from .page import is_page

log = logging.getLogger(__name__)
access = logging.getLogger("ray.serve.mfm_access")
"""Below Serve's own logger, whose handlers write to the replica's log file."""
_PATH_CHARS = 200

_OPEN_PATHS = ("/healthz", "/readyz")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")


class Gate:
    """ASGI middleware. Answers 401 and 413 by itself, and 500 without a trace for whatever a route lets through.

    names_requests: whether x-request-id is put into answers here; Serve's own proxy does so where there is one.
    access_log: one line of JSON for each request.
    """

    def __init__(
        self, app: Any, *, keys: Keys, body_bytes: int, body_s: float, names_requests: bool, access_log: bool = False
    ) -> None:
        self.app, self.keys, self.names_requests, self.access_log = app, keys, names_requests, access_log
        self.body_bytes, self.body_s = body_bytes, body_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        answer = _Answer(send, request_id, named=self.names_requests)
        state, began = scope.setdefault("state", {}), time.monotonic()
        state["request_id"] = answer.request_id
        try:
            self._admit(scope, headers, state)
            await self.app(scope, _limited(receive, self.body_bytes, self.body_s), answer)
        except ApiError as error:
            await answer.refuse(error)
        except Exception:
            log.exception("request %s failed", answer.request_id)
            await answer.refuse(internal())
        finally:
            if self.access_log:
                access.info(_access_line(scope, state, answer, time.monotonic() - began))

    def _admit(self, scope: Any, headers: Headers, state: dict[str, Any]) -> None:
        path = _own_path(scope)
        if path in _OPEN_PATHS or is_page(path):
            return
        client = (scope.get("client") or (None,))[0]
        state["key"] = self.keys.admit(headers.get("authorization"), client)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.body_bytes:
            raise too_large(self.body_bytes)
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip() != "application/json"
        ):
            # also what keeps other pages in a browser from asking in its user's name
            message = "content-type: expected application/json"
            raise ApiError(400, message, param="content-type", code="invalid_content_type", retry=False)


def _access_line(scope: Any, state: dict[str, Any], answer: _Answer, seconds: float) -> str:
    """One request as JSON. What could hold a secret or a picture is left out: headers, query, body; of a key there is
    the beginning of its fingerprint, by which callers are told apart."""
    return json.dumps(
        {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": answer.request_id,
            "client": (scope.get("client") or (None,))[0],
            "caller": state.get("key", "")[:8],
            "method": scope["method"],
            "path": scope["path"][:_PATH_CHARS],
            "status": answer.status,
            "bytes_sent": answer.bytes_sent,
            "seconds": round(seconds, 4),
        }
    )


def _own_path(scope: Any) -> str:
    """The path below the application's own prefix, where Serve has it at another one than /."""
    path, prefix = scope["path"], scope.get("root_path", "")
    return path[len(prefix) :] if path.startswith(f"{prefix}/") else path


class _Answer:
    """`send` with the request's id in the headers, and whether an answer has begun."""

    def __init__(self, send: Any, request_id: str, *, named: bool) -> None:
        self.send, self.request_id, self.named, self.begun = send, request_id, named, False
        self.status, self.bytes_sent = 0, 0  # 0: the client went away before an answer began

    async def __call__(self, message: Any) -> None:
        self.bytes_sent += len(message.get("body", b""))
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            if self.named:
                MutableHeaders(scope=message)["x-request-id"] = self.request_id
        await self.send(message)

    async def refuse(self, error: ApiError) -> None:
        """The error as the answer; once one has begun it cannot be changed, and the connection just ends."""
        if self.begun:
            return
        content = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers()}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": raw})
        await self({"type": "http.response.body", "body": content})


class BodyError(HTTPException):
    """Raised while a body is being read; FastAPI lets HTTP exceptions pass."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status)
        self.error = error


def _limited(receive: Any, limit: int, patience_s: float) -> Any:
    """`receive` for a body of so many bytes that must have come within so many seconds; what is received after it, such
    as the client's going away, may take its time."""
    read, ended, end = 0, False, asyncio.get_running_loop().time() + patience_s

    async def limited() -> Any:
        nonlocal read, ended
        if ended:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(end - asyncio.get_running_loop().time(), 0.0))
        except asyncio.TimeoutError as error:
            raise BodyError(_too_slow(patience_s)) from error
        ended = not message.get("more_body", False)
        read += len(message.get("body", b""))
        if read > limit:
            raise BodyError(too_large(limit))
        return message

    return limited


def _too_slow(patience_s: float) -> ApiError:
    message = f"body: not here after {patience_s:g} s"
    return ApiError(400, message, param="body", code="body_too_slow", retry=True)


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"body: more than {limit} bytes", param="body", code="body_too_large", retry=False)
