"""A flow map whose drift was tuned towards a reward, beside the frozen map that it was tuned from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap


class TunedFlowMap(FlowMap):
    """The drift b_t(x) of `tuned`, everything else of `base`.

    The drift is the velocity's diagonal s = u at conditioning time t = 0 (`FlowMap`), and each row is answered by whom
    it belongs to.

    Samples of its drift follow the tilted law p(x_1) exp(r(x_1)) / Z; its posterior draws are those of the law p that
    was tuned, p(x_1 | x_t), so that a value function made of them is the base's. A flow map that is distilled from it
    (a teacher is asked for its drift alone) has posterior draws of the tilted law.

    base, tuned: flow maps of the same space, classes and guidance scales; ValueError otherwise.
    """

    def __init__(self, base: FlowMap, tuned: FlowMap) -> None:
        same = [(each.space, each.num_classes, each.cfg_scales) for each in (base, tuned)]
        if same[0] != same[1]:
            raise ValueError(f"tuned: a flow map of {same[1]}, expected one of {same[0]}, as the base is")
        super().__init__(base.space, num_classes=base.num_classes, cfg_scales=base.cfg_scales)
        self.base, self.tuned = base, tuned

    def velocity(
        self,
        x_s: Tensor,
        s: Tensor,
        u: Tensor,
        *,
        t: Tensor,
        x_t: Tensor,
        label: Tensor | None = None,
        cfg_scale: float | Tensor | None = None,
    ) -> Tensor:
        is_drift = (t == 0) & (s == u)
        arguments = (x_s, s, u, t, x_t, label, cfg_scale)
        if not bool(is_drift.any()):
            return _ask(self.base, *arguments)
        if bool(is_drift.all()):
            return _ask(self.tuned, *arguments)
        result = torch.empty_like(x_s)
        for flow_map, rows in ((self.tuned, is_drift), (self.base, ~is_drift)):
            parts: list[Any] = [part[rows] if isinstance(part, Tensor) else part for part in arguments]
            result = result.index_put((rows,), _ask(flow_map, *parts).to(result))
        return result

    def posterior_spread(self, t: Tensor) -> Tensor:
        return self.base.posterior_spread(t)

    def config(self) -> dict[str, Any]:
        return {"name": "tuned", "base": self.base.config(), "tuned": self.tuned.config()}


def _ask(
    flow_map: FlowMap,
    x_s: Tensor,
    s: Tensor,
    u: Tensor,
    t: Tensor,
    x_t: Tensor,
    label: Tensor | None,
    cfg_scale: float | Tensor | None,
) -> Tensor:
    return flow_map.velocity(x_s, s, u, t=t, x_t=x_t, label=label, cfg_scale=cfg_scale)
