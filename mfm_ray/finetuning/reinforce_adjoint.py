"""Reinforce Adjoint Matching, a rival without rollouts of an SDE and without reward gradients (arXiv 2605.10759).

Endpoints x_1 are drawn from the current model and noised to x_t = t x_1 + (1 - t) z, as many times as one likes; with
the reward r less a constant c the target is

    b(x_t) + (r(x_1) - c) (x_1 - z - b_ft(x_t)),

which corrects the flow-matching target by the reward. Its fixed point is b_ft = b + Cov_ft(r, x_1 - z | x_t), a
covariance under the tuned law itself. The tilted law wants the integral of that covariance over the tilts exp(l r),
0 <= l <= 1: both agree to first order in r, and where the covariance does not depend on l (a linear reward of a
Gaussian), not in general. The difference is the path cost that the method leaves out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.finetuning.reward_matching import uniform_times
from mfm_ray.finetuning.rollout import ode_endpoints
from mfm_ray.finetuning.targets import Anchors, Drift, DriftTargets, TuningMethod
from mfm_ray.finetuning.tilt import Tilt
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import LinearInterpolant, expand_time
from mfm_ray.noise import Noise, Stream


class ReinforceAdjointMatching(TuningMethod):
    """num_steps: of the ODE that draws endpoints. noisings: states made of each endpoint. group: endpoints, one after
    another, that are compared with each other; a batch may end in a smaller group.

    The constant c is the mean reward of the other endpoints of the group. largest_advantage: r - c is clipped to
    plus or minus this number: below -1 a target moves away from the drift faster than the drift follows, and training
    diverges. Clipping tilts less than r would. max_time: t is uniform on [1 - max_time, max_time].
    """

    on_policy = True
    anchors_are_data = True

    def __init__(
        self,
        *,
        num_steps: int = 20,
        noisings: int = 8,
        group: int = 8,
        largest_advantage: float = 1.0,
        max_time: float = 0.998,
    ) -> None:
        require_at_least_one(num_steps=num_steps, noisings=noisings)
        require(isinstance(group, int) and group >= 2, "group", group, "an integer of at least 2")
        require(largest_advantage > 0, "largest_advantage", largest_advantage, "a number above 0")
        require(0.5 < max_time < 1, "max_time", max_time, "a number in (0.5, 1)")
        self.num_steps, self.noisings, self.group, self.max_time = num_steps, noisings, group, max_time
        self.group_rows, self.group_keys = noisings * group, ("noisings", "group")
        self.largest_advantage = largest_advantage

    @torch.no_grad()
    def targets(self, tilt: Tilt, anchors: Anchors, noise: Noise, *, drift: Drift | None = None) -> DriftTargets:
        assert drift is not None
        rows = torch.arange(len(anchors.x1), device=anchors.x1.device)
        of = rows // self.noisings * self.noisings
        first = rows[:: self.noisings]
        label = None if anchors.label is None else anchors.label[of]
        ends = ode_endpoints(
            drift,
            None if label is None else label[first],
            noise[first],
            like=anchors.x1[first],
            num_steps=self.num_steps,
        )
        rewards = tilt.rewards(ends)
        limit = self.largest_advantage
        advantage = (rewards - _mean_of_others(rewards, self.group)).clamp(-limit, limit)
        x1, advantage = ends[rows // self.noisings], advantage[rows // self.noisings].float()
        t = uniform_times(noise, self.max_time)
        path = LinearInterpolant().sample(noise.fold_in(Stream.OUTER).normal(*x1.shape[1:]).to(x1), x1, t)
        tuned, base = drift(path.x_t, t, label).float(), tilt.base_drift(path.x_t, t, label)
        return DriftTargets(
            x_t=path.x_t,
            t=t,
            label=label,
            target=base + expand_time(advantage, base) * (path.velocity - tuned),
            weight=torch.ones_like(t),
            reward=rewards[rows // self.noisings].float(),
            effective_share=torch.ones_like(t),
        )


def _mean_of_others(rewards: Tensor, group: int) -> Tensor:
    """Mean of the others of each group in succession, (N,) from (N,); zero for a single one."""
    return torch.cat([(part.sum() - part) / max(1, len(part) - 1) for part in rewards.split(group)])
