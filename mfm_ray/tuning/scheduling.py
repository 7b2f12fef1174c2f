"""What stops or perturbs trainings while they run, by name: `scheduler=asha|pbt|none`; constructors are the schema."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from mfm_ray.errors import InputError, refuse_unknown_arguments
from mfm_ray.settings import nearest
from mfm_ray.tuning.space import Choice, Grid, Integers, LogUniform, Setting, Uniform
from mfm_ray.tuning.training_space import PERTURBED
from mfm_ray.tuning.training_trial import STEP, TRIAL

History = Mapping[int, Sequence[Mapping[str, float]]]
"""What trials of an earlier call reported, by trial."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """What a scheduler is told of the sweep. metric, mode: first objective; max_steps, every: of one training, and
    between two reports; space: the settings that differ; num_trials: how many there are.
    """

    metric: str
    mode: str
    max_steps: int
    every: int
    space: Mapping[str, Setting]
    num_trials: int


class Scheduling(ABC):
    """Makes a scheduler of Ray Tune."""

    @abstractmethod
    def check(self, race: Race) -> None:
        """InputError for settings that do not fit the sweep."""

    @abstractmethod
    def scheduler(self, race: Race, earlier: History) -> TrialScheduler:
        """With what earlier calls of the sweep have decided."""

    def perturbed(self, race: Race) -> list[str]:
        """Settings that may change while a trial runs."""
        return []


class NoScheduling(Scheduling):
    """Every trial is trained to its end."""

    def check(self, race: Race) -> None:
        """Fits every sweep."""

    def scheduler(self, race: Race, earlier: History) -> TrialScheduler:
        return FIFOScheduler()


class Asha(Scheduling):
    """Asynchronous successive halving over steps.

    prune_after: steps of the first rung; each further one is `reduction_factor` times as far.
    """

    def __init__(self, *, prune_after: int | None = None, reduction_factor: int = 2) -> None:
        self.prune_after = _at_least("scheduler.prune_after", prune_after, 1)
        self.reduction_factor = _at_least("scheduler.reduction_factor", reduction_factor, 2) or 2

    def check(self, race: Race) -> None:
        _check_interval("scheduler.prune_after", self.prune_after, race)

    def scheduler(self, race: Race, earlier: History) -> TrialScheduler:
        asha = AshaByNumber(
            time_attr=STEP,
            metric=race.metric,
            mode=race.mode,
            max_t=race.max_steps,
            grace_period=self.prune_after or race.every,
            reduction_factor=self.reduction_factor,
        )
        for index, reports in earlier.items():
            trial = SimpleNamespace(config={TRIAL: index})
            asha.on_trial_add(None, trial)
            for reported in reports:
                asha.on_trial_result(None, trial, dict(reported))
        return asha


class AshaByNumber(AsyncHyperBandScheduler):
    """Knows trials by their number in the sweep: one that goes on after a kill is the one it was at every rung."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _numbered(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, _numbered(trial), result)
        # the trial itself says when it has reached max_steps: then its model is written
        return TrialScheduler.CONTINUE if result.get(STEP, 0) >= self._max_t else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _numbered(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _numbered(trial))


class Pbt(Scheduling):
    """Population based training (Jaderberg et al. 2017).

    perturbation_interval: steps after which the worst `quantile_fraction` of the trials go on from a checkpoint of one
    of the best, each setting times 0.8 or 1.2 (its neighbour in a list), or drawn anew with `resample_probability`.
    """

    def __init__(
        self,
        *,
        perturbation_interval: int | None = None,
        quantile_fraction: float = 0.25,
        resample_probability: float = 0.25,
    ) -> None:
        self.perturbation_interval = _at_least("scheduler.perturbation_interval", perturbation_interval, 1)
        self.quantile_fraction = _within("scheduler.quantile_fraction", quantile_fraction, 0.5)
        self.resample_probability = _within("scheduler.resample_probability", resample_probability, 1.0)

    def check(self, race: Race) -> None:
        _check_interval("scheduler.perturbation_interval", self.perturbation_interval, race)
        if race.num_trials < 2:
            raise InputError(
                "scheduler=pbt: a population of one trial has none to learn from; expected more num_trials"
            )
        for key, setting in race.space.items():
            if setting.when or not any(key == name or (name[-1] == "." and key.startswith(name)) for name in PERTURBED):
                names = ", ".join(f"{name}*" if name[-1] == "." else name for name in PERTURBED)
                raise InputError(
                    f"space.{key}: scheduler=pbt changes settings of a training that goes on; expected {names}, "
                    "without condition"
                )

    def scheduler(self, race: Race, earlier: History) -> TrialScheduler:
        return PbtByNumber(
            time_attr=STEP,
            metric=race.metric,
            mode=race.mode,
            perturbation_interval=self.perturbation_interval or race.every,
            hyperparam_mutations={key: _domain(setting) for key, setting in race.space.items()},
            quantile_fraction=self.quantile_fraction,
            resample_probability=self.resample_probability,
            custom_explore_fn=_Bounds(race.space),
            log_config=False,
            require_attrs=False,
        )

    def perturbed(self, race: Race) -> list[str]:
        return list(race.space)


class PbtByNumber(PopulationBasedTraining):
    """A trial that takes over another one's checkpoint and settings keeps its own number."""

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, TRIAL: trial.config[TRIAL]}, operations


@dataclass(frozen=True)
class _Bounds:
    """Keeps perturbed numbers within the ends of their range."""

    space: Mapping[str, Setting]

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        for key, setting in self.space.items():
            if isinstance(setting.dimension, Uniform):
                low, high = setting.dimension.bounds
                config[key] = min(max(config[key], low), high)
        return config


SCHEDULING: dict[str, type[Scheduling]] = {"asha": Asha, "pbt": Pbt, "none": NoScheduling}


def build_scheduling(settings: Mapping[str, Any]) -> Scheduling:
    """From {"name": ..., **arguments}. InputError naming the key that is wrong."""
    arguments = dict(settings)
    name = str(arguments.pop("name", None))
    if name not in SCHEDULING:
        close = nearest(name, SCHEDULING)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"scheduler={name}: expected one of {', '.join(SCHEDULING)}{hint}")
    refuse_unknown_arguments(arguments, SCHEDULING[name], group="scheduler")
    return SCHEDULING[name](**arguments)


def _numbered(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config[TRIAL])


def _domain(setting: Setting) -> Any:
    """The dimension in Ray Tune's words."""
    dimension = setting.dimension
    if isinstance(dimension, Grid | Choice):
        return list(dimension.options)
    assert isinstance(dimension, Uniform)
    low, high = dimension.bounds
    if isinstance(dimension, Integers):
        return tune.randint(int(low), int(high) + 1)
    return tune.loguniform(low, high) if isinstance(dimension, LogUniform) else tune.uniform(low, high)


def _at_least(key: str, value: Any, minimum: int) -> int | None:
    if value is not None and (type(value) is not int or value < minimum):
        raise InputError(f"{key}={value}: expected a whole number of at least {minimum}, or null")
    return value


def _within(key: str, value: Any, maximum: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
        raise InputError(f"{key}={value}: expected a number from 0 to {maximum:g}")
    return float(value)


def _check_interval(key: str, steps: int | None, race: Race) -> None:
    steps = race.every if steps is None else steps
    if steps % race.every:
        raise InputError(f"{key}={steps}: trials report every checkpoint_every={race.every} steps; expected a multiple")
    if steps >= race.max_steps:
        raise InputError(f"{key}={steps}: expected less than max_steps={race.max_steps}")
