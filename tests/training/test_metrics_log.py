"""The history of a run: averages over a window, one line a step, nothing twice after a restart."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mfm_ray.storage import Storage
from mfm_ray.training.metrics_log import METRICS_FILE, MetricsLog, StepWindow, TrainingDiverged, history_until


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_window_averages_its_steps_and_starts_again() -> None:
    window = StepWindow(["loss", "gradient_norm"])
    window.add(1, torch.tensor([1.0, 10.0]))
    window.add(2, torch.tensor([3.0, 20.0]))
    assert window.flush() == {"loss": 2.0, "gradient_norm": 15.0}
    assert window.flush() == {}


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_divergence_names_the_first_step_and_term(value: str) -> None:
    window = StepWindow(["loss", "squared_error.semigroup"])
    for step in range(7, 10):
        window.add(step, torch.tensor([1.0, float(value) if step >= 8 else 1.0]))
    with pytest.raises(TrainingDiverged, match=f"step 8, worker 0: squared_error.semigroup is {value}"):
        window.flush()


def test_history_keeps_what_was_written_up_to_the_resumed_step_and_drops_a_torn_line() -> None:
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (2, 4, 6)]
    assert history_until("\n".join(lines) + "\n", 4) == "".join(line + "\n" for line in lines[:2])
    assert history_until("\n".join([*lines[:2], '{"step": 6, "lo']), 10) == "".join(line + "\n" for line in lines[:2])
    assert history_until("", 4) == ""


@pytest.mark.parametrize("remote", [False, True])
def test_a_log_that_goes_on_has_each_step_once(tmp_path: Path, remote: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if remote:
        monkeypatch.setattr(Storage, "local_path", property(lambda self: None))
    run = Storage(tmp_path / "run")
    first = MetricsLog(run, resume_step=0)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    first.close()
    second = MetricsLog(run, resume_step=2)
    second.write(3, {"loss": 30.0})
    second.close()
    history = [json.loads(line) for line in run.read_bytes(METRICS_FILE).splitlines()]
    assert [(line["step"], line["loss"]) for line in history] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert any(name.startswith("events.out.tfevents") for name in run.listdir())
