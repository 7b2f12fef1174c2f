"""Errors by conditioning time: equal to a direct computation however the samples come, and named by their bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mfm_ray.config import TrainConfig, load_config
from mfm_ray.data import Batch
from mfm_ray.data_space import DataSpace
from mfm_ray.networks import build_network
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import build_objective
from mfm_ray.training.loss_module import LossModule
from mfm_ray.training.time_buckets import BucketWindow, bucket_name, bucket_sums

NAMES = ["t0-0.25", "t0.25-0.5", "t0.5-0.75", "t0.75-1"]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_bucket_has_its_name() -> None:
    assert [bucket_name("semigroup", i) for i in range(4)] == [f"squared_error.semigroup.{name}" for name in NAMES]


def test_every_time_is_in_one_bucket_the_lower_end_in_its_own() -> None:
    time = torch.tensor([0.0, 0.1, 0.25, 0.49, 0.5, 0.75, 0.999, 1.0])
    errors = torch.stack([2.0 ** torch.arange(8), torch.ones(8)])
    sums = bucket_sums(errors, time)
    assert sums.tolist() == [[3.0, 12.0, 16.0, 224.0], [2.0, 2.0, 1.0, 3.0], [2.0, 2.0, 1.0, 3.0]]


@pytest.mark.usefixtures("group")
def test_means_are_over_all_samples_of_all_steps_and_micro_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    window, seen = BucketWindow(["a", "b"]), []
    for size in (7, 1, 16, 3):
        errors, time = torch.rand(2, size, generator=generator), torch.rand(size, generator=generator)
        window.add(bucket_sums(errors, time).flatten())
        seen.append((errors, time))
    errors, time = torch.cat([e for e, _ in seen], dim=1).double(), torch.cat([t for _, t in seen])
    found = window.flush()
    assert set(found) == {f"squared_error.{term}.{name}" for term in "ab" for name in NAMES}
    for bucket, name in enumerate(NAMES):
        inside = (time >= bucket / 4) & (time < (bucket + 1) / 4)
        for row, term in enumerate("ab"):
            assert found[f"squared_error.{term}.{name}"] == pytest.approx(float(errors[row, inside].mean()), rel=1e-6)
    assert window.flush() == {}


@pytest.mark.usefixtures("group")
def test_a_bucket_without_samples_is_left_out() -> None:
    window = BucketWindow(["a"])
    window.add(bucket_sums(torch.tensor([[1.0, 3.0]]), torch.tensor([0.0, 0.8])))
    assert window.flush() == {"squared_error.a.t0-0.25": 1.0, "squared_error.a.t0.75-1": 3.0}


@pytest.mark.usefixtures("group")
def test_the_figures_of_a_step_end_with_the_sums_of_the_objectives_own_errors() -> None:
    config = load_config("train", ["experiment=gmm", "network.width=16", "network.num_blocks=1"])
    assert isinstance(config, TrainConfig)
    flow_map = build_network(config.network, space=DataSpace("coordinates", (2,)))
    objective = build_objective(config.objective)
    rows = torch.arange(64)
    batch = Batch(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), None, rows)
    noise = KeyedNoise.for_rows(0, rows)
    loss, figures = LossModule(flow_map, objective, precision="fp32")(batch, noise, 0)
    losses = objective(flow_map, batch, noise=noise, step=0)
    errors = torch.stack(list(losses.squared_errors.values()))
    torch.testing.assert_close(figures[:3], torch.tensor([float(loss.detach()), *errors.mean(1)]))
    window = BucketWindow(list(losses.squared_errors))
    torch.testing.assert_close(figures[3:].reshape(3, 4), bucket_sums(errors, losses.time))
    assert not figures.requires_grad
    window.add(figures[3:])
    found = window.flush()
    inside = losses.time < 0.25
    assert bool((losses.time == 0).any())
    for term, error in losses.squared_errors.items():
        assert found[bucket_name(term, 0)] == pytest.approx(float(error[inside].mean()), rel=1e-5)


def test_ranks_are_weighted_by_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank has one sample, of error 9, where this one has two."""
    other = bucket_sums(torch.tensor([[9.0]]), torch.tensor([0.2]))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(other))
    window = BucketWindow(["a"])
    window.add(bucket_sums(torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([0.1, 0.1, 0.6])))
    assert window.flush() == {"squared_error.a.t0-0.25": 4.0, "squared_error.a.t0.5-0.75": 6.0}
