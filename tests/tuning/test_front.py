"""The front of a sweep, its hypervolume and knee, reward hacking, and presets."""

import itertools

import pytest
import torch

from mfm_ray.tuning.front import choose_presets, find_front, hypervolume, reward_hacking

MAX_MIN = {"reward": "max", "nfe": "min"}


def trial(reward, nfe, **others):
    return {"reward": float(reward), "reward_half_width": 0.1, "nfe": float(nfe), **others}


def test_the_front_is_what_no_other_trial_beats_in_everything():
    trials = {0: trial(1, 10), 1: trial(2, 100), 2: trial(0.5, 50), 3: trial(3, 1000), 4: trial(2, 200)}
    front = find_front(trials, MAX_MIN)
    assert front is not None
    assert front.trials == [0, 1, 3]
    assert front.bounds == {"reward": (0.5, 3.0), "nfe": (1000.0, 10.0)}
    assert front.knee == 1


def test_pruned_trials_set_the_scale_and_are_never_on_the_front():
    finished, pruned = {0: trial(1, 10), 1: trial(2, 100)}, [trial(0, 10), trial(9, 10)]
    front = find_front(finished, MAX_MIN, unfinished=pruned)
    assert front is not None
    assert front.trials == [0, 1]
    assert front.bounds["reward"] == (0.0, 9.0)
    assert front.hypervolume == pytest.approx(1 / 9)


def test_equal_trials_are_all_on_the_front():
    front = find_front({0: trial(1, 10), 1: trial(1, 10)}, MAX_MIN)
    assert front is not None
    assert front.trials == [0, 1]


def test_trials_without_an_objective_have_no_front():
    assert find_front({0: {"nfe": 3.0}}, MAX_MIN) is None
    assert find_front({}, MAX_MIN) is None


@pytest.mark.parametrize(
    ("scores", "volume"),
    [
        ([], 0.0),
        ([(1.0, 1.0)], 1.0),
        ([(0.5, 1.0), (1.0, 0.5)], 0.75),
        ([(0.5, 1.0), (1.0, 0.5), (0.2, 0.2)], 0.75),
        ([(0.5, 0.5, 1.0), (1.0, 0.5, 0.5)], 0.375),
        ([(1.0, 0.0)], 0.0),
    ],
)
def test_hypervolume_by_hand(scores, volume):
    assert hypervolume(scores) == pytest.approx(volume)


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_hypervolume_is_what_random_points_find(dimensions):
    generator = torch.Generator().manual_seed(dimensions)
    corners = torch.rand(6, dimensions, generator=generator, dtype=torch.float64)
    darts = torch.rand(200_000, dimensions, generator=generator, dtype=torch.float64)
    hit = torch.stack([(darts <= corner).all(1) for corner in corners]).any(0).double()
    # five standard errors of a share
    assert hypervolume(corners.tolist()) == pytest.approx(float(hit.mean()), abs=5 * 0.5 / 200_000**0.5)


def test_hypervolume_does_not_depend_on_the_order():
    scores = [(0.2, 0.9, 0.4), (0.9, 0.1, 0.5), (0.5, 0.5, 0.5)]
    assert len({round(hypervolume(list(order)), 12) for order in itertools.permutations(scores)}) == 1


def test_a_reward_that_rises_while_a_judge_falls_is_flagged():
    trials = {
        0: trial(1, 10, confidence=0.9, confidence_half_width=0.01),
        1: trial(2, 10, confidence=0.89, confidence_half_width=0.01),
        2: trial(3, 10, confidence=0.5, confidence_half_width=0.01),
        3: trial(0.9, 10, confidence=0.5, confidence_half_width=0.01),
    }
    assert reward_hacking(trials) == [2]


def test_a_configured_judge_stands_in_for_the_confidence():
    trials = {
        0: trial(1, 10, confidence=0.9, **{"judge.x": 1.0, "judge.x_half_width": 0.1}),
        1: trial(2, 10, confidence=0.1, **{"judge.x": 1.1, "judge.x_half_width": 0.1}),
    }
    assert reward_hacking(trials) == []


def test_a_judge_that_is_the_objective_is_no_judge_of_itself():
    trials = {
        index: trial(reward, 10, confidence=0.9, confidence_half_width=0.01, **{"judge.x": -reward})
        for index, reward in enumerate((1.0, 2.0))
    }
    front = find_front(trials, {"judge.x": "max", "nfe": "min"})
    assert front is not None
    assert front.hacked == []


def test_presets_rise_in_cost_and_leave_hackers_out():
    good, bad = ({"confidence": value, "confidence_half_width": 0.01} for value in (0.9, 0.2))
    trials = {0: trial(1, 10, **good), 1: trial(2, 40, **good), 2: trial(2.2, 200, **good), 3: trial(9, 1000, **bad)}
    front = find_front(trials, MAX_MIN)
    assert front is not None
    assert front.hacked == [3]
    presets = choose_presets(trials, front)
    assert presets["low"] == 0
    assert presets["high"] == 2
    costs = [trials[presets[name]]["nfe"] for name in ("low", "medium", "high")]
    assert costs == sorted(costs)


def test_where_no_objective_is_a_cost_the_presets_rise_in_the_first_objective():
    """Trial 1 has the most reward and took the least time, by chance: that makes it no `low`."""
    trials = {
        index: {"reward": reward, "frechet_distance": distance, "seconds": seconds}
        for index, (reward, distance, seconds) in enumerate([(-30.0, 2.0, 15.0), (-5.0, 9.0, 13.0), (-12.0, 3.0, 14.0)])
    }
    front = find_front(trials, {"reward": "max", "frechet_distance": "min"})
    assert front is not None
    assert choose_presets(trials, front) == {"low": 0, "medium": 2, "high": 1}
