"""What a step of a DiT costs on n GPUs by arithmetic alone: memory of one GPU, bytes it sends, seconds.

Everything is as `zero.py` sets the engine up: weights, gradients, optimiser state and averages are float32 in every
stage, `precision=bf16` is autocast. N parameters, n GPUs, A micro-steps a step.

    memory a GPU, bytes     stage 0: 4 N (1 + 1 + 2 + E)                  weights, gradients, two moments, E averages
                            stage 1: 4 N (1 + 1) + 4 N (3 + E) / n        a float32 master copy is sharded as well
                            stage 2: 4 N         + 4 N (4 + E) / n
                            stage 3:               4 N (4 + E + 1) / n
                            in a step: + 2 N of bfloat16 copies (autocast); buckets of up to 200 million elements, two
                            at stages 1 to 3; at stage 3 up to 1e9 elements of gathered weights
    activations, bytes      rows x tokens x depth x 48 width, for each call of the network that has a gradient
    sent a GPU, bytes       stage 0: 4 N (n - 1) / n x 2                  all-reduce of the gradients = scatter + gather
                            stage 1: 4 N (n - 1) / n x 3                  the same, then a gather of the new weights
                            stage 2: 4 N (n - 1) / n x (2 A + 1)          the same in each micro-step
                            stage 3: 4 N (n - 1) / n x A (G + 1)          G gathers of weights, scatter of gradients

DeepSpeed reduces buckets that belong to several ranks by all-reduce, so stages 1 and 2 send more than in ZeRO's paper
(Rajbhandari et al., arXiv 1910.02054), and weights are float32 here. G is 1 as long as all weights fit into what stage
3 keeps gathered, else one for each call and each backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

_FLOAT, _HALF = 4, 2
ACTIVATION_BYTES = 48
"""Bytes that a block keeps for its backward pass, for each token and channel, under autocast: 14 halves of width and
what the fused attention and the two layer norms keep in float32 (measured: tests/training/test_footprint.py)."""
_FREQUENCIES = 256
LIVE_PARAMETERS = 1_000_000_000
"""Gathered elements that stage 3 keeps for their next use (DeepSpeed's stage3_max_live_parameters, its default)."""
_BUCKET = 200_000_000  # elements, as zero.py sets it


@dataclass(frozen=True)
class DiT:
    """Shape of `mfm_ray.networks.dit.DiTFlowMap`. size: of the square input; channels: of it."""

    width: int
    depth: int
    num_heads: int
    size: int = 32
    channels: int = 4
    patch_size: int = 2
    num_classes: int = 1000
    guidance_rows: int = 2

    @property
    def tokens(self) -> int:
        return (self.size // self.patch_size) ** 2

    @property
    def block_parameters(self) -> int:
        """Attention 4 w^2, MLP 8 w^2, modulation 6 w^2, and their biases."""
        return 18 * self.width**2 + 15 * self.width

    @property
    def parameters(self) -> int:
        w, patch = self.width, self.patch_size**2 * self.channels
        embedders = 5 * (_FREQUENCIES * w + w * w + 2 * w) + 2 * (patch + 1) * w
        tables = (self.num_classes + 1 + self.guidance_rows) * w
        final = (w + 1) * patch + 2 * (w + 1) * w
        return self.depth * self.block_parameters + embedders + tables + 2 * (w + 1) * w + final

    @property
    def forward_flops(self) -> float:
        """Of one row of one call: twice the multiply-adds of products and attention, as `forward_flops` counts them."""
        w, t, patch = self.width, self.tokens, self.patch_size**2 * self.channels
        block = t * 24 * w * w + 4 * t * t * w + 12 * w * w
        times = 5 * 2 * (_FREQUENCIES * w + w * w)
        return float(self.depth * block + times + 2 * t * 2 * patch * w + 4 * w * w + t * 2 * w * patch + 4 * w * w)


@dataclass(frozen=True)
class Objective:
    """What a step asks of the network. forward_units: FLOPs of a row in forward passes, a backward pass being two;
    calls: forward passes; gradient_calls: those that a backward pass goes through.
    """

    forward_units: float
    calls: int
    gradient_calls: int


SEMIGROUP = Objective(forward_units=8.0, calls=4, gradient_calls=2)
"""The diagonal from data and the semigroup condition: one call and three, of which one each has a gradient."""


@dataclass(frozen=True)
class Layout:
    """How a step is laid out. rows: of one micro-step of one GPU; averages: of `ema_decay`."""

    stage: int
    gpus: int
    rows: int
    micro_steps: int = 1
    averages: int = 1


@dataclass(frozen=True)
class Machine:
    """flops: dense bf16 peak of a GPU; mfu: share of it that is reached; bandwidth: bytes a second that a GPU sends
    and receives in a ring over all of them; overlap: share of communication that is hidden behind computing.
    """

    flops: float
    mfu: float
    bandwidth: float
    overlap: float = 0.0
    memory: float = 80e9


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. working: bfloat16 copies, buckets of collectives, gathered weights: in a step only."""

    weights: float
    gradients: float
    optimiser: float
    averages: float
    working: float = 0.0
    activations: float = 0.0

    @property
    def state(self) -> float:
        """What is there between two steps, gradients included."""
        return self.weights + self.gradients + self.optimiser + self.averages

    @property
    def total(self) -> float:
        return self.state + self.working + self.activations


def state_memory(parameters: float, layout: Layout) -> Memory:
    """Bytes of weights, gradients, optimiser (master copy and moments) and averages on one of the GPUs."""
    share = _FLOAT * parameters / layout.gpus
    whole = _FLOAT * parameters
    stage = layout.stage
    return Memory(
        weights=share if stage == 3 else whole,
        gradients=share if stage >= 2 else whole,
        optimiser=2 * whole if stage == 0 else 3 * share,
        averages=layout.averages * (whole if stage == 0 else share),
    )


def memory(network: DiT, objective: Objective, layout: Layout, *, recompute: bool = False) -> Memory:
    """Bytes on one GPU in the middle of a step.

    recompute: activation checkpointing of whole blocks (`activation_checkpointing=true`): a block keeps its input
    alone, and one at a time is computed again.
    """
    state = state_memory(network.parameters, layout)
    gathered = min(network.parameters, LIVE_PARAMETERS)
    casts = _HALF * (network.parameters if layout.stage < 3 else gathered)
    buckets = (1 if layout.stage == 0 else 2) * _FLOAT * min(network.parameters, _BUCKET)
    a_block = layout.rows * network.tokens * network.width
    keeps = ACTIVATION_BYTES * network.depth
    if recompute:
        keeps = _FLOAT * network.depth + ACTIVATION_BYTES
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimiser=state.optimiser,
        averages=state.averages,
        working=casts + buckets + (_FLOAT * gathered if layout.stage == 3 else 0),
        activations=objective.gradient_calls * a_block * keeps,
    )


def sent(parameters: float, objective: Objective, layout: Layout) -> float:
    """Bytes that one GPU sends in one step, by ring collectives."""
    gathers = 1 if parameters <= LIVE_PARAMETERS else objective.calls + objective.gradient_calls
    times = {0: 2, 1: 3, 2: 2 * layout.micro_steps + 1, 3: layout.micro_steps * (gathers + 1)}
    return times[layout.stage] * _FLOAT * parameters * (layout.gpus - 1) / layout.gpus


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: of arithmetic, of communication, and both with what is hidden taken off."""

    compute: float
    communication: float
    total: float


def step_time(network: DiT, objective: Objective, layout: Layout, machine: Machine) -> StepTime:
    """compute = units x FLOPs x rows x A / (peak x MFU); communication = bytes / bandwidth.

    total = compute + the communication that is not hidden: the share `overlap` is, but never more than the compute.
    """
    rows = layout.rows * layout.micro_steps
    compute = objective.forward_units * network.forward_flops * rows / (machine.flops * machine.mfu)
    communication = sent(network.parameters, objective, layout) / machine.bandwidth
    hidden = min(machine.overlap * communication, compute)
    return StepTime(compute, communication, compute + communication - hidden)
