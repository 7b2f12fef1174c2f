"""jobs.tune over jobs.finetune: composition and refusals without a cluster, and a small real sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml

from jobs import finetune, training_sweep, tune
from jobs.contract import JobRun
from jobs.run_folder import RunFolder
from mfm_ray.config import FinetuneSweepConfig, load_config, to_dict
from mfm_ray.errors import InputError
from mfm_ray.pretrained import load_flow_map
from mfm_ray.storage import Storage
from mfm_ray.training.evaluation import SampleScores
from mfm_ray.training.finetune_launch import evaluation_plan
from mfm_ray.tuning.training_space import finetune_words
from mfm_ray.tuning.tuned_quality import figures_of, in_words_of_sweeps

SMALL = [
    "reward=brightness",
    "reward.scale=0.1",
    "judges=[symmetry]",
    "global_batch_size=16",
    "anchors.chains=2",
    "anchors.start_steps=3",
    "max_steps=20",
    "checkpoint_every=10",
    "log_every=10",
    "sample_every=20",
    "warmup_steps=0",
    "ema_decay=0.5",
    "evaluate_samples=32",
    "evaluate_steps=4",
    "scaling.num_workers=1",
    "scaling.start_timeout_s=240",
]


def sweep_config(model: str, *words: str) -> FinetuneSweepConfig:
    config = load_config("tune", ["sweep=finetune", f"model={model}", "reward=brightness", *words])
    assert isinstance(config, FinetuneSweepConfig)
    return config


def test_the_sweep_file_composes_and_its_trials_are_checked_and_told_again(tiny_models: dict[str, str]) -> None:
    config = sweep_config(tiny_models["tiny"], "judges=[symmetry]", "scaling.resources_per_worker.CPU=2")
    tune.check(config)  # type: ignore[arg-type]
    trials = training_sweep.trial_settings(config)
    assert len(trials) == config.num_trials == len({settings["reward_multiplier"] for settings in trials.values()})
    for settings in trials.values():
        words = [f"model={tiny_models['tiny']}", *finetune_words(settings)]
        assert to_dict(load_config("finetune", words)) == {**settings, "name": "finetune"}


def test_another_method_has_its_own_arguments(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tune_configs").mkdir()
    (tmp_path / "tune_configs" / "how.yaml").write_text(
        "job: finetune\nspace:\n  method: {grid: [mfm_ft, reward_weighted]}\n"
        "  method.num_draws: {grid: [2, 8], when: {method: mfm_ft}}\nobjectives: {reward: max, confidence: max}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = sweep_config(tiny_models["tiny"], "sweep=how")
    tune.check(config)  # type: ignore[arg-type]
    methods = [settings["method"] for settings in training_sweep.trial_settings(config).values()]
    assert [(method["name"], method.get("num_draws")) for method in methods] == [
        ("mfm_ft", 2),
        ("mfm_ft", 8),
        ("reward_weighted", None),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=null"], "model=null: expected a model directory"),
        (["model=/nowhere"], "model=/nowhere does not exist, expected a model directory"),
        (["reward=none"], "reward=none: expected a reward to tune towards"),
        (["reward=brightnes"], "did you mean brightness?"),
        (["max_stepz=3"], "max_stepz: unknown key; did you mean max_steps?"),
        (["experiment=gmm"], "experiment: unknown key"),
        (["heldout.num_rows=64"], "heldout.num_rows: unknown key"),
        (["scheduler=asho"], "scheduler=asho: expected .*did you mean asha?"),
        (["scheduler=pbt"], "space.reward_multiplier: scheduler=pbt changes settings of a training that goes on"),
        (["objectives={rewrad: max}"], "objectives.rewrad: expected figures of reward, .*did you mean reward?"),
        (["objectives={judge.symmetry: max}"], "objectives.judge.symmetry: expected figures of reward, "),
        (["data.from_model=true"], "objectives.frechet_distance: expected figures of reward, "),
        (["judges=[symetry]"], r"judges\[0\].name=symetry: expected one of "),
        (["evaluate_every=5"], "evaluate_every=5: trials are measured at their checkpoints alone; expected 0"),
        (["best_metric=reward"], "best_metric=reward: trials are measured at their checkpoints alone; expected null"),
        (["stop_on_hacking=true"], "stop_on_hacking=true: trials are measured"),
        (["preset=paper"], "preset=paper: a sweep takes no recipe; expected null"),
        (["reward_app=mfm"], "reward_app=mfm: trials of a sweep make their reward; expected null"),
        (["checkpoint_every=9000"], "checkpoint_every=9000"),
        (["cfg_scale=2.5"], "cfg_scale=2.5: expected one of null alone"),
        (["sweep=wrong_key"], r"space.reward_multiplyer: unknown key; did you mean space.reward_multiplier\?"),
        (["sweep=wrong_value"], "reward_multiplier=-1.0: expected a number above 0"),
        (["sweep=wrong_argument"], "method.num_drawz: unknown key"),
        (["sweep=common"], "space.cfg_scale: is common to all trials; expected one of method, adapter, "),
    ],
)
def test_a_mistake_is_one_line_before_any_resource_is_taken(
    tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    (tmp_path / "tune_configs").mkdir()
    for name, space in (
        ("wrong_key", "{reward_multiplyer: {grid: [1.0]}}"),
        ("wrong_value", "{reward_multiplier: {grid: [1.0, -1.0]}}"),
        ("wrong_argument", "{method.num_drawz: {grid: [1]}}"),
        ("common", "{cfg_scale: {grid: [1.0]}}"),
    ):
        text = f"job: finetune\nspace: {space}\nobjectives: {{reward: max}}\n"
        (tmp_path / "tune_configs" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        tune.check(sweep_config(tiny_models["tiny"], f"storage={tmp_path}", *words))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_sweep_does_not_go_on_with_another_model_of_the_same_place(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    given = [f"storage={tmp_path}", *SMALL]
    began = sweep_config(tiny_models["tiny"], *given)
    settings = training_sweep.sweep_settings(began)
    RunFolder("tune", began).storage.write_json(training_sweep.SWEEP, {"settings": settings})
    tune.check(sweep_config(tiny_models["tiny"], *given, "resume=true", "models_to_keep=1"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model of hash .* were begun with model of hash"):
        tune.check(sweep_config(tiny_models["other"], *given, "resume=true"))  # type: ignore[arg-type]


def test_figures_keep_their_names_and_errors_become_intervals() -> None:
    evaluated = {"reward": 1.0, "reward_error": 0.5, "class_confidence": 0.9, "class_confidence_error": 0.1, "x": 2.0}
    assert in_words_of_sweeps(evaluated) == {
        "reward": 1.0,
        "reward_half_width": 0.98,
        "confidence": 0.9,
        "confidence_half_width": pytest.approx(0.196),
        "x": 2.0,
    }
    assert figures_of(["reward", "class_confidence", "drift_change"]) == {
        "reward": "max",
        "confidence": "max",
        "drift_change": "min",
        "seconds": "min",
    }


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_sweep_measures_its_tunings_keeps_models_and_its_rows_tune_again(
    ray_session: None, tiny_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tune_configs").mkdir()
    (tmp_path / "tune_configs" / "pair.yaml").write_text(
        "job: finetune\nspace:\n  reward_multiplier: {grid: [0.5, 4.0]}\n"
        "defaults:\n  - override /scheduler: none\nobjectives: {reward: max, drift_change: min}\n"
    )
    monkeypatch.chdir(tmp_path)
    model, words = tiny_models["tiny"], [f"storage={tmp_path}", "sweep=pair", *SMALL]
    words = [*words, "name=pair", "concurrent_trials=1", "models_to_keep=1"]

    def run(*more: str) -> tuple[list[dict[str, Any]], list[str]]:
        config, log = sweep_config(model, *words, *more), []
        tune.check(config)  # type: ignore[arg-type]
        tune.body(JobRun(config=config, storage=RunFolder("tune", config).storage, log=log.append))
        return pq.read_table(tmp_path / "pair" / "results.parquet").to_pylist(), log

    rows, _ = run()
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    names = ("reward", "judge.symmetry", "confidence", "diversity", "frechet_distance", "drift_change", "seconds")
    assert all(row[name] is not None for row in rows for name in names)
    assert all(row[f"{name}_half_width"] > 0 for row in rows for name in ("reward", "judge.symmetry", "confidence"))
    assert rows[0]["drift_change"] < rows[1]["drift_change"]  # a stronger tilt is further from the frozen drift
    record = json.loads((tmp_path / "pair" / "trials" / "00000.json").read_text())
    assert [report["step"] for report in record["history"]] == [10, 20]
    kept = next(row for row in rows if row["model"] is not None)
    assert kept["reward"] == max(row["reward"] for row in rows)
    assert [row["model"] for row in rows].count(None) == 1
    # what the sweep measured is what the model that it left is worth
    config = sweep_config(model, *words)
    plan = evaluation_plan(
        config,
        run=Storage(tmp_path),
        data=Storage(tmp_path / "pair" / "data"),
        judges={},
        make_reward=finetune.reward_of(config),
    )
    again = in_words_of_sweeps(SampleScores(plan).of(load_flow_map(kept["model"])))
    for name in ("reward", "reward_half_width", "confidence", "diversity", "frechet_distance", "drift_change"):
        assert again[name] == pytest.approx(kept[name], rel=1e-4)
    page = (tmp_path / "pair" / "report.html").read_text()
    for part in ("Learning curves", "data:image/png", "jobs.finetune"):
        assert part in page
    resumed, log = run("resume=true")
    assert log[0] == "2 of 2 trials are there already, 0 were begun"
    assert [{**row, "git": None} for row in resumed] == [{**row, "git": None} for row in rows]
    more, log = run("resume=true", "models_to_keep=2")
    assert any("1 of 2 models are there" in line for line in log)
    assert [row["model"] for row in more] == [row["model"] for row in rows]
    # a preset tunes the same model with jobs.finetune
    presets = yaml.safe_load((tmp_path / "pair" / "presets.yaml").read_text())
    name = next(name for name, preset in presets.items() if preset["trial"] == kept["trial"])
    place = f"preset={tmp_path}/pair/presets.yaml#{name}"
    alone = load_config("finetune", [f"storage={tmp_path}", "name=alone", f"model={model}", place])
    finetune.check(alone)  # type: ignore[arg-type]
    finetune.body(JobRun(config=alone, storage=RunFolder("finetune", alone).storage, log=[].append))
    ours, theirs = (
        safetensors.torch.load_file(Path(folder) / "model.safetensors")
        for folder in (tmp_path / "alone" / "model", kept["model"])
    )
    assert ours and all(torch.equal(ours[key], theirs[key]) for key in theirs)
