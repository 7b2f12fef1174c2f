"""jobs.evaluate of protocols in pieces: workers, files, resume, ADM batches, and what is refused before any work."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.contract import JobRun
from jobs.evaluate import check
from jobs.evaluation_pieces import StoredPieces, read_piece, shard_of
from jobs.sample_shards import sha256
from mfm_ray.config import load_config
from mfm_ray.errors import InputError
from mfm_ray.protocols.pieces import plan
from mfm_ray.storage import Storage

SMALL = (
    "protocol=imagenet_fid",
    "protocol.features=classifier",
    "protocol.nfe=[1,2]",
    "protocol.num_samples=40",
    "protocol.piece_size=16",
    "protocol.kid_subsets=4",
)


class Doubling:
    """Makes pieces that say which items they are of, and by which process."""

    def move(self, device):
        self.device = device

    def make(self, piece, progress):
        progress(piece.count)
        values = 2.0 * torch.arange(piece.first, piece.first + piece.count)
        return {"values": values, "process": torch.tensor([os.getpid()])}


def run_in(folder, *words):
    config = load_config("evaluate", ["model=none", f"storage={folder}", *words])
    lines = []
    return JobRun(config=config, storage=Storage(folder), log=lines.append), lines


def test_pieces_by_ray_workers_in_order_and_resumed(ray_session, tmp_path):
    run, lines = run_in(tmp_path, "scaling.num_workers=2")
    pieces = [*plan("a", 10, 4), *plan("b", 5, 4)]
    made = list(StoredPieces(run=run, settings={"x": 1})(Doubling(), pieces))
    assert torch.cat([part["values"] for part in made]).tolist() == [2.0 * i for i in (*range(10), *range(5))]
    processes = {int(part["process"]) for part in made}
    assert os.getpid() not in processes and 1 <= len(processes) <= 2
    # a whole piece stays, a damaged one and one of other settings are made again
    shards = [shard_of(index, piece) for index, piece in enumerate(pieces)]
    (tmp_path / shards[1].file).write_bytes(b"half")
    again = replace(run, config=replace(run.config, resume=True, scaling=replace(run.config.scaling, num_workers=0)))
    resumed = list(StoredPieces(run=again, settings={"x": 1})(Doubling(), pieces))
    assert "4 of 5 pieces are there already" in lines
    here = [int(part["process"]) == os.getpid() for part in resumed]
    assert here == [False, True, False, False, False]
    other = list(StoredPieces(run=again, settings={"x": 2})(Doubling(), pieces))
    assert all(int(part["process"]) == os.getpid() for part in other)
    record = json.loads((tmp_path / "pieces/a/_part-00000-of-00003.json").read_text())
    assert record["sha256"] == sha256((tmp_path / shards[0].file).read_bytes())


def test_fid_of_a_model_against_an_adm_batch_with_its_own_samples(run_job, tiny_models, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pixels)
    words = (
        *SMALL,
        f"model={tiny_models['tiny']}",
        f"protocol.reference={tmp_path / 'reference.npz'}",
        "protocol.save_images=true",
        "scaling.num_workers=0",
    )
    job = run_job("evaluate", *words)
    assert job.code == 0, job.describe()
    assert {"report", "data", "samples_nfe_1", "samples_nfe_2"} <= set(job.artifacts)
    with np.load(job.artifacts["samples_nfe_2"], allow_pickle=False) as file:
        assert file["arr_0"].shape == (40, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_0"].std() > 1
    figures = pq.read_table(job.artifacts["data"]).to_pylist()
    wanted = {(row["method"], row["quantity"]): row["value"] for row in figures}
    assert wanted["nfe_2", "fid"] == job.metrics["fid.nfe_2.fid"] > 0
    assert 0 <= job.metrics["fid.nfe_1.precision"] <= 1
    assert "Reference" in Path(job.artifacts["report"]).read_text()
    # the samples as their own reference: nothing between them
    own = tmp_path / "own.npz"
    parts = [shard_of(i, piece) for i, piece in enumerate(plan("nfe_1", 40, 16))]
    folder = Storage(Path(job.result_path).parent)
    images = torch.cat([read_piece(folder, shard)["images"] for shard in parts])
    np.savez(own, arr_0=images.permute(0, 2, 3, 1).numpy())
    check(load_config("evaluate", [*SMALL, f"model={tiny_models['tiny']}", f"protocol.reference={own}"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        (
            "protocol=imagenet_posterior",
            "protocol.features=classifier",
            "protocol.num_contexts=40",
            "protocol.piece_size=20",
            "protocol.glass_steps=[1]",
        ),
        (
            "protocol=imagenet_values",
            "protocol.rewards=[symmetry,{name: symmetry, weight: 0.1}]",
            "protocol.label=3",
            "protocol.num_contexts=8",
            "protocol.num_draws=8",
            "protocol.truth_draws=8",
            "protocol.truth_steps=4",
            "protocol.cfg_scale=null",
        ),
        (
            "protocol=imagenet_steering",
            "protocol.rewards=[symmetry,brightness]",
            "protocol.label=3",
            "protocol.num_images=4",
            "protocol.num_steps=4",
            "protocol.pool_size=16",
            "protocol.best_of=[1,4]",
            "protocol.cfg_scale=null",
            "protocol.gradient_draws=[1]",
            "protocol.gradient_free_draws=[2]",
            "protocol.search_particles=[2]",
        ),
    ],
    ids=lambda words: words[0],
)
def test_protocols_run_on_ray_and_resume_without_new_work(run_job, tiny_models, words):
    words = (*words, f"model={tiny_models['tiny']}", "scaling.num_workers=2")
    first = run_job("evaluate", *words)
    assert first.code == 0, first.describe()
    assert Path(first.artifacts["report"]).read_text().startswith("<!doctype html>")
    again = run_job("evaluate", *words, "resume=true")
    assert again.code == 0, again.describe()
    assert "starting" not in again.stdout
    timing = {"total_seconds"}
    assert {k: v for k, v in again.metrics.items() if k not in timing} == {
        k: v for k, v in first.metrics.items() if k not in timing
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("protocol=imagenet_fid", "protocol.features=classifier"),
            "model=null: protocol=imagenet_fid measures a model",
        ),
        (("protocol=digits", "scaling.num_workers=2"), "scaling: protocol=digits is measured by one process"),
        (("protocol=imagenet_finetuning", "protocol.runs=[/none]"), "protocol.runs=/none: metrics.jsonl is missing"),
        (("protocol=imagenet_fid", "protocol.inception=/none", "MODEL"), "protocol.inception=/none does not exist"),
        ((*SMALL, "MODEL", "protocol.reference=/none.npz"), "protocol.reference=/none.npz does not exist"),
        ((*SMALL, "MODEL", "protocol.cfg_scale=2.5"), "cfg_scale=2.5"),
        (("protocol=imagenet_posterior", "protocol.features=classifier", "MODEL"), "protocol.num_contexts=50000"),
        (("protocol=imagenet_steering", "protocol.rewards=[symetry]", "MODEL", "protocol.cfg_scale=null"), "symmetry"),
        (
            ("protocol=imagenet_steering", "protocol.rewards=[symmetry]", "MODEL", "protocol.cfg_scale=null"),
            "protocol.label=281: expected 0 to 9",
        ),
    ],
)
def test_mistakes_are_named_before_any_work(tiny_models, words, message):
    words = [f"model={tiny_models['tiny']}" if word == "MODEL" else word for word in words]
    with pytest.raises(InputError, match=message):
        check(load_config("evaluate", words))


def test_moments_of_inception_say_nothing_of_other_features(tiny_models, tmp_path):
    np.savez(tmp_path / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    words = [*SMALL, f"model={tiny_models['tiny']}", f"protocol.reference={tmp_path / 'moments.npz'}"]
    with pytest.raises(InputError, match="holds moments of Inception's features alone"):
        check(load_config("evaluate", words))
