"""Every objective at every ZeRO stage is the mathematics of one process: losses, gradients, weights after three steps.

One group of processes for each (stage, workers) runs all its cases on the real engine; the reference is plain PyTorch
with the same loss module, in float32. `make test` runs a cut through the matrix, `make test-all` all of it.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from mfm_ray.config import TrainConfig, load_config, to_dict
from mfm_ray.data.augment import AffineJitter
from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data.shards import read_manifest, write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.objectives import OBJECTIVES, build_objective
from mfm_ray.pretrained import save_model
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training import pretraining, session
from mfm_ray.training.feed import TrainingData
from mfm_ray.training.launch import model_config
from mfm_ray.training.loss_module import LossModule
from mfm_ray.training.pretraining import Pretraining, build_flow_map
from mfm_ray.training.session import Plan, set_up
from mfm_ray.training.teacher import load_teacher, teacher_location
from mfm_ray.training.zero import LearningRate, split_batch, zero_config

pytestmark = pytest.mark.ray  # no Ray, but groups of training processes

STEPS, ROWS = 3, 16
STAGES, WORLD_SIZES, ACCUMULATIONS = (0, 1, 2, 3), (1, 2), (1, 2)
GROUPS = [(stage, world_size) for stage in STAGES for world_size in WORLD_SIZES]
# one group of two workers at the stage that shards most, and one of one worker at the stage that shards least
IN_EVERY_RUN = [(3, 2), (0, 1)]
# (relative to the largest element, absolute) of gradients and weights
# differences divide rounding by the step of 1e-3
TOLERANCES = {"fp32": (2e-4, 2e-6), "bf16": (6e-2, 2e-3), "differences": (2e-3, 1e-4)}


@dataclass(frozen=True)
class Case:
    objective: str
    network: str = "residual_mlp"
    accumulation: int = 1
    precision: str = "fp32"
    words: tuple[str, ...] = ()

    @property
    def tolerances(self) -> tuple[float, float]:
        by_differences = "objective.tangent=finite_difference" in self.words
        return TOLERANCES["differences" if by_differences else self.precision]

    def __str__(self) -> str:
        extra = "-".join(word.split("=")[-1] for word in self.words)
        return f"{self.objective}-{self.network}-{self.accumulation}-{self.precision}{'-' if extra else ''}{extra}"


CASES = [
    *(Case(name, accumulation=accumulation) for name in sorted(OBJECTIVES) for accumulation in ACCUMULATIONS),
    *(Case(name, precision="bf16") for name in sorted(OBJECTIVES)),
    *(Case(name, network="dit") for name in ("eulerian", "lagrangian_teacher", "semigroup")),
    *(
        Case(name, network="dit", words=("activation_checkpointing=true",))
        for name in ("eulerian", "lagrangian_teacher", "semigroup")
    ),
    Case("semigroup", words=("objective.diagonal_weighting.name=learned",)),
    Case("eulerian_teacher", words=("objective.teacher_guidance=plain", "objective.diagonal=teacher")),
    Case("eulerian", words=("objective.tangent=finite_difference",)),
]
NETWORKS: dict[str, dict[str, Any]] = {
    "residual_mlp": {"name": "residual_mlp", "width": 24, "num_blocks": 2, "cfg_scales": [2.5]},
    "dit": {
        "name": "dit",
        "patch_size": 2,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "encoder_depth": 1,
        "cfg_scales": [2.5],
    },
}
DATA = {"residual_mlp": DataSpace("coordinates", (2,)), "dit": DataSpace("image", (1, 4, 4))}


def settings(case: Case, folder: Path, stage: int = 0, world_size: int = 1) -> dict[str, Any]:
    teacher = case.objective.endswith("_teacher")
    words = [
        "experiment=gmm",
        f"objective={case.objective}",
        *([f"objective.teacher={folder / 'teacher' / case.network}"] if teacher else []),
        "objective.label_dropout=0.3",
        "objective.max_time=0.9",
        f"global_batch_size={ROWS}",
        f"micro_batch_size={ROWS // world_size // case.accumulation}",
        f"max_steps={STEPS}",
        "warmup_steps=2",
        "gradient_clipping=0",
        "optimizer.learning_rate=0.01",
        "optimizer.eps=1e-2",  # Adam divides by tiny gradients otherwise, which blows rounding up
        f"precision={case.precision}",
        f"zero.stage={stage}",
        f"scaling.num_workers={world_size}",
        *case.words,
    ]
    return {**to_dict(load_config("train", words)), "network": NETWORKS[case.network]}


def plan_of(config: dict[str, Any], folder: Path) -> Plan:
    data = Storage(folder / "data" / config["network"]["name"])
    teacher = teacher_location(config["objective"])
    return Plan(
        config=config, data=data, run=Storage(folder / "run"), model={}, cuda=False, task=Pretraining(teacher=teacher)
    )


def write_data(folder: Path) -> None:
    """90 labelled rows for each kind of network, and a teacher with random weights for each."""
    generator = torch.Generator().manual_seed(1)
    for name, space in DATA.items():
        rows = 0.5 + 0.2 * torch.randn(90, *space.event_shape, generator=generator)
        split = Split(data=rows.clamp(0, 1), labels=torch.arange(90) % 3)
        write_shards(folder / "data" / name, Dataset(name, space, {"train": split}, class_names=("a", "b", "c")))
        config = from_dict(TrainConfig, settings(Case("semigroup", network=name), folder))
        manifest = read_manifest(folder / "data" / name)
        torch.manual_seed(7)
        teacher = build_network(config.network, space=manifest.space, num_classes=manifest.num_classes)
        perturb(teacher)
        save_model(folder / "teacher" / name, teacher, config=model_config(config, manifest))


def perturb(module: torch.nn.Module) -> None:
    """Weights away from their zero initialisation, the same ones everywhere."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def perturbed_flow_map(plan: Plan, config: TrainConfig) -> FlowMap:
    flow_map = build_flow_map(plan, config)
    perturb(flow_map)
    return flow_map


def nothing_stays_whole(**arguments: Any) -> dict[str, Any]:
    """Stage 3 keeps small parameters on every rank, and all of these are small: shard them too."""
    config = zero_config(**arguments)
    if arguments["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def run_case(case: Case, folder: Path, stage: int, world_size: int) -> dict[str, Any]:
    """Three steps on the sharded engine: global losses, full gradients by parameter, weights."""
    training = set_up(plan_of(settings(case, folder, stage, world_size), folder))
    engine, losses, gradients = training.engine, [], []
    for step in range(STEPS):
        mean = torch.zeros(())
        for batch, noise in training.data.micro_batches(step):
            loss, _ = engine.forward(batch, noise, step)
            engine.backward(loss)
            mean += loss.detach() / case.accumulation / world_size
            if engine._engine.is_gradient_accumulation_boundary():
                gradients.append(full_gradients(engine.module))
            engine.step(training.learning_rate(step))
        torch.distributed.all_reduce(mean)
        losses.append(float(mean))
    weights = {name: tensor.clone() for name, tensor in engine.full_tensors(engine.module)}
    return {"losses": losses, "gradients": gradients, "weights": weights}


def full_gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    found = {name: safe_get_full_grad(parameter) for name, parameter in module.named_parameters()}
    return {name: gradient.detach().float().clone() for name, gradient in found.items() if gradient is not None}


def run_reference(case: Case, folder: Path) -> dict[str, Any]:
    """The same in plain PyTorch: one process, whole batches, float32."""
    config = from_dict(TrainConfig, settings(dataclasses.replace(case, accumulation=1, precision="fp32"), folder))
    plan = plan_of(to_dict(config), folder)
    assert isinstance(plan.task, Pretraining)
    teacher = load_teacher(plan.task.teacher, precision="fp32", device=torch.device("cpu"))
    objective = build_objective(config.objective, teacher=teacher)
    module = LossModule(perturbed_flow_map(plan, config), objective, precision="fp32")
    split = split_batch(ROWS, num_workers=1, micro_batch_size=None)
    jitter = AffineJitter(**vars(config.augmentation))
    data = TrainingData.load(plan.source, config, split, jitter=jitter, rank=0, device=torch.device("cpu"))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-2)
    schedule = LearningRate(peak=0.01, warmup_steps=2, schedule="cosine", max_steps=STEPS)
    losses, gradients = [], []
    for step in range(STEPS):
        ((batch, noise),) = data.micro_batches(step)
        optimizer.zero_grad()
        loss, _ = module(batch, noise, step)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
    return {"losses": losses, "gradients": gradients, "weights": dict(module.state_dict())}


def worker(rank: int, stage: int, world_size: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    pretraining.build_flow_map = perturbed_flow_map
    session.zero_config = nothing_stays_whole
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in address.items()})
    store = f"file://{folder}/store-{stage}-{world_size}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    results = {str(case): run_case(case, Path(folder), stage, world_size) for case in CASES}
    if rank == 0:
        torch.save(results, Path(folder) / f"{stage}-{world_size}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("matrix")
    write_data(place)
    return place


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, dict[str, Any]]:
    return {str(case): run_reference(case, folder) for case in CASES}


@pytest.fixture(scope="module")
def group_of(folder: Path) -> Callable[[int, int], dict[str, dict[str, Any]]]:
    """Results of a group of processes by case; the group runs when it is first asked for."""

    def run(stage: int, world_size: int) -> dict[str, dict[str, Any]]:
        file = folder / f"{stage}-{world_size}.pt"
        if not file.exists():
            torch.multiprocessing.spawn(worker, (stage, world_size, str(folder)), nprocs=world_size)
        return torch.load(file, weights_only=True)

    return run


COMPILED = {
    0: Case("semigroup", network="dit", words=("execution=compiled",)),
    1: Case("eulerian_teacher", network="dit", words=("execution=compiled", "activation_checkpointing=true")),
    2: Case("semigroup", network="dit", words=("execution=compiled",)),
}
"""By the stage: those that may compile."""


def compiled_worker(rank: int, folder: str) -> None:
    """A group of one, of one stage after the other."""
    warnings.simplefilter("ignore")
    pretraining.build_flow_map = perturbed_flow_map
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store-compiled", rank=0, world_size=1)
    for stage, case in COMPILED.items():
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        result = run_case(case, Path(folder), stage, 1)
        result["programs"] = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch.save(result, Path(folder) / f"compiled-{stage}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_network_trains_as_it_stands(folder: Path) -> None:
    torch.multiprocessing.spawn(compiled_worker, (str(folder),), nprocs=1)
    expected = {case: run_reference(case, folder) for case in set(COMPILED.values())}
    for stage, case in COMPILED.items():
        result = torch.load(folder / f"compiled-{stage}.pt", weights_only=True)
        assert result["programs"] > 0
        for step in range(STEPS):
            assert_near(result["gradients"][step], expected[case]["gradients"][step], case.tolerances)
        assert_near(result["weights"], expected[case]["weights"], case.tolerances)


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerances: tuple[float, float]) -> None:
    relative, absolute = tolerances
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        error, scale = (actual[name] - tensor).abs().max(), tensor.abs().max()
        assert error <= relative * scale + absolute, f"{name}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize(
    ("stage", "world_size"),
    [pytest.param(*group, marks=[] if group in IN_EVERY_RUN else pytest.mark.slow) for group in GROUPS],
)
def test_every_objective_is_that_of_one_process(
    group_of: Callable[[int, int], dict[str, dict[str, Any]]],
    references: dict[str, dict[str, Any]],
    stage: int,
    world_size: int,
    subtests: pytest.Subtests,
) -> None:
    results = group_of(stage, world_size)
    for case in CASES:
        with subtests.test(case=str(case)):
            result, reference = results[str(case)], references[str(case)]
            relative = case.tolerances[0]
            torch.testing.assert_close(
                torch.tensor(result["losses"]), torch.tensor(reference["losses"]), rtol=relative, atol=1e-6
            )
            for step in range(STEPS):
                assert_near(result["gradients"][step], reference["gradients"][step], case.tolerances)
            assert_near(result["weights"], reference["weights"], case.tolerances)


def test_the_matrix_has_every_objective_stage_worker_count_and_accumulation() -> None:
    plain = {(case.objective, case.accumulation) for case in CASES if case.network == "residual_mlp" and not case.words}
    assert plain == {(name, accumulation) for name in OBJECTIVES for accumulation in ACCUMULATIONS}
    assert {case.objective for case in CASES if case.precision == "bf16"} == set(OBJECTIVES)
