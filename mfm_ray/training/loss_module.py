"""The module that is trained: a flow map and its objective, called as one so that sharding hooks see every use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.flow_map import FlowMap
from mfm_ray.noise import Noise
from mfm_ray.objectives import Examples, Objective
from mfm_ray.training.time_buckets import bucket_sums


class LossModule(nn.Module):
    """Mean loss of a batch, and the figures worth a line in the log.

    precision: "fp32", or "bf16" for a network computed under autocast; weights, and the objective's own arithmetic,
    are float32 in both.
    """

    def __init__(self, flow_map: FlowMap, objective: Objective, *, precision: str) -> None:
        super().__init__()
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={precision!r}: expected fp32 or bf16")
        self.flow_map = flow_map
        self.objective = objective
        # in a tuple, so that it is not registered: the same weights must not have a second name
        self._seen = (AutocastFlowMap(flow_map) if precision == "bf16" else flow_map,)

    def forward(self, batch: Examples, noise: Noise, step: int) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, (), and detached figures: [mean loss, mean squared error by term], followed by
        the flat `bucket_sums` of the squared errors. One vector, so that no step waits for the device."""
        losses = self.objective(self._seen[0], batch, noise=noise, step=step)
        loss = losses.total.mean()
        errors = torch.stack(list(losses.squared_errors.values()))
        means = torch.cat([loss.detach().reshape(1), errors.mean(1)])
        return loss, torch.cat([means, bucket_sums(errors, losses.time).flatten()])


class AutocastFlowMap(FlowMap):
    """A flow map whose velocity is computed in bfloat16 where autocast allows it and returned in float32."""

    def __init__(self, inner: FlowMap) -> None:
        super().__init__(inner.space, num_classes=inner.num_classes, cfg_scales=inner.cfg_scales)
        self._inner = inner

    def velocity(self, x_s: Tensor, s: Tensor, u: Tensor, **condition: Any) -> Tensor:
        with torch.autocast(x_s.device.type, torch.bfloat16):
            return self._inner.velocity(x_s, s, u, **condition).float()

    def posterior_spread(self, t: Tensor) -> Tensor:
        return self._inner.posterior_spread(t)

    def in_full_precision(self) -> FlowMap:
        return self._inner

    def config(self) -> dict[str, Any]:
        return self._inner.config()
