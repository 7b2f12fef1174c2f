"""What training costs: tangents, the engine around the loop, a second worker, and the bytes of each ZeRO stage.

    python -m benchmarks.training [tangents] [engine] [bytes] [--rounds 7]

All three parts by default, about a quarter of an hour on two cores; writes benchmarks/results/training.md. Every figure
is a ratio of medians over alternating runs on this machine, with the quartiles beside it. Threads: one a process.
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
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from benchmarks.on_device.workloads import attention_as
from mfm_ray.config import TrainConfig, load_config, to_dict
from mfm_ray.data import Batch, SampleOrder, data_moments, digits
from mfm_ray.data.shards import write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import build_network
from mfm_ray.networks.attention import written_out_attention
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import Objective, Tangent, TrainingStates, named_objective
from mfm_ray.objectives.conditions import average_velocity
from mfm_ray.settings import from_dict
from mfm_ray.storage import Storage
from mfm_ray.training.loss_module import LossModule
from mfm_ray.training.session import Plan, Training, keep_freed_memory, set_up

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "training.md"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


# ---- tangents -------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[DataSpace, dict[str, Any], int]] = {  # space, network, rows
    "transformer, 6 blocks of 192": (
        DataSpace("image", (4, 16, 16)),
        {"name": "dit", "patch_size": 2, "hidden_size": 192, "depth": 6, "num_heads": 4, "encoder_depth": 4},
        8,
    ),
    "residual MLP, 4 blocks of 512": (
        DataSpace("image", (1, 8, 8)),
        {"name": "residual_mlp", "width": 512, "num_blocks": 4},
        512,
    ),
    "UNet for 28x28": (
        DataSpace("image", (1, 28, 28)),
        {
            "name": "unet",
            "base_width": 64,
            "channel_multipliers": [1, 2],
            "blocks_per_level": 1,
            "attention_levels": [1],
            "num_heads": 4,
            "patch_size": 2,
            "condition_width": 128,
        },
        32,
    ),
}


class RecordedTangent(Tangent):
    """The straightforward form: one torch.func.jvp in grad mode, its graph kept until the backward pass is over."""

    def __init__(self) -> None:
        super().__init__("exact")
        self.kept: list[Tensor] = []

    def __call__(
        self,
        flow_map: FlowMap,
        states: TrainingStates,
        point: tuple[Tensor, Tensor, Tensor],
        directions: tuple[Tensor, Tensor, Tensor],
        *,
        differentiable: bool = False,
    ) -> tuple[Tensor, Tensor]:
        with attention_as(written_out_attention):
            value, tangent = torch.func.jvp(average_velocity(flow_map, states), point, directions)
        self.kept = [value, tangent]
        return value, tangent.detach()


def tangents(rounds: int) -> str:
    """Time and peak memory of a step (both terms, forward and backward) against the straightforward form."""
    lines = [
        "| network | objective | seconds | time, ratio | peak memory, ratio | consistency term alone: time, memory |",
        "|---|---|---|---|---|---|",
    ]
    for title, (space, network, rows) in NETWORKS.items():
        flow_map = _network(space, network)
        for name in ("eulerian", "mean_flow"):
            step, alone = (_compare(flow_map, name, rows, rounds, whole=whole) for whole in (True, False))
            line = (
                f"| {title}, {rows} rows | {name} | {step.seconds:.3f} | {step.time} | {step.memory:.2f} "
                f"| {alone.time.median:.2f}, {alone.memory:.2f} |"
            )
            lines.append(line)
            print(line, flush=True)
    return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    seconds: float
    time: Spread
    memory: float


def _network(space: DataSpace, network: dict[str, Any]) -> FlowMap:
    torch.manual_seed(0)
    flow_map = build_network(network, space=space)
    for parameter in flow_map.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return flow_map


def _compare(flow_map: FlowMap, name: str, rows: int, rounds: int, *, whole: bool) -> Comparison:
    """This library's tangent over the straightforward one: ratios of alternating steps, and of their peaks."""
    batch = Batch(torch.randn(rows, *flow_map.event_shape), None, torch.arange(rows))
    noise = KeyedNoise.for_rows(0, batch.rows)
    straight = named_objective(name)
    straight.terms[1].term.tangent = RecordedTangent()  # type: ignore[attr-defined]
    objectives = {"riding": named_objective(name), "straight": straight}
    if not whole:
        objectives = {key: Objective(value.terms[1:], times=value.times) for key, value in objectives.items()}
    seconds: dict[str, list[float]] = {key: [] for key in objectives}
    for turn in range(rounds + 1):
        for key, objective in objectives.items():
            began = time.perf_counter()
            _step(flow_map, objective, batch, noise)
            if turn:  # the first warms up
                seconds[key].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(seconds["riding"], seconds["straight"], strict=True)]
    peaks = {
        key: _peak_bytes(lambda o=objective: _step(flow_map, o, batch, noise)) for key, objective in objectives.items()
    }
    return Comparison(statistics.median(seconds["riding"]), Spread.of(ratios), peaks["riding"] / peaks["straight"])


def _step(flow_map: FlowMap, objective: Objective, batch: Batch, noise: KeyedNoise) -> None:
    for parameter in flow_map.parameters():
        parameter.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        objective(flow_map, batch, noise=noise).total.mean().backward()


def _peak_bytes(run: Callable[[], None]) -> int:
    """Most bytes of tensors alive at once that `run` allocated, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


# ---- engine ---------------------------------------------------------------------------------------------------------

ENGINE_WORDS = [
    "experiment=digits",
    "network.width=512",
    "augmentation.rate=0",
    "precision=fp32",
    "zero.stage=1",
    "max_steps=40",
    "log_every=5",
    "checkpoint_every=40",
    "sample_every=0",
    "classifier_steps=0",
]
ROWS_PER_WORKER = 512


def engine(rounds: int) -> str:
    """Seconds a step through Ray Train and DeepSpeed against the bare loop, and images a second of two workers."""
    seconds: dict[str, list[float]] = {"bare": [], "one": [], "two": []}
    for turn in range(rounds):
        seconds["bare"].append(_run_bare())
        seconds["one"].append(_run_ray(1))
        seconds["two"].append(_run_ray(2))
        print(
            f"round {turn + 1}: " + ", ".join(f"{key} {value[-1]:.3f} s" for key, value in seconds.items()), flush=True
        )
    overhead = [one / bare for one, bare in zip(seconds["one"], seconds["bare"], strict=True)]
    scaling = [2 * one / two for one, two in zip(seconds["one"], seconds["two"], strict=True)]
    return "\n".join(
        [
            "| what | seconds a step | ratio |",
            "|---|---|---|",
            f"| bare loop, {ROWS_PER_WORKER} rows | {statistics.median(seconds['bare']):.3f} | |",
            f"| Ray Train + DeepSpeed (stage 1), one worker, {ROWS_PER_WORKER} rows | "
            f"{statistics.median(seconds['one']):.3f} | {Spread.of(overhead)} of the bare loop's time |",
            f"| the same, two workers, {2 * ROWS_PER_WORKER} rows | "
            f"{statistics.median(seconds['two']):.3f} | {Spread.of(scaling)} times the images a second |",
        ]
    )


def _run_ray(workers: int) -> float:
    """Median seconds a step of a training job, over its lines of metrics; a process of its own."""
    with tempfile.TemporaryDirectory() as storage:
        words = [
            *ENGINE_WORDS,
            f"scaling.num_workers={workers}",
            f"global_batch_size={workers * ROWS_PER_WORKER}",
            f"storage={storage}",
        ]
        _call([sys.executable, "-m", "jobs.train", *words])
        text = (Path(storage) / "digits" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    rows = workers * ROWS_PER_WORKER
    return statistics.median(rows / line["images_per_second"] for line in lines[1:])


def _run_bare() -> float:
    return float(_call([sys.executable, "-m", "benchmarks.training", "--bare"]).splitlines()[-1])


def _call(command: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def bare_loop() -> float:
    """Median seconds a step of the same network, loss, data, clipping, optimiser and average in one plain loop."""
    torch.set_num_threads(1)
    keep_freed_memory()  # both sides get the allocator's setting
    config = from_dict(TrainConfig, to_dict(load_config("train", ENGINE_WORDS)))
    data = digits()
    rows = data.splits["train"]
    moments = data_moments(data.space.to_model_space(rows.data).flatten(1)).preconditioning()
    torch.manual_seed(0)
    flow_map = build_network(config.network, space=data.space, num_classes=10, moments=moments)
    module = LossModule(flow_map, named_objective("semigroup", label_dropout=0.7), precision="fp32")
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
    average = [parameter.detach().clone() for parameter in module.parameters()]
    order = SampleOrder(num_rows=len(rows), seed=0, global_batch_size=ROWS_PER_WORKER)
    times = []
    for step in range(config.max_steps):
        began = time.perf_counter()
        index, positions = order.rows(step), torch.arange(ROWS_PER_WORKER)
        batch = Batch(data.space.to_model_space(rows.data[index]), rows.labels[index], positions)
        loss = module(batch, KeyedNoise.for_rows(0, positions).fold_in(step), step)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in module.parameters()], 0.001)
        times.append(time.perf_counter() - began)
    return statistics.median(times[10:])


# ---- bytes ----------------------------------------------------------------------------------------------------------

WORLD_SIZE = 2
# float32 copies of the parameters a worker holds: kept whole, and shared out over the workers
THEORY = {0: (5.0, 0.0), 1: (2.0, 4.0), 2: (1.0, 5.0), 3: (0.0, 6.0)}


def bytes_by_stage(rounds: int) -> str:
    """Bytes of parameter, gradient, optimiser and average tensors of one of two workers, between backward and step."""
    del rounds  # nothing here is random
    lines = [
        "| stage | parameters | gradients | optimiser | average | together, copies | theory | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_bytes_worker, (folder,), nprocs=WORLD_SIZE)
        for stage, (whole, shared) in THEORY.items():
            found = json.loads((Path(folder) / f"{stage}.json").read_text())
            together, expected = sum(found.values()), whole + shared / WORLD_SIZE
            cells = " | ".join(f"{found[key]:.2f}" for key in ("parameters", "gradients", "optimiser", "average"))
            lines.append(f"| {stage} | {cells} | {together:.2f} | {expected:.2f} | {together / expected:.2f} |")
    print("\n".join(lines), flush=True)
    return "\n".join(lines)


def _bytes_worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), LOCAL_WORLD_SIZE=str(WORLD_SIZE)
    )
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    data = Path(folder) / "data"
    if rank == 0:
        write_shards(data, digits())
    torch.distributed.barrier()
    for stage in THEORY:
        words = [*ENGINE_WORDS, f"zero.stage={stage}", "global_batch_size=16"]
        config = to_dict(load_config("train", words))
        training = set_up(
            Plan(config=config, data=Storage(data), run=Storage(Path(folder) / "run"), model={}, cuda=False)
        )
        for step in range(2):
            for batch, noise in training.data.micro_batches(step):
                loss, _ = training.engine.forward(batch, noise, step)
                training.engine.backward(loss)
                if step == 0:
                    training.engine.step(training.learning_rate(step))
                    training.ema.update()
        if rank == 0:
            count = sum(getattr(p, "ds_numel", p.numel()) for p in training.engine.module.parameters())
            found = {key: _bytes(tensors) / 4 / count for key, tensors in _tensors(training).items()}
            (Path(folder) / f"{stage}.json").write_text(json.dumps(found))
        torch.distributed.barrier()


def _bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(training: Training) -> dict[str, list[Tensor]]:
    """What the engine holds, by kind. At stage 0 the parameters are their own master weights."""
    engine = training.engine._engine
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    for group in getattr(optimizer, "averaged_gradients", {}).values():
        gradients += [tensor for tensor in group or [] if tensor is not None]
    gradients += [buffer for buffer in [getattr(optimizer, "grad_partitions_flat_buffer", None)] if buffer is not None]
    state = getattr(optimizer, "optimizer", optimizer).state
    moments = [tensor for entry in state.values() for tensor in entry.values() if isinstance(tensor, Tensor)]
    masters = training.engine.fp32_shards() if training.engine.stage > 0 else []
    return {
        "parameters": [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")],
        "gradients": gradients,
        "optimiser": masters + moments,
        "average": [tensor for averages in training.ema._averages.values() for tensor in averages],
    }


PARTS: dict[str, Callable[[int], str]] = {"tangents": tangents, "engine": engine, "bytes": bytes_by_stage}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=7, help="alternating repeats of each measurement")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.bare:
        print(bare_loop())
        return
    chosen = given.parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"part={sorted(unknown)[0]}: expected one of {', '.join(PARTS)}")
    write({part: PARTS[part](given.rounds) for part in chosen})


def write(tables: dict[str, str]) -> None:
    """Replace the parts that were measured; keep the others."""
    kept = _sections(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, {platform.machine()}"
    for part, table in tables.items():
        kept[part] = f"`python -m benchmarks.training {part}` on {machine}.\n\n{table}\n"
    RESULTS.parent.mkdir(exist_ok=True)
    ordered = [f"## {part}\n\n{kept[part]}" for part in PARTS if part in kept]
    RESULTS.write_text("# What training costs\n\n" + "\n".join(ordered))
    print(RESULTS)


def _sections(text: str) -> dict[str, str]:
    found = {}
    for block in text.split("\n## ")[1:]:
        title, _, body = block.partition("\n\n")
        found[title.strip()] = body.rstrip("\n") + "\n"
    return found


if __name__ == "__main__":
    main()
