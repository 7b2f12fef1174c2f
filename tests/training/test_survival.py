"""Whole training loops that are cut short, find damage, or diverge: what is on disk then, and how they go on.

The loops run in two groups of processes (two workers, then one) without Ray, which has no part in this; real runs that
are killed: tests/jobs/test_train.py.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import CheckpointError, read_checkpoint_model
from mfm_ray.training.checkpoint_store import CHECKPOINTS, folders, newest_checkpoint
from mfm_ray.training.diverged import load_batch
from mfm_ray.training.loop import train
from mfm_ray.training.metrics_log import TrainingDiverged
from mfm_ray.training.session import Plan, set_up
from tests.data.test_shards import replace_shard, tensor_table
from tests.training.test_sharding import assert_close, assert_same, join_group, settings, write_data

pytestmark = pytest.mark.ray

STEPS, EVERY, SHORT = 12, 3, 9
FAR = 14
"""A row of the data that is poisoned in one of the runs: 1e30 in both coordinates, finite as data must be."""


def plan(folder: Path, run: str, *, world_size: int = 2, stage: int = 2, **changes: Any) -> Plan:
    words = {"max_steps": STEPS, "checkpoint_every": EVERY, "log_every": 1, "learning_rate_schedule": "constant"}
    config = settings(stage, world_size, **{**words, **changes})
    data = "poisoned" if run == "diverging" else "good"
    return Plan(
        config=config,
        data=Storage(folder / data / "data"),
        run=Storage(folder / run),
        model={"network": {}},
        cuda=False,
    )


def two_workers(rank: int, folder: str) -> None:
    place = Path(folder)
    join_group(rank, 2, folder, "two")
    logging.basicConfig(filename=place / f"said-{rank}.txt", level=logging.WARNING)
    train(plan(place, "whole", best_checkpoints_to_keep=1, checkpoint_score_order="max"))
    train(plan(place, "short", max_steps=SHORT))
    for name in ("altered", "all-altered", "moved"):
        if rank == 0:
            shutil.copytree(place / "short", place / name)
            for checkpoint in (
                folders(Storage(place / name))[-1:] if name == "altered" else folders(Storage(place / name))
            ):
                if name != "moved":
                    alter(place / name / CHECKPOINTS / checkpoint / "training-rank-1.safetensors")
        torch.distributed.barrier()
    train(plan(place, "altered"))
    for name in ("all-altered", "diverging"):
        try:
            train(plan(place, name))
        except (CheckpointError, TrainingDiverged) as error:
            (place / f"{name}-{rank}.txt").write_text(f"{type(error).__name__} {error}")
    torch.distributed.destroy_process_group()


def one_worker(rank: int, folder: str) -> None:
    join_group(rank, 1, folder, "one")
    place = Path(folder)
    train(plan(place, "moved", world_size=1, stage=3))
    saved = load_batch(next((place / "diverging" / "diverged").iterdir()))
    training = set_up(plan(place, "diverging", world_size=1, stage=0))
    found = {
        "loss": [float(training.engine.forward(*batch, saved.step - 1)[0]) for batch in saved.micro_batches],
        "step": saved.step,
        "rank": saved.rank,
        "rows": torch.cat([batch.rows for batch, _ in saved.micro_batches]),
        "largest": max(float(batch.data.abs().max()) for batch, _ in saved.micro_batches),
    }
    torch.save(found, place / "again.pt")
    torch.distributed.destroy_process_group()


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("survival")
    for name in ("good", "poisoned"):
        write_data(place / name)
    points = torch.randn(90, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([2.0, 0.5]) + 1.0
    points[FAR] = 1e30
    replace_shard(place / "poisoned" / "data", tensor_table(points, torch.arange(90) % 3))
    torch.multiprocessing.spawn(two_workers, (str(place),), nprocs=2)
    torch.multiprocessing.spawn(one_worker, (str(place),), nprocs=1)
    return place


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([[line["loss"], line["gradient_norm"]] for line in history(run)])


def steps_of(run: Path) -> list[int]:
    return [int(name[-8:]) for name in folders(Storage(run))]


def newest_model(run: Path) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(Storage(run))
    assert found is not None
    assert found.state.step == STEPS
    return read_checkpoint_model(found.storage).state_dict


def test_the_newest_checkpoints_stay_and_the_best_one(folder: Path) -> None:
    scores = {line["step"]: line["loss"] for line in history(folder / "whole") if line["step"] % EVERY == 0}
    best = max(scores, key=lambda step: scores[step])
    assert steps_of(folder / "whole") == sorted({best, STEPS - EVERY, STEPS})
    assert steps_of(folder / "short") == [SHORT - EVERY, SHORT]


def test_an_altered_checkpoint_is_named_and_the_one_before_it_taken(folder: Path) -> None:
    said = (folder / "said-0.txt").read_text().splitlines()
    assert len([line for line in said if "/altered/" in line]) == 1
    assert "000002-step-00000009/training-rank-1.safetensors: content differs" in said[0]
    assert (folder / "said-1.txt").read_text() == ""
    assert torch.equal(losses(folder / "altered"), losses(folder / "whole"))
    assert_same(newest_model(folder / "altered"), newest_model(folder / "whole"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_of_which_every_checkpoint_is_damaged_does_not_begin_again_in_silence(folder: Path, rank: int) -> None:
    told = (folder / f"all-altered-{rank}.txt").read_text()
    assert told.startswith("CheckpointError ")
    assert "000002-step-00000009/training-rank-1.safetensors: content differs" in told


def test_the_driver_passes_over_what_is_truncated_or_unfinished(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "whole", tmp_path / "run")
    *_, before, newest = folders(Storage(run))
    file = run / CHECKPOINTS / newest / "ema-rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    said: list[str] = []
    found = newest_checkpoint(Storage(run), said.append)
    assert found is not None
    assert found.storage.name == before
    assert len(said) == 1
    assert f"{newest}/ema-rank-0.safetensors" in said[0]
    (run / CHECKPOINTS / newest / "manifest-rank-1.json").unlink()
    found = newest_checkpoint(Storage(run), said.append)
    assert found is not None
    assert (found.storage.name, len(said)) == (before, 1)  # a writer that was killed is no damage


def test_a_run_of_two_workers_goes_on_with_one_and_another_stage(folder: Path) -> None:
    torch.testing.assert_close(losses(folder / "moved"), losses(folder / "whole"), rtol=1e-4, atol=1e-5)
    assert_close(newest_model(folder / "moved"), newest_model(folder / "whole"))


def test_a_loss_that_is_not_finite_stops_all_workers_with_one_line_and_keeps_the_batch(folder: Path) -> None:
    told = [(folder / f"diverging-{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert "\n" not in told[0]
    again = torch.load(folder / "again.pt", weights_only=True)
    step, rank = again["step"], again["rank"]
    assert told[0].startswith(f"TrainingDiverged step {step}, worker {rank}: loss is ")
    assert f"its batch is in {folder}/diverging/diverged/step-{step:08d}-worker-{rank}.safetensors" in told[0]
    assert EVERY < step < STEPS
    assert steps_of(folder / "diverging")[-1] == (step - 1) // EVERY * EVERY
    assert again["rows"].tolist() == list(range(8 * rank, 8 * rank + 8))
    assert again["largest"] > 1e29
    assert not all(map(torch.isfinite, torch.tensor(again["loss"])))
    assert torch.equal(losses(folder / "diverging"), losses(folder / "whole")[: step - 1])
