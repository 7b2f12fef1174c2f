"""What is measured: a network of the paper's sizes with all that training keeps, and what users call on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks import dit, unet
from mfm_ray.networks.attention import written_out_attention
from mfm_ray.networks.computation import AutocastFlowMap
from mfm_ray.networks.dit import DiTFlowMap
from mfm_ray.noise import KeyedNoise
from mfm_ray.objectives import EulerianTerm, Objective, Tangent, TrainingStates, named_objective
from mfm_ray.objectives.conditions import average_velocity
from mfm_ray.samplers import sample
from mfm_ray.steering import GradientGuidance
from mfm_ray.training.loss_module import LossModule
from mfm_ray.training.zero import build_optimizer

CFG_SCALES = (2.5,)
PATCH_SIZE = 2
DRAWS_A_STATE = 4
_EMA_DECAY, _CLIPPING = 0.999, 1.0


@dataclass(frozen=True)
class Size:
    """A network and its data: latents (C, H, W), and the batch that the search for one that fits starts at."""

    hidden_size: int
    depth: int
    num_heads: int
    encoder_depth: int
    latents: tuple[int, int, int]
    num_classes: int
    batch: int


SIZES = {
    "xl2": Size(1152, 28, 16, 20, latents=(4, 32, 32), num_classes=1000, batch=256),
    "b2": Size(768, 12, 12, 8, latents=(4, 32, 32), num_classes=1000, batch=1024),
    "toy": Size(32, 2, 2, 1, latents=(4, 8, 8), num_classes=10, batch=8),
}


def build(size: Size, device: torch.device) -> DiTFlowMap:
    """The network with random weights everywhere, float32.

    As initialised, half of it multiplies by zero, and a GPU is faster on zeros than on numbers: they cost less power.
    """
    torch.manual_seed(0)
    with torch.device(device):
        network = DiTFlowMap(
            space=DataSpace(kind="latent", event_shape=size.latents),
            patch_size=PATCH_SIZE,
            hidden_size=size.hidden_size,
            depth=size.depth,
            num_heads=size.num_heads,
            encoder_depth=size.encoder_depth,
            num_classes=size.num_classes,
            cfg_scales=CFG_SCALES,
        )
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return network


def build_frozen(size: Size, device: torch.device) -> DiTFlowMap:
    """The network as a loaded model is: without gradients."""
    return build(size, device).requires_grad_(False).eval()


@dataclass(frozen=True)
class Latents:
    """Examples of an objective: latents (B, C, H, W) in model space, labels (B,)."""

    data: Tensor
    label: Tensor

    @classmethod
    def random(cls, size: Size, batch: int, device: torch.device) -> Latents:
        label = torch.arange(batch, device=device) % size.num_classes
        return cls(torch.randn(batch, *size.latents, device=device), label)


class Training:
    """A network with what a training step keeps in float32: gradients, moving average, optimiser state.

    The learning rate stays 0, so that all figures are of the same weights; the optimiser does all its work even so.
    """

    def __init__(self, size: Size, device: torch.device, *, optimizer: str) -> None:
        self.size, self.device = size, device
        self.network = build(size, device)
        self._weights = list(self.network.parameters())
        self._average = [weight.detach().clone() for weight in self._weights]
        settings = {"name": optimizer, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        self._optimizer = build_optimizer(self.network, settings)

    def step(self, objective: Objective, batch: int) -> Callable[[], None]:
        """The training step on `batch` random latents: forward, backward, clipping, optimiser, moving average."""
        examples = Latents.random(self.size, batch, self.device)
        noise = KeyedNoise.for_rows(0, torch.arange(batch, device=self.device))
        loss_module = LossModule(self.network, objective, precision="bf16")

        def step() -> None:
            self._optimizer.zero_grad()
            loss, _ = loss_module(examples, noise, 0)
            loss.backward()
            nn.utils.clip_grad_norm_(self._weights, _CLIPPING, foreach=True)
            self._optimizer.step()
            self._update_average()

        return step

    @torch.no_grad()
    def _update_average(self) -> None:
        torch._foreach_lerp_(self._average, self._weights, 1 - _EMA_DECAY)


def build_objective(name: str, network: FlowMap) -> Objective:
    """The objective with its defaults; the teacher, where one is distilled, is a frozen copy of the network."""
    teacher = AutocastFlowMap(copy.deepcopy(network)) if name.endswith("_teacher") else None
    return named_objective(name, teacher=teacher)


def straightforward_eulerian() -> Objective:
    """The Eulerian objective as `torch.func.jvp` gives it: the same values, recorded twice."""
    objective = named_objective("eulerian")
    for weighted in objective.terms:
        if isinstance(weighted.term, EulerianTerm):
            weighted.term.tangent = StraightforwardTangent()
    return objective


class StraightforwardTangent(Tangent):
    """One `torch.func.jvp` in grad mode: attention written out, the tangent's graph beside the value's."""

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
        # as a local variable of the loss does: the tangent's graph lives until that of the value is freed
        value.register_hook(lambda gradient, held=tangent: None)
        return value.float(), tangent.detach().float()


@contextmanager
def attention_as(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Transformer and UNet with another function for their attention."""
    with mock.patch.object(dit, "attention", attend), mock.patch.object(unet, "attention", attend):
        yield


def mean_reward(samples: Tensor) -> Tensor:
    """-(mean - 1)^2 of each sample, (N,): a reward that costs nothing beside a network."""
    return -(samples.flatten(1).mean(1) - 1).square()


def draws(flow_map: FlowMap, size: Size, num_states: int, device: torch.device) -> Callable[[], Tensor]:
    """One-step posterior draws without gradient: `DRAWS_A_STATE` of each state."""
    x_t, t, condition = _states(size, num_states, device)

    @torch.no_grad()
    def call() -> Tensor:
        return flow_map.posterior_draws(x_t, t, **condition)

    return call


def draws_with_gradient(flow_map: FlowMap, size: Size, num_states: int, device: torch.device) -> Callable[[], Tensor]:
    """The same, and the gradient of the reward to x_t."""
    x_t, t, condition = _states(size, num_states, device)
    x_t.requires_grad_()

    def call() -> Tensor:
        drawn = flow_map.posterior_draws(x_t, t, **condition)
        reward = mean_reward(flow_map.space.to_data_units(drawn.flatten(0, 1)))
        return torch.autograd.grad(reward.sum(), x_t)[0]

    return call


def _states(size: Size, num_states: int, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Any]]:
    examples = Latents.random(size, num_states, device)
    condition = {
        "num_draws": DRAWS_A_STATE,
        "generator": KeyedNoise.for_images(0, num_states, device=device),
        "label": examples.label,
        "cfg_scale": CFG_SCALES[0],
    }
    return examples.data, torch.full((num_states,), 0.5, device=device), condition


def steered_images(flow_map: FlowMap, num_images: int, *, num_draws: int, num_steps: int) -> Callable[[], Tensor]:
    """`num_images` images of `sample` under gradient guidance with `num_draws` draws a step; unsteered for 0."""
    steering = GradientGuidance(mean_reward, num_draws=num_draws) if num_draws else None

    def call() -> Tensor:
        return sample(
            flow_map,
            num_samples=num_images,
            steering=steering,
            num_steps=num_steps,
            label=0,
            cfg_scale=CFG_SCALES[0],
            batch_size=num_images,
        ).images

    return call


def compiled_blocks(network: DiTFlowMap, backend: str) -> nn.ModuleList:
    """The transformer's blocks behind torch.compile, for shapes as they come: one program serves all blocks."""
    return nn.ModuleList(torch.compile(block, backend=backend, dynamic=False) for block in network.blocks)  # type: ignore[misc]


@contextmanager
def with_blocks(network: DiTFlowMap, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """The network made of other blocks that hold the same weights."""
    own = network.blocks
    network.blocks = blocks  # type: ignore[assignment]
    try:
        yield
    finally:
        network.blocks = own
