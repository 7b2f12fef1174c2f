"""jobs.tune on a real Ray cluster and a small network: outputs, rerun of a row, typos, kill and resume."""

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
import yaml

from benchmarks.sweeps import KILLED, Sweeps, killed_and_resumed
from jobs import sample, tune
from jobs.contract import JobRun, Outcome
from jobs.run_folder import RunFolder
from mfm_ray.config import load_config
from mfm_ray.errors import InputError
from serve.presets import read_presets

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["num_samples=8", "num_steps=2", "batch_size=8", "scaling.start_timeout_s=240"]
TIMES = ("seconds", "worker")


@dataclass(frozen=True)
class Finished:
    outcome: Outcome
    folder: Path
    log: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.folder / "results.parquet").to_pylist()

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows without what depends on the clock."""
        return [{key: value for key, value in row.items() if key not in TIMES} for row in self.rows]


def in_process(job: Any, name: str, folder: Path, *words: str) -> Finished:
    """Check and body of a job in this process."""
    config = load_config(job.__name__.removeprefix("jobs."), [f"storage={folder.parent}", f"name={name}", *words])
    job.check(config)
    log: list[str] = []
    run = JobRun(config=config, storage=RunFolder("tune", config).storage, log=log.append)
    return Finished(job.body(run), folder.parent / name, log)


@pytest.fixture
def sweep(ray_session: None, tiny_models: dict[str, str], tmp_path: Path) -> Callable[..., Finished]:
    def sweep(name: str, *words: str) -> Finished:
        return in_process(tune, name, tmp_path / name, f"model={tiny_models['tiny']}", *SMALL, *words)

    return sweep


def test_a_sweep_ends_in_a_table_a_front_presets_and_a_report(
    sweep: Callable[..., Finished], tiny_models: dict[str, str], tmp_path: Path
) -> None:
    asked = ["distances=[frechet,sliced_w2]", "log_to=[tensorboard,optuna]"]
    done = sweep("draws", "sweep=num_draws", "judges=[brightness]", "scaling.num_workers=2", *asked)
    rows = done.rows
    assert [row["param.steering.num_draws"] for row in rows] == [1, 2, 4, 8, 16]
    assert {row["status"] for row in rows} == {"ok"}
    for name in ("reward", "judge.brightness", "confidence", "diversity", "frechet", "sliced_w2"):
        assert all(row[f"{name}_half_width"] >= 0 and row[name] is not None for row in rows)
    assert done.outcome.metrics["model_loads"] <= 2
    front = json.loads((done.folder / "pareto.json").read_text())
    assert front["objectives"] == {"reward": "max", "nfe": "min"}
    assert front["trials"] == [row["trial"] for row in rows if row["on_front"]]
    presets = yaml.safe_load((done.folder / "presets.yaml").read_text())
    costs = [presets[name]["measured"]["nfe"] for name in ("low", "medium", "high")]
    assert costs == sorted(costs)
    assert sorted(path.name for path in (done.folder / "tensorboard").iterdir()) == [f"{i:05d}" for i in range(5)]
    assert (done.folder / "optuna.db").is_file()
    page = (done.folder / "report.html").read_text()
    assert "What each setting does" in page
    assert "data:image/png" in page
    served = read_presets(f"{done.folder}/presets.yaml", {"tiny": None})["tiny"]  # what an endpoint makes of them
    for quality, preset in served.items():
        chosen = rows[presets[quality]["trial"]]
        assert (preset.method, preset.num_steps) == ("gradient", 2)
        assert preset.arguments["num_draws"] == chosen["param.steering.num_draws"]
    for place in (f"{done.folder}/presets.yaml#low", f"{done.folder}/results.parquet#{presets['low']['trial']}"):
        model = f"model={tiny_models['tiny']}"
        again = in_process(
            sample, "again", tmp_path / "again", model, f"preset={place}", "num_samples=8", "overwrite=true"
        )
        for name in ("reward", "nfe"):
            assert again.outcome.metrics[name] == pytest.approx(presets["low"]["measured"][name], rel=1e-6)


def test_random_search_is_fixed_by_its_seed_and_resume_repeats_nothing(
    sweep: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tune_configs").mkdir()
    (tmp_path / "tune_configs" / "drawn.yaml").write_text(
        "defaults:\n  - override /steering: gradient\n  - override /reward: symmetry\n"
        "space:\n  steering.guidance_scale: {loguniform: [0.1, 2]}\n  num_steps: {integers: [1, 3]}\n"
        "objectives: {reward: max, nfe: min}\n"
    )
    monkeypatch.chdir(tmp_path)  # sweeps of one's own stand in the working directory
    whole = sweep("whole", "sweep=drawn", "num_trials=4", "scaling.num_workers=1")
    other = sweep("other", "sweep=drawn", "num_trials=4", "scaling.num_workers=1")
    assert other.table == whole.table
    (whole.folder / "trials" / "00002.json").unlink()
    resumed = sweep("whole", "sweep=drawn", "num_trials=4", "scaling.num_workers=1", "resume=true")
    assert resumed.log[0] == "3 of 4 trials are there already"
    assert [{**row, "git": None} for row in resumed.table] == [{**row, "git": None} for row in other.table]
    with pytest.raises(InputError, match=r"num_samples=6: .* were begun with num_samples=8"):
        sweep("whole", "sweep=drawn", "num_trials=4", "resume=true", "num_samples=6")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep=num_drawz"], "sweep=num_drawz: expected one of .* did you mean num_draws?"),
        ([], "sweep: missing; every sweep from a file, one of "),
        (["sweep=num_draws", "num_sampels=3"], "num_sampels: unknown key; did you mean num_samples?"),
        (["sweep=num_draws", "objectives={rewrad: max}"], "objectives.rewrad: expected metrics of .* mean reward?"),
        (["sweep=num_draws", "objectives={reward: up}"], "objectives=.*: expected one of max, min"),
        (["sweep=num_draws", "prune_after=8"], "prune_after=8: expected less than num_samples=8"),
        (["sweep=num_draws", "reward.scal=2"], "reward.scal: unknown key"),
        (["sweep=num_draws", "steering=dps"], "steering.num_draws: unknown key"),
        (["sweep=num_draws", "space.steering.num_draws.grid=[1]"], r"have dots of their own; expected space=\{KEY"),
        (["sweep=num_draws", "num_samples=1"], "num_samples=1: one sample has no interval; expected at least 2"),
        (["sweep=unsteered"], "objectives.reward: expected metrics of judge.symmetry, nfe, "),
        (["sweep=as_list"], "sweep=as_list: .*: expected space to be a group of keys"),
        (["sweep=no_such_group"], "steering=gradent: in the file of sweep=no_such_group, .*did you mean gradient?"),
        (["sweep=infinite"], "space=.*: expected a group of keys, all its numbers finite"),
        (["sweep=never"], "space.num_steps.when.steering=smcc: .* its values: smc, search; did you mean smc?"),
        (["sweep=num_draws", "search=optunna"], "search=optunna: expected one of .* did you mean optuna?"),
        (["sweep=num_draws", "search=optuna"], "num_trials=1: Optuna makes so many trials"),
        (["sweep=num_draws", "objectives={frechett: min}"], "objectives.frechett: .* did you mean frechet?"),
        (["sweep=num_draws", "distances=[frechet]", "data_path=nowhere"], "nowhere"),
        (["sweep=num_draws", "log_to=[tensorbord]"], "did you mean tensorboard?"),
        (["sweep=num_draws", "scaling.num_workers=0"], "trials run on Ray workers"),
    ],
)
def test_a_mistake_is_one_line_before_any_resource_is_taken(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    write_wrong_sweeps(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = [f"model={tiny_models['tiny']}", f"storage={tmp_path}", "num_samples=8", *words]
    with pytest.raises(InputError, match=message) as caught:
        tune.check(load_config("tune", given))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def write_wrong_sweeps(folder: Path) -> None:
    """Files with one mistake each, and one that is no YAML, which nobody asks for."""
    (folder / "tune_configs").mkdir()
    steered = "defaults: [override /steering: gradient, override /reward: symmetry]\nobjectives: {reward: max}\n"
    for name, text in {
        "unsteered": "judges: [symmetry]\nobjectives: {reward: max}\nspace: {num_steps: {grid: [2, 4]}}\n",
        "as_list": f"{steered}space: [2, 4]\n",
        "no_such_group": "defaults: [override /steering: gradent]\nspace: {num_steps: {grid: [2]}}\n",
        "infinite": f"{steered}space: {{steering.guidance_scale: {{grid: [1, .inf]}}}}\n",
        "never": f"{steered}space:\n  steering: {{grid: [smc, search]}}\n"
        "  num_steps: {grid: [2, 4], when: {steering: smcc}}\n",
        "no_yaml": "space: [",
    }.items():
        (folder / "tune_configs" / f"{name}.yaml").write_text(text)


def test_a_typo_is_exit_code_2(run_job: Callable[..., Any], tmp_path: Path) -> None:
    job = run_job("tune", "sweep=guidance_scal", "model=nowhere", f"storage={tmp_path}")
    assert job.code == 2, job.describe()
    assert "did you mean guidance_scale?" in job.stderr


def test_preset_of_a_sweep_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "presets.yaml").write_text("low: {words: [num_steps=3]}\n")
    place = f"preset={tmp_path}/presets.yaml"
    assert load_config("sample", [f"{place}#low"]).num_steps == 3  # type: ignore[attr-defined]
    assert load_config("sample", [f"{place}#low", "num_steps=4"]).num_steps == 4  # type: ignore[attr-defined]
    for word, message in (
        (f"{place}#lo", "did you mean low?"),
        (f"preset={tmp_path}/results.parquet#1", "there is no such file"),
        (f"preset={tmp_path}/presets.txt#1", "expected FILE#trial"),
    ):
        with pytest.raises(InputError, match=message):
            load_config("sample", [word])


@pytest.mark.ray
def test_a_killed_sweep_goes_on_to_the_table_of_an_uninterrupted_one(
    tiny_models: dict[str, str], tmp_path: Path, sweep: Callable[..., Finished]
) -> None:
    words = ["sweep=num_draws", "scaling.num_workers=1", "num_samples=48", "num_steps=20"]
    command = [f"model={tiny_models['tiny']}", f"storage={tmp_path}", "name=killed", *SMALL, *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    trials = tmp_path / "killed" / "trials"
    deadline = time.monotonic() + 200
    while not (trials.is_dir() and list(trials.glob("*.json"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {file.name: file.stat().st_mtime_ns for file in trials.glob("*.json")}
    assert 0 < len(kept) < 5
    resumed = sweep("killed", *words, "resume=true")
    assert resumed.log[0] == f"{len(kept)} of 5 trials are there already"
    assert {name: (trials / name).stat().st_mtime_ns for name in kept} == kept
    assert resumed.table == sweep("calm", *words).table


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("search", list(KILLED))
def test_three_kills_at_random_moments_change_nothing(search: str, tiny_models: dict[str, str]) -> None:
    """kill -9 of the driver, each time resumed: the table of an uninterrupted sweep (benchmarks/sweeps.py)."""
    sweep, *words = KILLED[search]
    small = [*words, "num_samples=16", "num_steps=10", "scaling.num_workers=2", "scaling.start_timeout_s=240"]
    with Sweeps(tiny_models["tiny"]) as sweeps:
        there, same = killed_and_resumed(sweeps, sweep, *small, seed=1)
    assert len(there) == 3 and there == sorted(there) and there[-1] < 12
    assert same
