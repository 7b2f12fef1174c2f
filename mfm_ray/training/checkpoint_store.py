"""The checkpoints of a run: their folders, the newest that can be used, and which of them stay.

    <run>/checkpoints/000003-step-00000150      the fourth that the run has begun to write, after 150 steps

Numbers only grow, so that no attempt ever writes into a folder of an earlier one, and the last name is the newest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import CheckpointError, CheckpointState, UnfinishedError, read_state

CHECKPOINTS = "checkpoints"
_FOLDER = re.compile(r"(\d{6,})-step-\d{8,}")
_EARLIER_FOLDER = re.compile(r"checkpoint_.*")  # as Ray Train named them, which held what DeepSpeed wrote

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A checkpoint of a run and what it says of itself."""

    storage: Storage
    state: CheckpointState


def folder_name(number: int, step: int) -> str:
    return f"{number:06d}-step-{step:08d}"


def folders(run: Storage) -> list[str]:
    """Names of the run's checkpoint folders, complete or not, the newest last."""
    names = run.listdir(CHECKPOINTS) if run.is_dir(CHECKPOINTS) else []
    ours = sorted((name for name in names if _FOLDER.fullmatch(name)), key=_number)
    return ours or [name for name in names if _EARLIER_FOLDER.fullmatch(name)]


def next_number(run: Storage) -> int:
    """The number of the folder that is written next."""
    numbers = [_number(name) for name in folders(run) if _FOLDER.fullmatch(name)]
    return max(numbers, default=-1) + 1


def _number(name: str) -> int:
    return int(name.partition("-")[0])


def complete_checkpoints(run: Storage, say: Say) -> Iterator[Found]:
    """The run's checkpoints of which every file is there with its size, the newest first.

    Each damaged one that is passed over is named to `say`; one that its writer did not complete is no damage.
    CheckpointError at the end when all that there are were damaged: a run must not begin again in silence.
    """
    damage: CheckpointError | None = None
    found_one = False
    for name in reversed(folders(run)):
        storage = run.child(CHECKPOINTS, name)
        try:
            state = read_state(storage)
        except UnfinishedError:
            continue
        except CheckpointError as error:
            damage = damage or error
            say(passed_over(error))
            continue
        found_one = True
        yield Found(storage, state)
    if damage is not None and not found_one:
        raise damage


def passed_over(error: CheckpointError) -> str:
    """One line for a damaged checkpoint where an older one is taken instead."""
    return f"checkpoint passed over, looking for the one before: {error}"


def newest_checkpoint(run: Storage, say: Say = lambda line: None) -> Found | None:
    """The checkpoint from which a run goes on, None when it has none. CheckpointError when all are damaged."""
    return next(complete_checkpoints(run, say), None)


@dataclass
class Retention:
    """Which checkpoints of a run stay: the `newest` ones, and the `best` ones by the figure `score`.

    order: min or max, whichever is better.
    """

    run: Storage
    newest: int
    best: int
    score: str
    order: str
    _scores: dict[str, float] = field(default_factory=dict)

    def score_of(self, figures: dict[str, float]) -> float:
        """The figure that decides. CheckpointError naming the figures that there are when it is none of them."""
        if self.score not in figures:
            raise CheckpointError(
                f"checkpoint_score={self.score}: no figure of this run, expected one of {', '.join(sorted(figures))}"
            )
        return figures[self.score]

    def prune(self, *, before: int) -> None:
        """Delete what need not stay of the checkpoints numbered below `before`, and what was never completed."""
        names = [name for name in folders(self.run) if _FOLDER.fullmatch(name) and _number(name) < before]
        complete = [name for name in names if self._is_complete(name)]
        kept = set(complete[-self.newest :]) | set(self._best(complete))
        for name in names:
            unfinished = name not in complete and complete and _number(name) < _number(complete[-1])
            if unfinished or (name in complete and name not in kept):
                self.run.delete(f"{CHECKPOINTS}/{name}")
                self._scores.pop(name, None)

    def _is_complete(self, name: str) -> bool:
        if name not in self._scores:
            try:
                state = read_state(self.run.child(CHECKPOINTS, name))
            except CheckpointError:  # it is not counted, and goes when a complete one is newer
                return False
            self._scores[name] = self.score_of(state.figures) if self.best else 0.0
        return True

    def _best(self, complete: list[str]) -> list[str]:
        sign = {"min": 1.0, "max": -1.0}[self.order]
        return sorted(complete, key=lambda name: (sign * self._scores[name], -_number(name)))[: self.best]
