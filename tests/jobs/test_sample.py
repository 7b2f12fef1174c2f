"""jobs.sample and jobs.evaluate as processes, on a small network that is not trained."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from jobs import evaluate, sample
from mfm_ray.config import load_config
from mfm_ray.data import data_moments, digits, write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.networks import build_network
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.pretrained import save_model


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits"
    write_shards(path, digits())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    data = digits()
    train = data.splits["train"].data.flatten(1).double()
    moments = data_moments(data.space.to_model_space(train)).preconditioning()
    torch.manual_seed(0)
    network = {"name": "residual_mlp", "width": 16, "num_blocks": 1}
    flow_map = build_network(network, space=data.space, num_classes=10, moments=moments)
    path = tmp_path_factory.mktemp("model") / "model"
    described = {"name": "digits", **data.space.config(), "num_classes": 10, "class_names": list(data.class_names)}
    judge = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    save_model(path, flow_map, config={"data": described, "training": {}}, classifier=judge)
    return path


def test_steered_samples_come_with_their_rewards_and_a_picture(run_job, model):
    words = ["num_samples=6", "num_steps=3", "steering=gradient", "reward=masked_observation", "reward.row=2"]
    job = run_job("sample", f"model={model}", "label=4", "seed=5", *words)
    assert job.code == 0, job.describe()
    table = pq.read_table(job.artifacts["samples"])
    assert table.column_names == ["image", "reward", "nfe", "label", "seed", "index"]
    images = table["image"].combine_chunks().to_numpy_ndarray()
    assert images.shape == (6, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1
    assert table["index"].to_pylist() == list(range(6))
    assert set(table["label"].to_pylist()) == {4}
    assert set(table["nfe"].to_pylist()) == {3 + 4 * 3} == {job.metrics["nfe"]}
    rewards = table["reward"].to_pylist()
    assert sum(rewards) / 6 == pytest.approx(job.metrics["reward"], rel=1e-5)
    assert job.metrics["images_per_second"] > 0
    assert Path(job.artifacts["grid"]).read_bytes().startswith(b"\x89PNG")


def test_an_image_does_not_depend_on_how_many_are_made(run_job, model):
    many, few = (
        run_job("sample", f"model={model}", f"name=of-{count}", f"num_samples={count}", "num_steps=2", *words)
        for count, words in ((9, ["batch_size=4"]), (4, []))
    )
    assert many.code == few.code == 0, many.describe() + few.describe()
    nine, four = (pq.read_table(job.artifacts["samples"])["image"].combine_chunks() for job in (many, few))
    assert (nine.to_numpy_ndarray()[:4] == four.to_numpy_ndarray()).all()
    assert set(pq.read_table(few.artifacts["samples"])["reward"].to_pylist()) == {None}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["steering=gradient"], "reward=none: steering=gradient needs a reward"),
        (["reward=symmetry"], "reward=symmetry: steering=none takes no reward; choose a steering"),
        (["label=10"], "label=10: expected 0 to 9"),
        (["cfg_scale=2.5"], "cfg_scale=2.5: expected one of null alone: this model has none"),
        (["steering=gradient", "reward=masked_observation", "reward.row=196"], "reward.row=196: expected a held-out"),
        (["steering=gradient", "reward=symmetry", "reward.scale=-1"], "reward.scale=-1: expected a finite number"),
        (
            ["steering=gradient", "reward=symmetry", "+reward.size=3"],
            "reward.size: unknown key; expected scale, axis, name",
        ),
        (["steering=gradient", "steering.num_draws=0", "reward=symmetry"], "num_draws=0: expected an integer"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(model, words, line):
    with pytest.raises(ValueError) as refusal:  # what the contract turns into exit code 2
        sample.check(load_config("sample", [f"model={model}", *words]))
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_model_is_evaluated_against_prepared_data(run_job, model, shards):
    short = ["num_targets=2", "num_steps=2", "samples_per_target=4", "samples_per_reward=4", "pool_size=20"]
    short += ["best_of=[1,10]", "rewards=[masked,symmetry]", "posterior_times=[0.5]", "posterior_contexts=2"]
    short += ["posterior_draws=8", "posterior_ode_steps=1", "num_draws_gradient_free=2"]
    job = run_job("evaluate", f"model={model}", f"data_path={shards}", *(f"protocol.{word}" for word in short))
    assert job.code == 0, job.describe()
    assert job.result["name"] == "digits"
    assert {"mfm_g_reward", "rewards.symmetry.mfm_g_reward", "posterior_sw2", "total_seconds"} <= set(job.metrics)
    assert "train_seconds" not in job.metrics
    assert Path(job.artifacts["report"]).read_text().startswith("<!doctype html>")
    assert pq.read_metadata(job.artifacts["data"]).num_rows > 100
    assert "Mirror symmetry" in job.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model=nowhere"], "model="),
        (["+training.max_steps=0"], "training: max_steps=0: expected a whole number of at least 1"),
        (["+training.max_step=1"], "training: max_step: unknown key; did you mean max_steps?"),
        (["+training.name=x"], "training.name: is decided by the job itself"),
        (["protocol.pool_size=5"], "protocol.best_of"),
        (["data_path=somewhere"], "data_path: belongs to a model"),
        (["protocol=gmm", "protocol.exact=true", "model=x"], "model: nothing is trained or loaded with protocol.exact"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused_before_anything_starts(words, line):
    with pytest.raises(ValueError) as refusal:
        evaluate.check(load_config("evaluate", words))
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_mnist_without_its_data_is_one_line(tmp_path):
    space = DataSpace("image", (1, 28, 28))
    flow_map = build_network({"name": "residual_mlp", "width": 8, "num_blocks": 1}, space=space, num_classes=10)
    described = {"name": "mnist", **space.config(), "num_classes": 10, "class_names": list("0123456789")}
    judge = DigitClassifier(num_classes=10, event_shape=(1, 28, 28))
    save_model(tmp_path / "model", flow_map, config={"data": described, "training": {}}, classifier=judge)
    with pytest.raises(ValueError) as refusal:
        evaluate.check(load_config("evaluate", ["protocol=mnist", f"model={tmp_path / 'model'}"]))
    assert str(refusal.value).startswith("data_path=null: expected the prepared data of mnist")
    assert "\n" not in str(refusal.value)


def test_a_refusal_is_exit_code_2(run_job, model):
    job = run_job("sample", f"model={model}", "steering=gradient")
    assert job.code == 2, job.describe()
    assert job.stderr == "jobs.sample: reward=none: steering=gradient needs a reward\n"
    assert job.result["status"] == "invalid"
