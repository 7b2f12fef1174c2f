"""A drill: load on the application while replicas are killed; every request must be answered, every image be its own.

    python -m benchmarks.drill --model outputs/demo/model [--minutes 10] [--every 30]

A local Ray with two sampler replicas and two replicas of each of two rewards. Clients ask one after the other; every
`--every` seconds one replica, a sampler's and a reward's in turn, is killed with SIGKILL. Each image is compared with
the one that `mfm_ray.sample` makes of the same seed and settings, as PNG, byte for byte. Writes
benchmarks/results/drill.md
and exits with 1 when a request was lost or an image differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.served import Offline, application, body, one_thread_in_replicas
from serve.settings import AppSettings, RewardSettings, SamplerSettings

RESULTS = Path(__file__).parent / "results" / "drill.md"
REWARDS = ["symmetry", "brightness"]
CLIENTS, REPLICAS = 4, 2
SMALL = {"num_cpus": 0.5}


@dataclass
class Tally:
    """outcomes: answers by status, or the error's name; different: answers whose images are not those made alone."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    kills: list[str] = field(default_factory=list)
    different: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory of images")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between kills")
    given = parser.parse_args()
    one_thread_in_replicas()
    settings = AppSettings(
        model=given.model,
        rewards=[RewardSettings(name=name, num_replicas=REPLICAS, ray_actor_options=SMALL) for name in REWARDS],
        sampler=SamplerSettings(num_replicas=REPLICAS, health_check_period_s=2),
    )
    tally, offline = Tally(), Offline.of(given.model, REWARDS)
    with application(settings) as url:
        ends = time.monotonic() + 60 * given.minutes
        clients = [threading.Thread(target=ask, args=(url, offline, tally, ends, number)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        kill_until(ends - 5, given.every, tally)
        for client in clients:
            client.join()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(table(tally, given.minutes, given.every))
    print(RESULTS.read_text())
    sys.exit(0 if set(tally.outcomes) == {"200"} and not tally.different else 1)


def ask(url: str, offline: Offline, tally: Tally, ends: float, number: int) -> None:
    """A client: one request after the other, each compared with its solo run."""
    chance = random.Random(number)
    with httpx.Client(base_url=url, timeout=300) as client:
        asked = 0
        while time.monotonic() < ends:
            asked += 1
            wanted = body(
                chance.choice(REWARDS),
                images=chance.randint(1, 4),
                draws=chance.choice((1, 4, 16)),
                steps=chance.choice((25, 50, 100)),
                seed=1_000_000 * number + asked,
            )
            began = time.monotonic()
            try:
                answer = client.post("/v1/images/generations", json=wanted)
            except httpx.HTTPError as error:
                tally.outcomes[type(error).__name__] += 1
                continue
            tally.outcomes[str(answer.status_code)] += 1
            tally.seconds.append(time.monotonic() - began)
            if answer.status_code == 200:
                images = [image["b64_json"] for image in answer.json()["data"]]
                tally.different += images != offline.images(wanted)
            else:
                print(answer.text, flush=True)


def kill_until(ends: float, every: float, tally: Tally) -> None:
    """SIGKILL to one replica at a time, a sampler's and a reward's in turn."""
    chance = random.Random(0)
    while time.monotonic() + every < ends:
        time.sleep(every)
        part = "sampler" if len(tally.kills) % 2 == 0 else "reward_"
        if found := replicas(part):
            process = chance.choice(found)
            tally.kills.append(part.strip("_"))
            os.kill(process.pid, signal.SIGKILL)
            print(f"killed {part} {process.pid}; answers so far: {dict(tally.outcomes)}", flush=True)


def replicas(part: str) -> list[psutil.Process]:
    """Processes of replicas of deployments whose names begin with `part`, below this process."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if f"ServeReplica:benchmark:{part}" in " ".join(_title(process))]


def _title(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def table(tally: Tally, minutes: float, every: float) -> str:
    ordered, kills = sorted(tally.seconds), Counter(tally.kills)
    requests, answered = tally.outcomes.total(), tally.outcomes["200"]
    figures = {
        "kills": f"{kills['sampler']} samplers, {kills['reward']} rewards",
        "requests": str(requests),
        "answered": str(answered),
        "lost or refused": str(requests - answered),
        "images that differ": str(tally.different),
        "median, s": f"{ordered[len(ordered) // 2]:.1f}",
        "p95, s": f"{ordered[int(0.95 * len(ordered))]:.1f}",
        "slowest, s": f"{ordered[-1]:.1f}",
    }
    lines = [
        f"{minutes:g} minutes, {CLIENTS} clients, {REPLICAS} replicas of the sampler and of each of {len(REWARDS)} "
        f"rewards; every {every:g} s one of them is killed with SIGKILL.",
        "",
        "| " + " | ".join(figures) + " |",
        "|" + "---|" * len(figures),
        "| " + " | ".join(figures.values()) + " |",
    ]
    return "\n".join([*lines, "", "Made by `python -m benchmarks.drill`.", ""])


if __name__ == "__main__":
    main()
