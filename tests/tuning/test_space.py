"""Search spaces: which points a sweep tries, and that a mistake is one line with the way out."""

import math

import pytest
import yaml

from jobs.tune import points_of_check, settings_of
from mfm_ray.config import SampleConfig, TuneConfig, load_config, sweep_files
from mfm_ray.errors import InputError
from mfm_ray.settings import from_dict
from mfm_ray.tuning.space import KINDS, parse_space, plan_points, settings_at
from mfm_ray.tuning.words import sample_words

COMMON = {"steering": {"name": "gradient", "num_draws": 1}, "reward": {"name": "symmetry"}, "num_steps": 5, "seed": 0}


def points(space, *, num_trials=1, seed=0):
    return plan_points(parse_space(space), num_trials=num_trials, seed=seed)


def test_grids_are_crossed_in_the_order_of_the_file():
    found = points({"num_steps": {"grid": [5, 10]}, "order": {"grid": [1, 2]}})
    assert [(point["num_steps"], point["order"]) for point in found] == [(5, 1), (5, 2), (10, 1), (10, 2)]


@pytest.mark.parametrize(
    ("kind", "given", "inside"),
    [
        ("uniform", [-1.0, 2.0], lambda value: -1 <= value <= 2),
        ("loguniform", [0.01, 100], lambda value: 0.01 <= value <= 100),
        ("integers", [2, 4], lambda value: value in (2, 3, 4)),
        ("choice", ["a", "b"], lambda value: value in ("a", "b")),
    ],
)
def test_other_kinds_are_drawn_within_their_bounds_and_the_seed_fixes_them(kind, given, inside):
    space = {"x": {kind: given}, "y": {"uniform": [0, 1]}}
    drawn = points(space, num_trials=40)
    assert len(drawn) == 40
    assert all(inside(point["x"]) for point in drawn)
    assert len({point["x"] for point in drawn}) > 1
    assert drawn == points(space, num_trials=40)
    assert drawn != points(space, num_trials=40, seed=1)


def test_log_uniform_draws_have_uniform_logarithms():
    drawn = points({"x": {"loguniform": [1e-4, 1e4]}}, num_trials=400)
    logs = [math.log10(point["x"]) for point in drawn]
    # uniform over [-4, 4]: mean 0, standard error 8 / sqrt(12 * 400) = 0.115; four of them
    assert abs(sum(logs) / len(logs)) < 4 * 0.115


def test_a_further_dimension_leaves_the_draws_of_the_others_alone():
    alone = points({"x": {"uniform": [0, 1]}}, num_trials=5)
    joint = points({"x": {"uniform": [0, 1]}, "y": {"uniform": [0, 1]}}, num_trials=5)
    assert [point["x"] for point in alone] == [point["x"] for point in joint]


def test_a_conditional_setting_is_there_only_where_its_condition_holds():
    found = points(
        {
            "steering": {"grid": ["gradient", "smc"]},
            "steering.num_particles": {"grid": [2, 4], "when": {"steering": ["smc"]}},
        }
    )
    assert found == [
        {"steering": "gradient"},
        {"steering": "smc", "steering.num_particles": 2},
        {"steering": "smc", "steering.num_particles": 4},
    ]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space: empty"),
        ({"num_steps": [1, 2]}, "space.num_steps=[1, 2]: expected one of {grid: [...]"),
        ({"num_steps": {"gird": [1]}}, "space.num_steps.gird: expected one of grid, choice"),
        ({"num_steps": {"gird": [1]}}, "did you mean grid?"),
        ({"num_steps": {"grid": []}}, "space.num_steps.grid=[]: expected a list [...] of at least one value"),
        ({"x": {"uniform": [2, 1]}}, "space.x.uniform=[2, 1]: expected two numbers [low, high], low below high"),
        ({"x": {"loguniform": [0, 1]}}, "above 0"),
        ({"x": {"integers": [0.5, 1]}}, "two whole numbers"),
        ({"a": {"grid": [1], "when": {"steerin": "smc"}}, "steering": {"grid": ["smc"]}}, "did you mean steering?"),
        (
            {"a": {"grid": [1], "when": {"b": "smk"}}, "b": {"choice": ["smc", "dps"]}},
            "its values: smc, dps; did you mean",
        ),
        ({"a": {"grid": [1], "when": {"b": 7}}, "b": {"integers": [1, 6]}}, "space.a.when.b=7: space.b is never that"),
        (
            {"a": {"grid": [1], "when": {"b": 0.5}}, "b": {"uniform": [0, 1]}},
            "space.a.when.b=0.5: space.b is never that",
        ),
        (
            {"a": {"grid": [1], "when": {"b": 1}}, "b": {"grid": [1], "when": {"a": 1}}},
            "space.a.when: waits for itself",
        ),
    ],
)
def test_a_mistake_in_a_space_is_one_line_that_names_it(space, message):
    with pytest.raises(InputError) as caught:
        parse_space(space)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_is_chosen_before_its_keys_are_set():
    settings = settings_at(COMMON, {"steering.num_particles": 3, "steering": "smc", "num_steps": 7})
    assert (settings["steering"]["name"], settings["steering"]["num_particles"], settings["num_steps"]) == ("smc", 3, 7)
    assert "num_draws" in settings["steering"]
    assert COMMON["num_steps"] == 5


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"num_step": 3}, "space.num_step: unknown key; did you mean space.num_steps?"),
        ({"seed": 3}, "space.seed: is common to all trials; expected one of steering, reward, num_steps"),
        ({"steering": "gradiant"}, "steering=gradiant: expected one of .* did you mean gradient?"),
    ],
)
def test_a_key_that_no_trial_may_have_of_its_own_is_refused(point, message):
    with pytest.raises(InputError, match=message):
        settings_at(COMMON, point)


OF_SAMPLES = [name for name, file in sweep_files().items() if "job" not in yaml.safe_load(file.read_text())]


@pytest.mark.parametrize("sweep", OF_SAMPLES)
def test_every_sweep_file_composes_and_its_trials_rerun_by_their_words(sweep):
    config = load_config("tune", [f"sweep={sweep}"])
    assert isinstance(config, TuneConfig)
    assert config.name == f"sweep_{sweep}"
    trials = [settings_of(config, point) for point in points_of_check(config)]
    assert len(trials) >= 5
    for settings in (trials[0], trials[len(trials) - 1]):
        again = load_config("sample", sample_words(settings))
        assert isinstance(again, SampleConfig)
        wanted = from_dict(SampleConfig, settings)
        for key in ("steering", "reward", "num_steps", "max_nfe", "judges", "seed", "preset"):
            assert getattr(again, key) == getattr(wanted, key), key


def test_the_files_use_every_kind_that_is_documented():
    assert set(KINDS) == {"grid", "choice", "uniform", "loguniform", "integers"}
