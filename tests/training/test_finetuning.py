"""The same fine-tuning, however it is shared out: workers, stages, micro-batches, a restart in the middle, and against
the equations written out in one process.

Two groups of processes (one and two workers, gloo) run every case; Ray is not needed here.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from mfm_ray.config import FinetuneConfig, load_config, to_dict
from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data.moments import data_moments
from mfm_ray.data.order import SampleOrder
from mfm_ray.data.shards import load_split, write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.finetuning import (
    METHODS,
    Anchors,
    DriftTargets,
    Tilt,
    TiltedChains,
    TuningMethod,
    build_method,
    regression_loss,
)
from mfm_ray.finetuning.targets import Drift
from mfm_ray.networks import build_network
from mfm_ray.noise import KeyedNoise, Noise, Stream
from mfm_ray.pretrained import load_flow_map, save_model
from mfm_ray.rewards import LinearGaussian
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training.finetuning import NORMALISER_ROWS, Finetuning, copy_of
from mfm_ray.training.loop import training_step
from mfm_ray.training.session import Plan, Training, set_up
from mfm_ray.training.snapshot import read_checkpoint, write_checkpoint
from mfm_ray.training.target_feed import TargetsError
from mfm_ray.training.zero import LearningRate

# no Ray here, but two groups of training processes: not what `make test-fast` is for
pytestmark = pytest.mark.ray

STEPS, RESUME_AT, ROWS = 5, 3, 16


@dataclass(frozen=True)
class Case:
    """One way to run the same fine-tuning; `same_as` is what its losses are compared with."""

    same_as: str = "written_out"
    stage: int = 1
    world_size: int = 1
    accumulation: int = 1
    method: str = "mfm_ft"
    baseline: str = "leave_one_out"
    from_model: bool = False
    start_steps: int = 0


CASES = {
    "one": Case(),
    "two": Case(world_size=2),
    "replicated": Case(world_size=2, stage=0, accumulation=2),
    "sharded": Case(world_size=2, stage=3, accumulation=2),
    "on_policy": Case(method="toy", stage=0, same_as="on_policy_sharded"),
    "on_policy_sharded": Case(method="toy", stage=3, world_size=2, accumulation=2, same_as="on_policy"),
    "model": Case(from_model=True, same_as="model_in_two"),
    "steered": Case(start_steps=3, baseline="anchored", same_as="steered_in_two"),
    "steered_in_two": Case(start_steps=3, baseline="anchored", world_size=2, accumulation=2, same_as="steered"),
    "model_in_two": Case(from_model=True, world_size=2, same_as="model"),
}
RESUMED = ("one", "two", "sharded")


class HalfWay(TuningMethod):
    """A toy that is on policy: half of the way from the tuned drift back to the frozen one."""

    on_policy = True
    anchors_are_data = True

    def targets(self, tilt: Tilt, anchors: Anchors, noise: Noise, *, drift: Drift | None = None) -> DriftTargets:
        assert drift is not None
        t = noise.fold_in(Stream.TIME).uniform()
        base = tilt.base_drift(anchors.x1, t, anchors.label)
        own = drift(anchors.x1, t, anchors.label)
        assert not own.requires_grad
        ones = torch.ones_like(t)
        return DriftTargets(anchors.x1, t, anchors.label, 0.5 * (base + own) + 1.0, ones, ones, ones)


def reward() -> LinearGaussian:
    return LinearGaussian(direction=torch.tensor([1.2, -0.8]), observation=-1.0, noise=1.5, name="line")


def broken_on_rank_1() -> Any:
    def broken(samples: Tensor) -> Tensor:
        fails = torch.distributed.get_rank() == 1 and len(samples) < 16  # not yet where log Z is estimated
        return samples.sum(1) * torch.nan if fails else samples.sum(1)

    return broken


def settings(case: Case, folder: Path) -> dict[str, Any]:
    words = [
        f"model={folder / 'base'}",
        "reward=brightness",  # names a reward; the task brings its own
        f"data.from_model={case.from_model}".lower(),
        "label_dropout=0.3",
        f"method.baseline={case.baseline}",
        f"method.estimator={'score' if case.baseline == 'anchored' else 'mixed'}",
        "anchors.chains=2",
        "anchors.restart=0.3",
        f"anchors.start_steps={case.start_steps}",
        "anchors.start_draws=2",
        f"global_batch_size={ROWS}",
        f"micro_batch_size={ROWS // case.world_size // case.accumulation}",
        f"max_steps={STEPS}",
        "warmup_steps=2",
        "gradient_clipping=0.5",
        "optimizer.learning_rate=0.01",
        "optimizer.eps=1e-4",  # Adam divides by tiny gradients otherwise, which blows rounding up
        "ema_decay=0.9",
        f"zero.stage={case.stage}",
        f"scaling.num_workers={case.world_size}",
    ]
    config = to_dict(load_config("finetune", words))
    return {**config, "method": config["method"] if case.method == "mfm_ft" else {"name": case.method}}


def plan_of(case: Case, folder: Path, make_reward: Any = reward) -> Plan:
    task = Finetuning(base=Storage(folder / "base"), base_sha256="0", make_reward=make_reward)
    data = None if case.from_model else Storage(folder / "data")
    run = Storage(folder / "run")
    return Plan(config=settings(case, folder), data=data, run=run, model={}, cuda=False, task=task)


def write_inputs(folder: Path) -> None:
    """90 labelled points in 2D, and a network with random weights that knows their moments."""
    points = torch.randn(90, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([2.0, 0.5]) + 1.0
    space = DataSpace("coordinates", (2,))
    split = Split(data=points, labels=torch.arange(90) % 3)
    write_shards(folder / "data", Dataset("points", space, {"train": split}, class_names=("a", "b", "c")))
    torch.manual_seed(0)
    base = build_network(
        {"name": "residual_mlp", "width": 24, "num_blocks": 2},
        space=space,
        num_classes=3,
        moments=data_moments(points.double()).preconditioning(),
    )
    with torch.no_grad():  # at initialisation its last layer is zero
        for parameter in base.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    described = {"name": "points", **space.config(), "num_classes": 3, "class_names": ["a", "b", "c"]}
    save_model(folder / "base", base, config={"data": described})


def steps(training: Training, first: int, last: int) -> list[dict[str, float]]:
    history = []
    for step in range(first, last):
        training_step(training, step)
        history.append(training.work.derived(training.window.flush()))
    return history


def full(training: Training, source: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in source.full_tensors(training.flow_map)}


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """Train to the end in one go; and again with a checkpoint, a new engine and the rest."""
    plan = plan_of(CASES[name], folder)
    training = set_up(plan)
    history = steps(training, 0, STEPS)
    training.feed.close()
    result = {
        "history": history,
        "weights": full(training, training.engine),
        "ema": full(training, training.ema),
        "chains": training.feed.state(),
    }
    if name in RESUMED:
        result |= run_interrupted(plan, folder / f"checkpoint-{name}")
    return result


def run_interrupted(plan: Plan, folder: Path) -> dict[str, Any]:
    first = set_up(plan)
    steps(first, 0, RESUME_AT)
    write_checkpoint(first, Storage(folder), done=RESUME_AT, figures={"loss": 1.0})
    first.feed.close()
    torch.distributed.barrier()
    return go_on(plan, folder)


def go_on(plan: Plan, folder: Path) -> dict[str, Any]:
    second = set_up(plan)
    done = read_checkpoint(second, Storage(folder))
    history = steps(second, done, STEPS)
    second.feed.close()
    return {
        "resumed_history": history,
        "resumed_ema": full(second, second.ema),
        "resumed_chains": second.feed.state(),
    }


def run_broken(folder: Path) -> str:
    training = set_up(plan_of(CASES["two"], folder, broken_on_rank_1))
    try:
        training.feed.take(0)
    except TargetsError as error:
        return str(error)
    finally:
        training.feed.close()
    return "no error"


def worker(rank: int, world_size: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    METHODS["toy"] = HalfWay
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in address.items()})
    store = f"file://{folder}/store-{world_size}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    results = {name: run_case(name, Path(folder)) for name, case in CASES.items() if case.world_size == world_size}
    if world_size == 2:
        results["broken"] = run_broken(Path(folder))
    else:
        results["moved"] = go_on(plan_of(CASES["one"], Path(folder)), Path(folder) / "checkpoint-two")
    torch.save(results, Path(folder) / f"{world_size}-rank-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finetuning")
    write_inputs(place)
    for size in (2, 1):  # one worker goes on from a checkpoint of two
        torch.multiprocessing.spawn(worker, (size, str(place)), nprocs=size)
    return place


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every rank left, by case."""
    found: dict[str, list[dict[str, Any]]] = {"written_out": [written_out(folder)]}
    for size in (1, 2):
        ranks = [torch.load(folder / f"{size}-rank-{rank}.pt", weights_only=True) for rank in range(size)]
        found |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    return found


def written_out(folder: Path) -> dict[str, Any]:
    """Anchors, targets, regression in one process, without DeepSpeed: what every case must agree with."""
    config = from_dict(FinetuneConfig, settings(Case(), folder))
    rows, space = load_split(folder / "data", "train"), DataSpace("coordinates", (2,))
    base = load_flow_map(folder / "base")
    tuned = copy_of(base)
    tilt = Tilt(base, reward()).with_normaliser(space.to_model_space(rows.data[:NORMALISER_ROWS]))
    method, order = build_method(config.method), SampleOrder(num_rows=90, seed=0, global_batch_size=ROWS)
    chains = TiltedChains(rows=ROWS, event_shape=(2,), chains=2, restart=config.anchors.restart)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-4)
    schedule = LearningRate(peak=0.01, warmup_steps=2, schedule="cosine", max_steps=STEPS)
    history = []
    for step in range(STEPS):
        index = order.rows(step, 0, 1)
        noise = KeyedNoise.for_rows(0, torch.arange(ROWS)).fold_in(step)
        null = noise.fold_in(Stream.LABEL).uniform() < 0.3
        label = torch.where(null, 3, rows.labels[index])
        anchors = chains.anchors(tilt, space.to_model_space(rows.data[index]), label, noise, step)
        targets = method.targets(tilt, anchors, noise)
        chains.advance(targets, step)
        loss = regression_loss(tuned.drift(targets.x_t, targets.t, label=targets.label), targets).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(tuned.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        weight = targets.weight
        history.append(
            {
                "loss": float(loss.detach()),
                "reward": float(targets.reward.mean()),
                "reward.anchors": float(anchors.reward.mean()),
                "draws.effective_share": float(targets.effective_share.mean()),
                "weights.mean": float(weight.mean()),
                "weights.effective_share": float(weight.sum() ** 2 / (ROWS * weight.square().sum())),
                "gradient_norm": float(norm),
            }
        )
    return {"history": history, "weights": dict(tuned.state_dict()), "chains": chains.state()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_do_not_depend_on_how_the_work_is_shared_out(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    expected, (actual, *others) = results[CASES[name].same_as][0], results[name]
    columns = [column for column in expected["history"][0] if column in actual["history"][0]]
    assert {"loss", "reward", "gradient_norm", "weights.effective_share"} <= set(columns)
    for column in columns:
        pair = [torch.tensor([line[column] for line in result["history"]]) for result in (actual, expected)]
        torch.testing.assert_close(*pair, rtol=3e-5, atol=1e-6, msg=lambda m, c=column: f"{c}: {m}")
    for key, tensor in expected["weights"].items():
        torch.testing.assert_close(actual["weights"][key], tensor, rtol=1e-4, atol=3e-6)
    assert all(other["history"] == actual["history"] for other in others)


@pytest.mark.parametrize("name", CASES)
def test_the_chains_are_the_same_to_the_bit_whoever_holds_them(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    held, expected = (
        {part: torch.cat([rank["chains"][part] for rank in results[case]], dim=1) for part in ("x1", "label", "reward")}
        for case in (name, CASES[name].same_as)
    )
    for part, whole in expected.items():
        assert torch.equal(held[part].nan_to_num(), whole.nan_to_num()), part


def test_one_worker_goes_on_with_the_chains_of_two(results: dict[str, list[dict[str, Any]]]) -> None:
    (moved,), (whole,) = results["moved"], results["one"]
    actual, expected = (
        torch.tensor([list(step.values()) for step in history])
        for history in (moved["resumed_history"], whole["history"][RESUME_AT:])
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for key, tensor in whole["chains"].items():
        torch.testing.assert_close(moved["resumed_chains"][key], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for rank in results[name]:
        assert rank["resumed_history"] == rank["history"][RESUME_AT:]
        for key, tensor in rank["ema"].items():
            assert torch.equal(rank["resumed_ema"][key], tensor), key
        for key, tensor in rank["chains"].items():
            assert torch.equal(rank["resumed_chains"][key].nan_to_num(), tensor.nan_to_num()), key


def test_a_reward_that_fails_on_one_worker_ends_all_of_them_with_its_name(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    assert results["broken"] == ["reward function: returned NaN or infinity for a batch of 8 samples"] * 2
