"""Trials on a real Ray cluster with a sampler of arithmetic: shared loads, pruning, failures, records."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mfm_ray.storage import Storage
from mfm_ray.tuning.sweep import Pruning, SweepPlan, TrialRecord, finished_trials, run_sweep
from mfm_ray.tuning.trial import TrialSpec, rungs_of


def arithmetic_sampler() -> Any:
    """A trial of setting x has rewards of about -(x - 5)^2; local, so that it travels to the workers by value."""

    def load() -> Any:
        import torch

        from mfm_ray.errors import InputError
        from mfm_ray.samplers import Samples

        class Sampler:
            classifier = None

            def draw(self, settings: Any, *, first_image: int, count: int) -> Samples:
                if settings["x"] == "refused":
                    raise InputError("x=refused: expected a number")
                if settings["x"] == "broken":
                    raise RuntimeError("out of memory")
                noise = torch.arange(first_image, first_image + count) % 2 - 0.5
                rewards = noise - (settings["x"] - 5) ** 2
                return Samples(images=torch.rand(count, 1, 2, 2), rewards=rewards, nfe=2.0, calls={})

        return Sampler()

    return load


Sweep = Callable[..., tuple[dict[int, TrialRecord], SweepPlan]]


@pytest.fixture
def sweep(ray_session: None, tmp_path: Path) -> Sweep:
    def sweep(
        xs: list[Any], *, num_samples: int = 16, prune_after: int | None = None, num_workers: int = 1, factor: int = 2
    ) -> tuple[dict[int, TrialRecord], SweepPlan]:
        rungs = rungs_of(num_samples, prune_after, factor)
        pruning = Pruning(metric="reward", mode="max", rungs=rungs, reduction_factor=factor)
        plan = SweepPlan(points=[{"x": x} for x in xs], decided_by="hash", pruning=pruning)
        run = Storage(tmp_path)
        spec = TrialSpec(
            load=arithmetic_sampler(),
            settings=dict(enumerate(plan.points)),
            rungs=rungs,
            pictures=run.child("pictures"),
        )
        records = run_sweep(
            plan,
            spec,
            run,
            finished_trials(run, plan),
            num_workers=num_workers,
            resources={"CPU": 1.0},
            max_failures=0,
            log=lambda line: None,
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
    records, plan = sweep([1.0, "refused", "broken", 2.0])
    assert [records[index].status for index in range(4)] == ["ok", "refused", "lost", "ok"]
    assert records[1].reason == "x=refused: expected a number"
    assert "out of memory" in str(records[2].reason)
    assert sorted(finished_trials(Storage(tmp_path), plan)) == [0, 1, 3]  # a lost trial may go better the next time


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
    other = SweepPlan(points=plan.points, decided_by="another hash", pruning=plan.pruning)
    assert finished_trials(Storage(tmp_path), other) == {}


def test_pruning_finds_the_same_best_for_less(sweep: Sweep) -> None:
    """One worker, so that rungs fill in the order of the points: the best comes early and the rest is cut."""
    xs = [5.0, *(float(x) for x in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11))]
    records, _ = sweep(xs, num_samples=64, prune_after=4, factor=4)
    finished = {index: record for index, record in records.items() if record.status == "ok"}
    assert max(finished, key=lambda index: finished[index].metrics["reward"]) == 0
    drawn = sum(record.history[-1]["num_samples"] for record in records.values())
    assert drawn <= 0.4 * 64 * len(xs)
    assert {record.status for record in records.values()} == {"ok", "pruned"}
    assert all(record.history[-1]["num_samples"] < 64 for record in records.values() if record.status == "pruned")
