"""Requests that nobody means well with: the routes over a backend that computes nothing, then a whole server (slow)."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import psutil
import pytest
import requests
import schemathesis

from serve.models import ModelCard
from serve.resolve import Resolver
from serve.settings import AppSettings, Limits

from .hostile import GENERATIONS, NO_HTTP, Attack, attacks, goes_away, raw, slow_body

KEY = "key-of-the-hostile-evening"
DECLARED = (503, 504)
SMALL = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 1, "graceful_shutdown_timeout_s": 2}
WISH = {"seed": 3, "n": 2, "steering": {"rewards": [{"name": "symmetry"}], "num_steps": 5}}
LONG = {"stream": True, "n": 4, "steering": {"rewards": [{"name": "symmetry"}], "num_steps": 50, "num_draws": 16}}
LIMITS = {"steps": 50, "images": 4, "particles": 16, "draws": 16, "deadline_s": 5, "body_s": 2}
SLOWEST_S = LIMITS["deadline_s"] + 10
GENERATED, BASE = 1000, "http://testserver"
OF_A_READ = 10
HOLDS_UP_S = 4.0
"""Of CPU: ten times what the slowest takes here; what is quadratic in a body takes minutes."""
NAMES = ("symmetry", "brightness", "masked_observation", "class_probability", "class_mixture")


@pytest.fixture
def resolver(card: ModelCard) -> Resolver:
    return Resolver({card.id: card}, NAMES, Limits())


def refused_wrongly(attack: Attack, status: int, text: str) -> str | None:
    """What is wrong with an answer, None where nothing is."""
    if status not in attack.expected:
        return f"{attack.name}: {status}, expected {attack.expected}: {text[:200]}"
    if status >= 400 and attack.method != "HEAD":
        error = json.loads(text)["error"]
        if set(error) != {"message", "type", "param", "code"} or len(error["message"]) > 1000 or "Traceback" in text:
            return f"{attack.name}: {text[:200]}"
    return None


def send(client: Any, attack: Attack) -> httpx.Response:
    headers = {"content-type": "application/json", **attack.headers}
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    return client.request(attack.method, attack.path, content=attack.content, headers=raw, follow_redirects=False)


def generated(schema: dict[str, Any], count: int, send_case: Callable[[requests.PreparedRequest], None]) -> None:
    """At least so many requests that schemathesis makes of our own OpenAPI, half of them against it; always the same
    ones. Most go where a body is taken: of the others there are few that differ."""
    operations = [found.ok() for found in schemathesis.openapi.from_dict(schema).get_all_operations()]
    modes = list(schemathesis.GenerationMode)
    with_body = sum(operation.method == "post" for operation in operations)
    for operation in operations:
        each = -(-count // (with_body * len(modes))) if operation.method == "post" else OF_A_READ
        for mode in modes:

            @hypothesis.settings(
                max_examples=each,
                database=None,
                derandomize=True,
                deadline=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                send_case(requests.Request(**case.as_transport_kwargs(base_url=BASE)).prepare())

            try:
                ask()
            except hypothesis.errors.Unsatisfiable:
                continue  # an operation without parameters cannot be asked wrongly


def test_the_list(client):
    """Each is refused as it should be, and soon: the endpoint has one event loop, which judging must not hold up."""
    wrong, slow = [], []
    for attack in attacks(Limits().body_bytes):
        began = time.process_time()
        answer = send(client, attack)
        wrong.append(refused_wrongly(attack, answer.status_code, answer.text))
        if (took := time.process_time() - began) > HOLDS_UP_S:
            slow.append((attack.name, took))
    assert [line for line in wrong if line] == []
    assert slow == []


def test_what_schemathesis_makes_of_our_openapi(client):
    asked = []

    def ask(case: requests.PreparedRequest) -> None:
        answer = client.request(case.method, case.url, content=case.body, headers=case.headers, follow_redirects=False)
        asked.append(answer.status_code)
        assert answer.status_code < 500, (case.url, case.body, answer.text)

    generated(client.app.openapi(), 120, ask)
    assert len(asked) >= 120
    assert {200, 400, 404} <= set(asked)


def test_a_body_that_does_not_come_is_refused(make_client):
    client = make_client(limits=Limits(body_s=0.05))
    messages = [{"type": "http.request", "body": b"{", "more_body": True}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def collect(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": headers, "query_string": b""}
    asyncio.run(
        client.app({**scope, "client": ("127.0.0.1", 1), "root_path": "", "http_version": "1.1"}, receive, collect)
    )
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_slow"


@dataclass(frozen=True)
class Target:
    url: str
    port: int
    http: httpx.Client


@pytest.fixture(scope="module")
def target(serve_url: str, tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    from ray import serve

    from serve.app import build_app

    keys = tmp_path_factory.mktemp("hostile") / "keys"
    keys.write_text(KEY)
    settings = {
        "model": {"tiny": tiny_models["tiny"]},
        "keys_file": str(keys),
        "limits": LIMITS,
        "rewards": [{"name": name, "placement": "colocated"} for name in NAMES],
        "sampler": SMALL,
        "ingress": SMALL,
        "access_log": True,
    }
    serve.run(build_app(AppSettings.model_validate(settings)), name="hostile", route_prefix="/")
    with httpx.Client(base_url=serve_url, headers={"Authorization": f"Bearer {KEY}"}, timeout=SLOWEST_S) as client:
        yield Target(serve_url, int(serve_url.rpartition(":")[2]), client)


def resident() -> int:
    """Bytes of everything that serves: proxy, endpoint, sampler."""
    parts = [p for p in psutil.Process().children(recursive=True) if _serves(p)]
    assert len(parts) >= 3
    return sum(part.memory_info().rss for part in parts)


def _serves(process: psutil.Process) -> bool:
    try:
        return any(name in " ".join(process.cmdline()) for name in ("ServeReplica", "ProxyActor"))
    except psutil.NoSuchProcess:
        return False


def _logs() -> str:
    import ray

    return ray._private.worker._global_node.get_logs_dir_path()


class OtherUser:
    """Asks the same all the time, and must get the same all the time."""

    def __init__(self, client: httpx.Client) -> None:
        self.client, self.answers, self.stopped = client, list[Any](), threading.Event()
        self.expected = self.images()
        self.thread = threading.Thread(target=self.run)

    def images(self) -> Any:
        response = self.client.post(GENERATIONS, json=WISH)
        if response.status_code != 200:
            return response.text
        return [image["b64_json"] for image in response.json()["data"]]

    def run(self) -> None:
        while not self.stopped.is_set():
            self.answers.append(self.images())
            self.stopped.wait(0.1)

    def __enter__(self) -> OtherUser:
        self.thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self.stopped.set()
        self.thread.join()
        assert self.answers
        assert [answer for answer in self.answers if answer != self.expected] == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_hostile_evening(target: Target) -> None:
    """The list, 1,000 generated requests, half-sent bodies, clients that go away, guesses at the key; all the while
    somebody else is answered as ever, and the memory that it took is given back."""
    statuses: dict[int, int] = {}
    wrong: list[str] = []

    def ask(case: requests.PreparedRequest) -> None:
        assert case.method and case.url
        headers = {**case.headers, "Authorization": f"Bearer {KEY}"}
        url = case.url.replace(BASE, target.url)
        took(target.http.request(case.method, url, content=case.body, headers=headers), f"{url} {case.body!r}")

    def took(response: httpx.Response, what: str) -> None:
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code >= 500 and response.status_code not in DECLARED:
            wrong.append(f"{what[:300]}: {response.status_code} {response.text[:200]}")

    def all_attacks() -> None:
        for attack in attacks(Limits().body_bytes):
            took(send(target.http, attack), attack.name)

    schema = target.http.get("/openapi.json").json()
    all_attacks()  # what is allocated once and kept is there before the memory is looked at
    time.sleep(LIMITS["deadline_s"])
    before = resident()
    with OtherUser(target.http), ThreadPoolExecutor(32) as pool:
        slow = [pool.submit(slow_body, target.port, KEY) for _ in range(20)]
        away = [pool.submit(goes_away, target.port, KEY, LONG, 0.02 * i) for i in range(40)]
        guesses = [
            httpx.get(f"{target.url}/v1/models", headers={"Authorization": f"Bearer {KEY[:i]}"})
            for i in range(1, len(KEY))
        ]
        assert {guess.status_code for guess in guesses} == {401}
        said = [raw(target.port, content) for content in NO_HTTP]
        assert [line for line in said if line.startswith(b"HTTP/1.1 5")] == []
        generated(schema, GENERATED, ask)
        all_attacks()
        assert {future.result().split(b" ")[1] for future in slow} == {b"400"}
        assert [future.result() for future in away] == [None] * 40
    assert wrong == []
    assert sum(statuses.values()) - 2 * len(attacks(Limits().body_bytes)) >= GENERATED
    deadline = time.monotonic() + 30
    while (after := resident()) > 1.1 * before and time.monotonic() < deadline:
        time.sleep(1)
    logs = [path for path in Path(_logs()).rglob("*") if path.is_file()]
    written = {path.name: path.read_text(errors="replace") for path in logs}
    assert [name for name, text in written.items() if KEY in text] == []
    assert sum(text.count('"status": 401') for text in written.values()) >= len(KEY) - 1
    print(f"answers {statuses}; resident {before / 2**20:.0f} MiB before, {after / 2**20:.0f} after")
    assert after <= 1.1 * before
