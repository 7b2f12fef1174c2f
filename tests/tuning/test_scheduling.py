"""What stops or perturbs trainings: settings by name, and decisions that a resumed sweep would take again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mfm_ray.errors import InputError
from mfm_ray.tuning.scheduling import Asha, Pbt, PbtByNumber, Race, build_scheduling
from mfm_ray.tuning.space import parse_space
from mfm_ray.tuning.training_trial import STEP, TRIAL

LEARNING_RATE = {"optimizer.learning_rate": {"loguniform": [0.001, 0.1]}}


def race(space: dict[str, Any] | None = None, **other: Any) -> Race:
    return Race(
        **{"metric": "posterior_score", "mode": "min", "max_steps": 80, "every": 10, "num_trials": 4, **other},
        space=parse_space(space or LEARNING_RATE),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ashaa"}, r"scheduler=ashaa: expected one of asha, pbt, none; did you mean asha\?"),
        ({"name": "asha", "reduction": 2}, r"scheduler\.reduction: unknown key; .*did you mean reduction_factor\?"),
        ({"name": "asha", "reduction_factor": 1}, r"scheduler\.reduction_factor=1: expected a whole number of at leas"),
        ({"name": "pbt", "quantile_fraction": 0.6}, r"scheduler\.quantile_fraction=0\.6: .*from 0 to 0\.5"),
        ({"name": "pbt", "prune_after": 5}, r"scheduler\.prune_after: unknown key"),
        ({"name": "none", "prune_after": 5}, r"scheduler\.prune_after: unknown key"),
    ],
)
def test_settings_that_are_none_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_scheduling(settings)


@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        ({"name": "asha", "prune_after": 15}, None, r"prune_after=15: .*every checkpoint_every=10 .*a multiple"),
        ({"name": "asha", "prune_after": 80}, None, r"prune_after=80: expected less than max_steps=80"),
        ({"name": "pbt", "perturbation_interval": 5}, None, r"perturbation_interval=5: .*a multiple"),
        ({"name": "pbt"}, {"network.width": {"choice": [8, 16]}}, r"space\.network\.width: scheduler=pbt changes"),
        ({"name": "pbt"}, {"objective": {"grid": ["lagrangian"]}}, r"space\.objective: scheduler=pbt changes"),
    ],
)
def test_settings_that_do_not_fit_the_sweep_are_refused(
    settings: dict[str, Any], space: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_scheduling(settings).check(race(space))


def test_a_population_of_one_is_refused() -> None:
    with pytest.raises(InputError, match="a population of one trial has none to learn from; expected more num_trials"):
        build_scheduling({"name": "pbt"}).check(race(num_trials=1))


def test_settings_that_fit_are_taken() -> None:
    build_scheduling({"name": "asha", "prune_after": None, "reduction_factor": 3}).check(race())
    build_scheduling({"name": "pbt"}).check(race({**LEARNING_RATE, "objective.time_power": {"uniform": [1, 2]}}))
    build_scheduling({"name": "none"}).check(race({"network.width": {"choice": [8, 16]}}))


def reported(step: int, score: float) -> dict[str, float]:
    return {STEP: step, "posterior_score": score}


def tell(scheduler: Any, index: int, *reports: dict[str, float]) -> str:
    trial = SimpleNamespace(config={TRIAL: index}, trial_id=f"any-{index}")
    scheduler.on_trial_add(None, trial)
    return [scheduler.on_trial_result(None, trial, report) for report in reports][-1]


def test_a_resumed_asha_decides_as_one_that_was_never_stopped() -> None:
    histories = {index: [reported(10, float(index)), reported(20, index + 0.5)] for index in range(4)}
    whole = Asha(prune_after=10).scheduler(race(), {})
    for index, history in histories.items():
        tell(whole, index, *history)
    resumed = Asha(prune_after=10).scheduler(race(), histories)
    for score in (-1.0, 0.4, 1.4, 1.6, 9.0):
        newcomer = reported(10, score)
        assert tell(resumed, 7, newcomer) == tell(whole, 7, newcomer)
        for scheduler in (whole, resumed):  # both forget the newcomer again
            for bracket in scheduler._brackets:
                for _, recorded in bracket._rungs:
                    recorded.pop(7, None)


def test_a_trial_that_goes_on_after_a_kill_is_counted_once_at_each_rung() -> None:
    resumed = Asha(prune_after=10).scheduler(race(), {0: [reported(10, 1.0), reported(20, 1.0)]})
    tell(resumed, 0, reported(30, 0.5))
    rungs = [recorded for _, recorded in resumed._brackets[0]._rungs if recorded]  # type: ignore[attr-defined]
    assert rungs == [{0: -1.0}, {0: -1.0}]


def test_the_last_report_ends_a_trial_by_its_own_word() -> None:
    """The trial has then written its model; a stop by the scheduler would be taken for pruning."""
    assert tell(Asha().scheduler(race(), {}), 0, reported(80, 1.0)) == "CONTINUE"


def test_a_trial_that_takes_another_ones_place_keeps_its_number_and_the_range() -> None:
    pbt = Pbt(resample_probability=0.0).scheduler(race(), {})
    assert isinstance(pbt, PbtByNumber)
    worst, best = (SimpleNamespace(config={TRIAL: index, "optimizer.learning_rate": 0.1}) for index in (3, 5))
    found = {pbt._get_new_config(worst, best)[0]["optimizer.learning_rate"] for _ in range(50)}
    assert sorted(found) == [pytest.approx(0.08), 0.1]  # 0.12 is above the end of the range
    assert pbt._get_new_config(worst, best)[0][TRIAL] == 3
