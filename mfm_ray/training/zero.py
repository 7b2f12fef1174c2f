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
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.training.comm_op import load_comm_op
from mfm_ray.training.pieces import Piece, share_of

_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
_FUSED = ("adam", "adamw")  # one pass over the shard instead of eight, on CPU and CUDA
_LARGEST_BUCKET = 200_000_000  # elements in one collective


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is shared out: the same rows, whatever the number of workers and of micro-steps.

    Worker r has rows floor(r G / W) to floor((r + 1) G / W) of G, in `accumulation` micro-steps cut by the same rule.
    Shares differ by at most one row; `weight` makes the mean over micro-steps and workers that over the rows.
    """

    global_batch_size: int
    num_workers: int
    accumulation: int

    def rows_of(self, rank: int) -> range:
        """The rows of the global batch that worker `rank` computes."""
        return _part(range(self.global_batch_size), rank, self.num_workers)

    def sizes(self, rank: int) -> list[int]:
        """Rows of each micro-step of worker `rank`."""
        rows = self.rows_of(rank)
        return [len(_part(rows, step, self.accumulation)) for step in range(self.accumulation)]

    def weights(self, rank: int) -> list[float]:
        """What each micro-step's mean counts in the mean of the means: 1 where all micro-steps are of one size."""
        parts = self.num_workers * self.accumulation
        return [size * parts / self.global_batch_size for size in self.sizes(rank)]

    @property
    def micro_batch_size(self) -> int:
        """Rows of the largest micro-step."""
        return max(max(self.sizes(rank)) for rank in range(self.num_workers))


def _part(rows: range, index: int, count: int) -> range:
    return rows[len(rows) * index // count : len(rows) * (index + 1) // count]


def split_batch(
    global_batch_size: int, *, num_workers: int, micro_batch_size: int | None, even: bool = True
) -> BatchSplit:
    """Divide a global batch over workers and micro-steps; without `micro_batch_size` there is one micro-step.

    even: whether all shares must be of one size. Where not, as in elastic training, `micro_batch_size` is an upper
    bound. Raises ValueError with the numbers when the batch does not divide, or leaves a micro-step without a row.
    """
    if even and global_batch_size % num_workers:
        raise ValueError(f"global_batch_size={global_batch_size} does not divide by scaling.num_workers={num_workers}")
    largest = math.ceil(global_batch_size / num_workers)
    micro = largest if micro_batch_size is None else micro_batch_size
    if micro < 1 or (even and largest % micro):
        raise ValueError(
            f"micro_batch_size={micro} does not divide the {largest} samples of a worker "
            f"(global_batch_size={global_batch_size} / scaling.num_workers={num_workers})"
        )
    accumulation = math.ceil(largest / micro)
    if global_batch_size // num_workers < accumulation:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}: with {num_workers} workers, global_batch_size={global_batch_size} "
            f"leaves one of them fewer rows than the {accumulation} micro-steps of another; expected a larger one"
        )
    return BatchSplit(global_batch_size=global_batch_size, num_workers=num_workers, accumulation=accumulation)


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
    """A sharded module with its optimiser: forward, backward, step, the float32 shards and what lies where in them.

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

    def buffers(self) -> dict[str, Tensor]:
        """The module's buffers by name; frozen parameters are those of whatever model they were taken from."""
        entries = self.module.state_dict(keep_vars=True).items()
        return {name: tensor for name, tensor in entries if not isinstance(tensor, nn.Parameter)}

    def set_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the module's buffers the values of those names; what is no buffer stays as it was built."""
        for name, tensor in self.buffers().items():
            if name in tensors:
                tensor.copy_(tensors[name])

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def pieces(self) -> list[Piece]:
        """What of which parameter lies where in `fp32_shards` of this rank; padding belongs to no piece."""
        found = []
        parameter: Any
        for index, (name, parameter) in enumerate(self.parameters().items()):
            if self.stage == 0:
                found.append(Piece(name, 0, parameter.numel(), index, 0))
            elif self.stage == 3:
                found += _piece_of_stage_3(name, parameter, self._engine.optimizer)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                place, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Piece(name, place.start, place.numel, mapping.param_group_index, there.start))
        return found

    def owned_pieces(self) -> list[Piece]:
        """What this rank writes: all that it holds, at stage 0, where all hold the same, its share of it."""
        if self.stage > 0:
            return self.pieces()
        return share_of(self.pieces(), torch.distributed.get_rank(), torch.distributed.get_world_size())

    def moments(self) -> dict[str, list[Tensor]]:
        """The optimiser's tensors by torch's name for them, laid out as `fp32_shards`; made where there are none."""
        states = self._optimizer_states()
        names = [name for name, value in states[0].items() if torch.is_tensor(value) and value.dim() > 0]
        return {name: [state[name] for state in states] for name in names}

    def counters(self) -> dict[str, float]:
        """The optimiser's numbers, such as `step`, which are the same for all parameters."""
        return {name: float(value) for name, value in self._optimizer_states()[0].items() if _is_counter(value)}

    def restored(self, counters: Mapping[str, float]) -> None:
        """Take up `counters` and the weights and moments that were written into the shards. Collective."""
        for state in self._optimizer_states():
            for name, value in counters.items():
                state[name].fill_(value)
        optimizer = self._engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            _renew_parameters_of_stage_3(optimizer)

    def _optimizer_states(self) -> list[dict[str, Any]]:
        """The optimiser's state of each shard. Before the first step it is what that step would begin with."""
        outer = self._engine.optimizer
        optimizer: torch.optim.Optimizer = outer if self.stage == 0 else outer.optimizer
        if self.stage == 0:
            keys = list(self.parameters().values())
        else:
            keys = outer.fp32_partitioned_groups_flat if self.stage == 3 else outer.single_partition_of_fp32_groups
        for key in keys:
            if not optimizer.state.get(key):
                optimizer.state[key] = _fresh_state(optimizer, key)
        return [optimizer.state[key] for key in keys]


def _is_counter(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() == 0


def _fresh_state(optimizer: torch.optim.Optimizer, like: Tensor) -> dict[str, Any]:
    """What torch's optimiser keeps for a parameter before its first step: zeros of its own types, on its devices."""
    one = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    one.grad = torch.zeros_like(one)
    defaults = {name: value for name, value in optimizer.defaults.items() if name != "decoupled_weight_decay"}
    sample = type(optimizer)([one], **defaults)
    sample.step()
    return {
        name: torch.zeros_like(value if _is_counter(value) else like, requires_grad=False)
        for name, value in sample.state[one].items()
    }


def _piece_of_stage_3(name: str, parameter: Any, optimizer: Any) -> list[Piece]:
    """Stage 3 cuts every parameter into equal parts, of which the last may be padded or empty."""
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * torch.distributed.get_rank()
    count = min(size, parameter.ds_numel - start)
    return [Piece(name, start, count, group, offset)] if count > 0 else []


def _renew_parameters_of_stage_3(optimizer: Any) -> None:
    """The working copies from the float32 shards, and whole where small parameters are kept whole. Collective."""
    for master, working, parts in zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    ):
        working.data.copy_(master.data)
        for part, new in zip(parts, optimizer.unflatten(working, parts), strict=True):
            part.data = new.data
    whole = optimizer.persistent_parameters
    if len(whole) > 0:
        whole[0].partition(whole)
        whole[0].all_gather(whole)
