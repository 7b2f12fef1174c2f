"""Errors as clients see them: OpenAI's shape, one line that names field, value and what is allowed; never a trace.

Serve's proxies import this (`edge`), so torch, which comes with `mfm_ray`, is not imported at the top.
"""

from __future__ import annotations

import json
from typing import Any


class ApiError(Exception):
    """An answer with a status other than 200.

    param: the field of the request that is wrong. code: for programs. retry: whether the same request may succeed
    later, None where clients know by the status. retry_after_s: for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, _clipped(message, _MESSAGE_CHARS), code
        self.param = None if param is None else _clipped(param, _PARAM_CHARS)
        self.retry, self.retry_after_s = retry, retry_after_s

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry is not None:
            headers["x-should-retry"] = str(self.retry).lower()
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


_MESSAGE_CHARS, _PARAM_CHARS = 1000, 200
"""What a request said wrongly is said back to it only so far."""


def _clipped(text: str, chars: int) -> str:
    """The text, of characters that UTF-8 has (half a pair of surrogates is none), not longer than that."""
    shown = text if len(text) <= chars else f"{text[: chars - 1]}…"
    return shown.encode(errors="replace").decode()


RETRY_AFTER_S = 1
"""Seconds after which to come back where a queue is full; steps are short."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_event(error: ApiError) -> str:
    """An error after a stream has begun; OpenAI's clients raise it."""
    return f"event: error\ndata: {json.dumps({'type': 'error', **error.body()})}\n\n"


def wrong_value(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value", retry=False)


def from_input_error(error: ValueError, *, within: str = "") -> ApiError:
    """400 for a refusal of the library, whose line starts with the name of what is wrong: `steering.num_draws=0: ...`.

    within: the field of the request that the library looked at; put in front where the line does not have it.
    """
    from mfm_ray.errors import InputError

    line = first_line(error)
    named = line.partition(":")[0].partition("=")[0].strip() if isinstance(error, InputError) else ""
    if within and not named.startswith(within):
        named, line = (f"{within}.{named}", f"{within}.{line}") if named else (within, f"{within}: {line}")
    return wrong_value(named, line)


def unknown_model(name: str, known: list[str]) -> ApiError:
    message = f"model={name}: not served here; expected one of {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found", retry=False)


def unknown_reward(name: str, known: list[str], *, param: str) -> ApiError:
    message = f"{param}={name}: not served here; expected one of {', '.join(known) or 'none: no reward is served'}"
    return ApiError(404, message, param=param, code="reward_not_found", retry=False)


def too_busy(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full", retry=True, retry_after_s=RETRY_AFTER_S)


def part_down(message: str, *, code: str = "unavailable") -> ApiError:
    return ApiError(503, message, code=code, retry=True, retry_after_s=5)


def reward_failed(message: str) -> ApiError:
    """A reward answered, but with something that is no reward; the same request would fail again."""
    return ApiError(503, message, code="reward_failed", retry=False)


def deadline_passed(deadline_s: float) -> ApiError:
    message = f"steering.deadline_s={deadline_s:g}: passed before the images were done"
    return ApiError(504, message, param="steering.deadline_s", code="deadline_exceeded", retry=False)


def internal() -> ApiError:
    return ApiError(500, "internal error; the server's log has it under this x-request-id", code="internal", retry=True)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
