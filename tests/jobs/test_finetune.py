"""`python -m jobs.finetune` as people call it: refusals, a whole run, a run that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import mfm_ray as mfm
from jobs.finetune import check
from mfm_ray.config import FINETUNE_PRESETS, FinetuneConfig, load_config
from mfm_ray.data.datasets import digits
from mfm_ray.data.shards import write_shards
from mfm_ray.errors import InputError
from mfm_ray.finetuning import LowRank, build_method
from mfm_ray.networks.tuned import TunedFlowMap
from mfm_ray.pretrained import load_classifier, load_flow_map, read_model_config
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint import read_checkpoint_model
from mfm_ray.training.checkpoint_store import newest_checkpoint
from mfm_ray.training.evaluation import hacked, is_better

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
RECIPE = [
    "reward=brightness",
    "reward.scale=0.1",
    "judges=[symmetry]",
    "global_batch_size=16",
    "anchors.chains=2",
    "anchors.start_steps=3",
    f"max_steps={STEPS}",
    "checkpoint_every=8",
    "log_every=4",
    "sample_every=24",
    "evaluate_every=12",
    "evaluate_samples=32",
    "evaluate_steps=4",
    "best_metric=reward",
]


def configured(*words: str) -> FinetuneConfig:
    config = load_config("finetune", list(words))
    assert isinstance(config, FinetuneConfig)
    return config


def test_the_papers_recipe_is_a_preset_that_words_win_over() -> None:
    config = configured("preset=paper", "warmup_steps=3")
    method = build_method(config.method)
    assert {name: getattr(method, name) for name in ("num_draws", "estimator", "baseline", "diffusion")} == {
        "num_draws": 1,
        "estimator": "pathwise",
        "baseline": "none",
        "diffusion": 100,
    }
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("radam", 1e-4)
    assert (config.precision, config.gradient_clipping, config.ema_decay) == ("bf16", 1.5, 0.999)
    assert (config.guided_drifts, config.label_dropout, config.max_steps) == (False, 0, 10_000)
    assert (config.evaluate_samples, config.evaluate_steps) == (512, 250)
    assert config.warmup_steps == 3
    assert set(FINETUNE_PRESETS) == {"paper"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=null"], "model=null: expected a model directory"),
        (["model=/nowhere"], "model=/nowhere does not exist, expected a model directory"),
        (["reward=none"], "reward=none: expected a reward to tune towards"),
        (["reward=brightnes"], "did you mean brightness?"),
        (["reward_multiplier=0"], "reward_multiplier=0: expected a number above 0"),
        (["method=mfm_f"], "method=mfm_f: expected one of "),
        (["method.num_draws=0"], "num_draws=0: expected an integer of at least 1"),
        (["method.diffusion=3"], "diffusion=3: expected null unless estimator=pathwise"),
        (["method.estimator=mixed"], "estimator=mixed: expected score with baseline=anchored"),
        (["adapter=lor"], "adapter=lor: expected one of lora, none"),
        (
            ["adapter=lora", "adapter.targets=[qkv]"],
            "adapter.targets=qkv: no linear layer or convolution of this model",
        ),
        (["adapter=lora", "adapter.rank=0"], "rank=0: expected an integer of at least 1"),
        (["method=adjoint_matching", "global_batch_size=20"], "micro_batch_size=10: the targets of 4 rows are made "),
        (
            ["method=reinforce_adjoint", "micro_batch_size=32"],
            "(method.noisings=8 x method.group=8); expected a multip",
        ),
        (["+method.draws=2"], "method.draws: unknown key; expected "),
        (["preset=papr"], "preset=papr: expected one of paper, or null; did you mean paper?"),
        (["cfg_scale=2.5"], "cfg_scale=2.5: expected one of null alone: this model has none"),
        (["global_batch_size=9"], "global_batch_size=9 does not divide by scaling.num_workers=2"),
        (["anchors.chains=0"], "anchors.chains=0: expected a whole number of at least 1"),
        (["label_dropout=2"], "label_dropout=2: expected a number of at least 0 and of at most 1"),
        (["data.path=/nowhere"], "/nowhere"),
        (["data.path=/x", "data.from_model=true"], "data.path=/x: data.from_model=true needs no data, expected null"),
        (["best_metric=reward"], "best_metric=reward: needs evaluations; expected evaluate_every above 0"),
        (["evaluate_every=5", "best_metric=rewards"], "best_metric=rewards: expected one of reward, diversity"),
        (["evaluate_every=5", "stop_on_hacking=true"], "stop_on_hacking=true: needs a judge that could fall"),
        (["evaluate_every=5", "judges=[symetry]"], "judges[0].name=symetry: expected one of "),
        (["reward_model=tiny"], "reward_model=tiny: is of a served reward; expected null without reward_app"),
        (["reward_app=mfm"], "reward_app=mfm: no cluster to join"),
        (["zero.stage=0", "zero.offload=true"], "zero.offload=true needs zero.stage=1, 2 or 3"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    tiny_models: dict[str, str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("jobs.finetune.joins_a_cluster", lambda: False)
    with pytest.raises(ValueError, match=".") as caught:
        check(configured(f"model={tiny_models['tiny']}", "reward=brightness", *words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_of_another_shape_are_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    data = digits()
    write_shards(tmp_path / "same", data)
    check(configured(f"model={tiny_models['tiny']}", "reward=brightness", f"data.path={tmp_path / 'same'}"))
    from mfm_ray.data.datasets import gmm

    write_shards(tmp_path / "other", gmm(seed=0))
    with pytest.raises(InputError, match=r"holds gmm, .*; expected .* with 10, as the model was trained on"):
        check(configured(f"model={tiny_models['tiny']}", "reward=brightness", f"data.path={tmp_path / 'other'}"))


def evaluated(reward: float, judge: float, error: float = 0.1) -> dict[str, float]:
    return {"reward": reward, "reward_error": error, "judge.a": judge, "judge.a_error": error}


def test_a_reward_is_hacked_when_a_judge_falls_clearly_while_it_rises() -> None:
    start = evaluated(0.0, 1.0)
    assert hacked([]) is None
    assert hacked([start]) is None
    assert hacked([start, evaluated(5.0, 1.5)]) is None  # both rise
    assert hacked([start, evaluated(5.0, 0.8)]) is None  # not clearly
    assert hacked([start, evaluated(0.2, -3.0)]) is None  # the reward does not rise
    assert hacked([start, evaluated(5.0, -3.0)]) == "a"
    # against the best that the judge was, not against the start
    assert hacked([start, evaluated(2.0, 3.0), evaluated(4.0, 1.0)]) == "a"


def test_less_of_a_distance_is_better_and_more_of_a_reward() -> None:
    assert is_better({"reward": 2.0}, {"reward": 1.0}, "reward")
    assert not is_better({"reward": 1.0}, {"reward": 1.0}, "reward")
    assert is_better({"frechet_distance": 1.0}, {"frechet_distance": 2.0}, "frechet_distance")


def command(storage: Path, model: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "jobs.finetune", f"storage={storage}", f"model={model}", *RECIPE, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(storage: Path, model: str, *words: str, timeout: float = 400.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(storage, model, *words),
        cwd=storage,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def whole(storage: Path, tiny_models: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run(storage, tiny_models["tiny"], "name=whole")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_leaves_a_tuned_model_history_evaluations_and_checkpoints(
    storage: Path, whole: subprocess.CompletedProcess[str], tiny_models: dict[str, str]
) -> None:
    assert whole.returncode == 0, whole.stdout + whole.stderr
    folder = storage / "whole"
    assert whole.stdout.splitlines()[-1] == f"RESULT {folder / 'result.json'}"
    result = json.loads((folder / "result.json").read_text())
    assert (result["job"], result["status"]) == ("finetune", "ok")
    assert set(result["artifacts"]) == {"model", "checkpoints", "metrics", "samples"}
    assert all(Path(place).exists() for place in result["artifacts"].values())
    told = history(folder)
    lines = [line for line in told if "loss" in line]  # an evaluation may have a line of its own
    assert [line["step"] for line in lines] == list(range(4, STEPS + 1, 4))
    wanted = {"loss", "reward", "reward.anchors", "draws.effective_share", "weights.effective_share", "gradient_norm"}
    assert all(wanted <= set(line) for line in lines)
    evaluations = [line for line in told if "evaluation.step" in line]
    assert [line["evaluation.step"] for line in evaluations] == [0, 12, 24]
    assert evaluations[0]["evaluation.drift_change"] == 0 < evaluations[-1]["evaluation.drift_change"]
    names = {"reward", "judge.symmetry", "diversity", "class_confidence", "frechet_distance"}
    assert all(f"evaluation.{name}" in line for line in evaluations for name in names)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_tuned_model_is_read_by_everything_that_reads_models(
    storage: Path, whole: subprocess.CompletedProcess[str], tiny_models: dict[str, str]
) -> None:
    model = storage / "whole" / "model"
    tuned, base = load_flow_map(model), load_flow_map(tiny_models["tiny"])
    assert isinstance(tuned, TunedFlowMap)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, tuned.base.state_dict()[name])
    assert load_classifier(model).num_classes == 10
    config = read_model_config(model)
    assert config["network"] == {"name": "tuned", "base": base.config(), "tuned": base.config()}
    training = config["training"]
    assert (training["reward"]["name"], training["reward_multiplier"]) == ("brightness", 1.0)
    assert training["base_model"] == tiny_models["tiny"]
    best = json.loads((storage / "whole" / "best" / "figures.json").read_text())
    evaluations = {line["evaluation.step"]: line for line in history(storage / "whole") if "evaluation.step" in line}
    assert best["reward"] == max(line["evaluation.reward"] for line in evaluations.values())
    assert training["steps"] == best["step"]
    card = (model / "README.md").read_text()
    assert all(word in card for word in ("brightness", "mfm_ft", "posterior draws", "lagrangian_teacher"))
    samples = mfm.sample(tuned, num_samples=8, num_steps=3, seed=0)
    assert samples.images.shape == (8, 1, 8, 8)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("best_metric", ["null", "drift_change"])
def test_an_adapter_is_tuned_alone_and_merged_into_the_model(
    storage: Path, tiny_models: dict[str, str], best_metric: str
) -> None:
    name = f"adapted-{best_metric}"
    words = [f"name={name}", "adapter=lora", "adapter.rank=2", "max_steps=12", f"best_metric={best_metric}"]
    done = run(storage, tiny_models["tiny"], *words)
    assert done.returncode == 0, done.stdout + done.stderr
    tuned, base = load_flow_map(storage / name / "model"), load_flow_map(tiny_models["tiny"])
    assert isinstance(tuned, TunedFlowMap)
    facts = read_model_config(storage / name / "model")["training"]["adapter"]
    assert facts == LowRank(rank=2).facts(base)
    assert f"{facts['tuned_parameters']:,}\nnumbers" in (storage / name / "model" / "README.md").read_text()
    change = {key: tensor - base.state_dict()[key] for key, tensor in tuned.tuned.state_dict().items()}
    if best_metric == "drift_change":  # least at step 0
        assert not any(tensor.any() for tensor in change.values())
        return
    changed = {key for key, tensor in change.items() if tensor.any()}
    layers = {f"{layer}.weight" for layer in LowRank(rank=2).layers(base)}
    assert changed <= layers
    # beyond the rounding of weights that something was added to
    ranks = [int(torch.linalg.matrix_rank(change[key].flatten(1), atol=1e-5, rtol=0.0)) for key in changed]
    assert 1 <= max(ranks) <= 2
    checkpoint = newest_checkpoint(Storage(storage / name))
    assert checkpoint is not None
    kept = read_checkpoint_model(checkpoint.storage).state_dict
    sizes = [tensor.numel() for key, tensor in kept.items() if ".lora_" in key]
    assert sum(sizes) == facts["tuned_parameters"]
    assert not any(".base_layer." in key for key in kept)


@pytest.mark.ray
def test_a_tuned_model_is_not_tuned_again(storage: Path, whole: subprocess.CompletedProcess[str]) -> None:
    with pytest.raises(InputError, match=r"is a tuned model, .*expected the model it was tuned from with both rewards"):
        check(configured(f"model={storage / 'whole' / 'model'}", "reward=symmetry"))


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(0.05)


def has_checkpoint(run: Path) -> bool:
    return (run / "checkpoints").exists() and newest_checkpoint(Storage(run)) is not None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_and_resumed_run_ends_with_the_same_weights_to_the_bit(
    storage: Path, tiny_models: dict[str, str]
) -> None:
    words = ["best_metric=null", "evaluate_every=0", "judges=[]", "max_steps=400", "checkpoint_every=40"]
    uninterrupted = run(storage, tiny_models["tiny"], "name=uninterrupted", *words)
    assert uninterrupted.returncode == 0, uninterrupted.stdout + uninterrupted.stderr
    process = subprocess.Popen(
        command(storage, tiny_models["tiny"], "name=killed", *words),
        cwd=storage,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    killed = storage / "killed"
    wait_until(lambda: process.poll() is not None or has_checkpoint(killed), seconds=300)
    assert process.poll() is None, "ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists()
    other = run(storage, tiny_models["tiny"], "name=killed", "resume=true", *words, "reward_multiplier=2")
    assert other.returncode == 2, other.stdout + other.stderr
    assert "tuning.reward_multiplier=2.0" in other.stderr
    resumed = run(storage, tiny_models["tiny"], "name=killed", "resume=true", *words)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "going on from step" in resumed.stdout
    expected, actual = (
        safetensors.torch.load_file(storage / name / "model" / "model.safetensors")
        for name in ("uninterrupted", "killed")
    )
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])] == []
    same = ("step", "loss", "reward", "reward.anchors", "weights.effective_share", "gradient_norm")
    told = [[[line[key] for key in same] for line in history(storage / name)] for name in ("uninterrupted", "killed")]
    assert told[0] == told[1]
    exported = subprocess.run(
        [sys.executable, "-m", "jobs.export", f"checkpoint={killed}", f"storage={storage}", "name=exported"],
        cwd=storage,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert exported.returncode == 0, exported.stdout + exported.stderr
    again = safetensors.torch.load_file(storage / "exported" / "model" / "model.safetensors")
    assert [name for name, tensor in actual.items() if not torch.equal(tensor, again[name])] == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_ends_when_the_reward_rises_while_a_judge_falls(storage: Path, tiny_models: dict[str, str]) -> None:
    most = 20_000
    words = [
        "name=hacking",
        "reward.target=0.8",
        "reward.scale=0.1",
        "judges=[{name: brightness, target: 0.1, scale: 0.1}]",
        "stop_on_hacking=true",
        "optimizer.learning_rate=0.01",
        "evaluate_every=40",
        "best_metric=judge.brightness",
        "checkpoint_every=1000",
        "sample_every=0",
        f"max_steps={most}",
    ]
    done = run(storage, tiny_models["tiny"], *words)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((storage / "hacking" / "result.json").read_text())
    ended = result["metrics"]["step"]
    assert ended < most
    line = f"ended at step {ended} of {most}: a judge falls while the reward rises"
    assert line in done.stdout.splitlines()
    assert result["metrics"]["evaluation.hacked"] == 1
    evaluations = [each for each in history(storage / "hacking") if "evaluation.step" in each]
    first, last = evaluations[0], evaluations[-1]
    assert last["evaluation.reward"] > first["evaluation.reward"]
    assert last["evaluation.judge.brightness"] < first["evaluation.judge.brightness"]
    # the judge was at its best before anything was tuned, and those weights are the model
    best = max(evaluations, key=lambda each: each["evaluation.judge.brightness"])["evaluation.step"]
    assert f"the model is that of step {int(best)}, the best by judge.brightness" in done.stdout.splitlines()
    assert read_model_config(storage / "hacking" / "model")["training"]["steps"] == best


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_flow_map_of_the_tilted_law_is_distilled_from_a_tuned_model(
    storage: Path, whole: subprocess.CompletedProcess[str]
) -> None:
    words = [
        "experiment=digits",
        "objective=lagrangian_teacher",
        f"objective.teacher={storage / 'whole' / 'model'}",
        "objective.diagonal=teacher",
        "network.width=16",
        "network.num_blocks=1",
        "network.max_time_frequency=0.66",
        "global_batch_size=32",
        "max_steps=8",
        "checkpoint_every=8",
        "sample_every=0",
        "classifier_steps=0",
        f"storage={storage}",
        "name=distilled",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", *words],
        cwd=storage,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not isinstance(load_flow_map(storage / "distilled" / "model"), TunedFlowMap)
