"""The same training, however it is shared out: stages, workers, micro-batches, a restart in the middle.

Two groups of processes (one and two workers, gloo) run every case on the real network and objective; the tests
compare what they left with each other and with plain PyTorch in one process.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from mfm_ray.config import TrainConfig, load_config, to_dict
from mfm_ray.data.augment import AffineJitter
from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data.shards import read_manifest, write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.networks import build_network
from mfm_ray.objectives import build_objective
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import (
    CheckpointError,
    PieceReader,
    ema_kind,
    ema_name,
    read_checkpoint_model,
    read_state,
    training_name,
    verify_rank,
)
from mfm_ray.training.feed import TrainingData
from mfm_ray.training.loop import training_step
from mfm_ray.training.loss_module import LossModule
from mfm_ray.training.pretraining import build_flow_map
from mfm_ray.training.session import Plan, Training, set_up
from mfm_ray.training.snapshot import read_checkpoint, write_checkpoint
from mfm_ray.training.zero import LearningRate, split_batch

# no Ray here, but two groups of training processes: not what `make test-fast` is for
pytestmark = pytest.mark.ray

STEPS, RESUME_AT = 4, 2
STAGES, WORLD_SIZES, ACCUMULATIONS = (0, 1, 2, 3), (1, 2), (1, 2)
CASES = list(itertools.product(STAGES, WORLD_SIZES, ACCUMULATIONS))


def settings(stage: int = 0, world_size: int = 1, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    words = [
        "experiment=gmm",
        "network.width=24",
        "network.num_blocks=2",
        "global_batch_size=16",
        f"micro_batch_size={16 // world_size // accumulation}",
        f"max_steps={STEPS}",
        "warmup_steps=2",
        "gradient_clipping=0.5",
        "optimizer.learning_rate=0.01",
        "optimizer.eps=1e-4",  # Adam divides by tiny gradients otherwise, which blows rounding up
        "ema_decay=0.9",
        f"zero.stage={stage}",
        f"scaling.num_workers={world_size}",
        *(f"{key}={value}" for key, value in changes.items()),
    ]
    return to_dict(load_config("train", words))


def plan_of(config: dict[str, Any], folder: Path) -> Plan:
    return Plan(config=config, data=Storage(folder / "data"), run=Storage(folder / "run"), model={}, cuda=False)


def write_data(folder: Path) -> None:
    """90 labelled points in 2D: not a multiple of the batch, so that batches reach over the ends of epochs."""
    points = torch.randn(90, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([2.0, 0.5]) + 1.0
    split = Split(data=points, labels=torch.arange(90) % 3)
    space = DataSpace("coordinates", (2,))
    write_shards(folder / "data", Dataset("points", space, {"train": split}, class_names=("a", "b", "c")))


def full(training: Training, source: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in source.full_tensors(training.flow_map)}


def steps(training: Training, first: int, last: int) -> list[dict[str, float]]:
    history = []
    for step in range(first, last):
        training_step(training, step)
        history.append(training.window.flush())
    return history


def run_case(stage: int, world_size: int, accumulation: int, folder: Path, rank: int) -> dict[str, Any]:
    """Train to the end in one go; and again with a checkpoint, a new engine and the rest."""
    plan = plan_of(settings(stage, world_size, accumulation), folder)
    training = set_up(plan)
    history = steps(training, 0, STEPS)
    weights_before = [shard.clone() for shard in training.engine.fp32_shards()]
    result = {
        "history": history,
        "ema": full(training, training.ema),
        "weights": full(training, training.engine),
        "shard_numel": sum(shard.numel() for shard in training.engine.fp32_shards()),
        "shards_untouched": all(
            torch.equal(a, b) for a, b in zip(weights_before, training.engine.fp32_shards(), strict=True)
        ),
    }
    if accumulation == 1:
        result |= run_interrupted(plan, folder / f"stage-{stage}-of-{world_size}")
    return result


def run_interrupted(plan: Plan, folder: Path) -> dict[str, Any]:
    first = set_up(plan)
    steps(first, 0, RESUME_AT)
    write_checkpoint(first, Storage(folder), done=RESUME_AT, figures={"loss": 1.0})
    ema_at_checkpoint = full(first, first.ema)
    torch.distributed.barrier()
    second = set_up(plan)
    done = read_checkpoint(second, Storage(folder))
    history = steps(second, done, STEPS)
    return {
        "resumed_at": done,
        "resumed_history": history,
        "resumed_weights": full(second, second.engine),
        "resumed_ema": full(second, second.ema),
        "ema_at_checkpoint": ema_at_checkpoint,
    }


@dataclass(frozen=True)
class Move:
    """From a checkpoint of one layout to a run of another."""

    stage: int
    world_size: int
    to_stage: int
    to_world_size: int

    def __str__(self) -> str:
        return f"stage-{self.stage}-of-{self.world_size}-to-stage-{self.to_stage}-of-{self.to_world_size}"


MOVES = [Move(2, 2, 3, 1), Move(1, 2, 0, 1), Move(3, 2, 2, 1), Move(0, 1, 2, 2), Move(3, 1, 0, 2), Move(2, 1, 3, 2)]
EVERY_MOVE = [
    move
    for stage, to_stage in itertools.product(STAGES, STAGES)
    for world_size, to_world_size in itertools.product(WORLD_SIZES, (1, 2, 3))
    if (stage, world_size) != (to_stage, to_world_size)
    and (move := Move(stage, world_size, to_stage, to_world_size)) not in MOVES
]


def run_move(move: Move, folder: Path) -> dict[str, Any]:
    """Go on from a checkpoint of another layout, and put down at its end what yet another group goes on from."""
    changes = {} if move.to_world_size != 3 else {"scaling.num_workers": "[1,3]", "micro_batch_size": 3}
    config = settings(move.to_stage, move.to_world_size, **changes)
    training = set_up(plan_of(config, folder))
    done = read_checkpoint(training, Storage(folder / f"stage-{move.stage}-of-{move.world_size}"))
    write_checkpoint(training, Storage(folder / f"again-{move}"), done=done, figures={})
    return {
        "resumed_at": done,
        "ema_at_checkpoint": full(training, training.ema),
        "history": steps(training, done, STEPS),
        "weights": full(training, training.engine),
        "ema": full(training, training.ema),
    }


def join_group(rank: int, world_size: int, folder: str, name: str) -> None:
    warnings.simplefilter("ignore")
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in address.items()})
    # a file, because a free port found here may be taken before the group listens on it
    store = f"file://{folder}/store-{name}-{world_size}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)


def mover(rank: int, world_size: int, folder: str, moves: list[Move]) -> None:
    join_group(rank, world_size, folder, f"moves-{len(moves)}")
    for move in moves:
        result = run_move(move, Path(folder))
        if rank == 0:
            torch.save(result, Path(folder) / f"{move}.pt")
    torch.distributed.destroy_process_group()


def make_moves(folder: Path, moves: list[Move]) -> None:
    groups = [
        torch.multiprocessing.spawn(mover, (size, str(folder), mine), nprocs=size, join=False)
        for size in (1, 2, 3)
        if (mine := [move for move in moves if move.to_world_size == size])
    ]
    for group in groups:
        while not group.join():
            pass


def worker(rank: int, world_size: int, folder: str) -> None:
    join_group(rank, world_size, folder, "cases")
    for stage, _, accumulation in (case for case in CASES if case[1] == world_size):
        result = run_case(stage, world_size, accumulation, Path(folder), rank)
        torch.save(result, Path(folder) / f"{stage}-{world_size}-{accumulation}-rank-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharding")
    write_data(place)
    groups = [torch.multiprocessing.spawn(worker, (size, str(place)), nprocs=size, join=False) for size in WORLD_SIZES]
    for group in groups:
        while not group.join():
            pass
    return place


def result_of(folder: Path, stage: int, world_size: int, accumulation: int = 1, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{stage}-{world_size}-{accumulation}-rank-{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """Plain PyTorch, one process, no DeepSpeed: what every case must agree with."""
    config = from_dict(TrainConfig, settings())
    plan = plan_of(settings(), folder)
    flow_map = build_flow_map(plan, config)
    module = LossModule(flow_map, build_objective(config.objective), precision="fp32")
    split = split_batch(16, num_workers=1, micro_batch_size=None)
    jitter = AffineJitter(**vars(config.augmentation))
    data = TrainingData.load(plan.source, config, split, jitter=jitter, rank=0, device=torch.device("cpu"))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-4)
    schedule = LearningRate(peak=0.01, warmup_steps=2, schedule="cosine", max_steps=STEPS)
    average = {name: tensor.clone() for name, tensor in flow_map.state_dict().items()}
    history = []
    for step in range(STEPS):
        ((batch, noise),) = data.micro_batches(step)
        loss, terms = module(batch, noise, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, tensor in flow_map.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * tensor
        history.append([*terms[:3].tolist(), float(norm)])
    return {"history": history, "weights": dict(flow_map.state_dict()), "ema": average}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


@pytest.mark.parametrize(("stage", "world_size", "accumulation"), CASES)
def test_training_is_that_of_plain_pytorch_in_one_process(
    folder: Path, reference: dict[str, Any], stage: int, world_size: int, accumulation: int
) -> None:
    result = result_of(folder, stage, world_size, accumulation)
    history = [list(step.values()) for step in result["history"]]
    torch.testing.assert_close(torch.tensor(history), torch.tensor(reference["history"]), rtol=2e-5, atol=1e-6)
    assert list(result["history"][0]) == [
        "loss",
        "squared_error.diagonal",
        "squared_error.semigroup",
        "gradient_norm",
    ]
    assert_close(result["weights"], reference["weights"])
    assert_close(result["ema"], reference["ema"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_moving_average_is_sharded_and_reading_it_leaves_the_weights_alone(folder: Path, stage: int) -> None:
    whole = result_of(folder, stage, 1)
    halves = [result_of(folder, stage, 2, rank=rank) for rank in range(2)]
    assert whole["shards_untouched"]
    assert all(half["shards_untouched"] for half in halves)
    assert_same(halves[0]["ema"], halves[1]["ema"])
    for half in halves:
        share = half["shard_numel"] / whole["shard_numel"]
        assert share == 1.0 if stage == 0 else 0.5 <= share < 0.51


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder: Path, stage: int, world_size: int) -> None:
    result = result_of(folder, stage, world_size)
    assert result["resumed_at"] == RESUME_AT
    assert result["resumed_history"] == result["history"][RESUME_AT:]
    assert_same(result["resumed_weights"], result["weights"])
    assert_same(result["resumed_ema"], result["ema"])


@pytest.fixture(scope="module")
def moved(folder: Path) -> Path:
    make_moves(folder, MOVES)
    return folder


@pytest.fixture(scope="module")
def moved_everywhere(folder: Path) -> Path:
    make_moves(folder, EVERY_MOVE)
    return folder


def check_move(folder: Path, move: Move) -> None:
    """What was read is what was written, bit for bit; what follows is the undisturbed run's, to rounding."""
    result = torch.load(folder / f"{move}.pt", weights_only=True)
    undisturbed = result_of(folder, move.stage, move.world_size)
    assert result["resumed_at"] == RESUME_AT
    assert_same(result["ema_at_checkpoint"], undisturbed["ema_at_checkpoint"])
    written, again = (
        tensors_of(folder / name) for name in (f"stage-{move.stage}-of-{move.world_size}", f"again-{move}")
    )
    assert {name.partition("/")[0] for name in written} == {"weights", "exp_avg", "exp_avg_sq", "ema_0.9"}
    assert_same(again, written)
    actual, expected = (
        torch.tensor([list(step.values()) for step in history])
        for history in (result["history"], undisturbed["history"][RESUME_AT:])
    )
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)
    assert_close(result["weights"], undisturbed["weights"])
    assert_close(result["ema"], undisturbed["ema"])


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every kind of state of every parameter, flat and whole, and the optimiser's counters."""
    state = read_state(Storage(checkpoint))
    assert state.optimizer == {"step": RESUME_AT}
    assert state.ema_updates == RESUME_AT
    files = [name(rank) for rank in range(state.world_size) for name in (training_name, ema_name)]
    with PieceReader(Storage(checkpoint), files) as reader:
        kinds = ("weights", "exp_avg", "exp_avg_sq", ema_kind(0.9))
        return {
            f"{kind}/{name}": reader.read(kind, name, 0, math.prod(shape))
            for kind, (name, shape) in itertools.product(kinds, state.shapes.items())
        }


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_a_run_goes_on_with_another_stage_and_another_number_of_workers(moved: Path, move: Move) -> None:
    check_move(moved, move)


@pytest.mark.slow
@pytest.mark.parametrize("move", EVERY_MOVE, ids=str)
def test_a_run_goes_on_from_every_layout_with_every_other(moved_everywhere: Path, move: Move) -> None:
    check_move(moved_everywhere, move)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_averaged_model_of_any_checkpoint_reads_without_its_workers(
    folder: Path, stage: int, world_size: int
) -> None:
    found = read_checkpoint_model(folder / f"stage-{stage}-of-{world_size}")
    assert (found.state.step, found.state.stage, found.state.world_size) == (RESUME_AT, stage, world_size)
    assert_same(found.state_dict, result_of(folder, stage, world_size)["ema_at_checkpoint"])
    manifest = read_manifest(folder / "data")
    model = build_network(found.state.config["network"], space=manifest.space, num_classes=manifest.num_classes)
    model.load_state_dict(found.state_dict)


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
@pytest.mark.parametrize("pattern", ["training-rank-1.safetensors", "ema-rank-1.safetensors"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(
    folder: Path, tmp_path: Path, damage: str, pattern: str
) -> None:
    place = shutil.copytree(folder / "stage-2-of-2", tmp_path / "checkpoint")
    file = sorted(place.glob(pattern))[-1]
    content = bytearray(file.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        read_state(Storage(place))  # sizes are right; the hash is the worker's to check
    elif damage == "truncated":
        file.write_bytes(content[:-10])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        verify_rank(Storage(place), 1)
    if damage != "altered":
        with pytest.raises(CheckpointError, match=file.name):
            read_state(Storage(place))
