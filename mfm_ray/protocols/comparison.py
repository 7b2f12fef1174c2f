"""Steering methods side by side on one problem: reward, network calls, confidence of a judge, class frequencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.dynamics import Grid
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.padding import ROW_MULTIPLE
from mfm_ray.presets import PRESETS
from mfm_ray.samplers import Samples, refine, sample
from mfm_ray.steering import DPS, GradientFreeGuidance, GradientGuidance, PosteriorResampling, Reward, Steering, score

Judge = Callable[[Tensor], Tensor]
"""Logits (N, num_classes) from images (N, *event) in data units; with `features`, what distances are taken in."""

UNSTEERED = "unsteered"
SINGLE_DRAW = "mfm_g"
GRADIENT_FREE = "mfm_gf"
RESAMPLING = "resampling"
BASELINE = "dps"
OFFICIAL = "official"
PROPORTIONS = "proportions"


@dataclass(frozen=True)
class Method:
    """A way to get a sample. `key` names its metrics, `family` its colour (`reporting.charts.COLOURS`).

    num_steps, dynamics, grid, preset: of its own, where it does not take those of all others.
    line: the curve on which it is a point. num_draws: posterior draws a step, where it has a choice.
    """

    key: str
    label: str
    family: str
    num_steps: int | None = None
    dynamics: str | None = None
    grid: Grid | None = None
    preset: str | None = None
    line: str = ""
    num_draws: int | None = None


def best_of(n: int, recipe: PoolRecipe | None = None) -> Method:
    """The plain `best_of_n` is over the pool that all problems share."""
    if recipe is None:
        return Method(f"best_of_{n}", f"Best-of-{n:,}", "best_of_n")
    label = f"Best-of-N, {recipe.label}"
    return Method(f"{recipe.key}_best_of_{n}", f"Best-of-{n:,}, {recipe.label}", "best_of_n", line=label)


def gradient(num_draws: int) -> Method:
    """MFM-G; the one with a single draw a step is the plain `mfm_g`."""
    key = SINGLE_DRAW if num_draws == 1 else f"{SINGLE_DRAW}_{num_draws}"
    label = f"MFM-G, {draws_in_words(num_draws)}"
    return Method(key, label, "mfm_g", line=label, num_draws=num_draws)


def gradient_free(num_draws: int) -> Method:
    """MFM-GF; a comparison has one of them."""
    label = f"MFM-GF, {draws_in_words(num_draws)}"
    return Method(GRADIENT_FREE, label, "mfm_gf", line=label, num_draws=num_draws)


def resampling(num_draws: int, steps: int) -> Method:
    """Posterior resampling, whose curve is over draws: it needs few steps."""
    label = f"Resampling, {draws_in_words(num_draws)}"
    return Method(RESAMPLING, label, "resampling", steps, line=f"Resampling, {steps} steps", num_draws=num_draws)


def draws_in_words(count: int) -> str:
    return f"{count} draw{'s' if count > 1 else ''}"


@dataclass(frozen=True)
class Target:
    """One thing to steer towards: its reward, a word for it, and pictures (*event) that explain it by name."""

    reward: Reward
    title: str
    pictures: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A reward with one or more targets; methods are compared over all of them.

    exact_reward: mean and deviation of the reward under the exact tilted law, where they are known; exact_rewards:
    equally likely values of it (Q,). wanted: class frequencies (C,) that are the goal, where they are.
    """

    name: str
    title: str
    explanation: str
    targets: tuple[Target, ...]
    exact_reward: tuple[float, float] | None = None
    exact_rewards: Tensor | None = None
    wanted: Tensor | None = None


@dataclass(frozen=True)
class PoolRecipe:
    """How unsteered samples are made: `num_steps` of the ODE, or of refinement by the map."""

    num_steps: int
    refined: bool = False

    @property
    def key(self) -> str:
        return f"{'refine' if self.refined else 'ode'}_{self.num_steps}"

    @property
    def label(self) -> str:
        return f"{steps_in_words(self.num_steps)}{'' if self.refined else ' (ODE)'}"


@dataclass(frozen=True)
class Pool:
    """Unsteered samples for all problems.

    images: (M, *event) in data units; probabilities: (M, C) of the judge, features: (M, F) of it.
    """

    images: Tensor
    probabilities: Tensor
    features: Tensor
    nfe: float

    def __len__(self) -> int:
        return self.images.shape[0]


@dataclass(frozen=True)
class MethodScore:
    """What a method reached on each of T targets.

    nfe: network and reward calls for one returned image, backward passes counted. reward_mean, reward_std,
    confidence: (T,) float64 over its samples. frequencies: (C,) of the judge's classes over all targets.
    images: (T, S, *event), some of the samples, with their image_rewards (T, S). rewards: (T, m) of all samples and
    samples (n, *event), their features (n, F) and classes (n,); a pool's are shared by all targets, and have weights
    (T, m).
    """

    method: Method
    nfe: float
    reward_mean: Tensor
    reward_std: Tensor
    confidence: Tensor
    frequencies: Tensor
    images: Tensor
    image_rewards: Tensor
    rewards: Tensor
    samples: Tensor
    features: Tensor
    classes: Tensor
    weights: Tensor | None = None

    @property
    def count(self) -> float:
        """Samples behind the figures of the law; the effective number of a weighted pool."""
        if self.weights is None:
            return float(len(self.features))
        return float(metrics.effective_sample_size(self.weights.mean(0)))

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
    """All methods on one problem, in the order in which they are shown; the tilted law where the pool reaches it.

    further: scores beside the comparison's own, such as points of curves and the official recipe.
    """

    problem: Problem
    scores: tuple[MethodScore, ...]
    tilted: TiltedLaw
    further: tuple[MethodScore, ...] = ()

    def __getitem__(self, key: str) -> MethodScore:
        return next(score for score in self.all_scores if score.method.key == key)

    @property
    def all_scores(self) -> tuple[MethodScore, ...]:
        return (*self.scores, *self.further)

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
    refined: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pool:
    """Unsteered samples by the ODE, or by refinement steps of the map itself."""
    if refined:
        images, nfe = refine(flow_map, num_samples=size, num_steps=num_steps, seed=seed), float(num_steps)
    else:
        drawn = sample(flow_map, num_samples=size, num_steps=num_steps, seed=seed, batch_size=1000, progress=progress)
        images, nfe = drawn.images, drawn.nfe
    return Pool(images, metrics.class_probabilities(judge, images), judge_features(judge, images), nfe)


def judge_features(judge: Judge, images: Tensor) -> Tensor:
    """Features (N, F) of the judge; its logits where it has none."""
    if isinstance(judge, DigitClassifier):
        return metrics.classifier_features(judge, images)
    with torch.no_grad():
        return judge(images)


def score_best_of(
    problem: Problem, pool: Pool, n: int, *, shown: int, method: Method | None = None, rewards: Tensor | None = None
) -> MethodScore:
    """Best-of-n as the exact average over all groups of the pool; the pictures are winners of disjoint groups.

    rewards: those of the pool (T, M), where they are known already.
    """
    rewards = pool_rewards(problem, pool) if rewards is None else rewards
    chance = metrics.best_of_n_probabilities(rewards, n)
    moments = metrics.weighted_moments(rewards, chance)
    winners = _winners(rewards, n, shown)
    confidence = metrics.class_confidence(pool.probabilities).double()
    return MethodScore(
        method=method or best_of(n),
        nfe=n * (pool.nfe + 1),
        reward_mean=moments.mean,
        reward_std=moments.std,
        confidence=(chance * confidence).sum(1),
        frequencies=metrics.class_frequencies(pool.probabilities, chance.mean(0)),
        images=pool.images[winners],
        image_rewards=rewards.gather(1, winners),
        rewards=rewards,
        samples=pool.images,
        features=pool.features,
        classes=pool.probabilities.argmax(1),
        weights=chance,
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
        num_steps=steps_of(method, num_steps),
        dynamics=None if method.preset else method.dynamics or dynamics,
        preset=method.preset,
        grid=method.grid,
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


def steps_of(method: Method, default: int) -> int:
    """Steps that a method makes where all others make `default`."""
    if method.preset is not None:
        return method.num_steps or PRESETS[method.preset].num_steps
    return method.num_steps or default


Steered = dict[Method, Callable[[Reward], Steering]]
"""Methods of a comparison with what makes them from a reward."""


def steered_methods(
    num_draws: Sequence[int], num_draws_gradient_free: int, *, num_draws_resampling: int, resampling_steps: int
) -> Steered:
    """The steered methods of a comparison: MFM-G, MFM-GF, posterior resampling in few steps, and the baseline DPS."""
    steered: Steered = {gradient(draws): partial(GradientGuidance, num_draws=draws) for draws in num_draws}
    steered[gradient_free(num_draws_gradient_free)] = partial(GradientFreeGuidance, num_draws=num_draws_gradient_free)
    few_steps = resampling(num_draws_resampling, resampling_steps)
    steered[few_steps] = partial(PosteriorResampling, num_draws=num_draws_resampling)
    steered[Method(BASELINE, "DPS", "muted", line="DPS")] = DPS
    return steered


def at_steps(steered: Steered, step_counts: Sequence[int]) -> Steered:
    """Each of the methods with each number of steps."""
    return {
        replace(method, key=f"{method.key}_k{k}", label=f"{method.label}, {steps_in_words(k)}", num_steps=k): steering
        for method, steering in steered.items()
        for k in step_counts
    }


def steps_in_words(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def over_draws(num_draws: Sequence[int], steps: int, resampling_steps: int) -> Steered:
    """MFM-G and MFM-GF of `steps` steps, and resampling of its own, by number of draws: on no curve over calls."""
    guided: Steered = {}
    for draws in num_draws:
        free = replace(gradient_free(draws), key=f"{GRADIENT_FREE}_{draws}")
        guided[replace(gradient(draws), key=f"{SINGLE_DRAW}_{draws}")] = partial(GradientGuidance, num_draws=draws)
        guided[free] = partial(GradientFreeGuidance, num_draws=draws)
    few = at_steps(resampling_over_draws(num_draws, resampling_steps), [resampling_steps])
    return {
        replace(method, key=f"{PROPORTIONS}_{method.key}", line=""): steering
        for method, steering in (at_steps(guided, [steps]) | few).items()
    }


def resampling_over_draws(num_draws: Sequence[int], steps: int) -> Steered:
    """Posterior resampling with each number of draws, points of the curve of the plain one."""
    return {
        replace(resampling(draws, steps), key=f"{RESAMPLING}_{draws}"): partial(PosteriorResampling, num_draws=draws)
        for draws in num_draws
    }


def official_methods(num_draws: Sequence[int]) -> Steered:
    """The paper's recipe of MFM-G whole (`preset="paper"`), and the same without its rescaling of the gradient."""
    paper = PRESETS["paper"]
    methods: Steered = {}
    for draws in num_draws:
        name = f"official, {draws_in_words(draws)}"
        methods[Method(f"{OFFICIAL}_{draws}", name, "muted", preset="paper")] = partial(
            GradientGuidance, num_draws=draws
        )
        plain = Method(
            f"{OFFICIAL}_{draws}_plain",
            f"{name}, not rescaled",
            "muted",
            num_steps=paper.num_steps,
            dynamics=paper.dynamics,
            grid=paper.grid,
        )
        methods[plain] = partial(GradientGuidance, num_draws=draws, trust_region=None, estimator="pathwise")
    return methods


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
        rewards=rewards,
        samples=drawn.images,
        features=judge_features(judge, drawn.images),
        classes=probabilities.argmax(1),
    )
