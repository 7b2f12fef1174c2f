"""Steering methods side by side on one problem: reward, network calls, confidence of a judge, class frequencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.flow_map import FlowMap
from mfm_ray.padding import ROW_MULTIPLE
from mfm_ray.samplers import Samples, sample
from mfm_ray.steering import DPS, GradientFreeGuidance, GradientGuidance, PosteriorResampling, Reward, Steering, score

Judge = Callable[[Tensor], Tensor]
"""Logits (N, num_classes) from images (N, *event) in data units."""

UNSTEERED = "unsteered"
SINGLE_DRAW = "mfm_g"
GRADIENT_FREE = "mfm_gf"
RESAMPLING = "resampling"
BASELINE = "dps"


@dataclass(frozen=True)
class Method:
    """A way to get a sample. `key` names its metrics, `family` its colour (`reporting.charts.COLOURS`).

    num_steps: of its own, where it does not make the steps of all others.
    """

    key: str
    label: str
    family: str
    num_steps: int | None = None


def best_of(n: int) -> Method:
    return Method(f"best_of_{n}", f"Best-of-{n:,}", "best_of_n")


def gradient(num_draws: int) -> Method:
    """MFM-G; the one with a single draw a step is the plain `mfm_g`."""
    if num_draws == 1:
        return Method(SINGLE_DRAW, "MFM-G, 1 draw", "mfm_g")
    return Method(f"mfm_g_{num_draws}", f"MFM-G, {num_draws} draws", "mfm_g")


def gradient_free(num_draws: int) -> Method:
    return Method(GRADIENT_FREE, f"MFM-GF, {num_draws} draws", "mfm_gf")


@dataclass(frozen=True)
class Target:
    """One thing to steer towards: its reward, a word for it, and pictures (*event) that explain it by name."""

    reward: Reward
    title: str
    pictures: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A reward with one or more targets; methods are compared over all of them.

    exact_reward: mean and deviation of the reward under the exact tilted law, where they are known.
    """

    name: str
    title: str
    explanation: str
    targets: tuple[Target, ...]
    exact_reward: tuple[float, float] | None = None


@dataclass(frozen=True)
class Pool:
    """Unsteered samples for all problems. images: (M, *event) in data units; probabilities: (M, C) of the judge."""

    images: Tensor
    probabilities: Tensor
    nfe: float

    def __len__(self) -> int:
        return self.images.shape[0]


@dataclass(frozen=True)
class MethodScore:
    """What a method reached on each of T targets.

    nfe: network and reward calls for one returned image, backward passes counted. reward_mean, reward_std,
    confidence: (T,) float64 over its samples. frequencies: (C,) of the judge's classes over all targets.
    images: (T, S, *event), some of the samples, with their image_rewards (T, S).
    """

    method: Method
    nfe: float
    reward_mean: Tensor
    reward_std: Tensor
    confidence: Tensor
    frequencies: Tensor
    images: Tensor
    image_rewards: Tensor

    @property
    def reward(self) -> float:
        return float(self.reward_mean.mean())

    @property
    def spread(self) -> float:
        """Standard deviation of the reward within a target, averaged over targets."""
        return float(self.reward_std.mean())


@dataclass(frozen=True)
class TiltedLaw:
    """The law that steering aims at, p(x) exp r(x), by reweighting the pool; good as far as its sample size goes."""

    reward: float
    spread: float
    frequencies: Tensor
    sample_size: float


@dataclass(frozen=True)
class Study:
    """All methods on one problem, in the order in which they are shown; the tilted law where the pool reaches it."""

    problem: Problem
    scores: tuple[MethodScore, ...]
    tilted: TiltedLaw

    def __getitem__(self, key: str) -> MethodScore:
        return next(score for score in self.scores if score.method.key == key)

    def class_distance(self, key: str) -> float:
        """Total variation between a method's class frequencies and those of the tilted law, 0 to 1."""
        return metrics.total_variation(self[key].frequencies, self.tilted.frequencies)

    def wins(self, *, over: str) -> int:
        """Targets on which MFM-G with one draw has the higher mean reward."""
        return int((self[SINGLE_DRAW].reward_mean > self[over].reward_mean).sum())


@dataclass(frozen=True)
class SideBySide:
    """The rewards of T targets as one, for a batch whose rows are T equal consecutive parts."""

    rewards: Sequence[Reward]
    name: str

    def __call__(self, samples: Tensor) -> Tensor:
        assert samples.shape[0] % len(self.rewards) == 0, "rows must divide evenly over the targets"
        parts = samples.chunk(len(self.rewards))
        return torch.cat([reward(part) for reward, part in zip(self.rewards, parts, strict=True)])


def make_pool(
    flow_map: FlowMap,
    judge: Judge,
    *,
    size: int,
    num_steps: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Pool:
    drawn = sample(flow_map, num_samples=size, num_steps=num_steps, seed=seed, batch_size=1000, progress=progress)
    return Pool(drawn.images, metrics.class_probabilities(judge, drawn.images), drawn.nfe)


def score_best_of(problem: Problem, pool: Pool, n: int, *, shown: int) -> MethodScore:
    """Best-of-n as the exact average over all groups of the pool; the pictures are winners of disjoint groups."""
    rewards = pool_rewards(problem, pool)
    chance = metrics.best_of_n_probabilities(rewards, n)
    moments = metrics.weighted_moments(rewards, chance)
    winners = _winners(rewards, n, shown)
    confidence = metrics.class_confidence(pool.probabilities).double()
    return MethodScore(
        method=best_of(n),
        nfe=n * (pool.nfe + 1),
        reward_mean=moments.mean,
        reward_std=moments.std,
        confidence=(chance * confidence).sum(1),
        frequencies=metrics.class_frequencies(pool.probabilities, chance.mean(0)),
        images=pool.images[winners],
        image_rewards=rewards.gather(1, winners),
    )


def score_unsteered(problem: Problem, pool: Pool, *, shown: int) -> MethodScore:
    """The pool itself: Best-of-1 without the call that scores it."""
    first = score_best_of(problem, pool, 1, shown=shown)
    return replace(first, method=Method(UNSTEERED, "Unsteered", "unsteered"), nfe=pool.nfe)


def score_steered(
    problem: Problem,
    method: Method,
    steering: Callable[[Reward], Steering],
    flow_map: FlowMap,
    judge: Judge,
    *,
    samples_per_target: int,
    num_steps: int,
    dynamics: str,
    seed: int,
    shown: int,
) -> MethodScore:
    """Steered samples of all targets in one batch."""
    count = len(problem.targets)
    reward = SideBySide([target.reward for target in problem.targets], problem.name)
    rows = count * samples_per_target
    # the sampler pads other batches, and rows would no longer fall to their targets
    assert rows % ROW_MULTIPLE == 0, "samples_per_target is a multiple of 4"
    drawn = sample(
        flow_map,
        num_samples=rows,
        steering=steering(reward),
        num_steps=method.num_steps or num_steps,
        dynamics=dynamics,
        seed=seed,
        batch_size=rows,
    )
    return _score_samples(method, drawn, judge, count, shown)


def tilted_law(problem: Problem, pool: Pool) -> TiltedLaw:
    rewards = pool_rewards(problem, pool)
    weights = metrics.tilting_weights(rewards)
    moments = metrics.weighted_moments(rewards, weights)
    return TiltedLaw(
        reward=float(moments.mean.mean()),
        spread=float(moments.std.mean()),
        frequencies=metrics.class_frequencies(pool.probabilities, weights.mean(0)),
        sample_size=float(metrics.effective_sample_size(weights).min()),
    )


def pool_rewards(problem: Problem, pool: Pool) -> Tensor:
    """Rewards of the pool for each target, (T, M)."""
    with torch.no_grad():
        return torch.stack([score(target.reward, pool.images) for target in problem.targets])


def steered_methods(
    num_draws: Sequence[int], num_draws_gradient_free: int, *, num_draws_resampling: int, resampling_steps: int
) -> dict[Method, Callable[[Reward], Steering]]:
    """The steered methods of a comparison: MFM-G, MFM-GF, posterior resampling in few steps, and the baseline DPS."""
    steered: dict[Method, Callable[[Reward], Steering]] = {
        gradient(draws): partial(GradientGuidance, num_draws=draws) for draws in num_draws
    }
    steered[gradient_free(num_draws_gradient_free)] = partial(GradientFreeGuidance, num_draws=num_draws_gradient_free)
    resampling = Method(RESAMPLING, f"Resampling, {num_draws_resampling} draws", "resampling", resampling_steps)
    steered[resampling] = partial(PosteriorResampling, num_draws=num_draws_resampling)
    steered[Method(BASELINE, "DPS", "muted")] = DPS
    return steered


def _winners(rewards: Tensor, n: int, shown: int) -> Tensor:
    """Pool members that win disjoint groups of n, (T, at most `shown`); each target begins with another group."""
    targets, size = rewards.shape
    groups = size // n
    best = rewards[:, : groups * n].unflatten(1, (groups, n)).argmax(2) + n * torch.arange(groups)
    turn = (torch.arange(groups) + torch.arange(targets).unsqueeze(1)) % groups
    return best.gather(1, turn)[:, :shown]


def _score_samples(method: Method, drawn: Samples, judge: Judge, count: int, shown: int) -> MethodScore:
    assert drawn.rewards is not None
    probabilities = metrics.class_probabilities(judge, drawn.images)
    rewards = drawn.rewards.double().unflatten(0, (count, -1))
    return MethodScore(
        method=method,
        nfe=drawn.nfe,
        reward_mean=rewards.mean(1),
        reward_std=rewards.std(1),
        confidence=metrics.class_confidence(probabilities).double().unflatten(0, (count, -1)).mean(1),
        frequencies=metrics.class_frequencies(probabilities),
        images=drawn.images.unflatten(0, (count, -1))[:, :shown],
        image_rewards=rewards[:, :shown],
    )
