"""What an operator writes: arguments of `build_app`, config.yaml, the words of `make serve` and of jobs.deploy."""

import inspect
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mfm_ray.errors import InputError
from scripts.run_server import read_words
from serve.app import build_app
from serve.deploying import read_deployment, require_free_port
from serve.settings import AppSettings, Limits, RewardSettings

CONFIG = Path(__file__).resolve().parents[2] / "serve" / "config.yaml"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    monkeypatch.delenv("MFM_RAY_API_KEYS", raising=False)


def test_the_shipped_configuration_is_one_that_serve_and_we_can_read(tiny_models):
    from ray.serve.schema import ServeDeploySchema

    assert ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text())).applications[0].name == "mfm"
    deployment = read_deployment(str(CONFIG), args={"model": tiny_models})
    assert deployment.address() == ("127.0.0.1", 8000)
    assert build_app(deployment.settings)


def test_serve_run_finds_the_type_of_the_arguments():
    assert inspect.signature(build_app).parameters["args"].annotation is AppSettings


def test_lists_may_be_written_with_commas_as_serve_run_passes_them():
    settings = AppSettings.model_validate({"model": "a/model, b/model", "rewards": "symmetry, brightness"})
    assert settings.model == ["a/model", "b/model"]
    assert [reward.name for reward in settings.rewards] == ["symmetry", "brightness"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"model": "/nowhere"}, "model=/nowhere does not exist"),
        ({"rewards": ["nicer"]}, "nicer is not among those of the models served; expected symmetry"),
        ({"rewards": ["symmetry", "symmetry"]}, "named twice"),
        ({"keys_file": "/nowhere"}, "keys_file=/nowhere"),
        ({"presets": "/nowhere/presets.yaml"}, "presets=/nowhere/presets.yaml#low: there is no such file"),
        ({"presets": {"thin": "presets.yaml"}}, "presets.thin: no such model is served; expected tiny, other"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(tiny_models, args, says):
    with pytest.raises(InputError, match=says):
        build_app(AppSettings.model_validate({"model": tiny_models, **args}))


def test_a_preset_above_the_limits_is_refused_before_anything_starts(tiny_models, tmp_path):
    file = tmp_path / "presets.yaml"
    words = ["steering=gradient", "reward=symmetry", "++steering.num_draws=64"]
    file.write_text(yaml.safe_dump({quality: {"words": words} for quality in ("low", "medium", "high")}))
    served = AppSettings.model_validate({"model": tiny_models, "presets": str(file)})
    assert build_app(served)
    with pytest.raises(InputError, match="^presets: low of tiny: steering.num_draws: 64 draws; expected at most 16"):
        build_app(served.model_copy(update={"limits": Limits(draws=16)}))


def test_two_models_of_one_name_are_refused(tiny_models):
    with pytest.raises(InputError, match="two models have the id tiny"):
        build_app(AppSettings(model=[tiny_models["tiny"], tiny_models["tiny"]]))


def test_an_argument_that_nothing_reads_is_refused_by_name(tmp_path):
    with pytest.raises(ValidationError, match="modle"):
        AppSettings.model_validate({"model": "x", "modle": "y"})
    with pytest.raises(InputError, match="^sampler.max_row: "):
        read_deployment(None, args={"model": "x", "sampler": {"max_row": 3}})
    with pytest.raises(InputError, match="config=.*cannot be read"):
        read_deployment(str(tmp_path / "none.yaml"), args={})
    with pytest.raises(InputError, match="^rewards.0.transport: .*'direct' or 'serve'"):
        read_deployment(None, args={"model": "x", "rewards": [{"name": "symmetry", "transport": "udp"}]})
    file = tmp_path / "other.yaml"
    file.write_text("applications: [{import_path: 'x:y'}]")
    with pytest.raises(InputError, match="import_path serve.app:build_app"):
        read_deployment(str(file), args={"model": "x"})


def test_without_keys_loopback_is_bound_whatever_the_configuration_says(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    file = tmp_path / "serve.yaml"
    file.write_text("http_options: {host: 0.0.0.0, port: 9000}\napplications: [{args: {model: x}}]")
    deployment = read_deployment(str(file), args={})
    assert deployment.address() == ("127.0.0.1", 9000)
    assert read_deployment(str(file), args={"keys_file": str(keys)}).address() == ("0.0.0.0", 9000)


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = replace(read_deployment(None, args={"model": "x"}), port=other.getsockname()[1])
        with pytest.raises(InputError, match="port="):
            require_free_port(taken)


def test_replicas_are_a_number_or_scaled():
    assert RewardSettings(name="a").options()["num_replicas"] == 1
    scaled = RewardSettings(name="a", autoscaling_config={"min_replicas": 0, "max_replicas": 3}).options()
    assert "num_replicas" not in scaled


def test_words_of_make_serve():
    assert read_words(["model=a=b", "port=1"]) == {"model": "a=b", "port": "1"}
    for word, says in (("modle=x", "did you mean model"), ("port", "key=value"), ("port=x", "a whole number")):
        with pytest.raises(InputError, match=says):
            read_words([word])
