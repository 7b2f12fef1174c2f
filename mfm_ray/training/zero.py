"""The sharded engine: how a batch is split, which ZeRO settings that means, and the one door to DeepSpeed.

Nothing else imports deepspeed, and here it is imported when an engine is made, so that the pure functions
serve the driver without it. Master weights, gradients and optimiser state are float32 in every stage.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.training.comm_op import load_comm_op

TAG = "deepspeed"  # the folder of the engine's own files inside a checkpoint

_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
_FUSED = ("adam", "adamw")  # one pass over the shard instead of eight, on CPU and CUDA
_LARGEST_BUCKET = 200_000_000  # elements in one collective


@dataclass(frozen=True)
class BatchSplit:
    """global_batch_size = micro_batch_size x accumulation x num_workers."""

    micro_batch_size: int
    accumulation: int
    num_workers: int

    @property
    def per_worker(self) -> int:
        return self.micro_batch_size * self.accumulation

    def rows(self, rank: int, micro_step: int) -> slice:
        """The rows of the global batch that worker `rank` computes in micro-step `micro_step`."""
        start = rank * self.per_worker + micro_step * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


def split_batch(global_batch_size: int, *, num_workers: int, micro_batch_size: int | None) -> BatchSplit:
    """Divide a global batch over workers and micro-steps; without `micro_batch_size` there is one micro-step.

    Raises ValueError with the numbers when the batch does not divide.
    """
    if global_batch_size % num_workers:
        raise ValueError(f"global_batch_size={global_batch_size} does not divide by scaling.num_workers={num_workers}")
    per_worker = global_batch_size // num_workers
    micro = per_worker if micro_batch_size is None else micro_batch_size
    if micro < 1 or per_worker % micro:
        raise ValueError(
            f"micro_batch_size={micro} does not divide the {per_worker} samples of a worker "
            f"(global_batch_size={global_batch_size} / scaling.num_workers={num_workers})"
        )
    return BatchSplit(micro_batch_size=micro, accumulation=per_worker // micro, num_workers=num_workers)


def check_sharding(*, stage: int, offload: bool) -> None:
    """ValueError for a stage that does not exist, and for offload without sharding."""
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero.stage={stage}: expected 0, 1, 2 or 3")
    if offload and stage == 0:
        raise ValueError("zero.offload=true needs zero.stage=1, 2 or 3, got zero.stage=0")


def zero_config(
    *, stage: int, offload: bool, split: BatchSplit, gradient_clipping: float, num_parameters: int, cuda: bool
) -> dict[str, Any]:
    """The DeepSpeed configuration of one run.

    Stage 0 replicates everything, 1 shards the optimiser state, 2 also the gradients, 3 also the parameters.
    `offload` keeps the optimiser state in host memory (stages 1 to 3). `gradient_clipping` is the largest global
    norm, 0 for no clipping. Raises ValueError as `check_sharding` does.
    """
    check_sharding(stage=stage, offload=offload)
    # DeepSpeed allocates a whole bucket in every step, however small the model
    bucket = min(_LARGEST_BUCKET, num_parameters)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # gloo has no stream to hide a collective behind, so overlap only costs copies there
        "overlap_comm": cuda and stage > 0,
    }
    if stage == 3:
        # its linear layer has no forward-mode derivative, which other objectives take through the network
        zero |= {"memory_efficient_linear": False, "stage3_prefetch_bucket_size": 20_000_000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_batch_size": split.micro_batch_size * split.accumulation * split.num_workers,
        "train_micro_batch_size_per_gpu": split.micro_batch_size,
        "gradient_accumulation_steps": split.accumulation,
        # at stage 0 ZeroEngine clips, because DeepSpeed would not tell the norm there
        "gradient_clipping": 0.0 if stage == 0 else gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": None,
        "log_level": "error",
        "timers": {"throughput": {"enabled": False}},
        "checkpoint": {"tag_validation": "IGNORE"},  # the tag is a constant
    }


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a function of the step, so that a resumed run needs no schedule state.

    Step k (from 0) of the warm-up has `peak` (k + 1) / `warmup_steps`; after it the rate is constant, or follows half
    a cosine to 0 at `max_steps`.
    """

    peak: float
    warmup_steps: int
    schedule: str
    max_steps: int

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"learning_rate_schedule={self.schedule!r}: expected constant or cosine")

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(module: nn.Module, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """A torch optimiser over the trainable parameters, from {name, betas, eps, weight_decay}."""
    name = settings["name"]
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer.name={name!r}: expected one of {', '.join(_OPTIMIZERS)}")
    return _OPTIMIZERS[name](
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=0.0,  # set at every step
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        **({"fused": True} if name in _FUSED else {}),
    )


def prepare(
    module: nn.Module, *, optimizer: Mapping[str, Any], config: Mapping[str, Any], gradient_clipping: float
) -> ZeroEngine:
    """Shard `module` over the process group that is already there. Collective.

    The module must hold the same weights on every rank (build it from one seed).
    """
    backend = torch.distributed.get_backend()
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
        load_comm_op()
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend)
    with _without_compiler():
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(module, optimizer), config=dict(config)
        )
    return ZeroEngine(engine, stage=config["zero_optimization"]["stage"], gradient_clipping=gradient_clipping)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """DeepSpeed compiles an optimiser that nobody asked for while it starts; loading the compiler takes seconds."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


class ZeroEngine:
    """A sharded module with its optimiser: forward, backward, step, the float32 shards, save and load.

    forward, backward and step are collective, and so is everything that reads full parameters.
    """

    def __init__(self, engine: Any, *, stage: int, gradient_clipping: float) -> None:
        self._engine = engine
        self._clip = gradient_clipping
        self.stage = stage
        self.module: nn.Module = engine.module
        self.device = torch.device(engine.device)
        self.gradient_norm: Tensor | float = 0.0

    def forward(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, the mean over this micro-batch.

        DeepSpeed divides by the number of micro-steps and averages over ranks, which makes the gradient that of
        the mean over the global batch, however it was split.
        """
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> bool:
        """End a micro-step; at the last one update the weights. True when they were updated."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = learning_rate
            if self.stage == 0:
                self.gradient_norm = self._clip_replicated()
        self._engine.step()
        if boundary and self.stage > 0:
            self.gradient_norm = self._engine.get_global_grad_norm()
        return boundary

    def _clip_replicated(self) -> Tensor:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        if self._clip > 0:
            return nn.utils.clip_grad_norm_(parameters, self._clip, foreach=True)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)

    def fp32_shards(self) -> list[Tensor]:
        """This rank's part of the master weights; at stage 0 the parameters themselves. Views, not copies."""
        optimizer = self._engine.optimizer
        if self.stage == 0:
            return [parameter.detach() for parameter in self.module.parameters() if parameter.requires_grad]
        if self.stage == 3:
            return [shard.detach() for shard in optimizer.fp32_partitioned_groups_flat]
        return [shard.detach() for shard in optimizer.single_partition_of_fp32_groups]

    def full_tensors(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every entry of the state dict of `module` (a part of the engine's), whole, one after another; without
        frozen parameters, which are those of whatever model they were taken from.

        Trainable parameters are read from the float32 shards. At most one of them is whole at a time; each is
        valid until the next is asked for. Collective: all ranks must exhaust it.
        """
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        for name, tensor in module.state_dict(keep_vars=True).items():
            full = None
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                continue
            if isinstance(tensor, nn.Parameter) and self.stage > 0:
                full = safe_get_full_fp32_param(tensor)
            if full is not None:
                yield name, full.detach()
                continue
            with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                yield name, tensor.detach()

    def save(self, directory: Path) -> None:
        """Write this rank's weights and optimiser state below `directory`/deepspeed. Collective."""
        self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, with the same number of ranks and the same stage. Collective.

        The files hold pickles: verify their hashes first (checkpoint.py).
        """
        path, _ = self._engine.load_checkpoint(str(directory), tag=TAG)
        assert path is not None, f"no engine state below {directory}"
