"""What `jobs.prepare_data data=images` costs beside its encoder: images a second of both.

    python -m benchmarks.latents [--rounds 4] [--images 768]

Two actors of one thread each on a local Ray, from JPEG files to shards; against two processes of one thread each that
give the same encoder preloaded tensors, batches of the same size and memory layout (channels last, the faster one).
They take turns in one run. Counted is the steady state: from where each worker has made one part to the last part.
Starting Ray, Python and the encoder is not counted, but named. About 4 minutes on two cores; writes
benchmarks/results/latents.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfm_ray.autoencoder import load_autoencoder
from mfm_ray.data.encoding import SPLITS
from mfm_ray.data.pixels import read_pixels

RESULTS = Path(__file__).parent / "results" / "latents.md"
WORKERS = 2
SIZE, BATCH, PART = 128, 16, 64
FILE = (250, 188)  # as ImageNet's mean of 500 x 375 is to 256
BLOCKS = (64, 64, 128, 128)


@dataclass(frozen=True)
class Pipeline:
    """A run of the job. rate: of the steady state; whole_rate: of all images over all seconds, start-up included."""

    rate: float
    seconds: float
    whole_rate: float


def save_autoencoder(folder: Path) -> None:
    """Stable Diffusion's autoencoder, narrower: factor 8, 4 channels, attention in the middle."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network: Any = AutoencoderKL(
        block_out_channels=BLOCKS,
        down_block_types=("DownEncoderBlock2D",) * len(BLOCKS),
        up_block_types=("UpDecoderBlock2D",) * len(BLOCKS),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
    )
    network.save_pretrained(folder)


def save_images(folder: Path, count: int) -> None:
    """JPEG files of smooth noise in ten class folders."""
    from PIL import Image

    random, (width, height) = np.random.default_rng(0), FILE
    for number in range(count):
        small = random.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        path = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize(FILE, Image.Resampling.BICUBIC).save(path, quality=90)


def environment() -> dict[str, str]:
    # Ray's workers have niceness 15 unless told otherwise; what they are compared with has 0
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1"}


def pipeline(folder: Path, turn: int) -> Pipeline:
    """One run of the job in a process of its own. When a part was done its shards say, which are written once."""
    output, began = folder / f"latents-{turn}", time.time()
    words = [f"source={folder}/images", f"autoencoder={folder}/vae", f"output={output}", f"name=run-{turn}"]
    sizes = [f"image_size={SIZE}", f"batch_size={BATCH}", f"shard_size={PART}", f"scaling.num_workers={WORKERS}"]
    job = [sys.executable, "-m", "jobs.prepare_data", "data=images", f"storage={folder}/runs", *words, *sizes]
    done = subprocess.run(job, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"jobs.prepare_data ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    seconds = time.time() - began
    splits = json.loads((output / "manifest.json").read_text())["splits"]
    made: dict[str, float] = {}
    rows: dict[str, int] = {}
    for split in SPLITS:
        for file in splits.get(split, {"files": []})["files"]:
            part = file["name"].removeprefix(f"{split}-")
            made[part] = max(made.get(part, 0.0), (output / file["name"]).stat().st_mtime)
            rows[part] = rows.get(part, 0) + file["rows"]
    parts = sorted(made, key=lambda part: made[part])
    counted = sum(rows[part] for part in parts[WORKERS:])
    rate = counted / (made[parts[-1]] - made[parts[WORKERS - 1]])
    return Pipeline(rate, seconds, sum(rows.values()) / seconds)


def bare_worker(rank: int, folder: str, images: int, barrier: Any, rates: Any) -> None:
    """The encoder alone, over and over on tensors that are there already."""
    torch.set_num_threads(1)
    autoencoder = load_autoencoder(f"{folder}/vae")
    files = sorted(Path(folder).glob("images/*/*.jpg"))[: 4 * BATCH]
    pixels = torch.from_numpy(np.stack([read_pixels(file.read_bytes(), SIZE) for file in files]))
    batches = (pixels.permute(0, 3, 1, 2).float() / 255).split(BATCH)
    with torch.inference_mode():
        for batch in batches:
            autoencoder.posterior(batch)
        barrier.wait()
        began, count = time.perf_counter(), 0
        while count < images:
            count += len(autoencoder.posterior(batches[count // BATCH % len(batches)])[0])
        rates.put((rank, count / (time.perf_counter() - began)))


def bare(folder: Path, images: int) -> float:
    """Images a second of all workers together, each encoding its share of the images."""
    context = torch.multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(WORKERS), context.Queue()
    arguments = (str(folder), images // WORKERS, barrier, rates)
    workers = [context.Process(target=bare_worker, args=(rank, *arguments)) for rank in range(WORKERS)]
    for worker in workers:
        worker.start()
    total = sum(rates.get(timeout=300)[1] for _ in workers)
    for worker in workers:
        worker.join()
    return total


def decoding_ms(folder: Path) -> float:
    """CPU milliseconds of one thread for reading, decoding and resizing an image."""
    files = sorted(folder.glob("images/*/*.jpg"))[:200]
    began = time.process_time()
    for file in files:
        read_pixels(file.read_bytes(), SIZE)
    return 1000 * (time.process_time() - began) / len(files)


def measure(rounds: int, images: int) -> str:
    alone: list[float] = []
    piped: list[Pipeline] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_autoencoder(folder / "vae")
        save_images(folder / "images", images)
        decoding = decoding_ms(folder)
        for turn in range(rounds):
            if turn % 2:  # whoever comes second finds a warmer machine
                piped.append(pipeline(folder, turn))
                alone.append(bare(folder, images))
            else:
                alone.append(bare(folder, images))
                piped.append(pipeline(folder, turn))
            print(f"bare {alone[-1]:.1f}, pipeline {piped[-1]}", flush=True)
    ratios = [ours.rate / theirs for ours, theirs in zip(piped, alone, strict=True)]
    whole, seconds = [run.whole_rate for run in piped], [run.seconds for run in piped]
    return "\n".join(
        [
            f"{images:,} JPEG files of {FILE[0]}x{FILE[1]} to {SIZE}x{SIZE}, an encoder of {BLOCKS} channels in "
            f"batches of {BATCH}, parts of {PART}, {WORKERS} workers of one thread, {rounds} rounds. Medians (range).",
            "",
            "| what | images/s |",
            "|---|---|",
            f"| the bare encoder | {spread(alone, 1)} |",
            f"| `jobs.prepare_data data=images`, steady state | {spread([run.rate for run in piped], 1)} |",
            f"| ratio of the two, round by round | {spread(ratios, 3)} |",
            f"| the job from its command to its result, start-up included | {spread(whole, 1)} |",
            "",
            f"The job took {spread(seconds, 1)} seconds. Reading, decoding and resizing a file takes {decoding:.2f} "
            f"ms of a core, encoding it {1000 * WORKERS / statistics.median(alone):.1f} ms.",
        ]
    )


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--no-file", action="store_true", help="print the table only")
    options = parser.parse_args()
    if options.images < 2 * WORKERS * PART:
        parser.error(f"--images: expected at least {2 * WORKERS * PART}, two parts for each worker")
    table = measure(options.rounds, options.images)
    print(table)
    command = f"`python -m benchmarks.latents --rounds {options.rounds} --images {options.images}`"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    if not options.no_file:
        RESULTS.write_text(f"# Images to latents\n\n{command}, {machine}\n\n{table}\n")


if __name__ == "__main__":
    main()
