"""What a sweep decides: the Pareto front of its trials, its hypervolume and knee, and presets to sample and serve by.

Objectives are compared on one scale, 0 for the worst and 1 for the best measured trial; costs by their logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Metrics = Mapping[str, float]
COSTS = ("nfe", "seconds")
HALF_WIDTH = "_half_width"
"""Ending of the metric that holds half of another one's 95 percent interval."""


@dataclass(frozen=True)
class Front:
    """trials: indices on the front, the cheapest first; hypervolume: share of the unit box that they dominate, its
    corners the worst and the best values of each objective; knee: the trial closest to the best of everything; bounds:
    worst and best by objective; hacked: trials, on the front or not, whose judge is worse than a less rewarded one's.
    """

    objectives: dict[str, str]
    trials: list[int]
    hypervolume: float
    knee: int
    bounds: dict[str, tuple[float, float]]
    hacked: list[int]


def find_front(
    finished: Mapping[int, Metrics], objectives: Mapping[str, str], *, unfinished: Sequence[Metrics] = ()
) -> Front | None:
    """The front of trials by index; None when none has all objectives. objectives: metric to "max" or "min".

    unfinished: of pruned trials, which only count for the scale.
    """
    rows = {index: row for index, row in finished.items() if all(name in row for name in objectives)}
    if not rows:
        return None
    measured = [*rows.values(), *(row for row in unfinished if all(name in row for name in objectives))]
    bounds = {name: _bounds([row[name] for row in measured], mode) for name, mode in objectives.items()}
    scores = {
        index: tuple(_score(row[name], *bounds[name], is_cost=name in COSTS) for name in objectives)
        for index, row in rows.items()
    }
    front = [index for index in scores if not any(_dominates(scores[other], scores[index]) for other in scores)]
    front.sort(key=lambda index: (cost_of(rows[index]), index))
    return Front(
        objectives=dict(objectives),
        trials=front,
        hypervolume=hypervolume([scores[index] for index in front]),
        knee=min(front, key=lambda index: (math.dist(scores[index], [1.0] * len(objectives)), index)),
        bounds=bounds,
        hacked=reward_hacking(rows, optimised=_optimised(objectives)),
    )


def cost_of(row: Metrics) -> float:
    """What a trial is sorted by: network calls an image; of a training its seconds."""
    return row.get("nfe", row.get("seconds", 0.0))


def hypervolume(scores: Sequence[Sequence[float]]) -> float:
    """Volume of the union of the boxes from the origin to each point, exactly, by slices of the last objective."""
    if not scores:
        return 0.0
    if len(scores[0]) == 1:
        return max(score[0] for score in scores)
    volume, upper = 0.0, sorted({score[-1] for score in scores}, reverse=True)
    for level, below in zip(upper, [*upper[1:], 0.0], strict=True):
        volume += (level - below) * hypervolume([score[:-1] for score in scores if score[-1] >= level])
    return volume


def judge_names(row: Metrics, optimised: str = "reward") -> list[str]:
    """Metrics that were never optimised and say whether a sample is still good: judges, else the confidence."""
    judges = [name for name in row if name.startswith("judge.") and not name.endswith(HALF_WIDTH)]
    judges = [name for name in judges if name != optimised]
    return judges or [name for name in ("confidence",) if name in row]


def reward_hacking(rows: Mapping[int, Metrics], *, optimised: str = "reward") -> list[int]:
    """Trials that have clearly more reward and clearly less of a judge than another one: intervals apart in both.

    optimised: metric of the reward, which is no judge of itself.
    """
    return [
        index
        for index, row in rows.items()
        if any(
            _clearly_above(row, other, optimised)
            and any(_clearly_above(other, row, name) for name in judge_names(row, optimised))
            for other in rows.values()
        )
    ]


def choose_presets(finished: Mapping[int, Metrics], front: Front) -> dict[str, int]:
    """Trials for low, medium and high: the cheapest of the front, the knee, and the most rewarded that is not hacked.

    Costs rise from low to high: where the best unhacked trial is no dearer than the knee, high is the knee. Where no
    objective is a cost, what trials happen to cost orders nothing: low is the least of the first objective.
    """
    name, mode = next(iter(front.objectives.items()))
    sign = 1.0 if mode == "max" else -1.0
    trusted = [index for index in front.trials if index not in front.hacked] or front.trials
    best = max(trusted, key=lambda index: sign * finished[index][name])
    is_priced = any(cost in front.objectives for cost in COSTS)
    ordered = trusted if is_priced else sorted(trusted, key=lambda index: sign * finished[index][name])
    low = ordered[0]
    knee = front.knee if front.knee in trusted else ordered[len(ordered) // 2]
    if not is_priced:
        return {"low": low, "medium": knee, "high": best}
    high = best if cost_of(finished[best]) >= cost_of(finished[knee]) else knee
    return {"low": low, "medium": knee, "high": high}


def _optimised(objectives: Mapping[str, str]) -> str:
    """The first objective where it is a judge (the reward without the weight that is swept), else the reward."""
    first = next(iter(objectives))
    return first if first.startswith("judge.") else "reward"


def _bounds(values: Sequence[float], mode: str) -> tuple[float, float]:
    """The worst and the best value."""
    return (min(values), max(values)) if mode == "max" else (max(values), min(values))


def _score(value: float, worst: float, best: float, *, is_cost: bool) -> float:
    if is_cost and min(worst, best) > 0:
        value, worst, best = math.log(value), math.log(worst), math.log(best)
    return 1.0 if worst == best else (value - worst) / (best - worst)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and one != other


def _clearly_above(one: Metrics, other: Metrics, name: str) -> bool:
    if name not in one or name not in other:
        return False
    widths = one.get(name + HALF_WIDTH, 0.0) + other.get(name + HALF_WIDTH, 0.0)
    return one[name] - other[name] > widths
