"""A shortened demo end to end: Ray, Ray Train, DeepSpeed, evaluation, report; and again, reusing what is valid."""

import json
from pathlib import Path

import pytest

SHORT_TRAINING = [
    "max_steps=20",
    "network.width=32",
    "network.num_blocks=1",
    "global_batch_size=64",
    "checkpoint_every=10",
    "sample_every=0",
    "log_every=5",
    "classifier_steps=60",
]
SHORT_PROTOCOL = [
    "num_targets=4",
    "num_steps=4",
    "samples_per_target=4",
    "samples_per_reward=4",
    "pool_size=40",
    "best_of=[1,10]",
    "posterior_contexts=2",
    "posterior_draws=16",
    "posterior_ode_steps=2",
]
WORDS = [*(f"+training.{word}" for word in SHORT_TRAINING), *(f"protocol.{word}" for word in SHORT_PROTOCOL)]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_demo_trains_once_and_reuses_what_is_valid(run_job, tmp_path):
    first = run_job("demo", *WORDS, timeout=280)
    assert first.code == 0, first.describe()
    assert first.result["name"] == "demo"
    assert Path(first.result_path) == tmp_path / "outputs" / "demo" / "result.json"
    assert set(first.artifacts) >= {"report", "model"}
    assert first.metrics["training_reused"] == 0
    assert 0 < first.metrics["train_seconds"] < first.metrics["total_seconds"]
    report = Path(first.artifacts["report"])
    assert "Training loss" in report.read_text()
    assert "MFM-G, 1 draw" in first.stdout

    second = run_job("demo", *WORDS, timeout=280)
    assert second.code == 0, second.describe()
    assert second.metrics["training_reused"] == 1
    assert second.metrics["train_seconds"] == first.metrics["train_seconds"]
    assert "nothing to train" in second.stdout
    assert "local Ray" not in second.stdout
    measured = [key for key in first.metrics if "seconds" not in key and key != "training_reused"]
    assert {key: second.metrics[key] for key in measured} == {key: first.metrics[key] for key in measured}

    weights = Path(first.artifacts["model"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    broken = run_job("demo", *WORDS, timeout=280)
    assert broken.code == 0, broken.describe()
    assert "nothing to train" not in broken.stdout
    assert broken.metrics["mfm_g_reward"] == first.metrics["mfm_g_reward"]


def test_a_demo_that_cannot_work_leaves_the_good_one_alone(run_job, tmp_path):
    folder = tmp_path / "outputs" / "demo"
    folder.mkdir(parents=True)
    good = {"job": "demo", "status": "ok", "metrics": {}, "artifacts": {}}
    (folder / "result.json").write_text(json.dumps(good))
    (folder / "report.html").write_text("good")
    job = run_job("demo", "+training.global_batch_size=63")
    assert job.code == 2, job.describe()
    assert "global_batch_size=63" in job.stderr
    assert len(job.stderr.strip().splitlines()) == 1
    assert json.loads((folder / "result.json").read_text()) == good
    assert (folder / "report.html").read_text() == "good"
