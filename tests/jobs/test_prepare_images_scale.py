"""jobs.prepare_data data=images on Ray: whoever encodes, and whoever is killed, the shards are the same to the byte."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.contract import JobRun
from jobs.encode_pool import Tally, _Watch
from jobs.prepare_data import body, check
from jobs.sample_maker import Progress
from jobs.sample_pool import LostWorkersError, Workers
from jobs.stopping import _descendants
from mfm_ray.config import load_config
from mfm_ray.data.mapped import read_arrow
from mfm_ray.errors import InputError, StorageError
from mfm_ray.storage import Storage

from ..conftest import ROOT, save_tiny_autoencoder

IMAGES = 240
FIXED = ["data=images", "image_size=32", "batch_size=4", "shard_size=8", "heldout_share=0.1"]
TWO_WORKERS = ["scaling.num_workers=2", "scaling.start_timeout_s=240"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder, images in 3 class folders, one of them damaged."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    save_tiny_autoencoder(folder / "vae")
    for number in range(IMAGES):
        path = folder / f"source/class{number % 3}/{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40 + number % 5, 34, 3), dtype=np.uint8)).save(path)
    (folder / "source/class1/004.jpg").write_bytes(b"no image")
    return folder


def words_of(place: Path, output: Path) -> list[str]:
    return [*FIXED, f"source={place}/source", f"autoencoder={place}/vae", f"output={output}"]


def run(place: Path, output: Path, *words: str) -> tuple[dict[str, float], list[str]]:
    """Metrics and what was said."""
    config: Any = load_config("prepare_data", [*words_of(place, output), *words])
    check(config)
    log: list[str] = []
    run_storage = Storage(output.parent / "run")
    return body(JobRun(config=config, storage=run_storage, log=log.append)).metrics, log


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process without Ray stores."""
    output = tmp_path_factory.mktemp("whole") / "out"
    metrics, _ = run(place, output, "scaling.num_workers=0")
    assert metrics["damaged"] == 1
    return content(output)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_workers_of_which_one_is_killed_store_what_one_process_stores(
    ray_session: None, place: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill_an_encoder, args=(tmp_path / "out", killed))
    killer.start()
    metrics, log = run(place, tmp_path / "out", *TWO_WORKERS)
    killer.join()
    assert len(killed) == 1
    assert any("the first worker is ready" in line for line in log)
    assert content(tmp_path / "out") == whole
    assert metrics["train.rows"] + metrics["heldout.rows"] == IMAGES - 1


def kill_an_encoder(output: Path, killed: list[int]) -> None:
    """SIGKILL for one of our actors, once a part is finished."""
    wait_until(lambda: any((output / "records").glob("*.json")), seconds=240)
    pid = encoders()[0]
    os.kill(pid, signal.SIGKILL)
    killed.append(pid)


def encoders() -> list[int]:
    """Process ids of the actors of our cluster that hold an encoder."""
    found = []
    for number in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            title = (Path("/proc") / str(number) / "cmdline").read_bytes()
            if title.startswith(b"ray::") and b"PartEncoder" in title:
                found.append(number)
    return found


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(0.02)


@pytest.mark.slow
def test_one_and_two_workers_store_what_one_process_stores(
    ray_session: None, place: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for number in (1, 2):
        run(place, tmp_path / str(number), f"scaling.num_workers={number}", "scaling.start_timeout_s=240")
        assert content(tmp_path / str(number)) == whole


@pytest.mark.slow
def test_a_worker_that_refuses_ends_the_job_in_one_line(ray_session: None, place: Path, tmp_path: Path) -> None:
    """A part of a source that workers cannot read is no hole, and a wish that no worker fulfils is an error in time."""
    output, words = tmp_path / "out", ["scaling.num_workers=1", "scaling.start_timeout_s=240"]
    missing = place / "source/class2/005.jpg"
    image, checked = missing.read_bytes(), load_config("prepare_data", [*words_of(place, output), *words])
    check(checked)  # type: ignore[arg-type]
    missing.unlink()
    try:
        with pytest.raises(StorageError, match=r"005.jpg was listed, but \S+ does not see it"):
            body(JobRun(config=checked, storage=Storage(tmp_path / "run"), log=lambda line: None))
    finally:
        missing.write_bytes(image)
    with pytest.raises(InputError, match="no worker .* is ready; the cluster has room for 0"):
        run(
            place,
            tmp_path / "crowd",
            "scaling.num_workers=1",
            "scaling.resources_per_worker.CPU=64",
            "scaling.start_timeout_s=1",
        )


@pytest.mark.slow
def test_a_part_that_is_lost_too_often_ends_the_job(ray_session: None) -> None:
    import ray

    remote: Any = ray.remote
    tally, log = remote(num_cpus=0)(Tally).remote(), list[str]()
    workers = Workers(num=1, resources={"CPU": 1.0}, start_timeout_s=240, max_failures=2)
    watch = _Watch(tally, workers, Progress(log.append, before=0, total=8), log.append)
    for pid in range(3):
        ray.get([tally.join.remote("here", pid), tally.begin.remote(7)])
        watch.look({7})
    assert log[1:] == [f"{lost} workers were lost so far, others took their places" for lost in (1, 2)]
    ray.get(tally.begin.remote(7))
    watch.look(set())  # it was finished after all
    with pytest.raises(LostWorkersError, match=r"part 7 was lost with its worker 3 times \(scaling.max_failures=2\)"):
        watch.look({7})
    ray.kill(tally)


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_job_goes_on_to_each_image_once_and_the_same_bytes(
    place: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "jobs.prepare_data", *words_of(place, output), f"storage={tmp_path}/runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, *TWO_WORKERS],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: process.poll() is not None or any((output / "records").glob("*.json")), seconds=240)
    assert process.poll() is None, "ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # workers that outlive their cluster by a moment
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*.arrow")}
    assert 0 < len(list((output / "records").glob("*.json"))) < IMAGES // 8
    resumed = subprocess.run(
        [*command, *TWO_WORKERS, "resume=true"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert content(output) == whole
    kept = [path for path, time_ns in finished.items() if path.stat().st_mtime_ns == time_ns]
    assert kept  # parts that were finished were not made again
    keys = [key for name, data in content(output).items() if name.endswith(".arrow") for key in keys_of(data)]
    assert len(keys) == len(set(keys)) == IMAGES - 1


def keys_of(data: bytes) -> list[str]:
    table: pa.Table = read_arrow(data)
    return table["key"].to_pylist()


@pytest.mark.gpu
def test_a_gpu_stores_what_float32_gives_and_the_same_bytes_twice(place: Path, tmp_path: Path) -> None:
    words = ["scaling.num_workers=0", "dtype=float32", "image_size=64"]
    torch.backends.cudnn.allow_tf32 = True
    for name in ("one", "two"):
        run(place, tmp_path / name, *words, "scaling.use_gpu=true")
    run(place, tmp_path / "cpu", *words, "scaling.use_gpu=false")
    one, two, cpu = (content(tmp_path / name) for name in ("one", "two", "cpu"))
    assert one == two
    for name in (name for name in one if name.endswith(".arrow")):
        rows, expected = (read_arrow(data[name])["data"].combine_chunks().to_numpy_ndarray() for data in (one, cpu))
        assert np.abs(rows - expected).max() < 2e-5  # TF32 errs by some 1e-3
    assert torch.backends.cudnn.allow_tf32
