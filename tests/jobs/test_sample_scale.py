"""Sampling in shards: by this process or by Ray workers, killed and resumed, the images are the same to the bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch

from jobs import sample
from jobs.contract import JobRun, Outcome
from jobs.run_folder import RunFolder
from jobs.sample_maker import Progress, ShardMaker
from jobs.sample_pool import Workers, choose_workers, make_on_ray
from jobs.sample_shards import plan_shards
from jobs.stopping import _descendants
from mfm_ray import BestOfN
from mfm_ray.config import SampleScalingConfig, load_config
from mfm_ray.data import digits
from mfm_ray.errors import InputError
from mfm_ray.networks import build_network
from mfm_ray.pretrained import save_model
from mfm_ray.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
STEERED = ["steering=gradient", "reward=masked_observation", "num_steps=3", "seed=3"]
FOUR_SHARDS = ["num_samples=40", "shard_size=12", *STEERED]
TWO_WORKERS = ["scaling.num_workers=2", "scaling.start_timeout_s=240"]  # a busy machine is no failure


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "model", seed=0)


def save(path: Path, *, seed: int) -> Path:
    data = digits()
    torch.manual_seed(seed)
    flow_map = build_network({"name": "residual_mlp", "width": 16, "num_blocks": 1}, space=data.space, num_classes=10)
    described = {"name": "digits", **data.space.config(), "num_classes": 10, "class_names": list(data.class_names)}
    save_model(path, flow_map, config={"data": described, "training": {}})
    return path


@dataclass(frozen=True)
class Finished:
    outcome: Outcome
    folder: Path
    log: list[str]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    @property
    def hashes(self) -> list[str]:
        return [shard["sha256"] for shard in self.manifest["shards"]]


@pytest.fixture
def draw(model: Path, tmp_path: Path) -> Callable[..., Finished]:
    """`draw("name", "num_samples=40", ...)`: check and body of the job in this process."""

    def draw(name: str, *words: str) -> Finished:
        config = load_config("sample", [f"model={model}", f"storage={tmp_path}", f"name={name}", *words])
        sample.check(config)  # type: ignore[arg-type]
        log: list[str] = []
        storage = RunFolder("sample", config).storage
        outcome = sample.body(JobRun(config=config, storage=storage, log=log.append))
        return Finished(outcome, tmp_path / name, log)

    return draw


def shard_files(folder: Path) -> list[Path]:
    return sorted((folder / "samples").glob("part-*.parquet"))


def images(*files: Path) -> torch.Tensor:
    tables = [pq.read_table(file)["image"].combine_chunks().to_numpy_ndarray() for file in files]
    return torch.cat([torch.from_numpy(table.copy()) for table in tables])


def test_shards_are_one_data_set_of_the_images_that_a_single_file_has(draw: Callable[..., Finished]) -> None:
    whole = draw("whole", "num_samples=40", *STEERED)
    parts = draw("parts", *FOUR_SHARDS, "scaling.num_workers=0")
    files = shard_files(parts.folder)
    assert [file.name for file in files] == [f"part-0000{index}-of-00004.parquet" for index in range(4)]
    assert torch.equal(images(*files), images(whole.folder / "samples.parquet"))
    data = pyarrow.dataset.dataset(parts.outcome.artifacts["samples"])
    assert sorted(data.to_table(columns=["index"])["index"].to_pylist()) == list(range(40))
    assert all((parts.folder / "samples" / f"_part-0000{index}-of-00004.png").is_file() for index in range(4))
    assert (parts.folder / "grid.png").read_bytes() == (whole.folder / "grid.png").read_bytes()
    for name in ("num_samples", "nfe", "reward", "reward_std"):
        assert parts.outcome.metrics[name] == pytest.approx(whole.outcome.metrics[name], rel=1e-9)


def test_the_manifest_vouches_for_every_shard(draw: Callable[..., Finished]) -> None:
    done = draw("vouched", *FOUR_SHARDS, "scaling.num_workers=0")
    manifest = done.manifest
    assert (manifest["status"], manifest["rows"], manifest["num_shards"]) == ("complete", 40, 4)
    assert manifest["settings"]["steering"]["name"] == "gradient"
    assert [(shard["first_image"], shard["count"]) for shard in manifest["shards"]] == [
        (0, 12),
        (12, 12),
        (24, 12),
        (36, 4),
    ]
    for shard in manifest["shards"]:
        content = (done.folder / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        rewards = pq.read_table(done.folder / shard["file"])["reward"].to_pylist()
        assert shard["rows"] == len(rewards)
        assert shard["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)


def test_only_damaged_and_missing_shards_are_made_again(draw: Callable[..., Finished]) -> None:
    before = draw("damaged", *FOUR_SHARDS, "scaling.num_workers=0")
    files = shard_files(before.folder)
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(content)
    files[2].write_bytes(files[2].read_bytes()[:-10])
    (before.folder / "samples" / "_part-00003-of-00004.json").unlink()
    untouched = files[0].stat().st_mtime_ns
    after = draw("damaged", *FOUR_SHARDS, "scaling.num_workers=0", "resume=true", "batch_size=16")
    assert after.log[0] == "1 of 4 shards are there already"
    assert after.hashes == before.hashes
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == before.hashes
    assert files[0].stat().st_mtime_ns == untouched
    assert after.outcome.metrics["reward"] == before.outcome.metrics["reward"]
    assert draw("damaged", *FOUR_SHARDS, "resume=true").log[0] == "4 of 4 shards are there already"  # and needs no Ray


def test_a_finished_job_of_one_shard_is_not_made_again(draw: Callable[..., Finished]) -> None:
    before = draw("one", "num_samples=5", *STEERED)
    written = (before.folder / "samples.parquet").stat().st_mtime_ns
    after = draw("one", "num_samples=5", *STEERED, "resume=true")
    assert (after.folder / "samples.parquet").stat().st_mtime_ns == written
    assert after.outcome.metrics == before.outcome.metrics


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("seed=4", "seed=4: the samples in {folder} were begun with seed=3; expected that, or overwrite=true"),
        ("num_samples=41", "num_samples=41: the samples in {folder} were begun with num_samples=40"),
        ("steering.num_draws=2", "steering.num_draws=2: the samples in {folder} were begun with steering.num_draws="),
        ("reward.row=1", "reward.row=1: the samples in {folder} were begun with reward.row=0"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(draw: Callable[..., Finished], word: str, line: str) -> None:
    begun = draw("begun", *FOUR_SHARDS, "scaling.num_workers=0")
    with pytest.raises(InputError) as refusal:
        draw("begun", *FOUR_SHARDS, "resume=true", word)
    assert line.format(folder=begun.folder) in str(refusal.value)


def test_going_on_with_another_model_is_refused(draw: Callable[..., Finished], tmp_path: Path) -> None:
    draw("other", *FOUR_SHARDS, "scaling.num_workers=0")
    other = save(tmp_path / "model", seed=1)
    with pytest.raises(InputError, match="model of hash .*: the samples in .* were begun with model of hash"):
        draw("other", *FOUR_SHARDS, "resume=true", f"model={other}")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("scaling.num_worker=2", "scaling.num_worker: unknown key; did you mean scaling.num_workers?"),
        ("scaling.num_workers=-1", "scaling.num_workers=-1: expected a whole number of at least 0, or null"),
        ("shard_size=0", "shard_size=0: expected a whole number of at least 1"),
        ("scaling.resources_per_worker.CPU=0", "scaling.resources_per_worker: expected at least one resource above 0"),
    ],
)
def test_a_mistake_in_the_scale_is_one_line(model: Path, word: str, line: str) -> None:
    with pytest.raises(InputError) as refusal:
        sample.check(load_config("sample", [f"model={model}", word]))  # type: ignore[arg-type]
    assert line in str(refusal.value)


def test_two_workers_make_what_one_process_makes(ray_session: None, draw: Callable[..., Finished]) -> None:
    alone = draw("alone", *FOUR_SHARDS, "scaling.num_workers=0")
    together = draw("together", *FOUR_SHARDS, *TWO_WORKERS)
    assert together.hashes == alone.hashes
    assert together.outcome.metrics["reward"] == alone.outcome.metrics["reward"]


def test_the_shard_of_a_killed_worker_is_given_to_another(
    ray_session: None, draw: Callable[..., Finished], tmp_path: Path
) -> None:
    words = ["num_samples=96", "shard_size=8", "num_steps=150", "seed=3"]
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "bereaved",))
    killer.start()
    bereaved = draw("bereaved", *words, *TWO_WORKERS)
    killer.join()
    assert any("was lost, another takes its place (1 of at most 2 times)" in line for line in bereaved.log)
    assert bereaved.hashes == draw("undisturbed", *words, "scaling.num_workers=0").hashes


def kill_a_worker(folder: Path) -> None:
    """SIGKILL for one of our Ray workers that is making a shard, once another shard is finished."""
    wait_until(lambda: any((folder / "samples").glob("_part-*.json")), seconds=240)
    busy: list[int] = []
    wait_until(lambda: bool(busy.extend(processes_titled("ray::ShardWorker.make")) or busy), seconds=60)
    os.kill(busy[0], signal.SIGKILL)


def processes_titled(title: str) -> list[int]:
    found = []
    for number in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if (Path("/proc") / str(number) / "cmdline").read_bytes().startswith(title.encode()):
                found.append(number)
    return found


def test_a_reward_that_is_no_number_ends_the_job_without_another_try(
    ray_session: None, model: Path, tmp_path: Path
) -> None:
    from mfm_ray.pretrained import load_flow_map

    def broken(samples: torch.Tensor) -> torch.Tensor:
        return samples.flatten(1).sum(1) * float("nan")

    config = load_config("sample", [f"model={model}", "num_samples=8", "shard_size=4", "num_steps=1"])
    maker = ShardMaker(
        judges={},
        flow_map=load_flow_map(model),
        steering=BestOfN(broken, num_particles=2),
        config=config,  # type: ignore[arg-type]
        settings={},
        run=Storage(tmp_path / "broken"),
        device="cpu",
    )
    log: list[str] = []
    workers = Workers(num=1, resources={"CPU": 1.0}, start_timeout_s=240, max_failures=2)
    progress = Progress(log.append, before=0, total=8)
    with pytest.raises(InputError, match="reward function: returned NaN or infinity"):
        make_on_ray(maker, plan_shards(8, 4), lambda shard, record: None, progress, workers=workers, log=log.append)
    assert log[-1] == "the first of 1 workers is ready"  # and no other one


def test_a_cluster_without_room_for_a_worker_is_an_error_after_the_stated_wait(
    ray_session: None, draw: Callable[..., Finished]
) -> None:
    words = ["scaling.num_workers=1", "scaling.resources_per_worker.CPU=64", "scaling.start_timeout_s=1"]
    with pytest.raises(InputError, match="no worker .* is ready; the cluster has room for 0 .too small., waited 1 s"):
        draw("crowd", *FOUR_SHARDS, *words)


def test_null_means_as_many_workers_as_this_machine_has_cores(ray_session: None) -> None:
    scaling = SampleScalingConfig(
        num_workers=None, use_gpu=False, resources_per_worker={"CPU": 1.0}, start_timeout_s=1.0, max_failures=0
    )
    cores = min(8, len(os.sched_getaffinity(0)))  # the cluster has 8 places
    assert choose_workers(scaling, 100).num == cores
    assert choose_workers(scaling, 1).num == 1


@pytest.mark.ray
def test_a_killed_job_goes_on_where_it_was_and_ends_with_the_same_bytes(
    draw: Callable[..., Finished], model: Path, tmp_path: Path
) -> None:
    words = ["num_samples=320", "shard_size=8", "num_steps=150", "seed=3"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jobs.sample",
            f"model={model}",
            f"storage={tmp_path}",
            "name=killed",
            *words,
            *TWO_WORKERS,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = tmp_path / "killed"
    wait_until(lambda: process.poll() is not None or any((folder / "samples").glob("_part-*.json")), seconds=240)
    assert process.poll() is None, "ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # workers that outlive their cluster by a moment
    finished = [file for file in shard_files(folder) if file.with_name(f"_{file.stem}.json").exists()]
    times = {file: file.stat().st_mtime_ns for file in finished}
    assert 0 < len(times) < 40
    resumed = draw("killed", *words, "scaling.num_workers=0", "resume=true")
    assert resumed.log[0] == f"{len(times)} of 40 shards are there already"
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert resumed.hashes == draw("calm", *words, "scaling.num_workers=0").hashes


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(0.02)
