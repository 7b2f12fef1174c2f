"""Jobs on a model of latents: pictures come out, rewards see them, and what cannot be decoded is refused at launch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import mfm_ray as mfm
from jobs import deploy, finetune, sample
from jobs.contract import JobRun, Outcome
from mfm_ray.config import load_config
from mfm_ray.data.batch import Split
from mfm_ray.data.datasets import Dataset
from mfm_ray.data.shards import write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.pretrained import load_flow_map, read_model_config
from mfm_ray.storage import Storage

from ..conftest import LatentModel, save_tiny_autoencoder

STEERED = ["steering=gradient", "reward=brightness", "reward.target=0.9", "num_steps=3", "seed=3", "label=1"]


def draw(model: str, folder: Path, *words: str) -> tuple[Outcome, list[str]]:
    """Check and body of `jobs.sample` in this process; what it said."""
    places = [f"model={model}", f"storage={folder.parent}", f"name={folder.name}"]
    config: Any = load_config("sample", [*places, *words])
    sample.check(config)
    said: list[str] = []
    return sample.body(JobRun(config=config, storage=Storage(folder), log=said.append)), said


def images(outcome: Outcome) -> np.ndarray:
    table = pq.read_table(outcome.artifacts["samples"])
    return table["image"].combine_chunks().to_numpy_ndarray()


def without_autoencoder(latent_model: LatentModel, target: Path) -> str:
    shutil.copytree(latent_model.model, target)
    config = json.loads((target / "config.json").read_text())
    del config["data"]["autoencoder"]
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_samples_are_pictures_as_the_library_makes_them(latent_model: LatentModel, tmp_path: Path) -> None:
    outcome, _ = draw(latent_model.model, tmp_path / "drawn", "num_samples=5", "decode_at_once=2", *STEERED)
    found = images(outcome)
    assert found.shape == (5, 3, 8, 8)
    assert outcome.artifacts["grid"].endswith("grid.png")
    with Image.open(outcome.artifacts["grid"]) as grid:
        assert len(set(np.asarray(grid)[..., :3].std(axis=2).flatten())) > 1, "in colour"
    reward = mfm.rewards.TargetBrightness(target=0.9, scale=0.01)
    expected = mfm.sample(
        load_flow_map(latent_model.model),
        num_samples=5,
        num_steps=3,
        seed=3,
        label=1,
        steering=mfm.GradientGuidance(reward, num_draws=1),
    )
    assert np.array_equal(found, expected.images.numpy())
    manifest = json.loads((tmp_path / "drawn" / "manifest.json").read_text())
    assert len(manifest["settings"]["autoencoder"]) == 64


def test_without_a_decoder_samples_are_latents_and_the_job_says_so(latent_model: LatentModel, tmp_path: Path) -> None:
    bare = without_autoencoder(latent_model, tmp_path / "bare")
    words = ["num_samples=3", "num_steps=2"]
    outcome, said = draw(bare, tmp_path / "latents", *words)
    assert images(outcome).shape == (3, 4, 4, 4)
    assert "grid" not in outcome.artifacts
    assert "samples are latents, of which nothing makes pictures (autoencoder=...)" in said
    by_key, _ = draw(bare, tmp_path / "pictures", *words, f"autoencoder={latent_model.autoencoder}")
    assert images(by_key).shape == (3, 3, 8, 8)
    by_null, _ = draw(latent_model.model, tmp_path / "by_null", *words, "autoencoder=null")
    assert np.array_equal(images(by_null), images(outcome))


def test_rewards_and_judges_of_pictures_need_pictures(latent_model: LatentModel, tmp_path: Path) -> None:
    bare = without_autoencoder(latent_model, tmp_path / "bare")
    for words, message in (
        (STEERED, "reward=brightness: is about pictures, and "),
        (["judges=[symmetry]"], "judges=symmetry: is about pictures, and "),
    ):
        with pytest.raises(InputError) as refused:
            draw(bare, tmp_path / "refused", *words)
        assert str(refused.value).startswith(message)
        assert "makes latents without an autoencoder; expected autoencoder=<folder" in str(refused.value)
    config: Any = load_config("finetune", [f"model={bare}", "reward=symmetry", "data.from_model=true"])
    with pytest.raises(InputError, match="reward=symmetry: is about pictures"):
        finetune.check(config)
    config = load_config("deploy", [f"model={bare}"])
    with pytest.raises(InputError, match=r"latent of shape \[4, 4, 4\] without an autoencoder"):
        deploy.check(config)


def test_a_wrong_autoencoder_is_refused_at_launch(latent_model: LatentModel, tmp_path: Path) -> None:
    save_tiny_autoencoder(tmp_path / "other", seed=1)
    for word, message in (
        (f"autoencoder={tmp_path / 'other'}", "check_autoencoder=false"),
        (f"autoencoder={tmp_path / 'none'}", "none does not exist, expected a local folder"),
        ("autoencoder=hf://x", "expected hf://owner/name"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            draw(latent_model.model, tmp_path / "refused", word)
        assert "\n" not in str(refused.value)
    words = ["num_steps=1", "num_samples=3"]
    asked = [f"autoencoder={tmp_path / 'other'}", "check_autoencoder=false"]
    outcome, _ = draw(latent_model.model, tmp_path / "drawn", *words, *asked)
    assert images(outcome).shape == (3, 3, 8, 8)
    with pytest.raises(InputError, match="autoencoder=.*: the samples in .* were begun with autoencoder="):
        draw(latent_model.model, tmp_path / "drawn", *words, "resume=true")


def test_what_a_tuning_of_latents_can_be_judged_by(latent_model: LatentModel) -> None:
    from mfm_ray.training.finetune_launch import metrics_of

    config: Any = load_config("finetune", [f"model={latent_model.model}", "reward=symmetry", "data.path=/x"])
    assert "frechet_distance" not in metrics_of(config)


@pytest.mark.ray
def test_ray_workers_write_the_pictures_that_one_process_writes(
    ray_session: None, latent_model: LatentModel, tmp_path: Path
) -> None:
    words = ["num_samples=6", "shard_size=4", *STEERED]
    here, _ = draw(latent_model.model, tmp_path / "here", *words, "scaling.num_workers=0")
    there, _ = draw(
        latent_model.model, tmp_path / "there", *words, "scaling.num_workers=1", "scaling.start_timeout_s=240"
    )
    ours, theirs = (
        [shard["sha256"] for shard in json.loads((tmp_path / name / "manifest.json").read_text())["shards"]]
        for name in ("here", "there")
    )
    assert ours == theirs
    assert here.metrics["reward"] == there.metrics["reward"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_model_of_latents_is_tuned_to_a_reward_of_pictures(
    run_job: Any, latent_model: LatentModel, tmp_path: Path
) -> None:
    model = tmp_path / "carried"
    shutil.copytree(latent_model.model, model)
    shutil.copytree(latent_model.autoencoder, model / "autoencoder")
    words = ["reward=brightness", "reward.target=0.9", "reward.scale=0.1", "data.from_model=true", "judges=[symmetry]"]
    words += ["max_steps=6", "global_batch_size=8", "anchors.chains=2", "anchors.start_steps=2", "log_every=2"]
    words += ["checkpoint_every=3", "sample_every=3", "evaluate_every=3", "evaluate_samples=8", "evaluate_steps=3"]
    job = run_job("finetune", f"model={model}", f"storage={tmp_path}", "name=tuned", *words, timeout=400)
    assert job.code == 0, job.describe()
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert any("evaluation.judge.symmetry" in line for line in lines)
    tuned = job.artifacts["model"]
    assert not any("autoencoder" in name or "decoder" in name for name in load_flow_map(tuned).state_dict())
    assert read_model_config(tuned)["data"]["autoencoder"]["source"] == str(model / "autoencoder")
    assert mfm.sample(load_flow_map(tuned), num_samples=2, num_steps=2).images.shape == (2, 3, 8, 8)
    with Image.open(Path(tuned) / "samples.png") as shown:
        assert shown.width > 100


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("known", [True, False])
def test_training_on_latents_shows_pictures_where_it_can(
    run_job: Any, latent_model: LatentModel, tmp_path: Path, known: bool
) -> None:
    described = read_model_config(latent_model.model)["data"]
    space = DataSpace.from_config(described)
    rows = torch.randn(32, *space.event_shape, generator=torch.Generator().manual_seed(0)) / space.scale
    split = Split(data=rows, labels=torch.arange(32) % 3)
    splits = {"train": split, "heldout": split}
    write_shards(tmp_path / "data", Dataset("pictures", space, splits, class_names=("a", "b", "c")))
    words = ["experiment=digits", "data.name=pictures", f"data.path={tmp_path / 'data'}", "network.width=16"]
    words += ["network.num_blocks=1", "augmentation.rate=0", "classifier_steps=0"]
    words += ["max_steps=4", "checkpoint_every=4", "sample_every=4", "global_batch_size=8", "log_every=2"]
    words += [f"autoencoder={latent_model.autoencoder}"] if known else []
    job = run_job("train", f"storage={tmp_path}", "name=trained", *words, timeout=400)
    assert job.code == 0, job.describe()
    assert (tmp_path / "trained" / "samples").is_dir() == known
    assert ("no pictures of samples: they are latents" in job.stdout + job.stderr) != known
