"""What is said and kept of trials while a sweep runs: the live table, TensorBoard, MLflow, an Optuna study."""

import importlib.util
import io
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.tuning.live import LiveTable, PlainLines, Progress
from mfm_ray.tuning.search import Planned
from mfm_ray.tuning.space import parse_space
from mfm_ray.tuning.sweep import Pruning, SweepPlan, TrialRecord
from mfm_ray.tuning.trackers import Tracked, check_trackers, open_trackers

POINTS = [{"scale": 0.5, "method": "smc"}, {"scale": 2.0, "method": None}, {"scale": 4.0, "method": [1, 2]}]
PLAN = SweepPlan(
    search=Planned(POINTS),
    decided_by="hash",
    pruning=Pruning(metric="reward", mode="max", rungs=[8, 16], reduction_factor=2),
)


def reported(samples, reward):
    return {"num_samples": float(samples), "reward": reward, "reward_half_width": 0.25, "nfe": 50.0}


def ended(index, status="ok", reward=1.0, reason=None):
    history = [] if reason else [reported(8, reward - 1), reported(16, reward)]
    return TrialRecord(
        index=index,
        point=POINTS[index],
        status=status,
        metrics=history[-1] if history else {},
        settings="hash",
        history=history,
        reason=reason,
    )


RECORDS = [ended(0), ended(1, reward=3.0), ended(2, status="refused", reason="scale=4: expected less")]


def tracked(folder):
    settings = parse_space({"scale": {"uniform": [0, 5]}, "method": {"grid": ["smc", None, [1, 2]]}})
    return Tracked(name="sweep", settings=settings, objectives={"reward": "max", "nfe": "min"}, run=Storage(folder))


@pytest.mark.parametrize("name", ["tensorboard", pytest.param("mlflow", marks=pytest.mark.slow), "optuna"])
def test_a_tracker_holds_each_trial_once_though_it_is_told_twice(name, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):
        (tracker,) = open_trackers([name], tracked(tmp_path))
        for record in RECORDS:
            tracker.on_end(record)
    assert READ[name](tmp_path) == [1.0, 3.0, None]


def read_tensorboard(folder):
    found = []
    for trial in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(trial))
        events.Reload()
        tags = events.Tags()["scalars"]
        assert "_hparams_/session_start_info" in events.summary_metadata
        if "reward" not in tags:
            found.append(None)
            continue
        assert [(event.step, event.value) for event in events.Scalars("nfe")] == [(8, 50.0), (16, 50.0)]
        found.append(events.Scalars("reward")[-1].value)
    return found


def read_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id], order_by=["tags.trial"])
    assert [run.data.params["scale"] for run in runs] == ["0.5", "2.0", "4.0"]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED", "FAILED"]
    assert [m.step for m in client.get_metric_history(runs[0].info.run_id, "reward")] == [8, 16]
    return [run.data.metrics.get("reward") for run in runs]


def read_optuna(folder):
    import optuna

    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/optuna.db")
    assert study.metric_names == ["reward", "nfe"]
    assert [trial.params["method"] for trial in study.trials] == ["smc", None, "[1, 2]"]
    assert [trial.number for trial in study.best_trials] == [1]
    assert study.trials[2].user_attrs["reason"] == "scale=4: expected less"
    return [trial.values[0] if trial.values else None for trial in study.trials]


READ = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "optuna": read_optuna}


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("optuna", "optuna")])
def test_a_tracker_that_is_not_installed_is_one_line(name, package, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=rf"log_to=\[{name}\]: {package} is not installed; pip install 'mfm_ray\[tune\]'"
    ):
        check_trackers([name], Storage(tmp_path))


def test_files_cannot_go_to_a_remote_storage():
    with pytest.raises(InputError, match="is not local, and tensorboard writes files"):
        check_trackers(["tensorboard"], Storage("mock://bucket/run"))


def run_with(make):
    now = [0.0]
    state = Progress("methods", PLAN, {}, clock=lambda: now[0])
    watcher = make(state, lambda: now[0])
    watcher.on_progress(0, POINTS[0], {})
    watcher.on_progress(1, POINTS[1], {})
    now[0] = 10.0
    watcher.on_progress(1, POINTS[1], reported(8, 2.0))
    watcher.on_end(RECORDS[0])
    return state, watcher


def test_without_a_terminal_each_ended_trial_is_a_line():
    lines = []
    _, watcher = run_with(lambda state, clock: PlainLines(state, lines.append))
    watcher.on_end(RECORDS[2])
    assert lines == [
        "1 of 3 trials, 0:20 left: scale=0.5 method=smc: ok, reward 1 ± 0.25, 50.0 calls an image",
        "2 of 3 trials, 0:05 left: scale=4 method=[1, 2]: refused, scale=4: expected less",
    ]


def test_on_a_terminal_the_table_takes_the_place_of_its_last_state():
    out = io.StringIO()
    state, watcher = run_with(lambda state, clock: LiveTable(state, out, clock=clock))
    assert state.table() == [
        "methods: 1 of 3 trials (1 ok), 1 running, 0:20 left",
        "  best         0  reward 1 ± 0.25  scale=0.5 method=smc",
        "  running      1   8 of 16 samples  reward 2 ± 0.25  scale=2 method=None",
    ]
    watcher.on_end(RECORDS[1])
    watcher.on_end(RECORDS[2])
    shown = screen(out.getvalue())
    assert shown == [
        "3 of 3 trials, 0:00 left: scale=4 method=[1, 2]: refused, scale=4: expected less",
        "methods: 3 of 3 trials (2 ok, 1 refused), 0 running, 0:00 left",
        "  best         1  reward 3 ± 0.25  scale=2 method=None",
    ]


def screen(text):
    """What stands on a terminal after this text, of which ESC[nA goes up and ESC[J clears to the end."""
    lines, row = [], 0
    for up, line in re.findall(r"(?:\x1b\[(\d+)A)?(?:\r\x1b\[J)?([^\n]*)\n", text):
        row -= int(up or 0)
        lines = [*lines[:row], line]
        row += 1
    return lines
