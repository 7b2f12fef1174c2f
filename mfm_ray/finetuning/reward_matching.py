"""MFM-FT: reward-weighted matching from posterior draws of the frozen flow map (Meta Flow Maps, arXiv 2601.14430).

At a state x of time t the frozen map draws x_1^i ~ p(x_1 | x), i = 1 ... N. With E_i = exp(r(x_1^i) - c_i) the loss

    (1 / N) sum_i sg(E_i) | b_ft - (b + a_i) |^2,        E[E_i a_i | x] = E[E_i | x] (sigma_t^2 / 2) grad V_t(x)

is least where b_ft = b + (sigma_t^2 / 2) grad V_t, pointwise in (t, x): off policy, for any law of x with full support,
and without bias for any number of draws, one among them, since only E[E a] and E[E] enter, both linearly. It has the
gradient of the paper's form | b_ft - sg(b - (E - 1)(b_ft - b) + (sigma^2 / 2) grad_x E) |^2, but is bounded below and
loses nothing to cancellation. The sum over draws is a single weighted error: W = mean_i E_i, sum_i E_i a_i / sum_i E_i.

With sigma_t^2 / 2 = (1 - t) / t the tuned drift is that of the tilted law. Two displacements have the right mean then,

    pathwise  a_i = (1 - t) / t * grad_x r(x_1^i(x)),         score  a_i = (x_1^i - m) / (1 - t),

m = x + (1 - t) b = E[x_1 | x]; grad_x log p(x_1 | x) = t (x_1 - m) / (1 - t)^2 makes them one in mean. (The mean of the
other draws would not do for m: with c_i it depends on the same draws, which tilts the product.) The score form needs no
gradient of the reward, and its noise falls with the posterior's width; the pathwise form is quiet where the reward
hardly bends across the posterior, and inherits the tails of the map's Jacobian where it does.

Where a reward is so strong that hardly any draw is a good one, E is exact and nearly always zero. Then the anchor of
the state helps: a sample x_1^0 of the tilted law, of which x is the noised form, as one more candidate. With w =
softmax(r) over all N + 1 of them

    sum_i w_i | b_ft - (x_1^i - x) / (1 - t) |^2

is least at the same drift, for any number of draws: given x, the anchor is a sample of the tilted posterior, and
importance sampling that is conditioned on one such sample is unbiased, though self-normalised (Andrieu et al. 2010;
Cardoso et al. 2022). No weight exceeds one. What it rests on is the law of the anchors (`chain.TiltedChains`), where
the form above holds at any state by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.finetuning.targets import Anchors, Drift, DriftTargets, TuningMethod
from mfm_ray.finetuning.tilt import Tilt
from mfm_ray.flow_map import require_at_least_one
from mfm_ray.interpolants import LinearInterpolant, expand_time
from mfm_ray.noise import Noise, Stream

ESTIMATORS = ("pathwise", "score", "mixed")
BASELINES = ("anchored", "leave_one_out", "none")


class RewardMatching(TuningMethod):
    """MFM-FT.

    num_draws: posterior draws of each state. baseline: how weights are kept in range. "anchored": they are normalised
    over the draws and the anchor; exact for anchors that follow the tilted law, in the score form. "leave_one_out": c_i
    is the log-mean-exp of the rewards of the other draws and of the anchor, but at least log Z, which bounds the
    weights by exp(max r) / Z; exact at every state by itself, since c_i does not look at draw i. "none": c = 0.
    estimator: "score", "pathwise", or "mixed", which weighs the score form by 1 - t^2: wide posteriors by their draws,
    narrow ones by the reward's slope. diffusion: sigma_t^2 / 2 as a constant in the place of (1 - t) / t, for the
    pathwise form alone; the fixed point is then b + diffusion * grad V_t, not the tilted law's drift. max_time: t is
    uniform on [1 - max_time, max_time].

    ValueError naming the argument for one that is out of range or does not fit another.
    """

    def __init__(
        self,
        *,
        num_draws: int = 4,
        baseline: str = "anchored",
        estimator: str = "score",
        diffusion: float | None = None,
        max_time: float = 0.998,
    ) -> None:
        require_at_least_one(num_draws=num_draws)
        require(estimator in ESTIMATORS, "estimator", estimator, f"one of {', '.join(ESTIMATORS)}")
        require(baseline in BASELINES, "baseline", baseline, f"one of {', '.join(BASELINES)}")
        require(0.5 < max_time < 1, "max_time", max_time, "a number in (0.5, 1)")
        if baseline == "anchored":
            require(estimator == "score", "estimator", estimator, "score with baseline=anchored")
        if diffusion is not None:
            require(diffusion > 0, "diffusion", diffusion, "a number above 0, or null for (1 - t) / t")
            require(estimator == "pathwise", "diffusion", diffusion, "null unless estimator=pathwise")
        self.num_draws, self.estimator, self.baseline = num_draws, estimator, baseline
        self.diffusion, self.max_time = diffusion, max_time
        self.needs_gradient = estimator != "score"

    def targets(self, tilt: Tilt, anchors: Anchors, noise: Noise, *, drift: Drift | None = None) -> DriftTargets:
        t = uniform_times(noise, self.max_time)
        x_t = LinearInterpolant().sample(noise.fold_in(Stream.OUTER).normal(*anchors.x1.shape[1:]), anchors.x1, t).x_t
        return self.at(tilt, x_t, t, anchors, noise)

    def at(self, tilt: Tilt, x_t: Tensor, t: Tensor, anchors: Anchors, noise: Noise) -> DriftTargets:
        """Targets at given states (B, *event) and times (B,), with draws of their own."""
        made = self._anchored if self.baseline == "anchored" else self._weighted
        return made(tilt, x_t, t, anchors, noise)

    def _anchored(self, tilt: Tilt, x_t: Tensor, t: Tensor, anchors: Anchors, noise: Noise) -> DriftTargets:
        draws = tilt.draws(x_t, t, anchors.label, noise, num_draws=self.num_draws, coefficients=None)
        rewards = torch.cat([anchors.reward.to(draws.rewards).unsqueeze(1), draws.rewards], dim=1)
        candidates = torch.cat([anchors.x1.unsqueeze(1), draws.x1], dim=1)
        shares = rewards.softmax(1)
        mean = torch.einsum("bk,bk...->b...", shares.to(candidates), candidates)
        picked, reward = pick_next(draws.x1, draws.rewards, anchors, noise)
        return DriftTargets(
            x_t=x_t,
            t=t,
            label=anchors.label,
            target=(mean - x_t) / expand_time(1 - t, x_t),
            weight=torch.ones_like(t),
            reward=draws.rewards.mean(1).float(),
            effective_share=(1 / shares.square().sum(1) / (self.num_draws + 1)).float(),
            next_x1=picked,
            next_reward=reward,
        )

    def _weighted(self, tilt: Tilt, x_t: Tensor, t: Tensor, anchors: Anchors, noise: Noise) -> DriftTargets:
        share = self._score_share(t)
        weigh = _Weigh(anchors.reward if self.baseline == "leave_one_out" else None, tilt.log_normaliser)
        draws = tilt.draws(
            x_t,
            t,
            anchors.label,
            noise,
            num_draws=self.num_draws,
            coefficients=(lambda rewards: weigh(rewards).softmax(1)) if self.needs_gradient else None,
        )
        log_weights = weigh(draws.rewards)
        shares = log_weights.softmax(1)
        base = tilt.base_drift(x_t, t, anchors.label)
        shift = torch.zeros_like(base)
        if self.estimator != "pathwise":
            shift = shift + expand_time(share, base) * self._score_shift(draws.x1, shares, x_t, base, t)
        if draws.gradient is not None:
            half_diffusion = (1 - t) / t if self.diffusion is None else torch.full_like(t, self.diffusion)
            shift = shift + expand_time((1 - share) * half_diffusion, base) * draws.gradient.float()
        weight = log_weights.logsumexp(1).exp() / self.num_draws
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"reward: exp of {float(draws.rewards.max()):.4g} is not finite; expected a smaller reward_multiplier "
                "or method.baseline=leave_one_out"
            )
        picked, reward = pick_next(draws.x1, draws.rewards, anchors, noise)
        return DriftTargets(
            x_t=x_t,
            t=t,
            label=anchors.label,
            target=base + shift,
            weight=weight.float(),
            reward=draws.rewards.mean(1).float(),
            effective_share=(1 / shares.square().sum(1) / self.num_draws).float(),
            next_x1=picked,
            next_reward=reward,
        )

    def _score_share(self, t: Tensor) -> Tensor:
        """How much of the displacement is the score form's, (B,)."""
        return {"pathwise": torch.zeros_like(t), "score": torch.ones_like(t), "mixed": 1 - t**2}[self.estimator]

    def _score_shift(self, x1: Tensor, shares: Tensor, x_t: Tensor, base: Tensor, t: Tensor) -> Tensor:
        """sum_i w_i (x_1^i - m) / (1 - t), (B, *event), m = x + (1 - t) b."""
        tilted = torch.einsum("bk,bk...->b...", shares.to(x1), x1)
        return (tilted - x_t) / expand_time(1 - t, x_t) - base


class _Weigh:
    """From rewards (B, N) float64 to log E_i = r_i - c_i, (B, N)."""

    def __init__(self, anchor_reward: Tensor | None, log_normaliser: float) -> None:
        self._anchor, self._log_normaliser = anchor_reward, log_normaliser

    def __call__(self, rewards: Tensor) -> Tensor:
        if self._anchor is None:
            return rewards
        baseline = leave_one_out(rewards, self._anchor.to(rewards))
        return rewards - torch.logaddexp(baseline, torch.full_like(baseline, self._log_normaliser))


def leave_one_out(rewards: Tensor, anchor: Tensor) -> Tensor:
    """c_i = log-mean-exp of the rewards of all other draws and of the anchor, (B, N) from (B, N) and (B,).

    The anchor, where it follows the tilted posterior, bounds the weights; where its reward is NaN it is left out, and a
    single draw without an anchor has no baseline, c = 0.
    """
    known = ~torch.isnan(anchor)
    extra = torch.where(known, anchor, torch.full_like(anchor, -torch.inf))
    num = rewards.shape[1]
    others = rewards.unsqueeze(1).expand(-1, num, -1)
    own = torch.eye(num, dtype=torch.bool, device=rewards.device)
    rest = others.masked_fill(own, -torch.inf).logsumexp(2)
    total = torch.logaddexp(rest, extra.unsqueeze(1))
    count = (num - 1 + known.double()).unsqueeze(1)
    return torch.where(count > 0, total - count.clamp_min(1).log(), torch.zeros_like(total))


def uniform_times(noise: Noise, max_time: float) -> Tensor:
    """t uniform on [1 - max_time, max_time], (B,)."""
    low = 1 - max_time
    return low + (max_time - low) * noise.fold_in(Stream.TIME).uniform()


def pick_next(x1: Tensor, rewards: Tensor, anchors: Anchors, noise: Noise) -> tuple[Tensor, Tensor]:
    """One of the draws (B, N, *event) or the anchor itself, taken with probability ~ exp r; and its reward, (B,).

    Iterated sampling-importance resampling (Andrieu et al. 2010): where the anchor is a sample of the tilted posterior
    given x_t, so is what is picked, for any number of draws. An anchor whose reward is not known is never kept.
    """
    own = torch.where(torch.isnan(anchors.reward), torch.full_like(anchors.reward, -torch.inf), anchors.reward)
    logits = torch.cat([own.to(rewards).unsqueeze(1), rewards], dim=1)
    uniform = noise.fold_in(Stream.RESAMPLE).spread(logits.shape[1]).uniform().to(logits)
    index = (logits - torch.log(-torch.log(uniform))).argmax(1)
    rows = torch.arange(len(index), device=index.device)
    candidates = torch.cat([anchors.x1.unsqueeze(1), x1.to(anchors.x1)], dim=1)
    return candidates[rows, index], logits[rows, index]
