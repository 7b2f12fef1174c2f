"""The problem of reward fine-tuning: a frozen flow map, a reward, and what its posterior draws say about both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mfm_ray.flow_map import FlowMap
from mfm_ray.noise import KeyedNoise, Noise
from mfm_ray.steering import CallCounter, Reward, SteeringContext, draw_and_score
from mfm_ray.steering.method import gradient_of
from mfm_ray.steering.scoring import name_of, score_states

Coefficients = Callable[[Tensor], Tensor]
"""From rewards (B, N) float64 to one factor for each draw, (B, N)."""


@dataclass(frozen=True)
class Draws:
    """Posterior draws of a batch of states: x1 (B, N, *event) in model space and their rewards (B, N), float64.

    gradient: (B, *event), sum_i c_i grad_x r(x1_i(x)) for the coefficients c that were asked for; None when none were.
    """

    x1: Tensor
    rewards: Tensor
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Tilt:
    """The tilted law p(x_1) exp(multiplier * r(x_1)) / Z, p being the law of the frozen flow map.

    flow_map: frozen. reward: of decoded samples in data units; `multiplier` is the paper's lambda. cfg_scale: one
    guidance scale for the draws, the frozen drift and the tuned one; guided_drifts: False asks both drifts without it,
    which is the paper's code and no tilted law. log_normaliser: log Z as far as it is known
    (`with_normaliser`); a scale for weights, on which no fixed point depends. calls: what has been asked, in rows.
    """

    flow_map: FlowMap
    reward: Reward
    multiplier: float = 1.0
    cfg_scale: float | None = None
    guided_drifts: bool = True
    log_normaliser: float = -torch.inf
    calls: CallCounter = field(default_factory=CallCounter)

    @property
    def drift_cfg_scale(self) -> float | None:
        """The guidance scale of the frozen drift and the tuned one."""
        return self.cfg_scale if self.guided_drifts else None

    @torch.no_grad()
    def base_drift(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """b_t(x) of the frozen flow map, (B, *event)."""
        self.calls.drift += len(x_t)
        return self.flow_map.drift(x_t, t, label=label, cfg_scale=self.drift_cfg_scale).float()

    @torch.no_grad()
    def rewards(self, x1: Tensor) -> Tensor:
        """multiplier * r of clean states (B, *event) in model space, (B,) float64. ValueError naming a bad reward."""
        return self.multiplier * score_states(self.reward, x1, self._quiet(len(x1))).double()

    def draws(
        self,
        x_t: Tensor,
        t: Tensor,
        label: Tensor | None,
        noise: Noise,
        *,
        num_draws: int,
        coefficients: Coefficients | None,
    ) -> Draws:
        """num_draws posterior draws of every state, their rewards, and on demand the weighted gradient.

        coefficients: from rewards (B, N) to the c_i (B, N) of `Draws.gradient`; None takes no gradient at all.
        """
        context = self._context(noise, label)
        if coefficients is None:
            with torch.no_grad():
                x1, rewards = draw_and_score(self.reward, x_t, t, num_draws, context)
            return Draws(x1.float(), self.multiplier * rewards.double())
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            x1, rewards = draw_and_score(self.reward, x, t, num_draws, context)
            scaled = self.multiplier * rewards.double()
            self._require_gradient(rewards)
            weights = coefficients(scaled.detach())
            gradient = gradient_of((weights * scaled).sum(), x)
            self.calls.draw_backward += rewards.numel()
            self.calls.reward_backward += rewards.numel()
        return Draws(x1.detach().float(), scaled.detach(), gradient)

    def reward_and_slope(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        """multiplier * r (B,) float64 of clean states (B, *event) in model space, and its gradient in them."""
        with torch.enable_grad():
            x = x1.detach().requires_grad_()
            rewards = self.multiplier * score_states(self.reward, x, self._quiet(len(x1))).double()
            self._require_gradient(rewards)
            slope = gradient_of(rewards.sum(), x)
            self.calls.reward_backward += len(x1)
        return rewards.detach(), slope

    def relative_weight(self, rewards: Tensor) -> Tensor:
        """exp(r - log Z), (B,) float32. ValueError where that is not finite."""
        weight = (rewards.double() - self.log_normaliser).exp().float()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"reward: {float(rewards.max()):.4g} has no finite exp; expected a smaller reward_multiplier"
            )
        return weight

    def counted(self, calls: CallCounter) -> Tilt:
        """The same problem, its calls added to `calls`."""
        return replace(self, calls=calls)

    def with_normaliser(self, x1: Tensor, *, batch_size: int | None = None) -> Tilt:
        """The same problem, log Z estimated from samples (B, *event) of p: a lower bound where few of them count.

        batch_size: samples that are scored at once, all by default.
        """
        rewards = torch.cat([self.rewards(part) for part in x1.split(batch_size or len(x1))])
        return replace(self, log_normaliser=float(rewards.logsumexp(0)) - math.log(len(rewards)))

    def _require_gradient(self, rewards: Tensor) -> None:
        if not rewards.requires_grad:
            raise ValueError(
                f"reward {name_of(self.reward)}: has no gradient, which this method takes; expected "
                "method=mfm_ft with method.estimator=score, or reward_weighted"
            )

    def _quiet(self, rows: int) -> SteeringContext:
        """A context in which nothing is drawn."""
        return self._context(KeyedNoise(torch.zeros(rows, dtype=torch.int64)), None)

    def _context(self, noise: Noise, label: Tensor | None) -> SteeringContext:
        return SteeringContext(
            flow_map=self.flow_map, noise=noise, calls=self.calls, label=label, cfg_scale=self.cfg_scale
        )
