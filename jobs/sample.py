"""Samples of a model, steered or not: Parquet files of images, rewards and labels, and a picture of the first ones.

python -m jobs.sample model=runs/digits/model num_samples=256
python -m jobs.sample model=runs/digits/model steering=gradient reward=masked_observation reward.row=3
python -m jobs.sample model=runs/digits/model steering=best_of_n steering.num_particles=100 reward=symmetry
ray job submit --working-dir . -- python -m jobs.sample model=/shared/model storage=/shared/runs num_samples=50000

A job of more than one shard runs on Ray and can be resumed: docs/sampling.md.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jobs.cluster import ray_cluster
from jobs.contract import JobRun, Outcome, run_job
from jobs.run_folder import RunFolder
from jobs.sample_maker import Progress, ShardMaker, make_here
from jobs.sample_pool import choose_workers, make_on_ray
from jobs.sample_shards import (
    FOLDER,
    MANIFEST,
    SAMPLES,
    Record,
    Shard,
    deciding_settings,
    finished_records,
    first_images,
    join_judges,
    join_rewards,
    picture_of,
    plan_shards,
    read_manifest,
    refuse_other_device,
    refuse_other_settings,
    write_manifest,
)
from jobs.workbench import Workbench
from mfm_ray.config import SampleConfig
from mfm_ray.errors import InputError
from mfm_ray.latent_models import Decoding

GRID = "grid.png"
_MANIFEST_EVERY_S = 10.0


def check(config: SampleConfig) -> None:
    """The model loads, steering, reward, label and sampler fit it, and so does what an earlier call has left."""
    bench = Workbench(config.model, Decoding.of(config))
    bench.build(config)
    bench.check(config)
    if not any(config.scaling.resources_per_worker.values()):
        raise InputError("scaling.resources_per_worker: expected at least one resource above 0, such as {CPU: 1}")
    if works_here(config):
        own_device(config)
    if config.resume:
        run = RunFolder("sample", config).storage
        refuse_other_settings(read_manifest(run), deciding_settings(config), where=run.uri)


def body(run: JobRun) -> Outcome:
    """Makes the shards that are not there yet, and says where all of them are and what they amount to."""
    config: SampleConfig = run.config
    bench = Workbench(config.model, Decoding.of(config))
    flow_map, (steering, judges) = bench.flow_map, bench.build(config)
    settings = deciding_settings(config)
    shards = plan_shards(config.num_samples, config.shard_size)
    book = _Book(run, settings, shards)
    missing = [shard for shard in shards if shard.index not in book.records]
    if config.resume:
        run.log(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
    if flow_map.space.kind == "latent" and not flow_map.space.makes_images:
        run.log("samples are latents, of which nothing makes pictures (autoencoder=...)")
    if missing:
        maker = ShardMaker(
            flow_map=flow_map,
            steering=steering,
            judges=judges,
            config=config,
            settings=settings,
            run=run.storage,
            device="cpu",
        )
        _make(maker, missing, book, run.log)
    several = len(shards) > 1
    artifacts = {
        "samples": run.storage.uri_of(FOLDER if several else SAMPLES),
        "manifest": run.storage.uri_of(MANIFEST),
    }
    if flow_map.space.makes_images:
        run.storage.write_bytes(GRID, picture_of(first_images(run.storage, shards)))
        artifacts["grid"] = run.storage.uri_of(GRID)
    metrics = book.metrics()
    run.log(", ".join(f"{name} {value:,.4g}" for name, value in metrics.items()))
    return Outcome(metrics=metrics, artifacts=artifacts)


def works_here(config: SampleConfig) -> bool:
    """Whether this process makes the samples: when the user says so, or when one shard is all there is to make."""
    workers = config.scaling.num_workers
    return workers == 0 or (workers is None and config.num_samples <= config.shard_size)


class _Book:
    """The records of finished shards, those of an earlier call included, and the manifest that lists them."""

    def __init__(self, run: JobRun, settings: dict[str, Any], shards: list[Shard]) -> None:
        self._storage, self._config, self._settings, self._num_shards = run.storage, run.config, settings, len(shards)
        self.records = finished_records(run.storage, shards, settings) if run.config.resume else {}
        earlier = read_manifest(run.storage) or {}
        self._images_per_second = earlier.get("images_per_second") or 0.0
        before = sum(record.rows for record in self.records.values())
        self.progress = Progress(run.log, before=before, total=run.config.num_samples)
        self._write()

    def keep(self, shard: Shard, record: Record) -> None:
        self.records[shard.index] = record
        self.progress.made += record.rows
        self._images_per_second = self.progress.images_per_second
        if len(self.records) == self._num_shards or time.monotonic() - self._written >= _MANIFEST_EVERY_S:
            self._write()

    def metrics(self) -> dict[str, float]:
        # in the order of the images, not in which shards finished: sums are the same to the bit
        records = [self.records[index] for index in sorted(self.records)]
        nfe = sum(record.nfe * record.rows for record in records) / sum(record.rows for record in records)
        metrics = {"num_samples": self._config.num_samples, "nfe": nfe, "images_per_second": self._images_per_second}
        rewards = join_rewards(records)
        if rewards is not None:
            metrics["reward"], metrics["reward_std"] = rewards
        return metrics | {f"judge.{name}": mean for name, mean in join_judges(records).items()}

    def _write(self) -> None:
        self._written = time.monotonic()
        write_manifest(
            self._storage,
            self._config,
            self._settings,
            self.records,
            num_shards=self._num_shards,
            images_per_second=self._images_per_second,
        )


def _make(maker: ShardMaker, missing: list[Shard], book: _Book, log: Callable[[str], None]) -> None:
    config = maker.config
    if works_here(config):
        maker = replace(maker, device=own_device(config))
        refuse_other_device(book.records.values(), maker.device, where=maker.run.uri)
        make_here(maker, missing, book.keep, book.progress)
        return
    with ray_cluster(log):
        workers = choose_workers(config.scaling, len(missing))
        maker = replace(maker, device=workers.device)
        refuse_other_device(book.records.values(), maker.device, where=maker.run.uri)
        make_on_ray(maker, missing, book.keep, book.progress, workers=workers, log=log)


def own_device(config: SampleConfig) -> str:
    """Where this process calculates."""
    import torch

    if config.scaling.use_gpu and not torch.cuda.is_available():
        raise InputError("scaling.use_gpu=true: this machine has no CUDA device; expected false or null")
    return "cuda" if torch.cuda.is_available() and config.scaling.use_gpu is not False else "cpu"


if __name__ == "__main__":
    run_job("sample", body, check=check)
