"""Which points a sweep tries: planned before its first trial, or proposed one by one by Optuna's samplers.

    trial i is proposed from the results of trials 0 to i - window

so that the proposals depend on the seed and the window alone: not on the number of workers, nor on the order in which
trials end. A resumed sweep tells a new study the trials that are there and comes to the same proposals again.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mfm_ray.errors import InputError
from mfm_ray.settings import nearest
from mfm_ray.tuning.space import Grid, Point, Setting, ask_point, corner_points, plan_points

_TRIES = 50  # proposals of what was there before, after which a space counts as exhausted
DIRECTIONS: Mapping[str, Literal["maximize", "minimize"]] = {"max": "maximize", "min": "minimize"}


class Ended(Protocol):
    """What a search wants to know of an ended trial."""

    @property
    def measured(self) -> Mapping[str, float]: ...


class Search(Protocol):
    """Points by index."""

    @property
    def most(self) -> int:
        """How many there can be."""

    @property
    def window(self) -> float:
        """How many are proposed before the result of the first one is known."""

    def points(self, ended: Mapping[int, Ended]) -> Sequence[Point]:
        """All points that are known when these trials have ended; more as more trials end."""


@dataclass(frozen=True)
class Planned:
    """Points that are known from the beginning."""

    known: Sequence[Point]
    window: float = math.inf

    @property
    def most(self) -> int:
        return len(self.known)

    def points(self, ended: Mapping[int, Ended]) -> Sequence[Point]:
        return self.known


class Proposed:
    """Points from an Optuna sampler (TPE, NSGA-II), all objectives at once.

    A trial without all objectives (it failed) is told as failed; a pruned one counts with what it had measured. A
    point that was there before is not made again: its own figures are told once more, and another point is asked for.
    """

    def __init__(
        self,
        settings: Mapping[str, Setting],
        *,
        sampler: Any,
        num_trials: int,
        objectives: Mapping[str, str],
        window: int,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a line for each trial otherwise
        self._settings, self._objectives, self._failed = settings, objectives, optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(
            directions=[DIRECTIONS[mode] for mode in objectives.values()], sampler=sampler
        )
        self._points: list[Point] = []
        self._trials: list[Any] = []
        self._told: list[Ended] = []
        self.most, self.window = num_trials, float(window)

    def points(self, ended: Mapping[int, Ended]) -> Sequence[Point]:
        while len(self._points) < self.most:
            due = len(self._points) - int(self.window)
            if due >= 0 and len(self._told) <= due:
                if due not in ended:
                    break
                self._tell(self._trials[due], ended[due])
                self._told.append(ended[due])
            if not self._ask():
                self.most = len(self._points)  # the space holds no more
        return self._points

    def _ask(self) -> bool:
        for _ in range(_TRIES):
            trial = self._study.ask()
            point = ask_point(self._settings, trial)
            if point not in self._points:
                self._points.append(point)
                self._trials.append(trial)
                return True
            before = self._points.index(point)
            self._tell(trial, self._told[before] if before < len(self._told) else None)
        return False

    def _tell(self, trial: Any, ended: Ended | None) -> None:
        metrics = ended.measured if ended is not None else {}
        values = [metrics.get(name, math.nan) for name in self._objectives]
        if all(map(math.isfinite, values)):
            self._study.tell(trial, values)
        else:
            self._study.tell(trial, state=self._failed)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What a search is made of; num_trials means passes through the grid where points are planned, else trials."""

    num_trials: int
    seed: int
    objectives: Mapping[str, str]
    window: int


def build_search(name: str, settings: Mapping[str, Setting], options: SearchOptions) -> Search:
    """The search of that name in `SEARCHES`. InputError for an unknown name, and naming what a search lacks."""
    if name not in SEARCHES:
        close = nearest(name, SEARCHES)
        hint = f"; did you mean {close}?" if close else ""
        raise InputError(f"search={name}: expected one of {', '.join(SEARCHES)}{hint}")
    return SEARCHES[name](settings, options)


def points_to_check(search: Search, settings: Mapping[str, Setting]) -> Sequence[Point]:
    """Points whose settings show every mistake of a space: all that are planned, or the corners of what may come."""
    return search.known if isinstance(search, Planned) else corner_points(settings)


def _grid(settings: Mapping[str, Setting], options: SearchOptions) -> Search:
    for key, setting in settings.items():
        if type(setting.dimension) is not Grid:
            raise InputError(f"search=grid: space.{key} is no grid; expected search=random, which crosses grids too")
    return _random(settings, options)


def _random(settings: Mapping[str, Setting], options: SearchOptions) -> Search:
    return Planned(plan_points(settings, num_trials=options.num_trials, seed=options.seed))


def _tpe(settings: Mapping[str, Setting], options: SearchOptions) -> Search:
    import_optuna("optuna")
    from optuna.samplers import TPESampler

    # a trial under way counts as a bad one: a window of proposals does not crowd into one place
    return _proposed(settings, options, TPESampler(seed=options.seed, constant_liar=True))


def _nsga2(settings: Mapping[str, Setting], options: SearchOptions) -> Search:
    import_optuna("optuna_nsga2")
    from optuna.samplers import NSGAIISampler

    return _proposed(settings, options, NSGAIISampler(seed=options.seed, population_size=max(2, options.window)))


def _proposed(settings: Mapping[str, Setting], options: SearchOptions, sampler: Any) -> Search:
    if options.num_trials < 2:
        raise InputError(f"num_trials={options.num_trials}: Optuna makes so many trials; expected at least 2")
    return Proposed(
        settings,
        sampler=sampler,
        num_trials=options.num_trials,
        objectives=options.objectives,
        window=options.window,
    )


def import_optuna(asked_by: str, key: str = "search") -> None:
    """InputError where Optuna is not installed, with the command that installs it."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError(f"{key}={asked_by}: optuna is not installed; pip install 'mfm_ray[tune]'")


SEARCHES: dict[str, Callable[[Mapping[str, Setting], SearchOptions], Search]] = {
    "grid": _grid,
    "random": _random,
    "optuna": _tpe,
    "optuna_nsga2": _nsga2,
}
