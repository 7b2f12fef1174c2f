"""The ImageNet recipes at toy size: official files in, `jobs.train` on two workers, `jobs.export`, refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import jobs.export
import jobs.train
from jobs.sample_shards import model_checksum
from jobs.workbench import Workbench
from mfm_ray.config import load_config
from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data.shards import write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.official import read_weights
from mfm_ray.pretrained import load_flow_map, model_place, read_model_config
from mfm_ray.storage import Storage
from mfm_ray.training.finetune_launch import outline_of
from mfm_ray.training.tuned_model import weights_sha256
from tests.networks import dit_reference as reference

SIZE = {"width": 32, "depth": 2, "patch": 2, "channels": 4, "grid": 4, "classes": 5}
FACTS = {"num_heads": 2, "encoder_depth": 1}
TOY = [
    "network.depth=2",
    "network.hidden_size=32",
    "network.num_heads=2",
    "network.encoder_depth=1",
    "global_batch_size=8",
    "max_steps=3",
    "log_every=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Posteriors of latents of 8x8 with five classes, as jobs.prepare_data leaves them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([5 * torch.randn(40, 4, 8, 8, generator=generator), torch.full((40, 4, 8, 8), -6.0)], dim=1)
    split = Split(rows, torch.arange(40) % 5)
    space = DataSpace("latent", (4, 8, 8), scale=0.18215)
    names, folder = tuple("abcde"), tmp_path_factory.mktemp("latents") / "data"
    write_shards(folder, Dataset("images", space, {"train": split}, names, row_form="mean_log_variance"))
    return folder


def file_of(path: Path, **changes) -> Path:
    torch.save(reference.random_weights(**{**SIZE, **changes}), path)
    return path


def begun_at(path: Path, *, time_flip: bool) -> dict[str, torch.Tensor]:
    return load_flow_map(path, cfg_scales=[2.5], time_flip=time_flip, **FACTS).state_dict()


def check_trained_from(run: Path, start: dict[str, torch.Tensor]) -> None:
    """Three steps of warm-up hardly move a weight, and do move the embedders that begin silent.

    The first layers of two of those say nothing at the start, and are at random: those of the run's own seed.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    flow_map = load_flow_map(run / "model")
    state = flow_map.state_dict()
    random = ("s_embedder_second.mlp.0.weight", "t_cond_embedder.mlp.0.weight")
    far = {name for name in state if not torch.allclose(state[name], start[name], atol=1e-4)}
    assert far <= set(random)
    assert not torch.equal(state["blocks.1.mlp.fc2.weight"], start["blocks.1.mlp.fc2.weight"])
    assert float(state["t_cond_embedder.mlp.2.bias"].abs().max()) > 0


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_xl2_is_distilled_from_dmf_where_it_begins(run_job, tmp_path: Path, data: Path) -> None:
    dmf = file_of(tmp_path / "dmf.pt", kind="one_time")
    words = ["experiment=imagenet_xl2_distilled", f"init_from={dmf.name}", f"data.path={data}", *TOY]
    done = run_job("train", *words)
    assert done.code == 0, done.describe()
    check_trained_from(tmp_path / "runs" / "imagenet_xl2_distilled", begun_at(dmf, time_flip=True))
    config = read_model_config(done.artifacts["model"])
    assert (config["network"]["time_flip"], config["cfg_scales"]) == (True, [2.5])
    assert config["data"]["scale"] == 0.18215
    assert config["training"]["init_from"] == dmf.name
    assert config["training"]["precision"] == "bf16"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_b2_begins_as_sit_and_xl2_at_random_as_well(run_job, tmp_path: Path, data: Path) -> None:
    sit = file_of(tmp_path / "sit.pt", kind="one_time", sigma=True)
    b2 = run_job("train", "experiment=imagenet_b2", f"init_from={sit}", f"data.path={data}", *TOY)
    assert b2.code == 0, b2.describe()
    check_trained_from(tmp_path / "runs" / "imagenet_b2", begun_at(sit, time_flip=False))
    xl2 = run_job("train", "experiment=imagenet_xl2", f"data.path={data}", *TOY, "zero.stage=3")
    assert xl2.code == 0, xl2.describe()
    assert read_model_config(xl2.artifacts["model"])["training"]["init_from"] is None
    longer = ["experiment=imagenet_xl2", f"data.path={data}", *TOY, "zero.stage=3", "max_steps=5", "resume=true"]
    resumed = run_job("train", *longer)
    assert resumed.code == 0, resumed.describe()
    assert "going on from step 3" in resumed.stdout
    for number, model in enumerate((xl2.artifacts["model"], file_of(tmp_path / "mfm.pt", width=64, depth=20))):
        drawn = run_job("sample", f"model={model}", "num_samples=4", "num_steps=2", f"name=drawn-{number}")
        assert drawn.code == 0, drawn.describe()


def test_official_files_of_the_hub_become_model_directories(run_job, tmp_path: Path) -> None:
    """The hub's own cache below HF_HOME holds a repository of one file; there is no network."""
    commit, cached = 40 * "a", tmp_path / "hf" / "hub" / "models--owner--name"
    for folder in ("refs", f"snapshots/{commit}"):
        (cached / folder).mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    dmf = file_of(cached / "snapshots" / commit / "dmf.pt", kind="one_time")
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    words = [f"official.{name}={value}" for name, value in FACTS.items()]
    done = run_job("export", "checkpoint=hf://owner/name", *words, "output=models/dmf", env=offline)
    assert done.code == 0, done.describe()
    assert done.artifacts["model"] == str(tmp_path / "models" / "dmf")
    weights = read_weights(Storage(dmf))
    made, expected = load_flow_map(tmp_path / "models" / "dmf"), weights.flow_map(**FACTS)
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert done.metrics["parameters"] == sum(each.numel() for each in expected.parameters())
    training = read_model_config(tmp_path / "models" / "dmf")["training"]
    assert (training["weights"], training["layout"], len(training["sha256"])) == ("hf://owner/name", "one_time", 64)


def test_jobs_take_bare_weights_for_a_model(tmp_path: Path) -> None:
    """A file of which the shapes and the values of XL/2 say all: what jobs ask of a model directory, they get."""
    path = file_of(tmp_path / "mfm.pt", width=64, depth=20)
    bench = Workbench(str(path))
    assert (bench.flow_map.event_shape, bench.flow_map.num_classes) == ((4, 8, 8), 5)
    assert not bench.has_classifier
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model_checksum(model_place(path)) == weights_sha256(model_place(path)) == digest
    outline = outline_of(read_model_config(path)).config()
    assert outline == bench.flow_map.config()


def test_a_bad_file_is_named_before_anything_starts(tmp_path: Path, monkeypatch, data: Path) -> None:
    """`check` is what `jobs.train` looks at before it writes or starts anything; its ValueErrors are exit code 2."""
    monkeypatch.chdir(tmp_path)
    weights = torch.load(file_of(tmp_path / "dmf.pt", kind="one_time"), weights_only=True)
    weights["pos_embed"][0, 0, 0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    recipe = [f"data.path={data}", *TOY]
    jobs.train.check(load_config("train", ["experiment=imagenet_xl2_distilled", *recipe, "init_from=dmf.pt"]))
    for words, reason in (
        (["experiment=imagenet_xl2", "init_from=nan.pt"], "nan.pt: pos_embed holds NaN or infinity"),
        (["experiment=imagenet_xl2_distilled", "init_from=nan.pt"], "nan.pt: pos_embed holds NaN or infinity"),
        (["experiment=imagenet_b2", "init_from=no.pt"], "init_from=.*no.pt does not exist"),
        (["experiment=imagenet_b2", "init_from=dmf.pt", "network.hidden_size=64"], "network.hidden_size=64: .* has 32"),
    ):
        with pytest.raises(InputError, match=reason):
            jobs.train.check(load_config("train", [words[0], *recipe, *words[1:]]))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["checkpoint=cut.pt"], "cut.pt: truncated or no file of torch.save"),
        (["checkpoint=mfm.pt", "official.encoder_depth=3"], "mfm.pt: encoder_depth=3: expected 1 to 2"),
        (["checkpoint=mfm.pt", "ema_decay=0.9"], "ema_decay=0.9: .*mfm.pt is no checkpoint of a run"),
        (["checkpoint=no.pt"], "no.pt: does not exist, expected a checkpoint folder"),
        (["checkpoint=folder", "official.num_heads=2"], "official.num_heads=2: checkpoint=folder is no official file"),
        (["checkpoint=hf://owner"], "checkpoint=hf://owner: expected hf://owner/name"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch, words: list[str], reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    content = file_of(tmp_path / "mfm.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=reason):
        jobs.export.check(load_config("export", words))
