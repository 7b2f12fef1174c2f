"""The application on a local Ray, for benchmarks: started, asked and ended; and the same images made without it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import mfm_ray as mfm
from mfm_ray.flow_map import FlowMap
from mfm_ray.pretrained import load_flow_map
from mfm_ray.steering import GradientGuidance, Reward
from serve.app import build_app
from serve.catalogue import RewardSource, defaults
from serve.models import read_models
from serve.pictures import encode_png
from serve.settings import AppSettings

APP = "benchmark"


@contextmanager
def application(settings: AppSettings, *, num_cpus: int = 16) -> Iterator[str]:
    """The URL of the application, on a Ray and a port of its own. Timeouts of the proxy are those of requests."""
    import ray
    from ray import serve

    # Ray's workers have niceness 15 unless told otherwise; what they are compared with has 0
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(settings), name=APP, route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@dataclass(frozen=True)
class Offline:
    """The model in this process, and the rewards as the application builds them."""

    flow_map: FlowMap
    rewards: Mapping[str, Reward]

    @classmethod
    def of(cls, model: str, names: list[str]) -> Offline:
        card = next(iter(read_models(model).values()))
        source = RewardSource(card)
        built = {name: source.build(name, defaults(name, card)) for name in names}
        return cls(load_flow_map(model), built)

    def images(self, body: Mapping[str, Any]) -> list[str]:
        """PNGs in base64, as the endpoint would answer a request of one reward with MFM-G."""
        steering = body["steering"]
        drawn = mfm.sample(
            self.flow_map,
            num_samples=body["n"],
            steering=GradientGuidance(self.rewards[steering["rewards"][0]["name"]], num_draws=steering["num_draws"]),
            num_steps=steering["num_steps"],
            seed=body["seed"],
        )
        return [encode_png(image) for image in drawn.images]


def body(reward: str, *, images: int, draws: int, steps: int, seed: int) -> dict[str, Any]:
    """A request with one reward."""
    return {
        "n": images,
        "seed": seed,
        "steering": {"rewards": [{"name": reward}], "num_draws": draws, "num_steps": steps},
    }


def one_thread_in_replicas() -> None:
    """As in production: as many threads as a replica has CPUs, not as the machine has."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
