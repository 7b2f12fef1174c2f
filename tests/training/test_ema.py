"""Several moving averages at once, sharded over two workers: each is what one process would average by itself."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import CheckpointError, check_decay, read_checkpoint_model, read_state
from mfm_ray.training.ema import ema_decays
from mfm_ray.training.loop import training_step
from mfm_ray.training.session import Training, set_up
from mfm_ray.training.snapshot import read_checkpoint, write_checkpoint
from tests.training.test_sharding import assert_same, plan_of, settings, write_data

DECAYS = (0.9, 0.15, 0.0)
STAGES, STEPS, RESUME_AT = (0, 2, 3), 5, 3


def full(training: Training, *, decay: float | None = None) -> dict[str, torch.Tensor]:
    """The averages of a decay, the weights themselves for None."""
    flow_map = training.flow_map
    tensors = training.engine.full_tensors(flow_map) if decay is None else training.ema.full_tensors(flow_map, decay)
    return {name: tensor.clone() for name, tensor in tensors}


def run_stage(stage: int, folder: Path) -> dict[str, Any]:
    """Averages after each step, by the shards and by the recurrence on whole tensors; and those of a resumed run."""
    plan = plan_of(settings(stage, 2, ema_decay="[0.9,0.15,0.0]"), folder)
    training = set_up(plan)
    expected = {decay: full(training) for decay in DECAYS}
    for step in range(STEPS):
        training_step(training, step)
        weights = full(training)
        for decay, average in expected.items():
            d = min(decay, (1 + step) / (10 + step))
            expected[decay] = {name: d * average[name] + (1 - d) * weights[name] for name in average}
        if step + 1 == RESUME_AT:
            checkpoint = Storage(folder / f"stage-{stage}")
            write_checkpoint(training, checkpoint, done=RESUME_AT, figures={})
            torch.distributed.barrier()
    sharded = {decay: full(training, decay=decay) for decay in DECAYS}
    resumed = set_up(plan)
    for step in range(read_checkpoint(resumed, checkpoint), STEPS):
        training_step(resumed, step)
    return {
        "expected": expected,
        "sharded": sharded,
        "default": {name: tensor.clone() for name, tensor in training.ema.full_tensors(training.flow_map)},
        "weights": full(training),
        "resumed": {decay: full(resumed, decay=decay) for decay in DECAYS},
    }


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in address.items()})
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {stage: run_stage(stage, Path(folder)) for stage in STAGES}
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ema")
    write_data(place)
    torch.multiprocessing.spawn(worker, (str(place),), nprocs=2)
    return place


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, Any]:
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.ray
@pytest.mark.parametrize("stage", STAGES)
def test_every_average_equals_that_of_one_process_with_whole_tensors(results: dict[int, Any], stage: int) -> None:
    result = results[stage]
    for decay in DECAYS:
        for name, tensor in result["expected"][decay].items():
            torch.testing.assert_close(result["sharded"][decay][name], tensor, rtol=1e-5, atol=1e-6)
    assert_same(result["default"], result["sharded"][DECAYS[0]])
    assert_same(result["weights"], result["sharded"][0.0])
    moved = [name for name, tensor in result["weights"].items() if not torch.equal(tensor, result["default"][name])]
    assert len(moved) > 5


@pytest.mark.ray
@pytest.mark.parametrize("stage", STAGES)
def test_every_average_goes_on_from_a_checkpoint_bit_for_bit(results: dict[int, Any], stage: int) -> None:
    for decay in DECAYS:
        assert_same(results[stage]["resumed"][decay], results[stage]["sharded"][decay])


@pytest.mark.ray
def test_a_checkpoint_holds_a_model_of_every_average(folder: Path, results: dict[int, Any]) -> None:
    place = folder / "stage-2"
    models = {decay: read_checkpoint_model(place, ema_decay=decay).state_dict for decay in DECAYS}
    assert_same(read_checkpoint_model(place).state_dict, models[DECAYS[0]])
    assert not torch.equal(models[0.9]["network.lift.weight"], models[0.15]["network.lift.weight"])
    with pytest.raises(CheckpointError, match="ema_decay=0.5: .* holds averages of 0.9, 0.15, 0.0"):
        check_decay(Storage(place), read_state(Storage(place)), 0.5)


@pytest.mark.parametrize(("setting", "decays"), [(0.999, (0.999,)), ([0.9], (0.9,)), ([0.99, 0.9], (0.99, 0.9))])
def test_one_decay_or_several_can_be_asked_for(setting: Any, decays: tuple[float, ...]) -> None:
    assert ema_decays(setting) == decays


@pytest.mark.parametrize("setting", [[], [0.9, 0.5, 0.9]])
def test_no_decay_or_the_same_one_twice_is_refused(setting: list[float]) -> None:
    with pytest.raises(ValueError, match="ema_decay=.*each of them once"):
        ema_decays(setting)
