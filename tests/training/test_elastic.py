"""Elastic training: a node dies and another one comes, on a real cluster of several (simulated) nodes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.elastic_drill import EVERY, WORDS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("loss", "squared_error.diagonal", "squared_error.semigroup", "gradient_norm")


def run(folder: Path, *command: str, timeout: float) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def history(run: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def test_a_run_shrinks_and_grows_with_the_cluster_and_its_curve_is_that_of_one_worker(tmp_path: Path) -> None:
    run(tmp_path, "tests.training.elastic_drill", str(tmp_path), timeout=500)
    told = json.loads((tmp_path / "told.json").read_text())
    sizes = [workers for _, workers in told["sizes"]]
    changes = [now for before, now in itertools.pairwise([0, *sizes]) if now != before]
    assert changes == [2, 1, 2]
    steps = [step for step, _ in told["sizes"]]
    last = max(steps)
    assert all(after - before <= EVERY for before, after in itertools.pairwise(steps))
    alone = [
        *WORDS,
        f"max_steps={last}",
        "scaling.num_workers=1",
        "micro_batch_size=43",
        f"storage={tmp_path}",
        "name=alone",
    ]
    alone.remove("+scaling.resources_per_worker.slot=1")
    run(tmp_path, "jobs.train", *alone, timeout=400)
    elastic, expected = history(tmp_path / "run"), history(tmp_path / "alone")
    common = [step for step in sorted(expected) if step <= last]
    assert set(common) <= set(elastic)
    actual, wanted = (torch.tensor([[lines[s][k] for k in FIGURES] for s in common]) for lines in (elastic, expected))
    torch.testing.assert_close(actual, wanted, rtol=5e-3, atol=1e-4)
