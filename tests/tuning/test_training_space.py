"""Settings of trainings at a point, what may be swept, and the words that train a trial again."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import training_sweep
from mfm_ray.config import TrainSweepConfig, load_config, to_dict
from mfm_ray.errors import InputError
from mfm_ray.tuning.training_space import FINETUNE, train_words, training_settings


def settings_of(*words: str) -> dict[str, Any]:
    return to_dict(load_config("train", ["experiment=digits", *words]))


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"optimizer.learning_rate": 0.01}, ["optimizer.learning_rate=0.01"]),
        ({"objective": "lagrangian"}, ["objective=lagrangian"]),
        ({"objective": "mean_flow", "objective.time_power": 2.0}, ["objective=mean_flow", "objective.time_power=2.0"]),
        ({"network": "unet"}, ["network=unet", "network.max_time_frequency=9.5"]),
        (
            {"objective.consistency_weighting.name": "adaptive", "objective.consistency_weighting.power": 0.5},
            ["objective.consistency_weighting={name: adaptive, power: 0.5}"],
        ),
        ({"zero.stage": 2, "global_batch_size": 64, "ema_decay": [0.9, 0.99]}, None),
    ],
)
def test_a_point_is_what_the_command_line_would_make_of_it(point: dict[str, Any], words: list[str] | None) -> None:
    found = training_settings(settings_of(), point)
    if words is None:
        words = ["zero.stage=2", "global_batch_size=64", "ema_decay=[0.9,0.99]"]
    wanted = settings_of(*words)
    if point.get("network") == "unet":  # the recipe's width is no key of this network; Hydra would add it
        wanted["network"].pop("width", None)
    assert found == wanted


def test_adapters_are_swept_like_methods() -> None:
    def tuned(*words: str) -> dict[str, Any]:
        return to_dict(load_config("finetune", ["model=m", "reward=symmetry", *words]))

    found = training_settings(tuned(), {"adapter": "lora", "adapter.rank": 4, "method.num_draws": 2}, FINETUNE)
    assert found == tuned("adapter=lora", "adapter.rank=4", "method.num_draws=2")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"optimizer.lr": 0.1}, r"space\.optimizer\.lr: unknown key; did you mean space\.optimizer\."),
        ({"optimiser.learning_rate": 0.1}, r"did you mean space\.optimizer\.learning_rate\?"),
        ({"objektive": "lagrangian"}, r"space\.objektive: unknown key; did you mean space\.objective\?"),
        ({"objective": "lagrangean"}, r"space\.objective: objective=lagrangean: .*did you mean lagrangian\?"),
        ({"max_steps": 10}, r"space\.max_steps: is common to all trials"),
        ({"optimizer": {"name": "adam"}}, r"space\.optimizer: is common to all trials"),
        ({"objective.time_power.x": 1}, r"space\.objective\.time_power\.x: time_power is no group of keys"),
    ],
)
def test_a_key_that_no_trial_may_have_is_refused_by_name(point: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        training_settings(settings_of(), point)


def test_a_point_leaves_the_common_settings_as_they_are() -> None:
    common = settings_of()
    training_settings(common, {"objective": "lagrangian", "optimizer.learning_rate": 1.0})
    assert common == settings_of()


@pytest.mark.parametrize("sweep", ["training", "training_schedule"])
def test_the_sweep_files_compose_and_fit_the_recipes(sweep: str) -> None:
    for experiment in ("gmm", "digits"):
        config = load_config("tune", [f"sweep={sweep}", f"experiment={experiment}", "num_trials=3"])
        assert isinstance(config, TrainSweepConfig) and config.name == f"sweep_{sweep}"
        training_sweep.check(config)
        trials = training_sweep.trial_settings(config)
        assert len(trials) >= 3
        for settings in trials.values():
            assert to_dict(load_config("train", train_words(settings))) == {**settings, "name": experiment}


@pytest.mark.parametrize("objective", ["semigroup", "lagrangian", "mean_flow"])
def test_the_words_of_a_trial_compose_to_its_settings(objective: str) -> None:
    words = ["scaling.num_workers=3", "+scaling.resources_per_worker.GPU=0.5", "data.path=/some/a=b"]
    trial = training_settings(
        settings_of(*words),
        {
            "objective": objective,
            "optimizer.learning_rate": 0.00123,
            "objective.consistency_weighting.name": "adaptive",
            "objective.consistency_weighting.power": 0.25,
        },
    )
    assert to_dict(load_config("train", train_words(trial))) == trial
