"""Training from mapped shards of `jobs.prepare_data data=images`: images and autoencoder are gone by then."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jobs.prepare_data
import jobs.train
from jobs.contract import JobRun, Outcome
from mfm_ray.autoencoder import load_autoencoder
from mfm_ray.config import load_config
from mfm_ray.data.augment import AffineJitter
from mfm_ray.data.mapped import MappedRows
from mfm_ray.data.shards import load_split
from mfm_ray.pretrained import load_flow_map, read_model_config
from mfm_ray.storage import Storage
from mfm_ray.training.feed import MicroBatch, TrainingData
from mfm_ray.training.zero import split_batch
from tests.conftest import save_tiny_autoencoder

CPU = torch.device("cpu")
TOY = [
    "experiment=imagenet_xl2",
    "network.depth=2",
    "network.hidden_size=32",
    "network.num_heads=2",
    "network.encoder_depth=1",
    "precision=fp32",
    "global_batch_size=8",
    "max_steps=3",
    "log_every=1",
]


@dataclass(frozen=True)
class Prepared:
    """Shards whose images and autoencoder are no longer there."""

    shards: Path
    autoencoder: str
    fingerprint: str


def job_in_process(job: Any, name: str, folder: Path, *words: str) -> tuple[Outcome, list[str]]:
    """Check and body of a job in this process; what it said."""
    config: Any = load_config(name, [*words, f"storage={folder.parent}", f"name={folder.name}"])
    job.check(config)
    said: list[str] = []
    return job.body(JobRun(config=config, storage=Storage(folder), log=said.append)), said


def save_images(folder: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(30):
        path = folder / f"class{number % 3}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 17, 3), dtype=np.uint8)).save(path)


def words_for(folder: Path) -> list[str]:
    places = [f"source={folder}/source", f"autoencoder={folder}/vae", f"output={folder}/latents"]
    return ["data=images", *places, "image_size=16", "batch_size=4", "shard_size=7", "heldout_share=0"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("mapped")
    save_images(folder / "source")
    save_tiny_autoencoder(folder / "vae")
    fingerprint = load_autoencoder(folder / "vae").fingerprint()
    job_in_process(jobs.prepare_data, "prepare_data", folder / "run", *words_for(folder), "scaling.num_workers=0")
    for used in ("source", "vae"):
        shutil.rmtree(folder / used)
    return Prepared(folder / "latents", str(folder / "vae"), fingerprint)


def feed(prepared: Prepared, *, rank: int = 0, workers: int = 1) -> TrainingData:
    config: Any = load_config("train", [*TOY, f"data.path={prepared.shards}", "seed=3"])
    return TrainingData.load(
        Storage(prepared.shards),
        config,
        split_batch(8, num_workers=workers, micro_batch_size=None),
        jitter=AffineJitter(**vars(config.augmentation)),
        rank=rank,
        device=CPU,
    )


def rows_of(micro_batches: list[list[MicroBatch]]) -> list[torch.Tensor]:
    """Data, labels, numbers in the global batch and noise keys, of all workers one after the other."""
    batches = [batch for worker in micro_batches for batch in worker]
    columns = [(batch.data, batch.label, batch.rows, noise.keys) for batch, noise in batches]
    return [torch.cat([column[number] for column in columns]) for number in range(4)]  # type: ignore[misc]


def test_batches_of_mapped_rows_are_those_of_rows_in_memory(prepared: Prepared) -> None:
    mapped, whole = feed(prepared), load_split(prepared.shards, "train")
    assert isinstance(mapped.x, MappedRows)
    assert mapped.x.shape == (30, 8, 8, 8)
    in_memory = replace(mapped, x=whole.data)
    for step in range(9):  # more than two epochs
        found, expected = (rows_of([list(data.micro_batches(step))]) for data in (mapped, in_memory))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(mapped.samples(torch.arange(30)), in_memory.samples(torch.arange(30)))


def test_two_workers_read_what_one_reads(prepared: Prepared) -> None:
    one, two = feed(prepared), [feed(prepared, rank=rank, workers=2) for rank in range(2)]
    for step in range(9):
        alone = rows_of([list(one.micro_batches(step))])
        shared = rows_of([list(worker.micro_batches(step)) for worker in two])
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
        assert alone[2].tolist() == list(range(8))


def check_trained(prepared: Prepared, model: str, run: Path) -> list[float]:
    """The model knows the autoencoder by name and fingerprint, draws finite latents; its losses."""
    data = read_model_config(model)["data"]
    described = {"source": prepared.autoencoder, "fingerprint": prepared.fingerprint, "image_size": 16}
    assert data["autoencoder"] == described
    assert (data["kind"], data["event_shape"], data["scale"]) == ("latent", [4, 8, 8], 0.18215)
    assert data["class_names"] == ["class0", "class1", "class2"]
    assert load_flow_map(model, autoencoder=None).space.event_shape == (4, 8, 8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    return [line["loss"] for line in lines]


@pytest.mark.timeout(180)
def test_training_needs_no_encoder(ray_session: None, prepared: Prepared, tmp_path: Path) -> None:
    words = [*TOY, f"data.path={prepared.shards}", "scaling.num_workers=1", "sample_every=0"]
    done, _ = job_in_process(jobs.train, "train", tmp_path / "run", *words)
    assert np.isfinite(check_trained(prepared, done.artifacts["model"], tmp_path / "run")).all()
