"""jobs.prepare_data data=images, in this process: what an interruption costs, and what is stored in the end."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import jobs.encode_images
import jobs.sample_maker
from jobs.contract import JobRun
from jobs.prepare_data import body, check
from mfm_ray.config import load_config
from mfm_ray.data.shards import load_split, open_split, verify_shards
from mfm_ray.errors import InputError, StorageError
from mfm_ray.storage import Storage
from tests.conftest import FinishedJob, save_tiny_autoencoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder, 40 images in 3 class folders, and one file that is no image."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    save_tiny_autoencoder(folder / "vae")
    for number in range(40):
        path = folder / f"source/class{number % 3}/{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20 + number % 5, 17, 3), dtype=np.uint8)).save(path)
    (folder / "source/class0/bad.jpg").write_bytes(b"no image")
    return folder


def run(place: Path, output: Path, *words: str, log: Callable[[str], None] = lambda line: None) -> dict[str, float]:
    fixed = ["image_size=16", "batch_size=4", "shard_size=10", "scaling.num_workers=0", "heldout_share=0.1"]
    named = [f"source={place}/source", f"autoencoder={place}/vae", f"output={output}"]
    config: Any = load_config("prepare_data", ["data=images", *named, *fixed, *words])
    check(config)
    return body(JobRun(config=config, storage=Storage(output.parent / "run"), log=log)).metrics


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_preparation_goes_on_and_ends_with_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = run(place, tmp_path / "whole")
    assert metrics["images"] == 41 and metrics["damaged"] == 1
    encode, made = jobs.encode_images.encode_part, []

    def dies_at_the_third(part: int, *args: Any, **kwargs: Any) -> Any:
        made.append(part)
        if len(made) == 3:
            raise KeyboardInterrupt
        return encode(part, *args, **kwargs)

    monkeypatch.setattr(jobs.encode_images, "encode_part", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "again")
    with pytest.raises(InputError, match="is not finished; resume=true goes on"):
        run(place, tmp_path / "again")
    with pytest.raises(InputError, match="dtype=float32.*was begun with float16"):
        run(place, tmp_path / "again", "resume=true", "dtype=float32")
    (tmp_path / "again/train-00001-of-00005.arrow").write_bytes(b"cut")
    run(place, tmp_path / "again", "resume=true")
    assert made[3:] == [1, 2, 3, 4]
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    assert b"class0/bad.jpg" in content(tmp_path / "whole")["damaged.jsonl"]


@pytest.mark.parametrize("lost", ["train-00001-of-00005.arrow", "train-00003-of-00005.arrow", "damaged.jsonl"])
@pytest.mark.parametrize("altered", [True, False], ids=["altered", "deleted"])
def test_resuming_a_finished_folder_makes_again_what_is_missing_and_only_that(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, altered: bool
) -> None:
    run(place, tmp_path / "out")
    before, encode, made = content(tmp_path / "out"), jobs.encode_images.encode_part, []

    def noted(part: int, *args: Any, **kwargs: Any) -> Any:
        made.append(part)
        return encode(part, *args, **kwargs)

    monkeypatch.setattr(jobs.encode_images, "encode_part", noted)
    run(place, tmp_path / "out", "resume=true")
    assert made == []
    (tmp_path / "out" / lost).unlink()
    if altered:
        (tmp_path / "out" / lost).write_bytes(before[lost][:-1])
    run(place, tmp_path / "out", "resume=true")
    assert made == [1 if "00001" in lost else 3 if "00003" in lost else 1]
    assert content(tmp_path / "out") == before


def test_other_threads_are_other_settings(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "out")
    with pytest.raises(InputError, match="encoder_threads=2: .* was begun with 1"):
        run(place, tmp_path / "out", "resume=true", "encoder_threads=2")
    threads = torch.get_num_threads()
    run(place, tmp_path / "two", "encoder_threads=2")
    assert torch.get_num_threads() == threads


def test_a_machine_that_cannot_read_an_image_leaves_its_part_to_be_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place, tmp_path / "whole")
    read = Storage.read_bytes

    def broken(self: Storage, rel: str) -> bytes:
        if rel.endswith("25.jpg"):
            raise StorageError(f"cannot read {self.uri_of(rel)}: Input/output error")
        return read(self, rel)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "read_bytes", broken)
        with pytest.raises(StorageError, match="25.jpg: Input/output error"):
            run(place, tmp_path / "again")
    run(place, tmp_path / "again", "resume=true")
    assert content(tmp_path / "again") == content(tmp_path / "whole")


@pytest.mark.slow
def test_the_job_counts_and_lists_what_is_damaged(
    place: Path, tmp_path: Path, run_job: Callable[..., FinishedJob]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    whole = (place / "source/class0/00.jpg").read_bytes()
    files = {"0.jpg": whole, "1.jpg": whole[:-200], "2.jpg": b"text", "3.jpg": b"", "4.jpg": whole}
    for name, image in files.items():
        (source / name).write_bytes(image)
    words = ["data=images", f"source={source}", f"autoencoder={place}/vae", "image_size=16", "heldout_share=0"]
    job = run_job("prepare_data", *words, f"output={tmp_path}/out", "scaling.num_workers=0")
    assert job.code == 0, job.describe()
    assert job.metrics["images"] == 5 and job.metrics["damaged"] == 3 and job.metrics["train.rows"] == 2
    listed = [json.loads(line) for line in Path(job.artifacts["damaged"]).read_text().splitlines()]
    assert [line["image"] for line in listed] == ["1.jpg", "2.jpg", "3.jpg"]
    assert listed[0]["reason"].startswith("damaged: ")
    assert [line["reason"] for line in listed[1:]] == ["not an image of a known format", "empty file"]


def test_the_same_images_in_a_tar_or_in_parquet_give_the_same_latents(place: Path, tmp_path: Path) -> None:
    images = {str(path.relative_to(place / "source")): path for path in sorted(place.glob("source/*/*.jpg"))}
    for kind in ("tars", "tables"):
        (tmp_path / kind).mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as archive:
        for name, path in images.items():
            archive.add(path, name)
    table = pa.table({"jpg": [path.read_bytes() for path in images.values()]})
    pq.write_table(table, tmp_path / "tables/0.parquet", row_group_size=7)
    rows = {}
    for kind, source in {"folder": place / "source", "tar": tmp_path / "tars", "table": tmp_path / "tables"}.items():
        metrics = run(place, tmp_path / kind, f"source={source}", "heldout_share=0")
        assert metrics["damaged"] == 1 and metrics["train.rows"] == 40
        rows[kind] = load_split(tmp_path / kind, "train").data
    assert torch.equal(rows["tar"], rows["folder"]) and torch.equal(rows["table"], rows["folder"])


def test_progress_names_the_time_left(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.sample_maker, "_LINE_EVERY_S", 0.0)
    log: list[str] = []
    run(place, tmp_path / "out", log=log.append)
    assert log[0] == "41 images (folder), 0 of 5 parts are there"
    lines = [line for line in log if re.fullmatch(r"\d+ of 41 images, [\d.,]+ images/s, \d+:\d\d left", line)]
    done = [int(line.split()[0]) for line in lines]
    assert done == sorted(done) and 0 < done[0] < done[-1] < 41


def test_a_source_of_damaged_images_alone_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for number in range(3):
        (tmp_path / f"source/{number}.jpg").write_bytes(b"text")
    with pytest.raises(InputError, match="no image is left to train on, 3 are damaged; the first: 0.jpg: not an image"):
        run(place, tmp_path / "out", f"source={tmp_path}/source")


def test_mapped_rows_are_those_that_a_whole_reading_gives(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "out")
    described = verify_shards(tmp_path / "out").description()
    assert described["kind"] == "latent" and described["event_shape"] == [4, 8, 8]
    assert described["class_names"] == ["class0", "class1", "class2"]
    assert described["autoencoder"]["source"] == str(place / "vae")
    assert described["autoencoder"]["image_size"] == 16
    mapped, loaded = open_split(tmp_path / "out", "train"), load_split(tmp_path / "out", "train")
    index = torch.randperm(len(mapped), generator=torch.Generator().manual_seed(0))
    assert torch.equal(mapped.data[index], loaded.data[index])
    assert torch.equal(mapped.labels, loaded.labels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image_size=15"], "image_size=15: expected a multiple of 2"),
        (["source=/nowhere"], "source=/nowhere does not exist"),
        (["autoencoder=/nowhere"], "autoencoder=/nowhere does not exist"),
        (["autoencoder=null"], "autoencoder=null: expected the folder"),
        (["source={empty}"], "source=.* is empty"),
        (["scaling.resources_per_worker.CPU=0"], "scaling.resources_per_worker: expected at least one resource"),
        (["labels=/nowhere"], "labels=/nowhere does not exist"),
        (["image_column=x"], "image_column=x: the source is of kind folder"),
        (["data=digits", "source=null", "autoencoder=null"], "image_size=16: digits is not encoded"),
    ],
)
def test_bad_input_is_one_line(place: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    named = [word.replace("{empty}", str(tmp_path / "empty")) for word in words]
    with pytest.raises(InputError, match=message):
        run(place, tmp_path / "out", *named)
    assert not (tmp_path / "out").exists()  # nothing was begun
