"""What a worker computes on: made ahead by a thread, and yet bit for bit what a direct reading gives."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_ray.config import TrainConfig, load_config
from mfm_ray.data import Dataset, Split, write_shards
from mfm_ray.data.augment import AffineJitter
from mfm_ray.data_space import DataSpace
from mfm_ray.storage import Storage
from mfm_ray.training.feed import BatchFeed, MicroBatch, TrainingData
from mfm_ray.training.zero import split_batch

STEPS = 12


def images() -> Dataset:
    """29 labelled images: epochs end within batches, and the jitter has something to turn."""
    data = torch.rand(29, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    split = Split(data, torch.arange(29) % 3)
    return Dataset("images", DataSpace("image", (1, 8, 8)), {"train": split}, class_names=("a", "b", "c"))


def latents() -> Dataset:
    rows = torch.rand(29, 8, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    space = DataSpace("latent", (4, 2, 2), scale=0.18215)
    return Dataset("latents", space, {"train": Split(rows, torch.full((29,), -1))}, row_form="mean_std")


def read(folder: Path, dataset: Dataset, *, rank: int = 0, workers: int = 2, micro: int | None = None) -> TrainingData:
    if not folder.exists():
        write_shards(folder, dataset)
    words = ["experiment=digits", "global_batch_size=24", "seed=3", f"augmentation.rate={dataset.row_form == 'sample'}"]
    config = load_config("train", [word.replace("True", "0.7").replace("False", "0") for word in words])
    assert isinstance(config, TrainConfig)
    split = split_batch(24, num_workers=workers, micro_batch_size=micro)
    jitter = AffineJitter(**vars(config.augmentation))
    return TrainingData.load(Storage(folder), config, split, jitter=jitter, rank=rank, device=torch.device("cpu"))


def assert_same(taken: list[MicroBatch], direct: list[MicroBatch]) -> None:
    assert len(taken) == len(direct)
    for (batch, noise), (other, other_noise) in zip(taken, direct, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), other.tensors(), strict=True))
        assert torch.equal(noise.keys, other_noise.keys)


@pytest.mark.parametrize("make", [images, latents])
@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_fetched_ahead_is_what_a_direct_reading_gives(
    tmp_path: Path, make: Any, micro: int | None, rank: int
) -> None:
    data = read(tmp_path / "data", make(), rank=rank, micro=micro)
    feed = BatchFeed(data, end=STEPS)
    for step in range(STEPS):
        taken = feed.take(step)
        assert len(taken) == (1 if micro is None else 3)
        assert_same(taken, list(data.micro_batches(step)))
    feed.close()


@pytest.mark.parametrize("make", [images, latents])
def test_a_resumed_feed_goes_on_with_the_same_bits(tmp_path: Path, make: Any) -> None:
    data = read(tmp_path / "data", make(), micro=6)
    feed = BatchFeed(data, end=STEPS)
    whole = [feed.take(step) for step in range(STEPS)]
    feed.close()
    resumed = BatchFeed(read(tmp_path / "data", make(), micro=6), end=STEPS)
    for step in range(7, STEPS):
        assert_same(resumed.take(step), whole[step])
    resumed.close()


@pytest.mark.parametrize("make", [images, latents])
def test_the_global_batch_does_not_depend_on_how_it_is_shared(tmp_path: Path, make: Any) -> None:
    one = read(tmp_path / "data", make(), workers=1)
    two = [read(tmp_path / "data", make(), rank=rank, micro=6) for rank in range(2)]
    for step in range(5):
        ((whole, _),) = one.micro_batches(step)
        parts = [batch for data in two for batch, _ in data.micro_batches(step)]
        assert torch.equal(torch.cat([part.data for part in parts]), whole.data)
        assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)


def test_latents_are_fresh_at_every_reading_and_scaled_to_model_space(tmp_path: Path) -> None:
    """120 readings of every row: their means within six standard errors of the stored ones."""
    data = read(tmp_path / "data", latents(), workers=1)
    mean, std = latents().splits["train"].data.double().chunk(2, dim=1)
    total, seen = torch.zeros_like(mean), torch.zeros(29)
    for step in range(29 * 24 * 5 // 24):
        ((batch, _),) = data.micro_batches(step)
        index = data.order.rows(step)
        total.index_add_(0, index, batch.data.double())
        seen.index_add_(0, index, torch.ones(24))
    assert torch.equal(seen, torch.full((29,), 120.0))
    assert ((total / 120 / 0.18215 - mean).abs() < 6 * std / 120**0.5).all()
    ((first, _),) = data.micro_batches(0)
    ((again, _),) = data.micro_batches(0)
    assert torch.equal(first.data, again.data)
    assert first.data.shape == (24, 4, 2, 2)


def test_an_error_of_the_thread_ends_the_step_that_needed_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read(tmp_path / "data", images())
    feed = BatchFeed(data, end=STEPS)
    feed.take(0)
    monkeypatch.setattr(data, "x", data.x[:3])
    with pytest.raises(IndexError):
        [feed.take(step) for step in range(1, STEPS)]
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.gpu
def test_on_cuda_the_batches_arrive_whole(tmp_path: Path) -> None:
    data = read(tmp_path / "data", images(), micro=4)
    cuda = read(tmp_path / "data", images(), micro=4)
    cuda.device = torch.device("cuda", 0)
    feed = BatchFeed(cuda, end=STEPS)
    for step in range(STEPS):
        for (batch, noise), (other, other_noise) in zip(feed.take(step), data.micro_batches(step), strict=True):
            assert all(torch.equal(a.cpu(), b) for a, b in zip(batch.tensors(), other.tensors(), strict=True))
            assert torch.equal(noise.keys.cpu(), other_noise.keys)
    feed.close()
