"""Where points come from: names, what Optuna proposes, and what a proposal may depend on."""

import importlib.util
import random
from types import SimpleNamespace

import pytest

from mfm_ray.errors import InputError
from mfm_ray.tuning.search import Planned, SearchOptions, build_search, points_to_check
from mfm_ray.tuning.space import corner_points, parse_space

SPACE = parse_space(
    {
        "strength": {"loguniform": [0.1, 10], "when": {"method": "gradient"}},
        "method": {"choice": ["gradient", "smc"]},
        "particles": {"integers": [1, 8], "when": {"method": ["smc"]}},
        "steps": {"grid": [10, 20, [1, 2]]},
    }
)


def options(**changes):
    given = {"num_trials": 30, "seed": 3, "objectives": {"reward": "max", "nfe": "min"}, "window": 4}
    return SearchOptions(**{**given, **changes})


def figures(point):
    """A front between strength and price, the better method known only by its result."""
    if point["method"] == "smc":
        return {"reward": 0.1 * point["particles"], "nfe": 10.0 * point["particles"]}
    return {"reward": point["strength"], "nfe": 5.0}


def run(search, *, order, workers=4):
    """All points of a search when up to `workers` run at once and end in the order of the given generator."""
    ended, running = {}, []
    while True:
        points = search.points(ended)
        waiting = [index for index in range(len(points)) if index not in ended and index not in running]
        while waiting and len(running) < workers:
            running.append(waiting.pop(0))
        if not running:
            return list(points)
        index = running.pop(order.randrange(len(running)))
        ended[index] = SimpleNamespace(measured=figures(points[index]))


@pytest.mark.parametrize("name", ["optuna", "optuna_nsga2"])
def test_proposals_hang_on_seed_and_window_alone(name):
    whole = run(build_search(name, SPACE, options()), order=random.Random(0))
    assert len(whole) == 30
    for seed, workers in ((1, 4), (2, 2), (3, 1)):
        assert run(build_search(name, SPACE, options()), order=random.Random(seed), workers=workers) == whole
    assert run(build_search(name, SPACE, options(seed=4)), order=random.Random(0)) != whole
    assert run(build_search(name, SPACE, options(window=5)), order=random.Random(0)) != whole


def test_proposals_respect_conditions_and_bounds():
    for point in run(build_search("optuna", SPACE, options()), order=random.Random(0)):
        assert ("strength" in point) == (point["method"] == "gradient")
        assert ("particles" in point) == (point["method"] == "smc")
        assert 0.1 <= point.get("strength", 1) <= 10
        assert point.get("particles", 1) in range(1, 9)
        assert point["steps"] in (10, 20, [1, 2])


def test_optuna_learns_from_results():
    """The strongest of its last points is stronger than the strongest of as many first ones."""
    points = run(build_search("optuna", SPACE, options(num_trials=60)), order=random.Random(0))
    strongest = [max(point.get("strength", 0) for point in part) for part in (points[:10], points[-10:])]
    assert strongest[1] > strongest[0]


def test_a_space_that_holds_no_more_ends_the_sweep_without_repeats():
    small = parse_space({"a": {"grid": [1, 2]}, "b": {"choice": [True, None]}})
    search = build_search("optuna", small, options(objectives={"reward": "max"}))
    ended = {}
    while len(ended) < len(points := search.points(ended)):
        ended |= {index: SimpleNamespace(measured={"reward": 1.0}) for index in range(len(points))}
    assert sorted(points, key=str) == sorted(({"a": a, "b": b} for a in (1, 2) for b in (True, None)), key=str)
    assert search.most == 4


def test_a_failed_trial_is_no_obstacle():
    search = build_search("optuna", SPACE, options(num_trials=8))
    ended = {index: SimpleNamespace(measured={}) for index in range(8)}
    assert len(search.points(ended)) == 8


def test_corners_hold_every_value_and_meet_every_condition():
    corners = corner_points(SPACE)
    for key, values in {
        "strength": [0.1, 10], "method": ["gradient", "smc"], "particles": [1, 8], "steps": [10, 20, [1, 2]]
    }.items():  # fmt: skip
        assert all(any(corner.get(key) == value for corner in corners) for value in values)
    assert all(("strength" in corner) == (corner["method"] == "gradient") for corner in corners)
    assert points_to_check(build_search("optuna", SPACE, options()), SPACE) == corners


def test_grid_takes_grids_alone_and_is_planned():
    search = build_search("grid", parse_space({"a": {"grid": [1, 2]}}), options(num_trials=1))
    assert isinstance(search, Planned)
    assert search.points({}) == [{"a": 1}, {"a": 2}]
    with pytest.raises(InputError, match="search=grid: space.strength is no grid"):
        build_search("grid", SPACE, options())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("optunna", {}, "search=optunna: expected one of grid, random, optuna, optuna_nsga2; did you mean optuna?"),
        ("optuna", {"num_trials": 1}, "num_trials=1: Optuna makes so many trials; expected at least 2"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(name, changes, message):
    with pytest.raises(InputError) as caught:
        build_search(name, SPACE, options(**changes))
    assert str(caught.value) == message


def test_without_optuna_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"search=optuna: optuna is not installed; pip install 'mfm_ray\[tune\]'"):
        build_search("optuna", SPACE, options())
