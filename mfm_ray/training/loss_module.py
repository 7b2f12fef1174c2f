"""The module that is trained: a flow map and its objective, called as one so that sharding hooks see every use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.computation import computed
from mfm_ray.noise import Noise
from mfm_ray.objectives import Examples, Objective
from mfm_ray.training.time_buckets import bucket_sums


class LossModule(nn.Module):
    """Mean loss of a batch, and the figures worth a line in the log.

    precision, execution: how the network is computed (`networks.computation`); weights, and the objective's own
    arithmetic, are float32 in all.
    """

    def __init__(self, flow_map: FlowMap, objective: Objective, *, precision: str, execution: str = "eager") -> None:
        super().__init__()
        self.flow_map = flow_map
        self.objective = objective
        # in a tuple, so that it is not registered: the same weights must not have a second name
        self._seen = (computed(flow_map, precision=precision, execution=execution),)

    def forward(self, batch: Examples, noise: Noise, step: int) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, (), and detached figures: [mean loss, mean squared error by term], followed by
        the flat `bucket_sums` of the squared errors. One vector, so that no step waits for the device."""
        losses = self.objective(self._seen[0], batch, noise=noise, step=step)
        loss = losses.total.mean()
        errors = torch.stack(list(losses.squared_errors.values()))
        means = torch.cat([loss.detach().reshape(1), errors.mean(1)])
        return loss, torch.cat([means, bucket_sums(errors, losses.time).flatten()])
