"""MLflow and W&B through Ray's own set-up functions; the packages themselves are stubs that write down their calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfm_ray.config import TrainConfig, load_config
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.training.launch import check_config
from mfm_ray.training.trackers import check_trackers, mlflow_uri, parameters

ROOT = Path(__file__).resolve().parents[2]

MLFLOW = """
import json, os

class Experiment:
    experiment_id = "7"

def note(name, /, *args, **kwargs):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([name, args, kwargs]) + "\\n")

def set_tracking_uri(uri): note("set_tracking_uri", uri)
def set_registry_uri(uri): pass
def get_experiment_by_name(name): return None
def create_experiment(name, artifact_location=None): note("create_experiment", name); return "7"
def active_run(): return None
def start_run(run_name=None, experiment_id=None, tags=None): note("start_run", run_name, experiment_id)
def log_param(key, value): note("log_param", key, value)
def log_metrics(metrics, step=None): note("log_metrics", metrics, step)
def end_run(status="FINISHED"): note("end_run", status)
"""
WANDB = {
    "__init__.py": """
import json, os

def note(name, /, *args, **kwargs):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([name, args, kwargs]) + "\\n")

class Run:
    def log(self, data, step=None): note("log", data, step)
    def finish(self, exit_code=None): note("finish", exit_code)

def init(**kwargs):
    note("init", **kwargs)
    return Run()
""",
    "sdk/data_types/base_types/wb_value.py": "class WBValue: pass\n",
    "sdk/data_types/image.py": "class Image: pass\n",
    "sdk/data_types/video.py": "class Video: pass\n",
    "util.py": "def json_dumps_safer(x): return str(x)\n",
    "wandb_run.py": "from wandb import Run\n",
}
SCRIPT = """
import sys
from mfm_ray.config import load_config
from mfm_ray.storage import Storage
from mfm_ray.training.trackers import check_trackers, open_trackers
config = load_config("train", ["experiment=gmm", "name=mine", "trackers=[mlflow,wandb]"])
check_trackers(config.trackers)
trackers = open_trackers(config, Storage(sys.argv[1]))
for tracker in trackers:
    tracker.log(20, {"loss": 0.5, "squared_error.semigroup.t0-0.25": 1.5})
    tracker.close(failed=tracker is trackers[1])
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    place = tmp_path / "stubs"
    files = {f"wandb/{name}": content for name, content in WANDB.items()}
    files |= {"mlflow/__init__.py": MLFLOW, "mlflow/utils/mlflow_tags.py": "MLFLOW_RUN_NAME = 'mlflow.runName'\n"}
    for name, content in files.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return place


def test_both_get_the_configuration_the_figures_and_how_it_ended(tmp_path: Path, stubs: Path) -> None:
    environment = {"PYTHONPATH": f"{stubs}{os.pathsep}{ROOT}", "CALLS": f"{tmp_path}/calls", "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run")]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    figures = {"loss": 0.5, "squared_error.semigroup.t0-0.25": 1.5}
    mlflow = [call for call in calls if call[0] not in ("init", "log", "finish")]
    assert mlflow[0] == ["set_tracking_uri", [f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"], {}]
    assert mlflow[1:3] == [["create_experiment", ["mfm-ray"], {}], ["start_run", ["mine", "7"], {}]]
    assert ["log_param", ["zero.stage", 1], {}] in mlflow
    assert mlflow[-2:] == [["log_metrics", [figures, 20], {}], ["end_run", ["FINISHED"], {}]]
    (_, _, init), log, finish = (call for call in calls if call[0] in ("init", "log", "finish"))
    assert (init["name"], init["project"], init["group"]) == ("mine", "mfm-ray", "gmm")
    assert init["config"]["zero.stage"] == 1
    assert (log, finish) == (["log", [figures, 20], {}], ["finish", [1], {}])


def test_a_tracking_server_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Storage(tmp_path / "run")
    assert mlflow_uri(run) == f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    assert mlflow_uri(Storage("mock://bucket/run")) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert mlflow_uri(run) is None  # MLflow then reads the variable itself


def config_of(*words: str) -> TrainConfig:
    config = load_config("train", ["experiment=gmm", *words])
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_way_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"trackers=\[{name}\]: {name} is not installed; pip install {name}"):
        check_config(config_of(f"trackers=[{name}]"))


def test_no_tracker_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(config_of().trackers)


def test_an_unknown_tracker_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"trackers=\['mlflov'\]: expected .*mlflow, wandb"):
        config_of("trackers=[mlflov]")


def test_parameters_are_flat() -> None:
    found = parameters(config_of())
    assert found["optimizer.learning_rate"] > 0
    assert not [value for value in found.values() if isinstance(value, dict)]
