"""Replicas that follow the load, and a new checkpoint under load: on a real Serve, by its own config schema."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

import mfm_ray as mfm
from serve.pictures import encode_png

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

APP = "mfm-scaling"
SMALL = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 1, "graceful_shutdown_timeout_s": 30}
FAST = {"upscale_delay_s": 0.5, "downscale_delay_s": 2, "metrics_interval_s": 0.5, "look_back_period_s": 1}
ROWS = 64
"""Of one request: images x draws."""
STEERING = {"rewards": [{"name": "symmetry"}], "num_draws": 16, "num_steps": 60, "dynamics": "sde"}
SEEDS = range(4)


def deploy(url: str, model: str) -> None:
    """What `serve deploy` asks of the cluster, until the application runs."""
    config = {
        "http_options": {"host": "127.0.0.1", "port": httpx.URL(url).port},
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "serve.app:build_app",
                "args": {
                    "model": {"digits": model},
                    "rewards": [{"name": "symmetry", "placement": "colocated"}],
                    "sampler": {
                        **SMALL,
                        "autoscaling_config": {"min_replicas": 1, "max_replicas": 3, **FAST},
                        "target_rows": 4 * ROWS,
                    },
                    "ingress": SMALL,
                },
            }
        ],
    }
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    wait_until(lambda: serve.status().applications[APP].status == ApplicationStatus.RUNNING, "the application runs")


def wait_until(true: Callable[[], bool], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}; {serve.status()}"
        time.sleep(0.2)


def samplers() -> int:
    """Replicas of the sampler that run."""
    return sum(
        count
        for state, count in serve.status().applications[APP].deployments["sampler"].replica_states.items()
        if state == "RUNNING"
    )


def ask(url: str, seed: int) -> httpx.Response:
    body = {"n": ROWS // 16, "seed": seed, "steering": STEERING}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=300)


def images_of(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [image["b64_json"] for image in response.json()["data"]]


def solo(model: str) -> dict[int, list[str]]:
    """What the library makes of the requests, alone, by seed."""
    flow_map = mfm.load_flow_map(model)
    method = mfm.GradientGuidance(mfm.rewards.Symmetry(scale=0.1), num_draws=16)
    made = {}
    for seed in SEEDS:
        images = mfm.sample(
            flow_map, num_samples=ROWS // 16, steering=method, num_steps=60, dynamics="sde", seed=seed
        ).images
        made[seed] = [encode_png(image) for image in images]
    return made


@pytest.fixture(scope="module")
def url(serve_url: str, tiny_models: dict[str, str]) -> str:
    deploy(serve_url, tiny_models["tiny"])
    return serve_url


class Load:
    """Clients that ask one request after the other until told to stop; every answer is kept."""

    def __init__(self, url: str, clients: int) -> None:
        self._url, self._stop, self.answers = url, threading.Event(), list[tuple[int, httpx.Response]]()
        self._pool = ThreadPoolExecutor(clients)
        self._done: Sequence[Future[None]] = [self._pool.submit(self._client, number) for number in range(clients)]

    def _client(self, number: int) -> None:
        while not self._stop.is_set():
            seed = SEEDS[number % len(SEEDS)]
            self.answers.append((seed, ask(self._url, seed)))

    def end(self) -> list[tuple[int, httpx.Response]]:
        self._stop.set()
        for client in self._done:
            client.result()
        self._pool.shutdown()
        return self.answers


def test_a_burst_brings_samplers_which_leave_again_and_nothing_is_lost(url: str, tiny_models: dict[str, str]) -> None:
    expected = solo(tiny_models["tiny"])
    assert samplers() == 1
    burst, trickle = Load(url, clients=20), Load(url, clients=1)
    wait_until(lambda: samplers() > 1, "a burst brings a second sampler")
    answers = burst.end()
    wait_until(lambda: samplers() == 1, "calm takes them away again")
    answers += trickle.end()  # asked for all the while, also while samplers left
    assert len(answers) > 20
    for seed, response in answers:
        assert images_of(response) == expected[seed]


def test_a_new_checkpoint_comes_under_load_without_a_failed_request(url: str, tiny_models: dict[str, str]) -> None:
    old, new = solo(tiny_models["tiny"]), solo(tiny_models["other"])
    load = Load(url, clients=3)
    wait_until(lambda: len(load.answers) >= 3, "the old checkpoint answers")
    deploy(url, tiny_models["other"])
    before = len(load.answers)
    wait_until(lambda: len(load.answers) >= before + 6, "the new checkpoint answers")
    made = [(seed, images_of(response)) for seed, response in load.end()]
    assert all(images in (old[seed], new[seed]) for seed, images in made)  # whole images of one or the other
    assert made[0][1] == old[made[0][0]]
    assert images_of(ask(url, SEEDS[0])) == new[SEEDS[0]]
