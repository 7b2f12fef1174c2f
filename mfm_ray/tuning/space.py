"""Search spaces from YAML: which values a setting may take, and the points that a sweep tries.

    steering.guidance_scale: {loguniform: [0.25, 4]}
    steering.num_draws: {grid: [1, 4, 16]}
    steering.renormalise: {choice: [none, rescale], when: {steering: gradient}}

A key is the override path of `jobs.sample`. Planned points are all known before the first trial: a grid is crossed,
the other kinds are drawn anew for every point, each value from its own seed, so that a further dimension changes no
other. Optuna (`mfm_ray.tuning.search`) proposes points one by one instead.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mfm_ray.config import flatten, group_defaults
from mfm_ray.errors import InputError
from mfm_ray.settings import nearest, unknown_key

Point = dict[str, Any]
_WHEN = "when"
_PRIMITIVE = (str, bool, int, float, type(None))
GROUPS = ("steering", "reward")
SWEPT = (*GROUPS, "num_steps", "dynamics", "order", "max_nfe", "preset", "label", "cfg_scale")
"""Keys of `jobs.sample` that may differ from trial to trial; the rest is common to all."""


class Dimension(ABC):
    """The values of one setting."""

    @abstractmethod
    def values(self, generator: random.Random) -> Sequence[Any]:
        """The values to cross with the other dimensions: all of a grid, else one draw."""

    @abstractmethod
    def ask(self, key: str, trial: Any) -> Any:
        """The value that an Optuna trial suggests for this setting."""

    @property
    @abstractmethod
    def extremes(self) -> Sequence[Any]:
        """The values to try when all that can be wrong with a setting is to be found: all, or both ends."""

    @abstractmethod
    def can_be(self, value: Any) -> bool:
        """Whether a condition that names this value can ever hold."""


@dataclass(frozen=True)
class Grid(Dimension):
    """Every value."""

    options: Sequence[Any]
    takes: ClassVar[str] = "a list [...] of at least one value"

    def __post_init__(self) -> None:
        if not isinstance(self.options, list) or not self.options:
            raise ValueError(self.takes)

    def values(self, generator: random.Random) -> Sequence[Any]:
        return self.options

    def ask(self, key: str, trial: Any) -> Any:
        names = [option if isinstance(option, _PRIMITIVE) else json.dumps(option) for option in self.options]
        return self.options[names.index(trial.suggest_categorical(key, names))]

    @property
    def extremes(self) -> Sequence[Any]:
        return self.options

    def can_be(self, value: Any) -> bool:
        return value in self.options


@dataclass(frozen=True)
class Choice(Grid):
    """One of the values, each as likely."""

    def values(self, generator: random.Random) -> Sequence[Any]:
        return [generator.choice(self.options)]


@dataclass(frozen=True)
class Uniform(Dimension):
    """A number between two bounds."""

    bounds: Sequence[float]
    takes: ClassVar[str] = "two numbers [low, high], low below high"

    def __post_init__(self) -> None:
        ok = isinstance(self.bounds, list) and len(self.bounds) == 2 and all(map(self.admits, self.bounds))
        if not (ok and self.bounds[0] < self.bounds[1]):
            raise ValueError(self.takes)

    @staticmethod
    def admits(bound: Any) -> bool:
        return isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound)

    def values(self, generator: random.Random) -> Sequence[Any]:
        return [generator.uniform(*self.bounds)]

    def ask(self, key: str, trial: Any) -> Any:
        return trial.suggest_float(key, *self.bounds)

    @property
    def extremes(self) -> Sequence[Any]:
        return self.bounds

    def can_be(self, value: Any) -> bool:
        """A drawn number meets no single value."""
        return False


@dataclass(frozen=True)
class LogUniform(Uniform):
    """A number whose logarithm is uniform."""

    takes: ClassVar[str] = "two numbers [low, high] above 0, low below high"

    @staticmethod
    def admits(bound: Any) -> bool:
        return Uniform.admits(bound) and bound > 0

    def values(self, generator: random.Random) -> Sequence[Any]:
        return [math.exp(generator.uniform(*map(math.log, self.bounds)))]

    def ask(self, key: str, trial: Any) -> Any:
        return trial.suggest_float(key, *self.bounds, log=True)


@dataclass(frozen=True)
class Integers(Uniform):
    """A whole number, both bounds included."""

    takes: ClassVar[str] = "two whole numbers [low, high], low below high"

    @staticmethod
    def admits(bound: Any) -> bool:
        return type(bound) is int

    def values(self, generator: random.Random) -> Sequence[Any]:
        return [generator.randint(*map(int, self.bounds))]

    def can_be(self, value: Any) -> bool:
        return type(value) is int and self.bounds[0] <= value <= self.bounds[1]

    def ask(self, key: str, trial: Any) -> Any:
        return trial.suggest_int(key, *self.bounds)


KINDS: dict[str, Any] = {
    "grid": Grid,
    "choice": Choice,
    "uniform": Uniform,
    "loguniform": LogUniform,
    "integers": Integers,
}


@dataclass(frozen=True)
class Setting:
    """A dimension and its condition: the values that other settings of the point must have for it to be there."""

    dimension: Dimension
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def applies(self, point: Point) -> bool:
        return all(point.get(key) in allowed for key, allowed in self.when.items())


def parse_space(space: Mapping[str, Any]) -> dict[str, Setting]:
    """The settings of a sweep. InputError naming key, kind and what is allowed."""
    if not space:
        raise InputError("space: empty; expected at least one setting, such as steering.guidance_scale: {grid: [1, 2]}")
    settings = {key: _parse_setting(key, given) for key, given in space.items()}
    for key, setting in settings.items():
        for other in setting.when:
            if other not in settings or other == key:
                close = nearest(other, [name for name in settings if name != key])
                hint = f"; did you mean {close}?" if close else ""
                raise InputError(f"space.{key}.when.{other}: expected another setting of this space{hint}")
        _check_values_of_conditions(key, settings)
    in_order(settings)
    return settings


def _check_values_of_conditions(key: str, settings: Mapping[str, Setting]) -> None:
    """A condition on a value that is never there would leave the setting out of every trial without a word."""
    for other, allowed in settings[key].when.items():
        dimension = settings[other].dimension
        for value in allowed:
            if not dimension.can_be(value):
                known = [str(option) for option in dimension.extremes]
                close = nearest(str(value), known)
                hint = f"; did you mean {close}?" if close else ""
                raise InputError(
                    f"space.{key}.when.{other}={value}: space.{other} is never that; "
                    f"its values: {', '.join(known)}{hint}"
                )


def in_order(settings: Mapping[str, Setting]) -> list[str]:
    """The keys, each behind those that its condition names. InputError for conditions that wait for each other."""
    ordered: list[str] = []
    while len(ordered) < len(settings):
        ready = [key for key in settings if key not in ordered and set(settings[key].when) <= set(ordered)]
        if not ready:
            (key, *_) = (key for key in settings if key not in ordered)
            raise InputError(f"space.{key}.when: waits for itself; expected conditions that name earlier settings")
        ordered += ready
    return ordered


def ask_point(settings: Mapping[str, Setting], trial: Any) -> Point:
    """The point that an Optuna trial suggests; a setting whose condition does not hold is not asked for."""
    found: Point = {}
    for key in in_order(settings):
        if settings[key].applies(found):
            found[key] = settings[key].dimension.ask(key, trial)
    return {key: found[key] for key in settings if key in found}


def corner_points(settings: Mapping[str, Setting]) -> list[Point]:
    """Points in which every value of a choice and both ends of a range stand at least once, conditions met."""
    points: list[Point] = []
    for key, setting in settings.items():
        for value in setting.dimension.extremes:
            forced = {**_conditions(settings, key), key: value}
            full: Point = {}
            for other in in_order(settings):
                if settings[other].applies(full) or other in forced:
                    full[other] = forced.get(other, settings[other].dimension.extremes[0])
            point = {other: full[other] for other in settings if other in full}
            if point not in points:
                points.append(point)
    return points


def _conditions(settings: Mapping[str, Setting], key: str) -> Point:
    """Values of other settings under which this one is there."""
    found: Point = {}
    for other, allowed in settings[key].when.items():
        found |= {**_conditions(settings, other), other: allowed[0]}
    return found


def plan_points(settings: Mapping[str, Setting], *, num_trials: int, seed: int) -> list[Point]:
    """All points of a sweep in their order: `num_trials` times the grid, without those that were there before.

    A setting whose condition does not hold is left out of its point.
    """
    axes = [key for key, setting in settings.items() if isinstance(setting.dimension, Grid)]
    axes = [key for key in axes if not isinstance(settings[key].dimension, Choice)]
    crossed = list(itertools.product(*(settings[key].dimension.values(random.Random(seed)) for key in axes)))
    points: list[Point] = []
    for repeat, values in itertools.product(range(num_trials), crossed):
        drawn = {
            key: setting.dimension.values(random.Random(f"{seed}/{key}/{repeat}/{values}"))[0]
            for key, setting in settings.items()
            if key not in axes
        }
        full = {**dict(zip(axes, values, strict=True)), **drawn}
        point = {key: full[key] for key in settings if settings[key].applies(full)}
        if point not in points:
            points.append(point)
    return points


def settings_at(common: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """The plain configuration of `jobs.sample` at a point: groups are chosen first, then their keys are set.

    InputError for a key that no trial may have of its own. Arguments of steering and reward are left to their
    constructors.
    """
    settings = copy.deepcopy(dict(common))
    known = [key for key in flatten(settings) if key.partition(".")[0] in SWEPT]
    for key, value in sorted(point.items(), key=lambda item: item[0] not in GROUPS):
        group, _, argument = key.partition(".")
        if key in GROUPS:
            settings[group] = group_defaults(group, value)
        elif group in GROUPS and argument:
            _set(settings[group], argument, value, key)
        elif key in SWEPT:
            settings[key] = value
        elif key in flatten(settings):
            raise InputError(
                f"space.{key}: is common to all trials; expected one of {', '.join(SWEPT)}, or a key of them"
            )
        else:
            raise unknown_key(f"space.{key}", [f"space.{name}" for name in known])
    return settings


def _set(group: dict[str, Any], argument: str, value: Any, key: str) -> None:
    *path, last = argument.split(".")
    for part in path:
        if not isinstance(group.get(part), dict):
            raise InputError(f"space.{key}: {part} is no group of keys")
        group = group[part]
    group[last] = value


def _parse_setting(key: str, given: Any) -> Setting:
    place = f"space.{key}"
    kinds = [kind for kind in given if kind != _WHEN] if isinstance(given, Mapping) else []
    if len(kinds) != 1:
        raise InputError(f"{place}={given}: expected one of {{{': [...]}, {'.join(KINDS)}: [...]}}")
    (kind,) = kinds
    if kind not in KINDS:
        close = nearest(kind, KINDS)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"{place}.{kind}: expected one of {', '.join(KINDS)}{hint}")
    try:
        dimension = KINDS[kind](given[kind])
    except ValueError as error:
        raise InputError(f"{place}.{kind}={given[kind]}: expected {error}") from error
    when = given.get(_WHEN, {})
    if not isinstance(when, Mapping):
        raise InputError(f"{place}.{_WHEN}={when}: expected {{setting: value or list of values}}")
    return Setting(dimension, {other: _as_list(values) for other, values in when.items()})


def _as_list(values: Any) -> Sequence[Any]:
    return values if isinstance(values, list) else [values]
