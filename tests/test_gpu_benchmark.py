"""The benchmark of one device, whole, at toy size on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mfm_ray.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--device", "cpu", "--size", "toy", "--repeats", "2", "--seconds", "0.01", "--compile-backend", "eager"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "toy.md"
    done = run("-m", "benchmarks.gpu", *QUICK, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert out.read_text().startswith("# ")
    assert "python -m benchmarks.gpu" in out.read_text()
    return json.loads(out.with_suffix(".json").read_text())


def rows(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return report["sections"][name]


def numbers(value: Any) -> list[float]:
    """Every number inside a JSON value."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_objective_is_measured_and_every_number_is_finite(report: dict[str, Any]) -> None:
    training = rows(report, "training")
    assert [row["objective"] for row in training] == list(OBJECTIVES)
    assert all(row["images_per_second"] for row in training)
    found = numbers(report)
    assert len(found) > 100
    assert all(math.isfinite(number) for number in found)


def test_draws_steering_both_eulerian_forms_kernels_and_compilation_are_there(report: dict[str, Any]) -> None:
    assert [row["form"] for row in rows(report, "eulerian")] == ["library", "straightforward"]
    assert len(rows(report, "draws")) == 2
    written = "attention written out in float32"
    assert [row["num_draws"] for row in rows(report, "steering")] == [0, 1, 4, 16]
    fast = rows(report, "fast_paths")
    assert [row["form"] for row in fast] == ["library", written, "library", "graphs", written]
    assert all(row["batch"] and row["seconds"] and row["slower"] for row in fast)
    assert any("addmm" in str(row) for row in rows(report, "profile"))
    assert len(rows(report, "compile")) == 3


def test_it_needs_torch_and_the_library_alone() -> None:
    code = (
        "import sys, benchmarks.gpu; print({n.partition('.')[0] for n in sys.modules} & {'ray', 'deepspeed', 'hydra'})"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_a_device_that_is_not_there_is_named() -> None:
    import torch

    if not torch.cuda.is_available():
        done = run("-m", "benchmarks.gpu", "--device", "cuda")
        assert done.returncode == 2
        assert "--device cuda: torch finds no CUDA device" in done.stderr
