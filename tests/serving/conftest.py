"""What is known of the tiny model, and the endpoint over a backend that computes nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from serve.generation import Accepted, Event, Finished, Generation, Preview
from serve.keys import Keys
from serve.models import ModelCard, read_models
from serve.resolve import Resolver
from serve.settings import Limits


@pytest.fixture(scope="module")
def serve_url(ray_session: None) -> Iterator[str]:
    """Ray Serve on a port of its own, for all applications of a file."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="session")
def card(tiny_models: dict[str, str]) -> ModelCard:
    return read_models({"tiny": tiny_models["tiny"]})["tiny"]


@pytest.fixture
def resolver(card: ModelCard) -> Resolver:
    return Resolver({card.id: card}, ["symmetry", "brightness", "class_probability", "masked_observation"], Limits())


class FakeBackend:
    """Answers at once; keeps what it was asked. `events`, when set, is what a generation yields."""

    def __init__(self) -> None:
        self.asked: list[Generation] = []
        self.events: Callable[[Generation], AsyncIterator[Event]] | None = None
        self.is_ready = True

    async def generate(self, generation: Generation) -> AsyncIterator[Event]:
        self.asked.append(generation)
        if self.events is not None:
            async for event in self.events(generation):
                yield event
            return
        yield Accepted()
        images = np.full((generation.num_images, 1, 8, 8), 0.5, np.float32)
        for number in range(generation.previews):
            yield Preview(number, images)
        scores = np.zeros(generation.num_images, np.float32)
        yield Finished(images, scores, {choice.title: scores for choice in generation.rewards}, 10.0, {"draw": 5.0})

    async def score(self, name: str, model: str, params: Any, images: np.ndarray) -> np.ndarray:
        await asyncio.sleep(0)
        return images.mean(axis=(1, 2, 3))

    async def ready(self) -> bool:
        return self.is_ready


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def make_client(backend: FakeBackend, resolver: Resolver) -> Callable[..., Any]:
    """`make_client(keys=["a"], limits=Limits(...), address="10.0.0.1", heartbeat_s=1)`: a client of the endpoint."""
    from dataclasses import replace

    from starlette.testclient import TestClient

    from serve.api import build_api

    def make(
        keys: list[str] | None = None,
        limits: Limits | None = None,
        address: str = "127.0.0.1",
        heartbeat_s: float = 10.0,
    ) -> TestClient:
        own = resolver if limits is None else replace(resolver, limits=limits)
        app = build_api(backend, own, Keys.of(keys or []), heartbeat_s=heartbeat_s)
        return TestClient(app, client=(address, 50000), raise_server_exceptions=False)

    return make


@pytest.fixture
def client(make_client: Callable[..., Any]) -> Any:
    return make_client()
