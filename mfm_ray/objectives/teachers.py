"""Teachers: the marginal velocity b_t(x) of a flow map that is already there, with classifier-free guidance.

A teacher is frozen, belongs to no optimiser and to no checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.flow_map import FlowMap
from mfm_ray.interpolants import expand_time


class Teacher(ABC):
    """b_t(x) under guidance: state (B, *event), time (B,), label (B,) or None, scale w (B,) or None (1 for all)."""

    forward_units: float = 1.0

    def __init__(self, flow_map: FlowMap) -> None:
        self.flow_map = flow_map.requires_grad_(False).eval()

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor | None, cfg_scale: Tensor | None) -> Tensor: ...

    def drifts(self, x: Tensor, t: Tensor, label: Tensor, *, cfg_scale: float | None) -> tuple[Tensor, Tensor]:
        """Drifts with the labels and with the null class, in one call of 2 B rows."""
        null = torch.full_like(label, self.flow_map.num_classes)
        both = self.flow_map.drift(
            torch.cat([x, x]), torch.cat([t, t]), label=torch.cat([label, null]), cfg_scale=cfg_scale
        )
        with_label, without = both.float().chunk(2)
        return with_label, without


class UnguidedTeacher(Teacher):
    """The teacher's drift for the label, whatever scale the student is told."""

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor | None, cfg_scale: Tensor | None) -> Tensor:
        return self.flow_map.drift(x, t, label=label)


class PlainTeacher(Teacher):
    """Classifier-free guidance of a plain conditional teacher: b_null + w (b_y - b_null). Two calls' worth."""

    forward_units = 2.0

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor | None, cfg_scale: Tensor | None) -> Tensor:
        if label is None or cfg_scale is None:
            return self.flow_map.drift(x, t, label=label)
        labelled, null = self.drifts(x, t, label, cfg_scale=None)
        return null + expand_time(cfg_scale, x) * (labelled - null)


class ModelGuidedTeacher(Teacher):
    """Guidance of a teacher that was itself trained with model guidance at scale `trained_scale` = 1 / (1 - omega).

    Its answer b_mg for a label is already guided; the plain conditional drift inside is
    b_y = (1 - omega) b_mg + omega b_null, and the target b_null + w (b_y - b_null) = b_null + w / trained_scale
    (b_mg - b_null). At w = trained_scale that is b_mg.
    """

    forward_units = 2.0

    def __init__(self, flow_map: FlowMap, *, trained_scale: float) -> None:
        super().__init__(flow_map)
        require(trained_scale >= 1, "trained_scale", trained_scale, "a number of at least 1")
        self.trained_scale = trained_scale

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor | None, cfg_scale: Tensor | None) -> Tensor:
        if label is None or cfg_scale is None:
            return self.flow_map.drift(x, t, label=label)
        told = self.trained_scale if self.trained_scale in self.flow_map.cfg_scales else None
        guided, null = self.drifts(x, t, label, cfg_scale=told)
        return null + expand_time(cfg_scale / self.trained_scale, x) * (guided - null)


TEACHERS = {"none": UnguidedTeacher, "plain": PlainTeacher, "model": ModelGuidedTeacher}
