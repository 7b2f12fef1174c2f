"""Who hangs, who is gone, and what is said about it. Real processes that hang and die: tests/jobs/test_faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from mfm_ray.storage import Storage
from mfm_ray.training.failures import causes
from mfm_ray.training.heartbeat import CHECKPOINT, DATA, END, START, STEP, Beat, Heartbeat, Member, birth, whereabouts
from mfm_ray.training.monitor import ATTEMPTS_FILE, AttemptsLog, Heard, find_hang

TIMEOUT_S = 100.0


def heard(rank: int, *, of: int = 3, step: int = 7, phase: str = STEP, still_s: float = 120.0, **changes: Any) -> Heard:
    member = Member(
        attempt="a:1", rank=rank, world_size=of, node=f"10.0.0.{rank}", node_id="", pid=100 + rank, born="1"
    )
    age_s = changes.pop("age_s", 1.0)
    values = {"started_from": 0, "stepped_at": 1.0, "waiting": True, "function": "all_reduce (c10d.py:1)", **changes}
    return Heard(Beat(member=member, step=step, phase=phase, still_s=still_s, **values), age_s)


def culprits(*group: Heard, timeout_s: float = TIMEOUT_S) -> list[int] | None:
    hang = find_hang(group, timeout_s=timeout_s)
    return None if hang is None else [one.beat.member.rank for one in hang.culprits]


def test_nobody_hangs_while_anybody_moves() -> None:
    assert culprits(heard(0), heard(1), heard(2, still_s=5.0)) is None
    assert culprits(heard(0, still_s=98.5), heard(1), heard(2)) is None
    assert culprits(heard(0, still_s=99.5), heard(1), heard(2)) == [0, 1, 2]  # age counts


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"age_s": 70.0, "still_s": 60.0}, "has gone silent"),
        ({"step": 6}, "is behind the others"),
        ({"phase": DATA}, "is behind the others"),
        (
            {"waiting": False, "function": "read (data.py:9)"},
            "is not where the others wait for it, in read (data.py:9)",
        ),
    ],
)
def test_the_worker_that_keeps_the_others_waiting_is_named_with_rank_node_and_step(
    odd: dict[str, Any], reason: str
) -> None:
    hang = find_hang([heard(0), heard(1, **odd), heard(2)], timeout_s=TIMEOUT_S)
    assert hang is not None
    assert [one.beat.member.rank for one in hang.culprits] == [1]
    step = odd.get("step", 7) + 1
    assert f"training worker 1 (node 10.0.0.1, process 101) in step {step} {reason}" in hang.line()


def test_when_all_wait_for_each_other_all_are_named_and_the_network_is_blamed() -> None:
    hang = find_hang([heard(rank) for rank in range(3)], timeout_s=TIMEOUT_S)
    assert hang is not None
    assert len(hang.culprits) == 3
    assert "network" in hang.line()


def test_the_first_step_may_take_three_times_as_long_and_the_end_may_wait() -> None:
    for odd in ({"stepped_at": 0.0}, {"phase": START}):
        assert culprits(*(heard(rank, still_s=298.0, **odd) for rank in range(3))) is None
        assert culprits(*(heard(rank, still_s=300.0, **odd) for rank in range(3))) == [0, 1, 2]
    assert culprits(heard(0, still_s=1e4, phase=CHECKPOINT), heard(1, phase=END), heard(2)) is None


def test_a_group_that_is_not_complete_or_trains_alone() -> None:
    assert culprits(heard(0), heard(1)) is None  # the third has not said a word yet
    assert culprits(heard(0, of=1)) == [0]


def test_a_heartbeat_knows_where_its_training_thread_is_and_whether_it_waits_for_others() -> None:
    arrived, leave = threading.Event(), threading.Event()

    def stuck_here() -> None:
        arrived.set()
        leave.wait()

    # the name of the file decides, as it does in a traceback
    code = compile("def all_reduce(inner): inner()", "/x/torch/distributed/distributed_c10d.py", "exec")
    space: dict[str, Any] = {}
    exec(code, space)
    for target, waiting in ((stuck_here, False), (lambda: space["all_reduce"](stuck_here), True)):
        arrived.clear()
        leave.clear()
        thread = threading.Thread(target=target)
        thread.start()
        arrived.wait()
        function, seen = whereabouts(thread.ident or 0)
        leave.set()
        thread.join()
        assert function.startswith("wait (threading.py:")
        assert seen is waiting


def test_a_process_is_known_by_its_number_and_its_birth() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert birth(child.pid) not in ("", birth(os.getpid()))
    child.communicate()
    assert birth(child.pid) == ""


def test_a_worker_counts_the_first_step_of_its_attempt_and_its_moves() -> None:
    beat = Heartbeat()
    beat.begin(40)
    beat.at(STEP, 40)
    assert not beat._stepped_at
    moved = beat._moved
    beat.at(DATA, 41)
    assert beat._stepped_at > 0
    assert beat._moved > moved


def test_of_failures_together_the_own_error_is_the_cause_then_the_process_that_is_gone() -> None:
    gloo = RuntimeError("Traceback\nRuntimeError: [gloo] Connection closed by peer")
    gone = WorkerHealthCheckFailedError("", RayActorError(error_msg="it is dead because its node has died"))
    own = RuntimeError("Traceback\nOSError: [Errno 28] No space left on device")
    assert set(causes({0: gloo, 1: gone})) == {1}
    assert causes({0: gloo, 1: gone}) == {1: "its node is lost"}
    assert "the process is gone" in causes({1: RayActorError()})[1]
    assert causes({0: gone, 1: gloo, 2: own}) == {2: "OSError: [Errno 28] No space left on device"}
    assert set(causes({0: gloo, 1: gloo})) == {0, 1}


def test_the_record_of_attempts_goes_on_after_a_resume_and_keeps_what_the_storage_refused(tmp_path: Path) -> None:
    said: list[str] = []
    run = Storage(tmp_path / "run")
    log = AttemptsLog(run, said.append)
    log.write("start", attempt=1)
    (tmp_path / "run").rename(tmp_path / "away")
    (tmp_path / "run").write_text("in its place")
    log.write("failure", rank=1)
    log.write("start", attempt=2)
    assert len(said) == 1
    assert "it is tried again" in said[0]
    (tmp_path / "run").unlink()
    (tmp_path / "away").rename(tmp_path / "run")
    log.flush()
    AttemptsLog(run, said.append).write("start", attempt=1)
    events = [json.loads(line) for line in (tmp_path / "run" / ATTEMPTS_FILE).read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "failure", "start", "start"]
    assert events[1]["rank"] == 1
