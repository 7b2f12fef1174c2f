"""jobs.tune over jobs.train on a real Ray cluster: early stopping, failures, models that stay, kill and resume, PBT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml

from jobs import train, tune
from jobs.contract import JobRun, Outcome
from jobs.run_folder import RunFolder
from mfm_ray.config import load_config
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint_store import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "experiment=gmm",
    "network.width=16",
    "network.num_blocks=1",
    "global_batch_size=64",
    "max_steps=40",
    "checkpoint_every=10",
    "log_every=10",
    "sample_every=40",
    "warmup_steps=0",
    "ema_decay=0.5",
    "optimizer.name=adamw",
    "scaling.num_workers=1",
    "scaling.start_timeout_s=240",
    "heldout.num_rows=64",
]
GOOD, USELESS, DIVERGING = 0, 2, 1
PAIR = """
job: train
space:
  optimizer.weight_decay: {grid: [0.0, 1.0e+30]}
objectives: {posterior_score: min, seconds: min}
"""
SHORT = """
job: train
space:
  optimizer.learning_rate: {grid: [0.001, 1.0]}
  optimizer.weight_decay: {grid: [0.0, 1.0e+30], when: {optimizer.learning_rate: 0.001}}
objectives: {posterior_score: min, seconds: min}
"""


@dataclass(frozen=True)
class Finished:
    outcome: Outcome
    folder: Path
    log: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.folder / "results.parquet").to_pylist()

    def record(self, index: int) -> dict[str, Any]:
        return json.loads((self.folder / "trials" / f"{index:05d}.json").read_text())


def in_process(folder: Path, *words: str) -> Finished:
    config = load_config("tune", [f"storage={folder.parent}", f"name={folder.name}", *SMALL, *words])
    tune.check(config)  # type: ignore[arg-type]
    log: list[str] = []
    run = JobRun(config=config, storage=RunFolder("tune", config).storage, log=log.append)
    return Finished(tune.body(run), folder, log)


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two sweeps: a good trial and one that diverges; these and one that is far off."""
    (tmp_path / "tune_configs").mkdir()
    (tmp_path / "tune_configs" / "pair.yaml").write_text(PAIR)
    (tmp_path / "tune_configs" / "short.yaml").write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.ray
def test_a_sweep_measures_its_trials_notes_the_diverged_and_keeps_the_best_model(
    ray_session: None, sweeps: Path
) -> None:
    done = in_process(sweeps / "pair", "sweep=pair", "concurrent_trials=2")
    rows = done.rows
    assert [row["status"] for row in rows] == ["ok", "refused"]
    assert "step 2, worker 0: loss is nan" in rows[DIVERGING]["reason"]
    assert [report["step"] for report in done.record(GOOD)["history"]] == [10, 20, 30, 40]
    assert rows[GOOD]["posterior_score_half_width"] > 0 and rows[GOOD]["posterior_error"] > 0
    kept = done.folder / "trainings" / "00000" / "model"
    assert [row["model"] for row in rows] == [str(kept), None]
    assert done.outcome.artifacts["model"] == str(kept)
    assert json.loads((kept / "config.json").read_text())["training"]["steps"] == 40
    assert not left_of(done, DIVERGING) & {"checkpoints", "model"}
    page = (done.folder / "report.html").read_text()
    for part in ("Learning curves", "Trials that failed", "data:image/png", "jobs.train"):
        assert part in page
    words = yaml.safe_load((done.folder / "presets.yaml").read_text())["high"]["words"]
    assert load_config("train", words).optimizer.weight_decay == 0.0  # type: ignore[attr-defined]
    again = in_process(sweeps / "pair", "sweep=pair", "concurrent_trials=2", "resume=true")
    assert again.log[0] == "2 of 2 trials are there already, 0 were begun"
    assert [{**row, "git": None} for row in again.rows] == [{**row, "git": None} for row in rows]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_trial_that_is_worse_at_a_rung_is_stopped_and_stays_stopped(ray_session: None, sweeps: Path) -> None:
    done = in_process(sweeps / "short", "sweep=short", "concurrent_trials=2")
    rows = done.rows
    assert [row["status"] for row in rows] == ["ok", "refused", "pruned"]
    assert rows[USELESS]["step"] == 10  # the first rung
    assert rows[USELESS]["posterior_score"] > done.record(GOOD)["history"][0]["posterior_score"]
    assert not left_of(done, USELESS) & {"checkpoints", "model"}
    again = in_process(sweeps / "short", "sweep=short", "concurrent_trials=2", "resume=true")
    assert again.log[0] == "3 of 3 trials are there already, 0 were begun"
    assert [{**row, "git": None} for row in again.rows] == [{**row, "git": None} for row in rows]


def left_of(sweep: Finished, index: int) -> set[str]:
    return {path.name for path in (sweep.folder / "trainings" / f"{index:05d}").iterdir()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep=trainingg"], "sweep=trainingg: expected one of .* did you mean training"),
        (["sweep=training"], "experiment: missing; every training starts from a recipe"),
        (["sweep=training", "experiment=gmm", "max_stepz=3"], "max_stepz: unknown key; did you mean max_steps?"),
        (["sweep=training", "experiment=gmm", "num_samples=3"], "num_samples: unknown key"),
        (["sweep=training", "experiment=gmm", "scheduler=asho"], "scheduler=asho: expected .*did you mean asha?"),
        (["sweep=training", "experiment=gmm", "scheduler.prune_aftr=5"], "scheduler.prune_aftr: unknown key"),
        (["sweep=training", "experiment=gmm", "scheduler.prune_after=5"], "prune_after=5: .*expected a multiple"),
        (["sweep=training", "experiment=gmm", "objectives={loss: min}"], "losses of different objectives cannot be"),
        (["sweep=training", "experiment=gmm", "objectives={confidence: max}"], "objectives.confidence: expected"),
        (["sweep=training", "experiment=gmm", "checkpoint_every=9000"], "checkpoint_every=9000"),
        (["sweep=training", "experiment=gmm", "scaling.num_workers=3"], "global_batch_size=1024 does not divide"),
        (["sweep=training", "experiment=gmm", "scheduler=pbt"], "space.objective: scheduler=pbt changes settings"),
        (["sweep=training", "experiment=gmm", "data.name=gmn"], "data.name=gmn"),
        (["sweep=wrong_key", "experiment=gmm"], "space.optimizer.lr: unknown key; did you mean space.optimizer"),
        (["sweep=wrong_value", "experiment=gmm"], "optimizer.learning_rate=-1.0: expected a number above 0"),
        (["sweep=wrong_kind", "experiment=gmm"], "space.seed.grit: expected one of .*did you mean grid?"),
        (["sweep=wrong_argument", "experiment=gmm"], "objective.*time_pover"),
        (["sweep=wrong_job", "experiment=gmm"], "job=trian: in the file of sweep=wrong_job, .*did you mean train?"),
    ],
)
def test_a_mistake_is_one_line_before_any_resource_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    (tmp_path / "tune_configs").mkdir()
    for name, job, space in (
        ("wrong_key", "train", "{optimizer.lr: {grid: [0.1]}}"),
        ("wrong_value", "train", "{optimizer.learning_rate: {grid: [0.1, -1.0]}}"),
        ("wrong_kind", "train", "{seed: {grit: [0]}}"),
        ("wrong_argument", "train", "{objective.time_pover: {grid: [1.0]}}"),
        ("wrong_job", "trian", "{seed: {grid: [0]}}"),
    ):
        text = f"job: {job}\nspace: {space}\nobjectives: {{posterior_score: min}}\n"
        (tmp_path / "tune_configs" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    if words[0] != "sweep=wrong_job":
        (tmp_path / "tune_configs" / "wrong_job.yaml").unlink()
    with pytest.raises(ValueError, match=message) as caught:
        tune.check(load_config("tune", [f"storage={tmp_path}", *words]))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_other_settings_do_not_go_on_with_a_sweep(sweeps: Path) -> None:
    config = load_config("tune", [f"storage={sweeps}", "sweep=short", *SMALL])
    storage = RunFolder("tune", config).storage
    from jobs.training_sweep import SWEEP, sweep_settings

    storage.write_json(SWEEP, {"settings": sweep_settings(config)})  # type: ignore[arg-type]
    common = [f"storage={sweeps}", "sweep=short", *SMALL, "resume=true"]
    tune.check(load_config("tune", [*common, "models_to_keep=1", "concurrent_trials=1"]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"max_steps=50: .* were begun with max_steps=40"):
        tune.check(load_config("tune", [*common, "max_steps=50"]))  # type: ignore[arg-type]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(model / "model.safetensors")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_killed_sweep_goes_on_from_its_checkpoints_to_the_same_table(sweeps: Path, ray_session: None) -> None:
    words = ["sweep=short", "concurrent_trials=1", "max_steps=400", "checkpoint_every=100", "scheduler.prune_after=200"]
    folder = sweeps / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", f"storage={sweeps}", "name=killed", *SMALL, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=sweeps,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    first = Storage(folder / "trainings" / "00000")
    wait_until(lambda: newest_checkpoint(first) is not None if first.is_dir("checkpoints") else False, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = newest_checkpoint(first)
    assert found is not None and not (folder / "trials" / "00001.json").exists()
    resumed = in_process(folder, *words, "resume=true")
    assert resumed.log[0] == "0 of 3 trials are there already, 1 were begun"
    calm = in_process(sweeps / "calm", *words)
    ends = [[(row["status"], row["reason"], row["step"]) for row in sweep.rows] for sweep in (resumed, calm)]
    assert ends[0] == ends[1]
    assert [status for status, _, _ in ends[0]][:2] == ["ok", "refused"]
    histories = [[report["posterior_score"] for report in sweep.record(GOOD)["history"]] for sweep in (resumed, calm)]
    assert histories[0] == histories[1] and len(histories[0]) == 4
    models = [weights(sweep.folder / "trainings" / "00000" / "model") for sweep in (resumed, calm)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    events = len(list((folder / "trainings" / "00000").glob("events.out.tfevents*")))
    assert events == 2  # it went on, it did not begin anew: one file of each attempt
    # a row's words train the same model with jobs.train
    preset = f"preset={calm.folder}/results.parquet#{GOOD}"
    config = load_config("train", [f"storage={sweeps}", "name=again", preset])
    train.check(config)  # type: ignore[arg-type]
    log: list[str] = []
    train.body(JobRun(config=config, storage=RunFolder("train", config).storage, log=log.append))
    again = weights(sweeps / "again" / "model")
    assert all(torch.equal(again[name], models[1][name]) for name in again)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_worst_of_a_population_goes_on_from_the_best_ones_checkpoint(sweeps: Path, ray_session: None) -> None:
    rates = [0.001, 0.02]
    (sweeps / "tune_configs" / "population.yaml").write_text(
        "job: train\ndefaults:\n  - override /scheduler: pbt\nlearning_rate_schedule: constant\n"
        f"space:\n  optimizer.learning_rate: {{grid: {rates}}}\nobjectives: {{posterior_score: min}}\n"
    )
    done = in_process(
        sweeps / "population",
        "sweep=population",
        "max_steps=1800",
        "checkpoint_every=300",
        "scheduler.quantile_fraction=0.5",
        "scheduler.resample_probability=0.0",
        "concurrent_trials=2",
    )
    assert [row["status"] for row in done.rows] == ["ok", "ok"]
    taken_over = [index for index in (0, 1) if done.record(index)["exploits"]]
    assert taken_over
    for index in taken_over:
        exploit, last = done.record(index)["exploits"][-1], done.record(index)["history"][-1]
        assert exploit["from"] == 1 - index and 300 <= exploit["step"] <= 1800
        changed = exploit["changed"]["optimizer.learning_rate"]
        assert changed in rates  # a value's neighbours in the list
        assert last["step"] == 1800 and last["learning_rate"] in (changed, rates[index])
        assert load_config("train", done.rows[index]["words"]).optimizer.learning_rate == changed  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_trial_whose_workers_die_is_recorded_and_goes_on_when_resumed(sweeps: Path, ray_session: None) -> None:
    """The only worker is killed, as the kernel does when memory is short."""
    words = ["sweep=short", "scaling.max_failures=0", "max_steps=1500", "checkpoint_every=250", "concurrent_trials=1"]
    folder = sweeps / "lost"
    command = [sys.executable, "-m", "jobs.tune", f"storage={sweeps}", "name=lost", *SMALL, *words]
    mark = f"MFM_RAY_TEST_OF={sweeps}"
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **dict([mark.split("=", 1)])},
        cwd=sweeps,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    first = Storage(folder / "trainings" / "00000")
    wait_until(lambda: newest_checkpoint(first) is not None if first.is_dir("checkpoints") else False, process)
    killed = [pid for pid in training_workers(mark) if os.kill(pid, signal.SIGKILL) is None]
    assert killed
    output, _ = process.communicate(timeout=600)
    record = json.loads((folder / "trials" / "00000.json").read_text())
    assert record["status"] == "lost" and record["reason"], output
    assert (folder / "trials" / "00002.json").exists(), output  # the sweep went on
    resumed = in_process(folder, *words, "resume=true")
    assert resumed.record(GOOD)["status"] == "ok"
    assert resumed.record(GOOD)["history"][-1]["step"] == 1500


def training_workers(mark: str) -> list[int]:
    """Processes that Ray calls workers of a training, of the driver whose environment has the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_text()
                is_ours = mark.encode() in (folder / "environ").read_bytes()
            except OSError:
                continue  # it has ended, or is somebody else's
            if is_ours and "RayTrainWorker" in title:
                found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any], *, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
