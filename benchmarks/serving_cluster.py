"""What the application adds to sampling: transport, and how close it comes to one large batch made offline.

    python -m benchmarks.serving_cluster --model outputs/demo/model

A local Ray and the real HTTP endpoint, with the reward in its own deployment, called directly and through Serve's
handle, and colocated with the sampler. `lone`:
one request of one image and one draw, 50 steps, against `mfm_ray.sample` of the same; the difference is per step.
`batch`: 64 images x 4 draws, as 16 requests of 4 images at once, against the same images made offline in one batch. One
thread in every process. Medians of `--repeats` alternating runs. Writes benchmarks/results/serving_cluster.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.served import Offline, application, body, one_thread_in_replicas
from serve.settings import AppSettings, RewardSettings, SamplerSettings

RESULTS = Path(__file__).parent / "results" / "serving_cluster.md"
REWARD, STEPS = "symmetry", 50
LONE = [body(REWARD, images=1, draws=1, steps=STEPS, seed=0)]
BATCH = [body(REWARD, images=4, draws=4, steps=STEPS, seed=seed) for seed in range(16)]
WHOLE = body(REWARD, images=64, draws=4, steps=STEPS, seed=0)
CASES = {
    "own deployment (direct)": RewardSettings(name=REWARD, transport="direct"),
    "own deployment (serve handle)": RewardSettings(name=REWARD, transport="serve"),
    "colocated": RewardSettings(name=REWARD, placement="colocated"),
}


@dataclass(frozen=True)
class Row:
    """Seconds, medians."""

    reward: str
    lone: float
    lone_offline: float
    batch: float
    batch_offline: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory of images")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, alternating")
    parser.add_argument("--waves", type=int, help="passes in flight; as an application has them when left out")
    parser.add_argument("--only", choices=list(CASES), help="one row alone, printed and not written")
    given = parser.parse_args()
    one_thread_in_replicas()
    offline = Offline.of(given.model, [REWARD])
    cases = [given.only] if given.only else list(CASES)
    rows = [measure(given.model, case, offline, given.repeats, given.waves) for case in cases]
    if given.only:
        print(table(rows))
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(table(rows))
    print(RESULTS.read_text())


def measure(model: str, case: str, offline: Offline, repeats: int, waves: int | None) -> Row:
    settings = AppSettings(model=model, rewards=[CASES[case]], sampler=SamplerSettings(waves=waves))
    with application(settings) as url, httpx.Client(base_url=url, timeout=300) as client:
        ask_all(client, LONE + BATCH[:2])
        works: list[Callable[[], object]] = [
            lambda: ask_all(client, LONE),
            lambda: offline.images(LONE[0]),
            lambda: ask_all(client, BATCH),
            lambda: offline.images(WHOLE),
        ]
        seconds: list[list[float]] = [[] for _ in works]
        for _ in range(repeats):
            for work, spent in zip(works, seconds, strict=True):
                began = time.perf_counter()
                work()
                spent.append(time.perf_counter() - began)
        return Row(case, *(statistics.median(spent) for spent in seconds))


def ask_all(client: httpx.Client, bodies: list[dict[str, object]]) -> None:
    """All requests at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        for answer in pool.map(lambda wanted: client.post("/v1/images/generations", json=wanted), bodies):
            answer.raise_for_status()


def table(rows: list[Row]) -> str:
    header = ["reward", "lone request, s", "offline, s", "ratio", "added a step, ms"]
    header += ["64 images x 4 draws, s", "offline, s", "ratio"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lone = [f"{row.lone:.2f}", f"{row.lone_offline:.2f}", f"{row.lone / row.lone_offline:.2f}"]
        added = f"{1000 * (row.lone - row.lone_offline) / STEPS:.1f}"
        batch = [f"{row.batch:.2f}", f"{row.batch_offline:.2f}", f"{row.batch / row.batch_offline:.2f}"]
        lines.append("| " + " | ".join([row.reward, *lone, added, *batch]) + " |")
    return "\n".join([*lines, "", "Made by `python -m benchmarks.serving_cluster`.", ""])


if __name__ == "__main__":
    main()
