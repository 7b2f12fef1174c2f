"""Continuous batching against request-level batching and one request at a time: the same load, side by side.

    python -m benchmarks.serving --model outputs/demo/model [--seconds 60]

No cluster: all three policies run in this process, on the same network and rewards, so that only the policy differs.
Mixed open-loop load: Poisson arrivals; 25 to 100 steps, 1 to 16 draws, two rewards, 1 to 4 images. The rate is 0.8 of
what the engine was measured to sustain. Goodput counts requests answered within `--limit` seconds of their arrival; p95
is over all requests, also those answered later. Request-level batching is what `@serve.batch` does: whole requests of
equal settings that wait at the same time are run as one batch. Writes benchmarks/results/serving.md.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mfm_ray.dynamics import DYNAMICS
from mfm_ray.engine import Engine, Job
from mfm_ray.flow_map import FlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.padding import PaddedFlowMap
from mfm_ray.pretrained import load_classifier, load_flow_map
from mfm_ray.rewards import ClassProbability, Symmetry
from mfm_ray.samplers import OuterSampler, finished_samples
from mfm_ray.steering import CallCounter, GradientGuidance, Reward

RESULTS = Path(__file__).parent / "results" / "serving.md"
STEPS, DRAWS, MOST_IMAGES = (25, 50, 75, 100), (1, 2, 4, 8, 16), 4
BATCH_IMAGES = 64
"""Of request-level batching, at most."""
BURST = 48
"""Requests at once, from which the engine's rate is measured."""


@dataclass
class Request:
    """arrival, answered: seconds since the start of the run."""

    job: Job
    arrival: float
    answered: float = float("inf")


class Policy(ABC):
    """Answers requests; `take` is called as they arrive, from the load's thread."""

    name: str

    @abstractmethod
    def take(self, request: Request) -> None: ...

    @abstractmethod
    def drain(self) -> None:
        """Returns once all requests are answered."""


class Continuous(Policy):
    name = "engine: continuous batching of steps"

    def __init__(self, flow_map: FlowMap, began: float) -> None:
        self._engine, self._began, self._futures = Engine(flow_map, waves=1).start(), began, list[object]()

    def take(self, request: Request) -> None:
        def answered(_: object) -> None:
            request.answered = time.perf_counter() - self._began

        future = self._engine.submit(request.job).future
        future.add_done_callback(answered)
        self._futures.append(future)

    def drain(self) -> None:
        for future in self._futures:
            future.result()  # type: ignore[attr-defined]
        self._engine.close()


class Batches(Policy):
    """Whole requests, one batch after the other: the oldest and all that wait with equal settings."""

    def __init__(self, flow_map: FlowMap, began: float, *, most_images: int, name: str) -> None:
        self.name, self._flow_map, self._began, self._most = name, PaddedFlowMap(flow_map), began, most_images
        self._waiting: list[Request] = []
        self._changed, self._ended = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def take(self, request: Request) -> None:
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()

    def drain(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            run_whole(self._flow_map, [request.job for request in batch])
            now = time.perf_counter() - self._began
            for request in batch:
                request.answered = now

    def _next(self) -> list[Request]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if not self._waiting:
                return []
            first, images, batch = self._waiting[0], 0, list[Request]()
            for request in list(self._waiting):
                fits = not batch or images + request.job.num_images <= self._most
                if settings_of(request.job) == settings_of(first.job) and fits:
                    batch.append(request)
                    images += request.job.num_images
                    self._waiting.remove(request)
            return batch


def settings_of(job: Job) -> tuple[object, ...]:
    return (job.steering, job.num_steps, job.dynamics, job.label)


@torch.no_grad()
def run_whole(flow_map: FlowMap, jobs: Sequence[Job]) -> None:
    """Jobs of equal settings from noise to scored images, as one batch."""
    job, calls = jobs[0], CallCounter()
    outer = OuterSampler(flow_map, DYNAMICS[job.dynamics](), job.grid.times(job.num_steps))
    noise = KeyedNoise(torch.cat([KeyedNoise.for_images(one.seed, one.num_images).keys for one in jobs]))
    particles, trace = outer.run(job.steering, noise.spread(job.steering.num_particles), None, calls)
    finished_samples(job.steering, particles, trace, flow_map.space, noise, calls)


def mixed_load(rewards: Sequence[Reward], count: int, rate: float, *, seed: int) -> list[Request]:
    """Requests with Poisson arrivals at `rate` a second; all at once for an infinite rate."""
    chance, now, requests = random.Random(seed), 0.0, []
    for number in range(count):
        steering = GradientGuidance(chance.choice(rewards), num_draws=chance.choice(DRAWS))
        job = Job(steering, chance.randint(1, MOST_IMAGES), chance.choice(STEPS), "sde", number, key=str(number))
        now += 0.0 if rate == float("inf") else chance.expovariate(rate)
        requests.append(Request(job, now))
    return requests


def play(policy: Policy, requests: Sequence[Request], began: float) -> None:
    """Hands requests in when they are due, whatever the policy is doing."""
    for request in requests:
        time.sleep(max(0.0, began + request.arrival - time.perf_counter()))
        policy.take(request)
    policy.drain()


@dataclass(frozen=True)
class Row:
    policy: str
    goodput: float
    throughput: float
    median: float
    p95: float


def measure(policy: Policy, requests: Sequence[Request], began: float, limit: float) -> Row:
    play(policy, requests, began)
    latency = torch.tensor([request.answered - request.arrival for request in requests])
    window = requests[-1].arrival
    return Row(
        policy.name,
        float((latency <= limit).sum()) / window,
        len(requests) / max(request.answered for request in requests),
        float(latency.median()),
        float(latency.quantile(0.95)),
    )


def sustained_rate(flow_map: FlowMap, rewards: Sequence[Reward]) -> float:
    """Requests a second of the engine on a burst."""
    requests, began = mixed_load(rewards, BURST, float("inf"), seed=1), time.perf_counter()
    play(Continuous(flow_map, began), requests, began)
    return BURST / max(request.answered for request in requests)


def table(rows: Sequence[Row], *, rate: float, count: int, limit: float) -> str:
    first = rows[0]
    lines = [
        f"{count} requests at {rate:.2f} a second; goodput: answered within {limit:g} s. Ratios are of the engine over "
        "the others.",
        "",
        "| policy | goodput, requests/s | ratio | throughput, requests/s | median latency, s | p95 latency, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row is first else f"{first.goodput / max(row.goodput, 1e-9):.1f}"
        lines.append(
            f"| {row.policy} | {row.goodput:.2f} | {ratio} | {row.throughput:.2f} | {row.median:.1f} | {row.p95:.1f} |"
        )
    return "\n".join([*lines, "", "Made by `python -m benchmarks.serving`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory of digits with a classifier in it")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds within which an answer counts")
    given = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    flow_map = load_flow_map(given.model)
    rewards = [Symmetry(scale=0.1), ClassProbability(classifier=load_classifier(given.model), label=3)]
    rate = 0.8 * sustained_rate(flow_map, rewards)
    count, rows = max(8, round(rate * given.seconds)), list[Row]()
    for make in (
        lambda began: Continuous(flow_map, began),
        lambda began: Batches(flow_map, began, most_images=BATCH_IMAGES, name="batches of whole, equal requests"),
        lambda began: Batches(flow_map, began, most_images=1, name="one request at a time"),
    ):
        requests, began = mixed_load(rewards, count, rate, seed=2), time.perf_counter()
        rows.append(measure(make(began), requests, began, given.limit))
        print(rows[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(table(rows, rate=rate, count=count, limit=given.limit))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
