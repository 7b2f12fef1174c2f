"""`python -m jobs.train` as people call it: a whole run, a run that is killed and goes on, and refusals."""

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

import mfm_ray.pretrained
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint_store import newest_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 240
RECIPE = [
    "experiment=digits",
    "network.width=32",
    "network.num_blocks=1",
    "global_batch_size=64",
    f"max_steps={STEPS}",
    "checkpoint_every=60",
    "log_every=20",
    "sample_every=120",
    "classifier_steps=25",
    "zero.stage=2",
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def command(storage: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "jobs.train", f"storage={storage}", *RECIPE, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(storage: Path, *words: str, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(storage, *words), cwd=storage, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "model" / "model.safetensors")


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(storage: Path) -> subprocess.CompletedProcess[str]:
    return run(storage, "name=whole")


@pytest.fixture(scope="module")
def resumed(storage: Path, whole: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The same run, killed with everything it started after its first checkpoint, then resumed."""
    process = subprocess.Popen(
        command(storage, "name=killed"),
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
    return run(storage, "name=killed", "resume=true")


def has_checkpoint(run: Path) -> bool:
    return (run / "checkpoints").exists() and newest_checkpoint(Storage(run)) is not None


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(0.05)


def test_a_run_leaves_model_history_pictures_and_checkpoints(
    storage: Path, whole: subprocess.CompletedProcess[str]
) -> None:
    assert whole.returncode == 0, whole.stdout + whole.stderr
    folder = storage / "whole"
    assert whole.stdout.splitlines()[-1] == f"RESULT {folder / 'result.json'}"
    assert f"step {STEPS}/{STEPS}" in whole.stdout
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "ok"
    assert set(result["artifacts"]) == {"model", "checkpoints", "metrics", "samples"}
    assert all(Path(place).exists() for place in result["artifacts"].values())
    assert [line["step"] for line in history(folder)] == list(range(20, STEPS + 1, 20))
    wanted = {"loss", "squared_error.diagonal", "squared_error.semigroup", "gradient_norm", "learning_rate"}
    wanted |= {"images_per_second", "data_seconds", "seconds"}
    assert all(wanted <= set(line) for line in history(folder))
    assert len(list(folder.glob("events.out.tfevents*"))) == 1
    pictures = sorted(path.name for path in (folder / "samples").iterdir())
    assert pictures == ["step-00000120.png", "step-00000240.png"]
    assert len([path for path in (folder / "checkpoints").iterdir() if path.is_dir()]) == 2
    flow_map = mfm_ray.pretrained.load_flow_map(folder / "model")
    assert flow_map.event_shape == (1, 8, 8)
    assert mfm_ray.pretrained.load_classifier(folder / "model").num_classes == 10
    summary = mfm_ray.pretrained.read_model_config(folder / "model")["training"]
    assert (summary["steps"], summary["num_workers"], summary["zero_stage"]) == (STEPS, 2, 2)


def test_a_killed_and_resumed_run_ends_with_the_same_weights_to_the_bit(
    storage: Path, resumed: subprocess.CompletedProcess[str]
) -> None:
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "going on from step" in resumed.stdout
    expected, actual = weights(storage / "whole"), weights(storage / "killed")
    assert expected.keys() == actual.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])] == []


def test_the_history_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    storage: Path, resumed: subprocess.CompletedProcess[str]
) -> None:
    same = ("step", "loss", "squared_error.diagonal", "squared_error.semigroup", "gradient_norm", "learning_rate")
    whole, killed = history(storage / "whole"), history(storage / "killed")
    assert [[line[key] for key in same] for line in killed] == [[line[key] for key in same] for line in whole]
    seconds = [line["seconds"] for line in killed]
    assert seconds == sorted(seconds)


def test_a_checkpoint_of_another_network_is_refused_and_the_good_run_stays(
    storage: Path, whole: subprocess.CompletedProcess[str]
) -> None:
    before = weights(storage / "whole")
    refused = run(storage, "name=whole", "resume=true", "network.width=48", "max_steps=300")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "network.width=48" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert weights(storage / "whole").keys() == before.keys()


def test_more_workers_than_the_cluster_has_room_for_is_an_error_after_the_stated_wait(storage: Path) -> None:
    refused = run(storage, "name=crowd", "scaling.num_workers=64", "scaling.start_timeout_s=3")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "scaling.num_workers=64" in refused.stderr
    assert "waited 3 s" in refused.stderr


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps_and_past_a_damaged_checkpoint_with_fewer_workers(
    storage: Path, resumed: subprocess.CompletedProcess[str]
) -> None:
    again = run(storage, "name=killed", "resume=true")
    assert again.returncode == 0, again.stdout + again.stderr
    assert history(storage / "killed")[-1]["step"] == STEPS
    longer = run(storage, "name=killed", "resume=true", f"max_steps={STEPS + 20}")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert [line["step"] for line in history(storage / "killed")] == list(range(20, STEPS + 21, 20))
    found = newest_checkpoint(Storage(storage / "killed"))
    assert found is not None
    assert found.storage.local_path is not None
    file = found.storage.local_path / "training-rank-1.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = run(storage, "name=killed", "resume=true", f"max_steps={STEPS + 40}", "scaling.num_workers=1")
    assert damaged.returncode == 0, damaged.stdout + damaged.stderr
    assert f"{file}: content differs" in damaged.stdout
    assert f"going on from step {STEPS}" in damaged.stdout
    assert [line["step"] for line in history(storage / "killed")] == list(range(20, STEPS + 41, 20))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_the_other_stages_train_under_ray_as_well(storage: Path, stage: int) -> None:
    done = run(storage, f"name=stage-{stage}", f"zero.stage={stage}", "max_steps=20", "micro_batch_size=16")
    assert done.returncode == 0, done.stdout + done.stderr
    mfm_ray.pretrained.load_flow_map(storage / f"stage-{stage}" / "model")
