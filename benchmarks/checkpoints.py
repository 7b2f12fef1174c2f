"""What checkpoints cost: the same steps without, with a checkpoint every 50 steps, and with one that is waited for.

    python -m benchmarks.checkpoints [--rounds 7] [--every 50]

Two workers of one thread each train digits; the three variants take turns within one run, so that whatever else the
machine does falls on all of them. About 12 minutes on two cores; writes benchmarks/results/checkpoints.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing

from benchmarks.training import Spread
from mfm_ray.config import load_config, to_dict
from mfm_ray.data import digits
from mfm_ray.data.shards import write_shards
from mfm_ray.storage import Storage
from mfm_ray.training.loop import training_step
from mfm_ray.training.recorder import Recorder
from mfm_ray.training.session import Plan, Training, set_up

RESULTS = Path(__file__).parent / "results" / "checkpoints.md"
WORKERS = 2
WORDS = ["experiment=digits", "network.width=512", "global_batch_size=512", "zero.stage=2", "max_steps=1000000"]


def without(recorder: Recorder, done: int) -> None:
    """No checkpoint."""


def beside(recorder: Recorder, done: int) -> None:
    """Copied in the step, written while the next ones are computed: what training does."""
    recorder.save_checkpoint(done)


def waited_for(recorder: Recorder, done: int) -> None:
    """Written before the next step begins."""
    recorder.save_checkpoint(done)
    recorder.finish()


VARIANTS: dict[str, Callable[[Recorder, int], None]] = {
    "no checkpoint": without,
    "a checkpoint, beside the steps": beside,
    "a checkpoint, waited for": waited_for,
}


def block(
    training: Training, recorder: Recorder, first: int, steps: int, save: Callable[[Recorder, int], None]
) -> tuple[float, float]:
    """Seconds of `steps` steps and what `save` does before them, all workers together; CPU seconds of this one."""
    torch.distributed.barrier()
    began, used = time.perf_counter(), time.process_time()
    save(recorder, first)
    for step in range(first, first + steps):
        training_step(training, step)
        recorder.check()
    torch.distributed.barrier()
    return time.perf_counter() - began, time.process_time() - used


def worker(rank: int, folder: str, rounds: int, every: int) -> None:
    warnings.simplefilter("ignore")
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORKERS, "LOCAL_WORLD_SIZE": WORKERS}
    os.environ.update({name: str(value) for name, value in address.items()})
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORKERS)
    config = to_dict(load_config("train", WORDS))
    run = Storage(Path(folder) / "run")
    training = set_up(Plan(config=config, data=Storage(Path(folder) / "data"), run=run, model={}, cuda=False))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    done = 0
    with Recorder(training, 0) as recorder:
        for save in VARIANTS.values():  # not measured: first steps, first memory
            block(training, recorder, done, 5, save)
            done += 5
        recorder.record(done, last=False)
        for turn in range(rounds):
            names = list(VARIANTS)[turn % len(VARIANTS) :] + list(VARIANTS)[: turn % len(VARIANTS)]
            for name in names:
                seconds[name].append(block(training, recorder, done, every, VARIANTS[name]))
                done += every
                recorder.record(done, last=False)
            if rank == 0:
                print(", ".join(f"{name} {values[-1][0]:.2f} s" for name, values in seconds.items()), flush=True)
        recorder.finish()
    training.feed.close()
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
    torch.distributed.destroy_process_group()


def measure(rounds: int, every: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Storage(Path(folder) / "data"), digits())
        torch.multiprocessing.spawn(worker, (folder, rounds, every), nprocs=WORKERS)
        seconds = json.loads((Path(folder) / "seconds.json").read_text())
        runs = (Path(folder) / "run" / "checkpoints").iterdir()
        size = max(
            sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) for run in runs if run.is_dir()
        )
    plain = seconds["no checkpoint"]
    lines = [
        f"Digits, residual MLP 512 wide, 512 rows, ZeRO 2, {WORKERS} workers of one thread, {size / 1e6:.0f} MB a "
        f"checkpoint, one every {every} steps, {rounds} rounds.",
        "",
        "| what | seconds a step | time, ratio to none | CPU seconds of a worker, ratio to none |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        by_clock = [[mine[clock] / other[clock] for mine, other in zip(values, plain, strict=True)] for clock in (0, 1)]
        cells = ["", ""] if name == "no checkpoint" else [three_digits(Spread.of(ratios)) for ratios in by_clock]
        lines.append(f"| {name} | {statistics.median(wall for wall, _ in values) / every:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def three_digits(spread: Spread) -> str:
    return f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=int, default=50)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: expected at least 2, for quartiles")
    table = measure(options.rounds, options.every)
    print(table)
    heading = f"# Checkpoints\n\n`python -m benchmarks.checkpoints --rounds {options.rounds} --every {options.every}`"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    RESULTS.write_text(f"{heading}, {machine}\n\n{table}\n")


if __name__ == "__main__":
    main()
