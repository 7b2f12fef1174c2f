"""The arithmetic of docs/scaling.md against network, autograd and engine: what they hold and send at toy size."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from mfm_ray.config import load_config, to_dict
from mfm_ray.data.datasets import digits
from mfm_ray.data.shards import write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.networks.dit import DiTFlowMap
from mfm_ray.networks.flops import forward_flops
from mfm_ray.objectives import named_objective
from mfm_ray.storage import Storage
from mfm_ray.training.footprint import ACTIVATION_BYTES, SEMIGROUP, DiT, Layout, sent, state_memory
from mfm_ray.training.session import Plan, set_up

WORKERS = 2
WORDS = [
    "experiment=digits",
    "network.width=512",
    "augmentation.rate=0",
    "precision=fp32",
    "global_batch_size=16",
    "micro_batch_size=4",
    "max_steps=4",
]
MICRO_STEPS = 2


def network(width: int, depth: int, *, size: int = 16) -> DiTFlowMap:
    return DiTFlowMap(
        space=DataSpace("image", (4, size, size)),
        patch_size=2,
        hidden_size=width,
        depth=depth,
        num_heads=4,
        encoder_depth=1,
        num_classes=10,
        cfg_scales=[2.5],
    )


@pytest.mark.parametrize(("width", "depth", "size"), [(32, 1, 8), (64, 3, 16)])
def test_parameters_and_flops_are_those_of_the_network(width: int, depth: int, size: int) -> None:
    shape = DiT(width=width, depth=depth, num_heads=4, size=size, num_classes=10)
    real = network(width, depth, size=size)
    assert shape.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert shape.forward_flops == forward_flops(real)


def test_the_objective_s_passes_are_those_it_declares() -> None:
    terms = named_objective("semigroup").terms
    assert sum(weighted.term.forward_units for weighted in terms) == SEMIGROUP.forward_units
    assert SEMIGROUP.forward_units == SEMIGROUP.calls + 2 * SEMIGROUP.gradient_calls


def test_activations_are_what_autograd_keeps_under_autocast() -> None:
    def kept(depth: int, rows: int) -> int:
        """Bytes of storages that are not weights."""
        flow_map = network(64, depth)
        weights = {parameter.untyped_storage().data_ptr() for parameter in flow_map.parameters()}
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x, time = torch.randn(rows, 4, 16, 16), torch.full((rows,), 0.5)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            flow_map.velocity(x, time, time, t=time, x_t=x, label=torch.zeros(rows, dtype=torch.int64))
        return sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in weights)

    tokens, width = 64, 64
    # differences: of one block, and of two rows, so that the bfloat16 copies of weights and all else drop out
    a_block_and_two_rows = (kept(2, 4) - kept(1, 4)) - (kept(2, 2) - kept(1, 2))
    assert a_block_and_two_rows / (2 * tokens * width) == pytest.approx(ACTIVATION_BYTES, rel=0.03)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("footprint")
    write_shards(folder / "data", digits())
    torch.multiprocessing.spawn(_worker, (str(folder),), nprocs=WORKERS)
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.ray
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_state_of_a_worker_is_what_the_engine_holds(measured: dict[str, Any], stage: int) -> None:
    found, count = measured["state"][str(stage)], measured["parameters"]
    expected = state_memory(count, Layout(stage=stage, gpus=WORKERS, rows=4, micro_steps=MICRO_STEPS))
    print(stage, {k: v / 4 / count for k, v in found.items()}, expected.state / 4 / count)
    assert sum(found.values()) == pytest.approx(expected.state, rel=0.15)


@pytest.mark.ray
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_worker_sends_is_what_goes_through_its_collectives(measured: dict[str, Any], stage: int) -> None:
    found, count = measured["sent"][str(stage)], measured["parameters"]
    expected = sent(count, SEMIGROUP, Layout(stage=stage, gpus=WORKERS, rows=4, micro_steps=MICRO_STEPS))
    print(stage, {k: v / 4 / count for k, v in found.items()}, expected / 4 / count)
    assert sum(found.values()) == pytest.approx(expected, rel=0.1)


def _worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORKERS), LOCAL_WORLD_SIZE=str(WORKERS))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    result: dict[str, Any] = {"state": {}, "sent": {}}
    counter = CollectiveCounter()  # before DeepSpeed looks the functions up
    for stage in (0, 1, 2, 3):
        config = to_dict(load_config("train", [*WORDS, f"zero.stage={stage}"]))
        plan = Plan(config=config, data=Storage(f"{folder}/data"), run=Storage(f"{folder}/run"), model={}, cuda=False)
        training = set_up(plan)
        engine = training.engine
        for step in range(2):
            counter.sent = {}
            for i, batch in enumerate(training.data.micro_batches(step)):
                loss, _ = engine.forward(*batch, step)
                engine.backward(loss)
                if i == MICRO_STEPS - 1:
                    result["state"][stage] = held(training)
                engine.step(training.learning_rate(step))
            result["sent"][stage] = dict(counter.sent)
            training.ema.update()
        result["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    if rank == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(result))
    torch.distributed.barrier()


class CollectiveCounter:
    """Puts itself around the collectives and counts the bytes that a ring would make this rank send, by name."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}
        self._depth = 0
        gather = ["all_gather", "all_gather_into_tensor", "_all_gather_base", "all_gather_coalesced"]
        scatter = ["reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base", "reduce", "broadcast"]
        for name in ("all_reduce", *gather, *scatter):
            if hasattr(torch.distributed, name):
                times = 2 if name == "all_reduce" else 1  # a scatter and a gather
                setattr(torch.distributed, name, self._counted(name, times, getattr(torch.distributed, name)))

    def _counted(self, name: str, times: int, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:  # some are made of others
                whole = max(_size(value) for value in (*args, *kwargs.values()))
                self.sent[name] = self.sent.get(name, 0.0) + times * whole * (WORKERS - 1) / WORKERS
            self._depth += 1
            try:
                return real(*args, **kwargs)
            finally:
                self._depth -= 1

        return call


def _size(value: Any) -> int:
    """Bytes of a tensor or a list of them, 0 of anything else."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_size(part) for part in value) if isinstance(value, list) else 0


def held(training: Any) -> dict[str, int]:
    """Bytes of what the engine and the averages hold between backward and step, by kind."""
    engine = training.engine._engine
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    for group in getattr(optimizer, "averaged_gradients", {}).values():
        gradients += [tensor for tensor in group or [] if tensor is not None]
    gradients += [buffer for buffer in [getattr(optimizer, "grad_partitions_flat_buffer", None)] if buffer is not None]
    state = getattr(optimizer, "optimizer", optimizer).state
    kinds = {
        "weights": [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")],
        "gradients": gradients,
        "moments": [tensor for entry in state.values() for tensor in entry.values() if isinstance(tensor, Tensor)],
        "master": training.engine.fp32_shards() if training.engine.stage > 0 else [],
        "averages": [tensor for averages in training.ema._averages.values() for tensor in averages],
    }
    return {kind: _storages(tensors) for kind, tensors in kinds.items()}


def _storages(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
