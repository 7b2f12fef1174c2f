"""`python -m jobs.train objective=...` with derivatives and a teacher: two workers, ZeRO-3, bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfm_ray.data_space import DataSpace
from mfm_ray.networks.residual_mlp import ResidualMLPFlowMap
from mfm_ray.pretrained import load_flow_map, read_model_config, save_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def train(storage: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.train", "experiment=gmm", f"storage={storage}", "network.width=32", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=storage, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    space = DataSpace("coordinates", (2,))
    data = {"name": "gmm", **space.config(), "num_classes": 0}
    save_model(tmp_path / "teacher", ResidualMLPFlowMap(space=space, width=16, num_blocks=1), config={"data": data})
    return tmp_path / "teacher"


def test_a_teacher_is_distilled_by_two_workers_that_share_every_parameter(tmp_path: Path, teacher: Path) -> None:
    done = train(
        tmp_path,
        "objective=eulerian_teacher",
        f"objective.teacher={teacher}",
        "objective.diagonal=teacher",
        "objective.consistency_weighting={name: learned}",
        "network.max_time_frequency=0.66",
        "global_batch_size=64",
        "max_steps=30",
        "checkpoint_every=30",
        "sample_every=0",
        "log_every=10",
        "zero.stage=3",
        "precision=bf16",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "gmm" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert all({"squared_error.diagonal", "squared_error.eulerian"} <= set(line) for line in lines)
    assert lines[-1]["squared_error.diagonal"] < lines[0]["squared_error.diagonal"]
    model = tmp_path / "gmm" / "model"
    assert load_flow_map(model).event_shape == (2,)
    assert read_model_config(model)["training"]["zero_stage"] == 3


def test_a_distilled_objective_without_a_teacher_is_refused_in_one_line(tmp_path: Path) -> None:
    done = train(tmp_path, "objective=lagrangian_teacher", "name=none")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "objective.teacher=null: expected a model directory" in line
