"""Every file of tune_configs/ as a small real sweep: it runs to its end and its presets are words of the swept job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import tune
from jobs.contract import JobRun
from jobs.run_folder import RunFolder
from mfm_ray.config import load_config, sweep_files

FILES = {name: yaml.safe_load(file.read_text()).get("job", "sample") for name, file in sweep_files().items()}
_TRAINED = ["max_steps=20", "checkpoint_every=10", "log_every=10", "sample_every=20", "warmup_steps=0", "ema_decay=0.5"]
_TRAINED += ["scaling.num_workers=1", "scaling.start_timeout_s=240", "concurrent_trials=2", "models_to_keep=1"]
SHORT = {
    "sample": ["num_samples=4", "num_steps=2", "scaling.num_workers=2", "scaling.start_timeout_s=240"],
    "train": [
        "experiment=gmm",
        "network.width=16",
        "network.num_blocks=1",
        "global_batch_size=64",
        "optimizer.name=adamw",
        "heldout.num_rows=64",
        *_TRAINED,
    ],
    "finetune": [
        "reward=brightness",
        "global_batch_size=16",
        "anchors.chains=2",
        "anchors.start_steps=3",
        "evaluate_samples=32",
        "evaluate_steps=4",
        "num_trials=2",
        *_TRAINED,
    ],
}
FURTHER = {"guidance_search": ["num_trials=4"], "training_schedule": ["num_trials=2"]}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sweep", sorted(FILES))
def test_every_sweep_file_runs_in_a_short_form(
    sweep: str, ray_session: None, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    job = FILES[sweep]
    model = [] if job == "train" else [f"model={tiny_models['tiny']}"]
    words = [f"sweep={sweep}", f"storage={tmp_path}", *model, *SHORT[job], *FURTHER.get(sweep, [])]
    config: Any = load_config("tune", words)
    tune.check(config)
    outcome = tune.body(JobRun(config=config, storage=RunFolder("tune", config).storage, log=[].append))
    assert outcome.metrics["trials.ok"] > 0
    assert outcome.metrics["trials.refused"] == outcome.metrics["trials.lost"] == 0
    folder = tmp_path / f"sweep_{sweep}"  # no job that is swept writes there
    front = json.loads((folder / "pareto.json").read_text())
    assert list(front["objectives"]) == list(config.objectives)
    for name in ("low", "medium", "high"):
        load_config(job, [*model, f"preset={folder}/presets.yaml#{name}"])
    assert not (folder / "tune").exists()  # what Ray Tune needs while it runs
