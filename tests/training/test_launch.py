"""The driver's checks and how it names a failure; whole runs: tests/jobs/test_train.py."""

from pathlib import Path
from typing import Any

import pytest
from ray.train import WorkerGroupError

from mfm_ray.config import TrainConfig, load_config
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage
from mfm_ray.training.checkpoint_store import newest_checkpoint
from mfm_ray.training.launch import check_config, is_complete, root_cause, wait_for_resources
from mfm_ray.training.progress import ProgressState
from tests.training.test_checkpoint import STATE


def config_of(*words: str) -> TrainConfig:
    config = load_config("train", ["experiment=digits", *words])
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scaling.num_workers=3"], "global_batch_size=256 does not divide by scaling.num_workers=3"),
        (["micro_batch_size=100"], "micro_batch_size=100"),
        (["zero.stage=0", "zero.offload=true"], "zero.offload=true needs"),
        (["scaling.num_workers=[2,1]"], r"scaling.num_workers=\[2, 1\]: expected one number, or \[least, most\]"),
        (["scaling.num_workers=[1,2,3]"], "least, most"),
        (["scaling.num_workers=[1,3]", "micro_batch_size=1"], "micro_batch_size=1: with 3 workers"),
        (["+objective.weight=3"], "objective.*weight"),
        (["execution=compiled", "zero.stage=3"], "execution=compiled: .* expected zero.stage=0, 1 or 2, or execution="),
        (["activation_checkpointing=true"], "activation_checkpointing=true: network=residual_mlp .* network=dit"),
        (["data.name=flowers"], "data.name=flowers is not bundled"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_starts(words: list[str], message: str) -> None:
    check_config(config_of())
    with pytest.raises(ValueError, match=message):
        check_config(config_of(*words))


def test_the_cause_of_a_failure_is_the_worker_that_failed_not_its_neighbours() -> None:
    neighbour = RuntimeError("Traceback ...\nRuntimeError: [gloo] Connection closed by peer")
    culprit = RuntimeError("Traceback ...\n  File x\nOSError: [Errno 28] No space left on device")
    error = WorkerGroupError("sixty lines", {0: neighbour, 1: culprit})
    assert root_cause(error) == "training worker 1: OSError: [Errno 28] No space left on device"
    assert "Connection closed" in root_cause(WorkerGroupError("", {0: neighbour}))


def test_a_run_is_complete_when_its_steps_or_its_time_are_used_up() -> None:
    assert not is_complete(config_of("max_steps=6"), STATE)
    assert is_complete(config_of("max_steps=5"), STATE)
    assert is_complete(config_of("max_steps=6", "max_seconds=1.5"), STATE)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_checkpoint(Storage(tmp_path)) is None


def test_progress_tells_step_loss_throughput_and_time_left() -> None:
    state = ProgressState(step=10, max_steps=130, loss=0.5, images_per_second=1234.5, steps_per_second=2.0)
    assert state.line() == "step 10/130  loss 0.5  1,234 images/s  1:00 left"


@pytest.mark.ray
def test_more_workers_than_the_cluster_holds_is_an_error_after_the_stated_wait(ray_session: Any) -> None:
    said: list[str] = []
    with pytest.raises(InputError, match=r"scaling.num_workers=9: .*room for 8 workers.*too small.*waited 3 s"):
        wait_for_resources(9, {"CPU": 1.0}, 3.0, said.append)
    assert said == ["waiting up to 3 s for 9 workers; the cluster has room for 8"]
    wait_for_resources(8, {"CPU": 1.0}, 3.0, said.append)
