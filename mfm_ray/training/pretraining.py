"""Training of a flow map by an objective, from data or from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mfm_ray.config import TrainConfig
from mfm_ray.data.augment import AffineJitter
from mfm_ray.data.shards import load_moments, read_manifest
from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.latent_models import Decoding, decoded_space
from mfm_ray.networks import build_network
from mfm_ray.objectives import build_objective
from mfm_ray.training.feed import BatchFeed, TrainingData
from mfm_ray.training.loss_module import LossModule
from mfm_ray.training.sample_grid import can_be_shown, draw_steps
from mfm_ray.training.starting import begin_at
from mfm_ray.training.task import Work
from mfm_ray.training.teacher import TeacherPlace, load_teacher
from mfm_ray.training.zero import BatchSplit, ZeroEngine

if TYPE_CHECKING:
    from mfm_ray.training.session import Plan


@dataclass(frozen=True)
class Pretraining:
    """The task of `jobs.train`. teacher: the model that is distilled, or None; start: `init_from`, as workers
    find it."""

    config_type: ClassVar[type[Any]] = TrainConfig
    teacher: TeacherPlace | None = None
    start: str | None = None

    def begin(self, plan: Plan, config: TrainConfig, device: torch.device) -> PretrainingWork:
        teacher = load_teacher(self.teacher, precision=config.precision, execution=config.execution, device=device)
        flow_map = begin_at(build_flow_map(plan, config), self.start)
        return PretrainingWork(plan, config, flow_map.to(device), teacher, device)


class PretrainingWork(Work):
    """A network at its start and its objective."""

    def __init__(
        self, plan: Plan, config: TrainConfig, flow_map: FlowMap, teacher: FlowMap | None, device: torch.device
    ) -> None:
        self._plan, self._config = plan, config
        objective = build_objective(config.objective, teacher=teacher)
        self.flow_map = flow_map
        self.terms = [weighted.term for weighted in objective.terms]
        self.columns = ["loss", *(f"squared_error.{term.name}" for term in self.terms)]
        flow_map.recompute_activations(config.activation_checkpointing)
        self.module = LossModule(flow_map, objective.to(device), precision=config.precision, execution=config.execution)

    def data(self, split: BatchSplit, *, rank: int, device: torch.device) -> TrainingData:
        jitter = AffineJitter(**vars(self._config.augmentation))
        return TrainingData.load(self._plan.source, self._config, split, jitter=jitter, rank=rank, device=device)

    def feed(self, data: TrainingData, engine: ZeroEngine, split: BatchSplit, *, rank: int) -> BatchFeed:
        return BatchFeed(data, end=self._config.max_steps)

    def model(self, weights: Mapping[str, Tensor], device: torch.device) -> FlowMap:
        return self._with_weights(weights, device, None)

    def pictures(self, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        if not can_be_shown(self._shown):
            return {}
        return draw_steps(self._with_weights(weights, device, self._shown), seed=self._config.seed)

    @cached_property
    def _shown(self) -> DataSpace:
        """The data's space, with a decoder of latents where there is one; nothing but pictures needs it."""
        plan, space = self._plan, read_manifest(self._plan.source).space
        if space.kind != "latent":
            return space
        return decoded_space(space, plan.source, plan.model["data"], Decoding.of(self._config))

    def _with_weights(self, weights: Mapping[str, Tensor], device: torch.device, space: DataSpace | None) -> FlowMap:
        model = build_flow_map(self._plan, self._config, space)
        model.load_state_dict(weights)
        return model.to(device).eval()


def build_flow_map(plan: Plan, config: TrainConfig, space: DataSpace | None = None) -> FlowMap:
    """The network at initialisation, the same on every rank. space: that of the data, in which latents may be decoded;
    None: as the data have it."""
    manifest, found = read_manifest(plan.source), load_moments(plan.source)
    moments = None if found is None else found.preconditioning()
    torch.manual_seed(config.seed)
    return build_network(
        config.network,
        space=space or manifest.space,
        num_classes=manifest.num_classes,
        moments=moments,
    )
