"""What a sweep costs over its sampling, what ASHA saves, and whether kills change its table.

    python -m benchmarks.sweeps --model outputs/demo/model [cost] [asha] [kills] [--trials 64] [--seconds 10 1]

All three parts by default, about 20 minutes on two cores; each writes its benchmarks/results/sweeps_PART.md.

cost: a sweep of gradient guidance through `jobs.tune`, all of it (start of Ray, report) against the same trials in as
many bare processes that have the model loaded and share a queue, one thread each; the number of samples is chosen so
that a trial takes the seconds that are asked for. asha: a pruned grid against the whole one. kills: the driver is
killed (SIGKILL) three times at random moments and resumed each time, against an uninterrupted sweep.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from jobs.tune import SamplerOfModel, settings_of, sweep_plan
from mfm_ray.config import load_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_BASE = "defaults:\n  - override /steering: gradient\n  - override /reward: symmetry\n"
SWEEPS = {
    "even": _BASE  # trials of equal cost
    + "space:\n  steering.guidance_scale: {loguniform: [0.125, 4]}\nobjectives: {reward: max, confidence: max}\n",
    "strengths": _BASE
    + "space:\n  steering.guidance_scale: {grid: [0.125, 0.25, 0.5, 1, 2, 4, 8, 16]}\n"
    + "  steering.num_draws: {grid: [1, 2, 4]}\nobjectives: {reward: max, nfe: min}\n",
    "grid": _BASE
    + "space:\n  steering.guidance_scale: {grid: [0.25, 0.5, 1, 2]}\n  steering.num_draws: {grid: [1, 2, 4]}\n"
    + "objectives: {reward: max, nfe: min}\n",
}
TIMES = ("seconds", "worker", "losses")
"""Columns of a table that no two runs share."""
NUM_KILLS = 3
_CLUSTER_ENDS_S = 5.0
"""Ray's processes see that their driver is gone within seconds; a head that starts before may not come up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all when left out")
    parser.add_argument("--model", required=True, help="model directory of digits with a classifier in it")
    parser.add_argument("--trials", type=int, default=64, help="trials of the part cost")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 1.0], help="sampling a trial, of part cost")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=256, help="samples a trial of the part asha")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}; expected of {', '.join(PARTS)}")
    given.model = str(Path(given.model).resolve())
    RESULTS.mkdir(exist_ok=True)
    for name in given.parts or PARTS:
        made_by = f"Made by `python -m benchmarks.sweeps {name} --model MODEL` on {os.cpu_count()} cores."
        text = "\n\n".join([PARTS[name](given), made_by])
        (RESULTS / f"sweeps_{name}.md").write_text(text + "\n")
        print(text, flush=True)


# ---- cost -----------------------------------------------------------------------------------------------------------


def cost(given: argparse.Namespace) -> str:
    """Wall-clock time of the whole job against that of bare processes."""
    lines = [
        f"{given.trials} trials, {given.workers} workers of one thread. The whole job (Ray's start, workers, report) "
        "against bare processes with the model loaded; seconds a trial: worker seconds beyond sampling.",
        "",
        "| sampling a trial, s | samples | bare, s | sweep, s | ratio | beyond sampling, s a trial | model loads |",
        "|---|---|---|---|---|---|---|",
    ]
    for seconds in given.seconds:
        num_samples = calibrated(given.model, seconds, workers=given.workers)
        words = [f"num_trials={given.trials}", f"num_samples={num_samples}", f"scaling.num_workers={given.workers}"]
        with Sweeps(given.model) as sweeps:
            bare = bare_seconds(given.model, sweeps.settings("even", *words), workers=given.workers)
            done = sweeps.run("even", "even", *words)
        beyond = (done.seconds - bare.wall) * given.workers / given.trials
        lines.append(
            f"| {bare.sampling / given.trials:.1f} | {num_samples} | {bare.wall:.1f} | {done.seconds:.1f} | "
            f"{done.seconds / bare.wall:.2f} | {beyond:.2f} | {done.metrics['model_loads']:.0f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(["## Cost", "", *lines])


@dataclass(frozen=True)
class Bare:
    """wall: from the first trial's begin to the last one's end; sampling: summed over the trials."""

    wall: float
    sampling: float


def bare_seconds(model: str, trials: Sequence[Mapping[str, Any]], *, workers: int) -> Bare:
    """The trials in processes that share a queue, each with its model loaded before the clock starts."""
    context = multiprocessing.get_context("spawn")
    queue, spans, barrier = context.Queue(), context.Queue(), context.Barrier(workers)
    for trial in trials:
        queue.put(trial)
    for _ in range(workers):
        queue.put(None)
    processes = [context.Process(target=_sample, args=(model, queue, spans, barrier)) for _ in range(workers)]
    for process in processes:
        process.start()
    measured = [spans.get() for _ in trials]
    for process in processes:
        process.join()
    return Bare(
        wall=max(end for _, end in measured) - min(begin for begin, _ in measured),
        sampling=sum(end - begin for begin, end in measured),
    )


def _sample(model: str, queue: Any, spans: Any, barrier: Any) -> None:
    torch.set_num_threads(1)
    sampler = SamplerOfModel(model, "cpu")()
    barrier.wait()
    while (trial := queue.get()) is not None:
        began = time.monotonic()
        sampler.draw(trial, first_image=0, count=trial["num_samples"])
        spans.put((began, time.monotonic()))


def calibrated(model: str, seconds: float, *, workers: int) -> int:
    """Samples that take a trial at least so long when as many workers as will be are busy."""
    pilot = 64
    with Sweeps(model) as sweeps:
        trials = sweeps.settings("even", f"num_samples={pilot}", f"num_trials={3 * workers}")
    an_image = bare_seconds(model, trials, workers=workers).sampling / len(trials) / pilot
    return max(2, round(1.05 * seconds / an_image))


# ---- asha -----------------------------------------------------------------------------------------------------------


def asha(given: argparse.Namespace) -> str:
    """Samples that a pruned grid draws, and whether its best point is that of the whole one."""
    words = [f"num_samples={given.samples}", "num_steps=20", f"scaling.num_workers={given.workers}"]
    with Sweeps(given.model) as sweeps:
        whole = sweeps.run("strengths", "whole", *words)
        pruned = sweeps.run("strengths", "pruned", *words, f"prune_after={given.samples // 16}", "reduction_factor=4")
    measured = {row["trial"]: row for row in whole.rows}
    best, found = (max(_finished(table.rows), key=lambda row: row["reward"])["trial"] for table in (whole, pruned))
    gap = measured[best]["reward"] - measured[found]["reward"]
    share = pruned.metrics["samples"] / whole.metrics["samples"]
    within = gap <= measured[best]["reward_half_width"]
    return "\n".join(
        [
            "## ASHA",
            "",
            f"A grid of {len(whole.rows)} points of {given.samples} samples, pruned from {given.samples // 16} on, one "
            f"in 4 going on: {share:.0%} of the samples. Best of the whole grid: trial {best}, reward "
            f"{_reward(measured[best])}. Best of the pruned one: trial {found}, in the whole grid "
            f"{_reward(measured[found])}: {'within' if within else 'NOT within'} the interval of the best.",
        ]
    )


def _finished(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["status"] == "ok"]


def _reward(row: Mapping[str, Any]) -> str:
    return f"{row['reward']:.3g} ± {row['reward_half_width']:.2g}"


# ---- kills ----------------------------------------------------------------------------------------------------------


def kills(given: argparse.Namespace) -> str:
    lines = ["| search | trials there at each kill | same table |", "|---|---|---|"]
    for seed, (search, words) in enumerate(KILLED.items()):
        with Sweeps(given.model) as sweeps:
            there, same = killed_and_resumed(sweeps, *words, f"scaling.num_workers={given.workers}", seed=seed)
        lines.append(f"| {search} | {', '.join(map(str, there))} | {'yes' if same else 'NO'} |")
        print(lines[-1], flush=True)
    text = (
        "The driver is killed three times, each time resumed; the table but for its times against an uninterrupted one:"
    )
    return "\n".join(["## Kills", "", text, "", *lines])


KILLED = {
    "grid": ("grid", "num_samples=64"),
    "random": ("even", "num_samples=64", "num_trials=12"),
    "optuna": ("even", "num_samples=64", "num_trials=12", "search=optuna", "search_window=4"),
}


def killed_and_resumed(sweeps: Sweeps, sweep: str, *words: str, seed: int) -> tuple[list[int], bool]:
    """Trials that were there at each kill, and whether the table is that of an uninterrupted sweep at the end."""
    calm = sweeps.run(sweep, "calm", *words)
    chance, total = random.Random(seed), len(calm.rows)
    pause = max(row["seconds"] * sweeps.config(sweep, *words).num_samples for row in calm.rows)
    there = []
    for turn, moment in enumerate(sorted(chance.uniform(0, total - 2) for _ in range(NUM_KILLS))):
        resume = ["resume=true"] if turn else []
        there.append(sweeps.kill(sweep, "killed", *words, *resume, trials=int(moment), pause=moment % 1 * pause))
    return there, sweeps.run(sweep, "killed", *words, "resume=true").table == calm.table


# ---- sweeps as processes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """seconds: of the whole process."""

    seconds: float
    metrics: dict[str, float]
    rows: list[dict[str, Any]]

    @property
    def table(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in self.rows]


class Sweeps:
    """Runs `jobs.tune` in a folder of its own, where the sweep files of `SWEEPS` stand."""

    def __init__(self, model: str) -> None:
        self._model = model

    def __enter__(self) -> Sweeps:
        self._folder = tempfile.TemporaryDirectory(prefix="mfm-sweeps-")
        self.path = Path(self._folder.name)
        (self.path / "tune_configs").mkdir()
        for name, text in SWEEPS.items():
            (self.path / "tune_configs" / f"{name}.yaml").write_text(text)
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def config(self, sweep: str, *words: str) -> Any:
        here = Path.cwd()
        os.chdir(self.path)
        try:
            return load_config("tune", [f"sweep={sweep}", *self._place, *words])
        finally:
            os.chdir(here)

    def settings(self, sweep: str, *words: str) -> list[dict[str, Any]]:
        """What the trials of a planned sweep sample by."""
        config = self.config(sweep, *words)
        return [settings_of(config, point) for point in sweep_plan(config).search.points({})]

    def run(self, sweep: str, name: str, *words: str) -> Finished:
        began = time.monotonic()
        process = self._start(sweep, name, *words)
        output, _ = process.communicate()
        seconds = time.monotonic() - began
        if process.returncode != 0:
            raise RuntimeError(f"jobs.tune sweep={sweep} ended with {process.returncode}:\n{output[-3000:]}")
        folder = self.path / name
        metrics = json.loads((folder / "result.json").read_text())["metrics"]
        return Finished(seconds, metrics, pq.read_table(folder / "results.parquet").to_pylist())

    def kill(self, sweep: str, name: str, *words: str, trials: int, pause: float) -> int:
        """Starts a sweep and kills its driver `pause` seconds after so many trials are there; how many there are."""
        process = self._start(sweep, name, *words)
        records = self.path / name / "trials"
        while not (records.is_dir() and len(list(records.glob("*.json"))) >= max(trials, 1)):
            if process.poll() is not None:
                raise RuntimeError(f"the sweep ended before its kill:\n{process.communicate()[0][-3000:]}")
            time.sleep(0.05)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(_CLUSTER_ENDS_S)
        return len(list(records.glob("*.json")))

    @property
    def _place(self) -> list[str]:
        return [f"model={self._model}", f"storage={self.path}"]

    def _start(self, sweep: str, name: str, *words: str) -> subprocess.Popen[str]:
        given = [f"sweep={sweep}", f"name={name}", *self._place, *words]
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.tune", *given],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


PARTS = {"cost": cost, "asha": asha, "kills": kills}

if __name__ == "__main__":
    main()
