"""Records, folders and models of trainings, without a cluster: who stays, what a resumed sweep knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint_store import CHECKPOINTS
from mfm_ray.tuning.scheduling import Race, build_scheduling
from mfm_ray.tuning.training_sweep import TrainingBook, TrainingPlan, kept_trials, known_records
from mfm_ray.tuning.training_trial import (
    FAILURE,
    INHERITED,
    LOST,
    STEP,
    TRIAL,
    WHOLE,
    changes_of,
    exploits_of,
    inherit,
    training_folder,
    with_changes,
)


def plan_of(num_trials: int = 4, *, mode: str = "min", decided_by: str = "hash") -> TrainingPlan:
    return TrainingPlan(
        points=[{"seed": index} for index in range(num_trials)],
        decided_by=decided_by,
        race=Race(metric="posterior_score", mode=mode, max_steps=20, every=10, space={}),
        scheduling=build_scheduling({"name": "none"}),
        models_to_keep=2,
    )


class Sweep:
    """A book and what Tune would tell it."""

    def __init__(self, run: Storage, plan: TrainingPlan) -> None:
        self.run, self.said = run, []
        self.book = TrainingBook(plan, run, known_records(run, plan), self.said.append)

    def start(self, index: int) -> Any:
        trial = SimpleNamespace(config={TRIAL: index}, last_result=None, error_file=None)
        self.book.on_trial_start(0, [], trial)
        folder = training_folder(self.run, index)
        for name in (CHECKPOINTS, "model"):
            folder.write_bytes(f"{name}/file", b"content")
        return trial

    def report(self, trial: Any, step: int, score: float, **more: Any) -> None:
        trial.last_result = {STEP: step, "posterior_score": score, "time_total_s": 1.0, **more}
        self.book.on_trial_result(0, [], trial, trial.last_result)

    def end(self, index: int, score: float, **more: Any) -> None:
        trial = self.start(index)
        self.report(trial, 10, score + 1)
        self.report(trial, 20, score, **more)
        self.book.on_trial_complete(0, [], trial)

    def left(self, index: int) -> set[str]:
        folder = training_folder(self.run, index)
        return set(folder.listdir()) if folder.exists() else set()


@pytest.mark.parametrize(("mode", "kept"), [("min", [1, 2]), ("max", [0, 3])])
def test_the_best_models_stay_and_the_others_go_when_they_end(tmp_path: Path, mode: str, kept: list[int]) -> None:
    plan = plan_of(mode=mode)
    sweep = Sweep(Storage(tmp_path), plan)
    for index, score in enumerate((4.0, 1.0, 2.0, 3.0)):
        sweep.end(index, score, **{WHOLE: True})
    assert kept_trials(sweep.book.records, plan) == kept
    assert [bool(sweep.left(index)) for index in range(4)] == [index in kept for index in range(4)]
    assert sweep.said[-1].startswith("4 of 4 trials, 0 s left: seed=3: ok, posterior_score 3 after 20 steps")


def test_how_a_trial_ended_stands_in_its_record(tmp_path: Path) -> None:
    plan, run = plan_of(), Storage(tmp_path)
    sweep = Sweep(run, plan)
    sweep.end(0, 1.0, **{WHOLE: True})
    sweep.end(1, 2.0)
    for index, is_lost in ((2, False), (3, True)):
        trial = sweep.start(index)
        sweep.report(trial, 10, 1.0)
        trial.last_result = {STEP: 10, FAILURE: "loss is nan", LOST: is_lost}
        sweep.book.on_trial_result(0, [], trial, trial.last_result)
        sweep.book.on_trial_complete(0, [], trial)
    found = known_records(run, plan)
    assert [found[index].status for index in range(4)] == ["ok", "pruned", "refused", "lost"]
    assert [found[index].is_final for index in range(4)] == [True, True, True, False]
    assert found[3].reason == "loss is nan" and found[3].metrics == {STEP: 10.0, "posterior_score": 1.0}
    assert sweep.left(1) == sweep.left(2) == set()
    assert CHECKPOINTS in sweep.left(3)  # it goes on from there
    assert known_records(run, plan_of(decided_by="another")) == {}


def test_a_killed_driver_leaves_a_record_of_every_report(tmp_path: Path) -> None:
    plan, run = plan_of(), Storage(tmp_path)
    killed = Sweep(run, plan)
    killed.report(killed.start(0), 10, 1.0)
    killed.start(1)
    found = known_records(run, plan)
    assert [(found[index].status, len(found[index].history)) for index in (0, 1)] == [("running", 1), ("running", 0)]
    resumed = Sweep(run, plan)
    assert resumed.book.records == {}
    trial = resumed.start(0)
    resumed.report(trial, 10, 1.0)  # the same checkpoint again is no second report
    resumed.report(trial, 20, 0.5, **{WHOLE: True})
    resumed.book.on_trial_complete(0, [], trial)
    assert [report[STEP] for report in resumed.book.records[0].history] == [10, 20]


def test_a_trial_takes_over_a_checkpoint_and_settings(tmp_path: Path) -> None:
    folder, donor = Storage(tmp_path / "mine"), tmp_path / "donor"
    folder.write_bytes(f"{CHECKPOINTS}/old", b"old")
    for step, rate in ((10, 0.1), (20, 0.2)):
        Storage(donor).write_bytes("manifest-rank-0.json", str(step).encode())
        inherit(folder, donor, {"from": 3, STEP: step, "changed": {"optimizer.learning_rate": rate}})
        assert folder.read_bytes(f"{INHERITED}/manifest-rank-0.json") == str(step).encode()
    assert not folder.exists(CHECKPOINTS)
    assert [exploit[STEP] for exploit in exploits_of(folder)] == [10, 20]
    assert changes_of(folder) == {"optimizer.learning_rate": 0.2}
    settings = {"optimizer": {"learning_rate": 1.0, "name": "adam"}}
    assert with_changes(settings, changes_of(folder)) == {"optimizer": {"learning_rate": 0.2, "name": "adam"}}
    assert settings["optimizer"]["learning_rate"] == 1.0
    assert changes_of(Storage(tmp_path / "nobody")) == {}
