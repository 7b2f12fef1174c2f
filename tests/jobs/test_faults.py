"""Faults done to real trainings (benchmarks/drills/faults.py): no more than one checkpoint interval is lost, nothing in
silence, and the model at the end is the undisturbed one. A killed driver is in `make test`: test_train.py."""

from __future__ import annotations

import pytest

from benchmarks.drills import faults
from benchmarks.drills.faults import CHECKPOINT_EVERY, Drill, Outcome

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return Drill(tmp_path_factory.mktemp("drill"))


def check(outcome: Outcome, *said: str, attempts: int = 2) -> None:
    assert outcome.same, outcome
    assert outcome.lost_steps <= CHECKPOINT_EVERY, outcome
    assert outcome.attempts == attempts, outcome
    for words in said:
        assert any(words in line for line in outcome.said), outcome


def test_a_rank_that_is_killed_is_named_with_node_step_and_last_checkpoint(drill: Drill) -> None:
    outcome = faults.rank_killed(drill)
    check(outcome, "training worker 1 (node ", " in step ", "the process is gone", "last checkpoint: step 100")


def test_a_rank_that_is_killed_while_it_writes_a_checkpoint(drill: Drill) -> None:
    check(faults.rank_killed_while_writing(drill), "training worker 1 (node ", "the process is gone")


def test_a_driver_that_is_killed_and_resumed(drill: Drill) -> None:
    check(faults.driver_killed(drill))


def test_a_rank_that_hangs_is_named_and_ended(drill: Drill) -> None:
    check(faults.rank_hangs(drill), "hang: training worker 1 (node ", "has gone silent")


def test_a_rank_that_is_told_to_end_leaves_a_checkpoint_of_its_last_step(drill: Drill) -> None:
    outcome = faults.rank_told_to_end(drill)
    check(outcome, "its checkpoint is written")
    assert outcome.lost_steps == 0


def test_a_node_that_is_lost_is_replaced(drill: Drill) -> None:
    check(faults.node_killed(drill), "training worker")


def test_a_node_that_is_drained_costs_no_step_that_was_made_before_the_notice(drill: Drill) -> None:
    outcome = faults.node_drained(drill)
    check(outcome)


def test_storage_that_is_away_is_waited_for(drill: Drill) -> None:
    outcome = faults.storage_away(drill)
    check(outcome, "trying again", "done after", attempts=1)
    assert outcome.lost_steps == 0


@pytest.mark.skipif(not faults.may_mount(), reason="a small disk to fill is mounted, which needs root")
def test_a_full_disk_is_waited_for(drill: Drill) -> None:
    outcome = faults.disk_full(drill)
    check(outcome, "No space left on device; trying again", "done after", attempts=1)
    assert outcome.lost_steps == 0
