"""A soak: mixed load for half an hour; no request may fail, and the memory must not grow.

    python -m benchmarks.soak --model outputs/demo/model [--minutes 30]

A local Ray and the real HTTP endpoint, two rewards in deployments of their own and three in the sampler. Clients ask
one after the other for plain answers, streams with previews and traces, scores, lists and pages, some go away in the
middle, and some ask for what is refused (which must be 400). Every 5 s the resident memory of each process that serves
is noted; slopes are fitted to the last two thirds of the time, with their 95 percent intervals from the residuals of
one-minute means. Writes benchmarks/results/soak.md; exit code 1 when a request failed or the interval of the sum lies
above 0 by more than 1 percent of the memory an hour.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.served import application, one_thread_in_replicas
from serve.settings import AppSettings, RewardSettings

RESULTS = Path(__file__).parent / "results" / "soak.md"
OWN, COLOCATED = ("symmetry", "class_probability"), ("brightness", "masked_observation", "class_mixture")
METHODS = ("gradient", "gradient_free", "dps", "search", "smc", "best_of_n")
CLIENTS, EVERY_S, TOLERATED = 4, 5.0, 0.01
GENERATIONS = "/v1/images/generations"


@dataclass
class Tally:
    answers: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """Seconds since the beginning, and MiB by process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory of images")
    parser.add_argument("--minutes", type=float, default=30.0)
    given = parser.parse_args()
    one_thread_in_replicas()
    rewards = [RewardSettings(name=name) for name in OWN]
    rewards += [RewardSettings(name=name, placement="colocated") for name in COLOCATED]
    tally = Tally()
    with application(AppSettings(model=given.model, rewards=rewards)) as url:
        ends = time.monotonic() + 60 * given.minutes
        clients = [threading.Thread(target=client, args=(url, tally, ends, number)) for number in range(CLIENTS)]
        for thread in clients:
            thread.start()
        watch(tally, ends)
        for thread in clients:
            thread.join()
    everything = growth([(at, sum(sizes.values())) for at, sizes in tally.memory])
    slope, margin, level = everything
    RESULTS.write_text(table(tally, given.minutes, everything))
    print(RESULTS.read_text(), *tally.failed[:20], sep="\n")
    sys.exit(1 if tally.failed or slope - margin > TOLERATED * level else 0)


def client(url: str, tally: Tally, ends: float, number: int) -> None:
    chance = random.Random(number)
    works = (plain, plain, streamed, streamed, scored, looked_at, refused, left)
    with httpx.Client(base_url=url, timeout=300) as line:
        while time.monotonic() < ends:
            work = chance.choice(works)
            began = time.monotonic()
            try:
                wrong = work(line, chance)
            except httpx.HTTPError as error:
                wrong = repr(error)
            tally.answers[work.__name__] += 1
            tally.seconds.append(time.monotonic() - began)
            if wrong:
                tally.failed.append(f"{work.__name__}: {wrong}")


def wish(chance: random.Random) -> dict[str, Any]:
    names = chance.sample(OWN + COLOCATED, chance.randint(1, 2))
    steering = {
        "method": chance.choice(METHODS),
        "rewards": [{"name": name, "weight": chance.choice((0.5, 1.0))} for name in names],
        "num_steps": chance.choice((10, 25, 50)),
    }
    return {"n": chance.randint(1, 4), "prompt": chance.choice(("", "3", "8")), "steering": steering}


def plain(line: httpx.Client, chance: random.Random) -> str | None:
    return _unless(200, line.post(GENERATIONS, json=wish(chance)))


def streamed(line: httpx.Client, chance: random.Random) -> str | None:
    asked = wish(chance)
    given = {**asked, "stream": True, "partial_images": 3, "include": ["trace", "timing"]}
    answer = line.post(GENERATIONS, json=given)
    complete = answer.text.count("event: image_generation.completed") == asked["n"]
    return _unless(200, answer) or (None if complete else answer.text[-300:])


def scored(line: httpx.Client, chance: random.Random) -> str | None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), chance.randrange(256), np.uint8)).save(buffer, format="PNG")
    images = [base64.b64encode(buffer.getvalue()).decode()] * chance.randint(1, 8)
    return _unless(200, line.post(f"/v1/rewards/{chance.choice(OWN + COLOCATED)}/score", json={"images": images}))


def looked_at(line: httpx.Client, chance: random.Random) -> str | None:
    return _unless(200, line.get(chance.choice(("/", "/playground/main.js", "/v1/rewards", "/v1/methods", "/readyz"))))


def refused(line: httpx.Client, chance: random.Random) -> str | None:
    bodies: tuple[Any, ...] = ({"n": 10**6}, {"prompt": "x" * 10_000}, {"steering": {"methd": 1}}, [1], {"seed": -1})
    return _unless(400, line.post(GENERATIONS, json=chance.choice(bodies)))


def left(line: httpx.Client, chance: random.Random) -> str | None:
    with line.stream("POST", GENERATIONS, json={**wish(chance), "stream": True, "partial_images": 3}) as answer:
        for _ in answer.iter_lines():
            break
        return None if answer.status_code == 200 else str(answer.status_code)


def _unless(expected: int, answer: httpx.Response) -> str | None:
    return None if answer.status_code == expected else f"{answer.status_code} {answer.text[:300]}"


def watch(tally: Tally, ends: float) -> None:
    began = time.monotonic()
    while time.monotonic() < ends:
        tally.memory.append((time.monotonic() - began, resident()))
        time.sleep(EVERY_S)


def resident() -> dict[str, float]:
    """MiB of each replica and of the proxy below this process, by what it is and its number."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            role = _role(" ".join(process.cmdline()))
            if role is not None:
                found[f"{role} ({process.pid})"] = process.memory_info().rss / 2**20
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def _role(command: str) -> str | None:
    """`sampler`, `reward_symmetry`, `endpoint`, `proxy`; None for what is not Serve's."""
    if "ServeReplica" in command:
        return command.split(":")[4].split(".")[0].split()[0]
    return "proxy" if "ProxyActor" in command else None


def growth(memory: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope in MiB an hour, half of its 95 percent interval, and the level in MiB."""
    late = [(at, size) for at, size in memory if at >= memory[-1][0] / 3]
    minutes: dict[int, list[float]] = {}
    for at, size in late:
        minutes.setdefault(int(at // 60), []).append(size)
    hours = np.array([minute / 60 for minute in minutes])
    sizes = np.array([statistics.fmean(values) for values in minutes.values()])
    if len(hours) < 3:
        return 0.0, float("inf"), float(sizes.mean())
    slope, start = np.polyfit(hours, sizes, 1)
    residual = sizes - (start + slope * hours)
    spread = np.sqrt((residual**2).sum() / (len(hours) - 2) / ((hours - hours.mean()) ** 2).sum())
    return float(slope), float(2.1 * spread), float(sizes.mean())


def table(tally: Tally, minutes: float, everything: tuple[float, float, float]) -> str:
    ordered = sorted(tally.seconds)
    slope, margin, level = everything
    figures = {
        "requests": str(tally.answers.total()),
        "failed": str(len(tally.failed)),
        "median, s": f"{ordered[len(ordered) // 2]:.2f}",
        "p95, s": f"{ordered[int(0.95 * len(ordered))]:.2f}",
        "memory, MiB": f"{level:.0f}",
        "growth, MiB an hour": f"{slope:.1f} +- {margin:.1f}",
    }
    head = " | ".join(["minutes", *figures])
    row = " | ".join([f"{minutes:g}", *figures.values()])
    lines = [f"| {head} |", f"|{'---|' * (len(figures) + 1)}", f"| {row} |", "", *_by_process(tally), ""]
    return "\n".join([*lines, "Made by `python -m benchmarks.soak`.", ""])


def _by_process(tally: Tally) -> list[str]:
    """Of the processes that were there from the beginning to the end."""
    lines = ["| process | memory, MiB | growth, MiB an hour |", "|---|---|---|"]
    for name in tally.memory[0][1]:
        sizes = [(at, found[name]) for at, found in tally.memory if name in found]
        if len(sizes) == len(tally.memory):
            slope, margin, level = growth(sizes)
            lines.append(f"| {name.split(' ')[0]} | {level:.0f} | {slope:.1f} +- {margin:.1f} |")
    return lines


if __name__ == "__main__":
    main()
