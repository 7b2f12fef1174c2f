"""How far the samples of each method are from the real images and from the tilted law, beside what is resolvable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_ray import metrics
from mfm_ray.data.datasets import Split
from mfm_ray.flow_map import FlowMap
from mfm_ray.protocols.annealing import Annealed, Start, anneal
from mfm_ray.protocols.comparison import Judge, MethodScore, Problem, Study, judge_features

_ENOUGH = 30.0
"""Effective samples from which the moments of a weighted pool are worth a figure."""
_KERNEL_MEMBERS = 2000
_FLOOR_SETS = 20


@dataclass(frozen=True)
class Quality:
    """Distances of one method's samples; None where the reference or the samples do not carry one.

    frechet_data: Fréchet distance of the judge's features to all training images; frechet_law, mmd_law: Fréchet and
    unbiased MMD^2 (multi-scale, of features) to chains of the tilted law; reward_w1: 1-Wasserstein distance of the
    rewards to those of the tilted law, a mean over targets; pmf: |p - w| of the classes, where w is the goal.
    """

    frechet_data: float | None = None
    frechet_law: float | None = None
    mmd_law: float | None = None
    reward_w1: float | None = None
    pmf: float | None = None

    @property
    def error(self) -> float | None:
        """The most telling distance that the problem has: of the classes, of the rewards, of the features."""
        return next((value for value in (self.pmf, self.reward_w1, self.mmd_law) if value is not None), None)


@dataclass(frozen=True)
class Law:
    """The tilted law by two independent sets of annealed chains. features: (M, F) of each; frequencies: (C,)."""

    runs: tuple[Annealed, Annealed]
    features: tuple[Tensor, Tensor]
    frequencies: Tensor

    @property
    def rewards(self) -> Tensor:
        return torch.cat([run.rewards for run in self.runs]).double()

    @property
    def all_features(self) -> Tensor:
        return torch.cat(self.features)


@dataclass(frozen=True)
class Judgement:
    """Of one study: the law where it was sampled, quality by method, and by size what the reference itself reaches.

    floors: by number of samples, the Quality that samples of the reference have (of MMD^2, the root mean square).
    """

    law: Law | None
    by_method: Mapping[str, Quality]
    floors: Mapping[int, Quality]

    def __getitem__(self, key: str) -> Quality:
        return self.by_method[key]

    def floor(self, score: MethodScore) -> Quality | None:
        return None if score.weights is not None else self.floors[len(score.features)]


@dataclass(frozen=True)
class Yardstick:
    """What all problems share: features (N, F) of the training images, and scales of the kernel from them."""

    features: Tensor
    bandwidths: Sequence[float]

    @classmethod
    def of(cls, judge: Judge, train: Split) -> Yardstick:
        features = judge_features(judge, train.data)
        return cls(features, metrics.rbf_bandwidths(features))


def sample_law(
    flow_map: FlowMap,
    judge: Judge,
    problem: Problem,
    starts: tuple[Start, Start],
    *,
    size: int,
    moves: int,
    seed: int,
    advance: Callable[[float], None],
) -> Law:
    """The law of a problem with one target, `size` chains in two independent halves."""
    assert len(problem.targets) == 1, "chains are run for one target"
    reward = problem.targets[0].reward
    first, second = (
        anneal(flow_map, reward, start, count=size // 2, final_moves=moves, seed=seed + half, advance=advance)
        for half, start in enumerate(starts)
    )
    features = (judge_features(judge, first.samples), judge_features(judge, second.samples))
    probabilities = metrics.class_probabilities(judge, torch.cat([first.samples, second.samples]))
    return Law((first, second), features, metrics.class_frequencies(probabilities))


def judge_study(study: Study, yardstick: Yardstick, law: Law | None) -> Judgement:
    exact = study.problem.exact_rewards if law is None else law.rewards
    by_method = {score.method.key: _quality(score, study.problem, yardstick, law, exact) for score in study.all_scores}
    sizes = {len(score.features): score for score in study.all_scores if score.weights is None}
    floors = {size: _floor(score, study.problem, yardstick, law, exact) for size, score in sizes.items()}
    return Judgement(law, by_method, floors)


def cheapest_as_good(study: Study, judgement: Judgement, key: str, *, among: Sequence[str]) -> MethodScore | None:
    """The method with the fewest calls among those named whose error is at most that of method `key`.

    Errors at the number of samples that `key` has (`error_at`); methods with fewer are left out. An error of `key`
    below the floor of exact samples is chance, so that the floor is then the bar.
    """
    count = len(study[key].features)
    bar, floor = judgement[key].error, judgement.floor(study[key])
    if bar is None:
        return None
    bar = max(bar, (floor.error if floor is not None else None) or 0.0)
    errors = {name: error_at(study, judgement, name, count) for name in among}
    good = [study[name] for name, error in errors.items() if error is not None and error <= bar]
    return min(good, key=lambda score: score.nfe, default=None)


def error_at(study: Study, judgement: Judgement, key: str, count: int) -> float | None:
    """`Quality.error` as `count` samples have it: the mean over disjoint groups of class proportions, which few samples
    miss by chance; other errors as they are. None with fewer samples than that.
    """
    score, wanted = study[key], study.problem.wanted
    if len(score.features) < count:
        return None
    if wanted is None or score.weights is not None:
        return judgement[key].error
    groups = score.classes.split(count)[: len(score.classes) // count]
    shares = [torch.bincount(group, minlength=len(wanted)).double() / count for group in groups]
    return sum(metrics.pmf_distance(share, wanted) for share in shares) / len(shares)


def _quality(
    score: MethodScore, problem: Problem, yardstick: Yardstick, law: Law | None, exact: Tensor | None
) -> Quality:
    weights = None if score.weights is None else score.weights.mean(0)
    enough = weights is None or score.count >= _ENOUGH
    features = score.features
    return Quality(
        frechet_data=metrics.frechet_distance(features, yardstick.features, weights=weights) if enough else None,
        frechet_law=(
            metrics.frechet_distance(features, law.all_features, weights=weights)
            if law is not None and enough
            else None
        ),
        mmd_law=_mmd(features, weights, law, yardstick) if law is not None and enough else None,
        reward_w1=None if exact is None else _reward_w1(score, exact),
        pmf=None if problem.wanted is None else metrics.pmf_distance(score.frequencies, problem.wanted),
    )


def _mmd(features: Tensor, weights: Tensor | None, law: Law, yardstick: Yardstick) -> float:
    if weights is None:
        return metrics.squared_mmd(features, law.all_features, bandwidths=yardstick.bandwidths)
    chosen = _thinned(weights)
    distance = metrics.weighted_squared_mmd(
        features[chosen], weights[chosen].unsqueeze(0), law.all_features, bandwidths=yardstick.bandwidths
    )
    return float(distance[0])


def _thinned(weights: Tensor) -> Tensor:
    """Rows of at most 2,000 members at equal intervals of those that carry any weight worth naming."""
    rows = (weights > 1e-9 * weights.max()).nonzero().flatten()
    if len(rows) <= _KERNEL_MEMBERS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, _KERNEL_MEMBERS, dtype=torch.float64).round().long()]


def _reward_w1(score: MethodScore, exact: Tensor) -> float:
    each = [
        metrics.wasserstein_1(rewards, exact, weights=None if score.weights is None else score.weights[target])
        for target, rewards in enumerate(score.rewards)
    ]
    return sum(each) / len(each)


def _floor(
    score: MethodScore, problem: Problem, yardstick: Yardstick, law: Law | None, exact: Tensor | None
) -> Quality:
    """What as many samples of the references themselves reach, by random subsets."""
    generator, count = torch.Generator().manual_seed(0), len(score.features)

    def subset(rows: Tensor, size: int) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size]]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    data = [metrics.frechet_distance(subset(yardstick.features, count), yardstick.features) for _ in range(_FLOOR_SETS)]
    frechet = mmd = w1 = None
    if law is not None:
        pairs = [(subset(law.features[i % 2], count), law.features[1 - i % 2]) for i in range(_FLOOR_SETS)]
        frechet = mean([metrics.frechet_distance(a, b) for a, b in pairs])
        squares = [metrics.squared_mmd(a, b, bandwidths=yardstick.bandwidths) ** 2 for a, b in pairs]
        mmd = math.sqrt(mean(squares))
    if exact is not None:
        a_target = score.rewards.shape[1]
        w1 = mean([metrics.wasserstein_1(subset(exact, a_target), exact) for _ in range(_FLOOR_SETS)])
    pmf = None if problem.wanted is None else metrics.pmf_floor(problem.wanted, count)
    return Quality(mean(data), frechet, mmd, w1, pmf)
