"""jobs.prepare_data: shards without a cluster, and nothing lost by a mistake."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.contract import JobRun
from jobs.prepare_data import body, check, make_dataset, output_of
from jobs.run_folder import SUBMITTED_JOB
from mfm_ray.config import PrepareDataConfig, load_config
from mfm_ray.data.shards import verify_shards
from mfm_ray.errors import InputError
from mfm_ray.storage import Storage


def prepared(tmp_path: Path, *words: str) -> PrepareDataConfig:
    config = load_config("prepare_data", [f"storage={tmp_path}/runs", f"output={tmp_path}/out", *words])
    assert isinstance(config, PrepareDataConfig)
    return config


def run(tmp_path: Path, *words: str) -> dict[str, float]:
    config = prepared(tmp_path, *words)
    check(config)
    outcome = body(JobRun(config=config, storage=Storage(tmp_path / "runs/x"), log=lambda line: None))
    assert outcome.artifacts == {"shards": str(tmp_path / "out")}
    return outcome.metrics


def test_digits_become_hashed_shards_in_a_process_without_ray(run_job: Callable[..., Any], tmp_path: Path) -> None:
    job = run_job("prepare_data", "data=digits")
    assert job.code == 0, job.describe()
    assert job.artifacts == {"shards": str(tmp_path / "data/digits")}
    assert job.metrics["train.rows"] + job.metrics["heldout.rows"] == 1797
    assert verify_shards(tmp_path / "data/digits").num_classes == 10
    assert "Ray" not in job.stdout


def test_preparing_again_verifies_replaces_or_refuses(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert run(tmp_path, "resume=true") == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(InputError, match=r"exists; resume=true verifies it, overwrite=true replaces it"):
        run(tmp_path, "name=other")
    with pytest.raises(InputError, match="holds digits, expected gmm"):
        run(tmp_path, "data=gmm", "resume=true")

    shard = next((tmp_path / "out").glob("train-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=shard.name):
        run(tmp_path, "resume=true")
    assert run(tmp_path, "overwrite=true") == first


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("")
    for words in ([], ["overwrite=true"], ["resume=true"]):
        with pytest.raises(InputError, match="something other than prepared data"):
            run(tmp_path, *words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=digits", "source=/x"], "source=/x: digits is bundled data"),
        (["data=mnist"], "source=null: expected the folder"),
        (["data=mnist", "source=/nowhere"], "source=/nowhere does not exist"),
        (["data.name=cifar"], "data.name=cifar: expected one of digits, gmm, mnist, images"),
    ],
)
def test_source_fits_the_data(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(prepared(tmp_path, *words))
    assert not (tmp_path / "out").exists()


def write_idx(path: Path, shape: tuple[int, ...], content: bytes) -> None:
    path.write_bytes(gzip.compress(struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape) + content))


def test_mnist_from_the_split_that_is_there(tmp_path: Path) -> None:
    source = tmp_path / "idx"
    source.mkdir()
    write_idx(source / "t10k-images-idx3-ubyte.gz", (20, 28, 28), bytes(20 * 784))
    write_idx(source / "t10k-labels-idx1-ubyte.gz", (20,), bytes(range(10)) * 2)
    assert run(tmp_path, "data=mnist", f"source={source}") == {"train.rows": 18, "heldout.rows": 2, "num_classes": 10}


def test_output_is_named_after_the_data_or_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def output(*words: str) -> str:
        config = load_config("prepare_data", words)
        assert isinstance(config, PrepareDataConfig)
        return output_of(config).uri

    assert output("data=gmm").endswith("/data/gmm")
    assert output("data=gmm", "name=mine").endswith("/data/mine")
    monkeypatch.setenv(SUBMITTED_JOB, json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    with pytest.raises(InputError, match="output=data/gmm: a submitted job's working directory is temporary"):
        output("data=gmm")
    assert output("output=/shared/gmm") == "/shared/gmm"


def test_gmm_follows_the_seed() -> None:
    first, again, other = (make_dataset("gmm", seed=seed).splits["train"].data for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
