"""Trials on a real Ray cluster with a sampler of arithmetic: shared loads, pruning, failures, records."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mfm_ray.storage import Storage
from mfm_ray.tuning.search import Planned, Search, SearchOptions, build_search
from mfm_ray.tuning.space import parse_space
from mfm_ray.tuning.sweep import Pruning, SweepPlan, TrialRecord, finished_trials, run_sweep, why_lost
from mfm_ray.tuning.trial import TrialSpec, rungs_of


def arithmetic_sampler() -> Any:
    """A trial of setting x has rewards of about -(x - 5)^2; local, so that it travels to the workers by value."""

    def load() -> Any:
        import os
        import signal
        from pathlib import Path

        import torch

        from mfm_ray.errors import InputError
        from mfm_ray.samplers import Samples

        def _kill_this_worker(x: str) -> None:
            """At each call, or at the first one only, where x names a file that remembers it."""
            mark = Path(x.partition(":")[2] or "/nowhere/none")
            if not mark.exists():
                if mark.parent.is_dir():
                    mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        class Sampler:
            classifier = None
            makes_images = True

            def compare(self, settings: Any, images: Any) -> dict[str, float]:
                return {}

            def draw(self, settings: Any, *, first_image: int, count: int) -> Samples:
                if isinstance(settings["x"], str) and settings["x"].startswith("kill"):
                    _kill_this_worker(settings["x"])
                    settings = {"x": 4.0}
                if settings["x"] == "refused":
                    raise InputError("x=refused: expected a number")
                if settings["x"] == "broken":
                    raise RuntimeError("out of memory")
                if settings["x"] == "no number":
                    judged = {"kind": torch.full((count,), float("nan"))}
                    return Samples(
                        images=torch.rand(count, 1, 2, 2), rewards=torch.zeros(count), nfe=2.0, calls={}, judges=judged
                    )
                if settings["x"] == "unsteered":
                    return Samples(images=torch.rand(count, 1, 2, 2), rewards=None, nfe=1.0, calls={})
                noise = torch.arange(first_image, first_image + count) % 2 - 0.5
                rewards = noise - (settings["x"] - 5) ** 2
                return Samples(images=torch.rand(count, 1, 2, 2), rewards=rewards, nfe=2.0, calls={})

        return Sampler()

    return load


Sweep = Callable[..., tuple[dict[int, TrialRecord], SweepPlan]]


@pytest.fixture
def sweep(ray_session: None, tmp_path: Path) -> Sweep:
    def sweep(
        xs: list[Any],
        *,
        num_samples: int = 16,
        prune_after: int | None = None,
        num_workers: int = 1,
        factor: int = 2,
        max_failures: int = 0,
        search: Search | None = None,
    ) -> tuple[dict[int, TrialRecord], SweepPlan]:
        rungs = rungs_of(num_samples, prune_after, factor)
        pruning = Pruning(metric="reward", mode="max", rungs=rungs, reduction_factor=factor)
        plan = SweepPlan(search=search or Planned([{"x": x} for x in xs]), decided_by="hash", pruning=pruning)
        run = Storage(tmp_path)
        spec = TrialSpec(
            load=arithmetic_sampler(),
            rungs=rungs,
            pictures=run.child("pictures"),
            objectives=["reward"],
        )
        records = run_sweep(
            plan,
            spec,
            run,
            finished_trials(run, plan),
            settings_of=lambda point: point,
            num_workers=num_workers,
            resources={"CPU": 1.0},
            max_failures=max_failures,
        )
        return records, plan

    return sweep


def test_trials_share_the_model_of_their_worker_and_leave_records(sweep: Sweep, tmp_path: Path) -> None:
    records, plan = sweep([float(x) for x in range(8)], num_workers=2)
    assert sorted(records) == list(range(8))
    assert {record.status for record in records.values()} == {"ok"}
    assert sum(record.model_loads for record in records.values()) <= 2
    assert [records[x].metrics["reward"] for x in range(8)] == [pytest.approx(-((x - 5) ** 2)) for x in range(8)]
    assert finished_trials(Storage(tmp_path), plan) == records
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 8


def test_a_failing_trial_is_recorded_with_its_reason_and_ends_nothing(sweep: Sweep, tmp_path: Path) -> None:
    records, plan = sweep([1.0, "refused", "broken", 2.0, "no number", "unsteered"])
    assert [records[index].status for index in range(6)] == ["ok", "refused", "lost", "ok", "refused", "refused"]
    assert records[1].reason == "x=refused: expected a number"
    assert "out of memory" in str(records[2].reason)
    assert records[4].reason == "judge.kind: nan, expected a finite number"
    assert str(records[5].reason).startswith("reward: not measured")
    assert sorted(finished_trials(Storage(tmp_path), plan)) == [
        0,
        1,
        3,
        4,
        5,
    ]  # a lost trial may go better the next time


@pytest.mark.parametrize(
    ("noted", "reason"),
    [
        ("Traceback (most recent call last):\n  File x\nRuntimeError: out of memory\n", "RuntimeError: out of memory"),
        (
            "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.\n"
            "Memory on the node was 7.9GB / 8GB.\nTo disable worker killing, set `RAY_x` to zero.\n",
            "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory. "
            "To disable worker killing, set `RAY_x` to zero.",
        ),
        ("", "unknown error"),
    ],
)
def test_a_lost_trial_names_the_exception_and_not_only_its_last_line(noted: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(noted)
    assert why_lost(SimpleNamespace(error_file=str(tmp_path / "error.txt"))) == reason


def test_what_is_there_is_not_made_again(sweep: Sweep, tmp_path: Path) -> None:
    first, _ = sweep([1.0, 2.0])
    files = sorted((tmp_path / "trials").glob("*.json"))
    written = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    time.sleep(0.01)
    again, _ = sweep([1.0, 2.0])
    assert [again[index].metrics["reward"] for index in (0, 1)] == [first[index].metrics["reward"] for index in (0, 1)]
    assert files[0].stat().st_mtime_ns == written[0]
    assert files[1].stat().st_mtime_ns > written[1]


def test_a_damaged_record_and_one_of_other_settings_are_made_again(sweep: Sweep, tmp_path: Path) -> None:
    _, plan = sweep([1.0, 2.0])
    (tmp_path / "trials" / "00000.json").write_text('{"index": 0}')
    assert sorted(finished_trials(Storage(tmp_path), plan)) == [1]
    other = SweepPlan(search=plan.search, decided_by="another hash", pruning=plan.pruning)
    assert finished_trials(Storage(tmp_path), other) == {}


def test_pruning_finds_the_same_best_for_less(sweep: Sweep) -> None:
    """One worker, so that rungs fill in one order: not that of the points, whose first half gets better and better."""
    xs = [x / 2 for x in range(24)]
    records, _ = sweep(xs, num_samples=64, prune_after=4, factor=4)
    finished = {index: record for index, record in records.items() if record.status == "ok"}
    assert max(finished, key=lambda index: finished[index].metrics["reward"]) == 10
    drawn = sum(record.history[-1]["num_samples"] for record in records.values())
    assert drawn <= 0.4 * 64 * len(xs)
    assert {record.status for record in records.values()} == {"ok", "pruned"}
    assert all(record.history[-1]["num_samples"] < 64 for record in records.values() if record.status == "pruned")


def test_a_worker_that_is_killed_is_replaced_and_its_trial_made_again(sweep: Sweep, tmp_path: Path) -> None:
    """kill -9 of the worker in its first trial."""
    records, _ = sweep([f"kill:{tmp_path}/once", 2.0], max_failures=1)
    assert [records[index].status for index in range(2)] == ["ok", "ok"]
    assert records[0].metrics["reward"] == pytest.approx(-1.0)
    assert [records[index].losses for index in range(2)] == [1, 0]


@pytest.mark.slow
def test_a_trial_that_kills_every_worker_is_given_up_and_the_sweep_goes_on(sweep: Sweep) -> None:
    records, _ = sweep([1.0, "kill always", 2.0], max_failures=1)
    assert [records[index].status for index in range(3)] == ["ok", "lost", "ok"]
    assert [records[index].losses for index in range(3)] == [0, 2, 0]
    assert "died" in str(records[1].reason)


def test_proposed_points_are_the_same_whatever_the_workers_and_after_a_stop(sweep: Sweep, tmp_path: Path) -> None:
    settings = parse_space({"x": {"uniform": [0, 20]}})
    options = SearchOptions(num_trials=8, seed=1, objectives={"reward": "max", "nfe": "min"}, window=3)
    whole, plan = sweep([], search=build_search("optuna", settings, options), num_workers=2)
    assert sorted(whole) == list(range(8))
    assert sum(record.model_loads for record in whole.values()) <= 2
    for index in (3, 7):
        (tmp_path / "trials" / f"{index:05d}.json").unlink()
    again = build_search("optuna", settings, options)
    kept = finished_trials(Storage(tmp_path), SweepPlan(search=again, decided_by="hash", pruning=plan.pruning))
    assert sorted(kept) == [0, 1, 2, 4, 5]  # of 6 nobody knows that it was proposed, without the result of 3
    resumed, _ = sweep([], search=build_search("optuna", settings, options), num_workers=1)
    for index in range(8):
        assert resumed[index].point == whole[index].point
        assert resumed[index].metrics["reward"] == whole[index].metrics["reward"]


def test_a_loss_that_proposals_were_made_from_stays_one(tmp_path: Path) -> None:
    """Made again it would change what was proposed after it; the last ones are made again."""
    settings = parse_space({"x": {"uniform": [0, 20]}})
    options = SearchOptions(num_trials=6, seed=1, objectives={"reward": "max"}, window=2)
    run, search = Storage(tmp_path), build_search("optuna", settings, options)
    records: dict[int, TrialRecord] = {}
    while len(records) < 6:
        for index, point in enumerate(search.points(records)):
            status = "lost" if index in (1, 5) else "ok"
            reason = "out of memory" if status == "lost" else None
            records[index] = TrialRecord(
                index=index,
                point=point,
                status=status,
                metrics={"reward": point["x"]},
                settings="hash",
                reason=reason,
            )
            run.write_json(f"trials/{index:05d}.json", asdict(records[index]))
    pruning = Pruning(metric="reward", mode="max", rungs=[8], reduction_factor=2)
    plan = SweepPlan(search=build_search("optuna", settings, options), decided_by="hash", pruning=pruning)
    assert sorted(finished_trials(run, plan)) == [0, 1, 2, 3, 4]
    assert records[1].measured == {} and records[0].measured == records[0].metrics
