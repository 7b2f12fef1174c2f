"""Reward fine-tuning of a flow map's drift: a copy of the network is trained, the frozen map stays on every worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mfm_ray.config import FinetuneConfig
from mfm_ray.data.augment import AffineJitter
from mfm_ray.finetuning import DriftTargets, Tilt, build_adapter, build_method, regression_loss
from mfm_ray.flow_map import FlowMap
from mfm_ray.latent_models import Decoding
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.pretrained import load_flow_map
from mfm_ray.samplers import sample
from mfm_ray.steering import Reward
from mfm_ray.storage import Storage
from mfm_ray.training.feed import TrainingData
from mfm_ray.training.loss_module import AutocastFlowMap
from mfm_ray.training.sample_grid import can_be_shown, picture_labels, picture_size
from mfm_ray.training.target_feed import TargetFeed, together
from mfm_ray.training.task import Work
from mfm_ray.training.time_buckets import bucket_sums
from mfm_ray.training.tuning_rows import DataRows, ModelRows, SteeredRows, TuningRows
from mfm_ray.training.zero import BatchSplit, ZeroEngine

if TYPE_CHECKING:
    from mfm_ray.training.session import Plan

NORMALISER_ROWS = 512
"""Samples of the model's law that log Z, the scale of the weights, is estimated from."""
_SCORED_AT_ONCE = 64
_PICTURE_STEPS = 20

MakeReward = Callable[[], Reward]
"""Makes the reward on a worker; travels there."""


@dataclass(frozen=True)
class Finetuning:
    """The task of `jobs.finetune`. base: model directory that is tuned, with the SHA-256 of its weights."""

    config_type: ClassVar[type[Any]] = FinetuneConfig
    base: Storage
    base_sha256: str
    make_reward: MakeReward

    def begin(self, plan: Plan, config: FinetuneConfig, device: torch.device) -> FinetuningWork:
        base = load_flow_map(self.base, autoencoder=Decoding.of(config)).to(device)
        reward: Any = self.make_reward()
        if hasattr(reward, "to"):
            reward = reward.to(device)
        tilt = Tilt(
            AutocastFlowMap(base) if config.precision == "bf16" else base,
            reward,
            multiplier=config.reward_multiplier,
            cfg_scale=config.cfg_scale,
            guided_drifts=config.guided_drifts,
        )
        return FinetuningWork(plan, config, base, tilt, base_sha256=self.base_sha256)


@dataclass(frozen=True)
class DriftCost:
    """What is known of a step's cost whatever the method: forward and backward pass of the tuned drift."""

    name: str = "drift"
    forward_units: float = 3.0  # `Adapter.backward_units` and one

    def active(self, step: int) -> bool:
        return True


class TuningModule(nn.Module):
    """Mean regression loss of a batch of targets, and the figures worth a line in the log.

    multiplier: what rewards were multiplied by, taken out again in the figures.
    """

    COLUMNS = (
        "loss",
        "squared_error.drift",
        "reward",
        "reward.anchors",
        "draws.effective_share",
        "weights.mean",
        "weights.square",
    )

    def __init__(self, flow_map: FlowMap, *, cfg_scale: float | None, precision: str, multiplier: float) -> None:
        super().__init__()
        self.flow_map = flow_map
        self._cfg_scale, self._multiplier = cfg_scale, multiplier
        # in a tuple, so that it is not registered: the same weights must not have a second name
        self._seen = (AutocastFlowMap(flow_map) if precision == "bf16" else flow_map,)

    def drift(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The tuned drift, (B, *event) float32."""
        return self._seen[0].drift(x_t, t, label=label, cfg_scale=self._cfg_scale).float()

    def forward(self, targets: DriftTargets, anchor_reward: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, (), and detached figures: the means of `COLUMNS`, then the flat `bucket_sums` of
        the squared errors."""
        prediction = self.drift(targets.x_t, targets.t, targets.label)
        loss = regression_loss(prediction, targets).mean()
        with torch.no_grad():
            errors = (prediction - targets.target).flatten(1).square().mean(1)
            rows = (
                errors,
                targets.reward / self._multiplier,
                anchor_reward.nan_to_num().float() / self._multiplier,
                targets.effective_share,
                targets.weight,
                targets.weight.square(),
            )
            means = torch.stack([loss, *(row.mean() for row in rows)])
            return loss, torch.cat([means, bucket_sums(errors.unsqueeze(0), targets.t).flatten()])


class FinetuningWork(Work):
    """The frozen map, its tuned copy and the method between them."""

    def __init__(self, plan: Plan, config: FinetuneConfig, base: FlowMap, tilt: Tilt, *, base_sha256: str) -> None:
        self._plan, self._config, self._base, self._tilt, self._sha256 = plan, config, base, tilt, base_sha256
        self._method = build_method(config.method)
        self._adapter = build_adapter(config.adapter)
        self.flow_map = self._adapter.trainable(base, seed=config.seed)
        self.terms = [DriftCost(forward_units=1 + self._adapter.backward_units)]
        self.evaluate_every, self.stop_on_hacking = config.evaluate_every, config.stop_on_hacking
        self.columns = TuningModule.COLUMNS
        self.module: TuningModule = TuningModule(
            self.flow_map,
            cfg_scale=tilt.drift_cfg_scale,
            precision=config.precision,
            multiplier=config.reward_multiplier,
        )

    def data(self, split: BatchSplit, *, rank: int, device: torch.device) -> TuningRows:
        rows, anchors, method = self._unsteered(split, rank=rank, device=device), self._config.anchors, self._method
        if method.anchors_are_data or anchors.start_steps == 0:
            return rows
        return SteeredRows(
            rows,
            self._tilt,
            chains=anchors.chains,
            rows=split.rows_of(rank),
            batch_size=self._config.global_batch_size,
            num_steps=anchors.start_steps,
            num_draws=anchors.start_draws,
            seed=self._config.seed,
        )

    def _unsteered(self, split: BatchSplit, *, rank: int, device: torch.device) -> TuningRows:
        config = self._config
        whole = replace(split, accumulation=1)
        if config.data.from_model:
            return ModelRows(
                self._tilt.flow_map,
                seed=config.seed,
                rows=whole.rows_of(rank),
                label_dropout=config.label_dropout,
                sha256=self._sha256,
                device=device,
            )
        jitter = AffineJitter(rate=0.0, rotation=0.0, scale=0.0, shift=0.0)
        data = TrainingData.load(self._plan.source, config, whole, jitter=jitter, rank=rank, device=device)
        return DataRows(data, label_dropout=config.label_dropout, num_classes=self._base.num_classes)

    def feed(self, data: TuningRows, engine: ZeroEngine, split: BatchSplit, *, rank: int) -> TargetFeed:
        config, tilt = self._config, self._tilt
        return TargetFeed(
            data,
            self._method,
            together(
                lambda: tilt.with_normaliser(data.first(NORMALISER_ROWS), batch_size=_SCORED_AT_ONCE), engine.device
            ),
            sizes=split.sizes(rank),
            chains=config.anchors.chains,
            restart=config.anchors.restart,
            end=config.max_steps,
            device=engine.device,
            drift=torch.no_grad()(self.module.drift),
            collective_drift=engine.stage == 3,
        )

    def model(self, weights: Mapping[str, Tensor], device: torch.device) -> FlowMap:
        return TunedFlowMap(self._base, self._adapter.merged(self._base, weights).to(device).eval())

    def pictures(self, weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Samples of the frozen and of the tuned drift, from the same noise."""
        if not can_be_shown(self._base.space):
            return {}
        maps = {"before": self._base, "tuned": self.model(weights, device)}
        return {
            title: sample(
                flow_map,
                num_samples=picture_size(flow_map),
                num_steps=_PICTURE_STEPS,
                seed=self._config.seed,
                label=picture_labels(flow_map, device),
                cfg_scale=self._config.cfg_scale,
            ).images.cpu()
            for title, flow_map in maps.items()
        }

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """The mean square of the weights as what it says: (sum w)^2 / (B sum w^2), over the steps of the line."""
        means = dict(means)
        if self._method.on_policy and self._method.anchors_are_data:
            means.pop("reward.anchors", None)  # such anchors are not scored
        square = means.pop("weights.square", None)
        if square is not None:
            means["weights.effective_share"] = means["weights.mean"] ** 2 / square if square > 0 else 0.0
        return means
