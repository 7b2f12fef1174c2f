"""Routes: what clients call. They judge, ask the backend, and answer; every refusal has OpenAI's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mfm_ray.settings import nearest

from .answers import KEEP_ALIVE, completed_events, generation_answer, preview_events, server_sent
from .backend import Backend
from .catalogue import describe, reads_prompts
from .errors import ApiError, deadline_passed, error_event, internal, too_busy, wrong_value
from .gate import BodyError, Gate, log
from .generation import Event, Finished, Generation, Preview
from .heartbeat import with_heartbeats
from .idempotency import HEADER, MAX_LENGTH, Idempotency, seed_of
from .keys import Keys
from .methods import describe_methods
from .metrics import requests_total
from .models import ModelCard, heldout_images
from .page import PREFIX, page
from .pictures import decode_png, encode_png
from .resolve import Resolver, at_most
from .schema import GenerationRequest, RewardRequest, ScoreRequest

_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""For proxies on the way: an event is passed on at once, and never answered from a cache."""
_NO_ROWS = "row: this model's data has no held-out images here"
_FIELDS = {
    "": GenerationRequest.model_fields,
    "steering.rewards": RewardRequest.model_fields,
}


def build_api(
    backend: Backend,
    resolver: Resolver,
    keys: Keys,
    *,
    heartbeat_s: float = 10.0,
    names_requests: bool = True,
    access_log: bool = False,
) -> FastAPI:
    """The ASGI application over a backend.

    heartbeat_s: a stream with nothing to say for so long sends a comment. names_requests, access_log: as in `Gate`.
    """
    app = FastAPI(title="mfm-ray", description="Reward-steered generation with Meta Flow Maps: OpenAI's Images API.")
    routes = Routes(backend, resolver, heartbeat_s)
    app.post("/v1/images/generations")(routes.generate)
    app.post("/v1/rewards/{name}/score")(routes.score)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{name}")(routes.model)
    app.get("/v1/rewards")(routes.rewards)
    app.get("/healthz")(routes.healthz)
    app.get("/readyz")(routes.readyz)
    app.get("/v1/models/{name}/heldout/{row}")(routes.heldout)
    app.get("/v1/methods")(routes.methods)
    app.get("/", include_in_schema=False)(routes.index)
    app.get(PREFIX + "{name}", include_in_schema=False)(routes.page)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    limits = resolver.limits
    app.add_middleware(
        Gate,
        keys=keys,
        body_bytes=limits.body_bytes,
        body_s=limits.body_s,
        names_requests=names_requests,
        access_log=access_log,
    )
    return app


class Routes:
    """One method a route."""

    def __init__(self, backend: Backend, resolver: Resolver, heartbeat_s: float) -> None:
        self._backend, self._resolver, self._heartbeat_s = backend, resolver, heartbeat_s
        self._idempotency = Idempotency()
        self._in_flight = 0

    async def generate(self, body: GenerationRequest, request: Request) -> Response:
        """Images, steered by rewards or not; with `stream`, server-sent events with posterior draws on the way."""
        caller, repeat = request.state.key, _idempotency_key(request)
        seed = None if repeat is None else seed_of(caller, repeat)
        generation = self._resolver.generation(body, key=caller, seed=seed)
        if body.stream:
            events = with_heartbeats(self._events(generation), self._heartbeat_s)
            first = await anext(events)  # what is refused before it began gets a status of its own
            lines = _server_sent(generation, first, events)
            return StreamingResponse(lines, media_type="text/event-stream", headers=_UNBUFFERED)
        if repeat is None:
            return JSONResponse(await self._images(generation))
        text = body.model_dump_json(exclude_unset=True)
        return JSONResponse(await self._idempotency.answer(caller, repeat, text, lambda: self._images(generation)))

    async def score(self, name: str, body: ScoreRequest, request: Request) -> dict[str, Any]:
        """Scores of images by one reward, in the order of the images."""
        limits, card = self._resolver.limits, self._resolver.model(body.model)
        params = self._resolver.reward_params(name, card, body.params, place="params", of="name", prompt=body.prompt)
        at_most("prompt", len(body.prompt), limits.prompt_chars, "characters")
        if body.prompt and params.get("prompt") != body.prompt:
            of = "another one stands in params.prompt" if reads_prompts(name) else f"reward {name} takes none"
            raise wrong_value("prompt", f"prompt={body.prompt[:40]}: {of}")
        at_most("images", len(body.images), limits.scored_images, "images")
        images = torch.stack([_decoded(text, i, card, limits.image_pixels) for i, text in enumerate(body.images)])
        scores = await self._backend.score(name, card.id, params, images.numpy())
        return {"object": "list", "model": card.id, "scores": [float(score) for score in scores], "params": params}

    async def models(self) -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [self._described(card) for card in self._resolver.models.values()]}

    async def model(self, name: str) -> dict[str, Any]:
        """One served model."""
        return self._described(self._resolver.model(name))

    async def rewards(self) -> dict[str, Any]:
        """Rewards that steer and score here, with their parameters, ranges and defaults."""
        cards = list(self._resolver.models.values())
        return {"object": "list", "data": [describe(name, cards) for name in self._resolver.rewards]}

    async def healthz(self) -> dict[str, str]:
        """Alive."""
        return {"status": "ok"}

    async def readyz(self) -> dict[str, str]:
        """Able to serve; 503 until a sampler is."""
        if not await self._backend.ready():
            raise ApiError(503, "no sampler is ready", code="not_ready", retry=True, retry_after_s=2)
        return {"status": "ready"}

    async def heldout(self, name: str, row: int) -> dict[str, Any]:
        """A held-out image of the model's bundled data, as `masked_observation` sees it by its `row`."""
        card = self._resolver.model(name)
        if not 0 <= row < card.num_heldout:
            raise wrong_value(
                "row", f"row={row}: expected 0 to {card.num_heldout - 1}" if card.num_heldout else _NO_ROWS
            )
        image = await asyncio.to_thread(lambda: encode_png(heldout_images(card.data_name)[row]))
        return {"object": "image", "model": card.id, "row": row, "b64_json": image}

    async def methods(self) -> dict[str, Any]:
        """Methods that steer, with their arguments and defaults; limits: the most that one request may have."""
        limits = self._resolver.limits
        return {"object": "list", "data": describe_methods(limits), "limits": limits.model_dump()}

    async def index(self) -> Response:
        """The playground."""
        return await self.page("index.html")

    async def page(self, name: str) -> Response:
        """A file of the playground."""
        found = page(name)
        if found is None:
            raise HTTPException(404, "no such file")
        return found

    def _described(self, card: ModelCard) -> dict[str, Any]:
        """The entry of GET /v1/models. presets: what each quality means here, empty for the built-in ones."""
        presets = self._resolver.presets.get(card.id, {})
        return {**card.description(), "presets": {name: preset.description() for name, preset in presets.items()}}

    async def _images(self, generation: Generation) -> dict[str, Any]:
        async for event in self._events(generation):
            if isinstance(event, Finished):
                return await asyncio.to_thread(generation_answer, generation, event)
        raise internal()

    async def _events(self, generation: Generation) -> AsyncIterator[Event]:
        """The backend's events within the deadline and the number of requests that are held, counted by outcome."""
        if self._in_flight >= self._resolver.limits.requests:
            requests_total().inc(tags={"outcome": "queue_full"})
            raise too_busy(f"{self._in_flight} requests are being answered already")
        self._in_flight += 1
        outcome, began = "cancelled", time.monotonic()
        try:
            async for event in _within_deadline(self._backend.generate(generation), generation.deadline_s):
                if isinstance(event, Finished):
                    outcome = "ok"
                    event = replace(event, timing={**event.timing, "total_s": time.monotonic() - began})
                yield event
        except ApiError as error:
            outcome = error.code or "error"
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self._in_flight -= 1
            requests_total().inc(tags={"outcome": outcome})


async def _within_deadline(events: AsyncIterator[Event], deadline_s: float | None) -> AsyncIterator[Event]:
    """The events until the deadline; then ApiError 504, and whatever made them is told to stop."""
    assert deadline_s is not None
    clock = asyncio.get_running_loop().time
    end = clock() + deadline_s
    while True:
        try:
            yield await asyncio.wait_for(anext(events), max(end - clock(), 0.0))
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError as error:
            raise deadline_passed(deadline_s) from error


async def _server_sent(
    generation: Generation, first: Event | None, events: AsyncGenerator[Event | None, None]
) -> AsyncIterator[str]:
    try:
        for line in _lines(generation, first):
            yield line
        async for event in events:
            for line in await asyncio.to_thread(_lines, generation, event):
                yield line
    except ApiError as error:
        yield error_event(error)
    except Exception:
        log.exception("a stream failed")
        yield error_event(internal())
    finally:
        await events.aclose()  # a client that went away: whatever makes its images is told to stop


def _lines(generation: Generation, event: Event | None) -> list[str]:
    """An event as a client sees it; some are for nobody."""
    if event is None:
        return [KEEP_ALIVE]
    if isinstance(event, Preview):
        return [server_sent(shown) for shown in preview_events(generation, event)]
    if isinstance(event, Finished):
        return [server_sent(shown) for shown in completed_events(generation, event)]
    return []


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get(HEADER)
    if key is not None and not 0 < len(key) <= MAX_LENGTH:
        raise wrong_value(HEADER, f"{HEADER}: {len(key)} characters; expected 1 to {MAX_LENGTH}")
    return key


def _decoded(text: str, index: int, card: Any, max_pixels: int) -> torch.Tensor:
    try:
        return decode_png(text, event_shape=card.sample_shape, max_pixels=max_pixels)
    except ValueError as error:
        raise wrong_value(f"images[{index}]", f"images[{index}]: {error}") from error


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """What the framework would call 422, as 400 that names the first wrong field."""
    assert isinstance(error, RequestValidationError)
    return await _answer_error(request, _from_validation(error.errors()[0]))


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: no such route, no such method, a body that grew too large."""
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyError):
        return await _answer_error(request, error.error)
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _answer_error(request, ApiError(error.status_code, message, code=code, retry=False))


def _from_validation(first: Mapping[str, Any]) -> ApiError:
    """One line from the first thing that the schema found wrong."""
    place = list(first["loc"][1:])  # the first says where in the request: body, path
    if first["type"] == "json_invalid":
        return wrong_value("body", f"body: no JSON: {first.get('ctx', {}).get('error', 'cannot be read')}")
    param = _dotted(place) or "body"
    if first["type"] == "extra_forbidden":
        return wrong_value(param, f"{param}: unknown field{_hint(place)}")
    if first["type"] == "missing":
        return wrong_value(param, f"{param}: missing")
    shown = "{...}" if first["type"] == "too_many_fields" else repr(first.get("input"))
    message = str(first["msg"]).replace("Input should be", "expected")
    return wrong_value(param, f"{param}={shown[:60]}: {message[:1].lower()}{message[1:]}")


def _dotted(place: list[Any]) -> str:
    """`steering.rewards[0].name`; names of alternatives that the schema tried are no fields."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("int", "float", "str", "bool"):
            text += f".{part}" if text else part
    return text


def _hint(place: list[Any]) -> str:
    parent = ".".join(part for part in place[:-1] if isinstance(part, str))
    known = list(_FIELDS.get(parent, {}))
    close = nearest(str(place[-1]), known)
    return f"; did you mean {close}?" if close else f"; expected {', '.join(known)}" if known else ""
