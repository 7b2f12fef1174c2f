import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.networks import build_network
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.pretrained import load_classifier, load_flow_map, read_model_config, save_classifier, save_model
from mfm_ray.storage import Storage

SPACE = DataSpace(kind="image", event_shape=(1, 8, 8))
CONFIG = {
    "data": {"name": "digits", **SPACE.config(), "num_classes": 10, "class_names": [str(i) for i in range(10)]},
    "training": {"steps": 12, "seconds": 1.5},
}
PNG = b"\x89PNG\r\n\x1a\n"


def make_flow_map(seed=0, width=8):
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(64, 64)).Q
    moments = {"mean": torch.rand(64), "variances": torch.rand(64) + 0.1, "basis": basis}
    flow_map = build_network(
        {"name": "residual_mlp", "width": width, "num_blocks": 2}, space=SPACE, num_classes=10, moments=moments
    )
    with torch.no_grad():
        for parameter in flow_map.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow_map


def velocity(flow_map):
    generator = torch.Generator().manual_seed(1)
    x_s, x_t = torch.randn(2, 4, 1, 8, 8, generator=generator)
    s, t = torch.full((4,), 0.3), torch.full((4,), 0.5)
    return flow_map.velocity(x_s, s, s + 0.4, t=t, x_t=x_t, label=torch.arange(4))


@pytest.fixture
def model(tmp_path):
    save_model(tmp_path / "model", make_flow_map(), config=CONFIG)
    return tmp_path / "model"


def refusal(source, load=load_flow_map):
    with pytest.raises(InputError) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path, change, name="config.json"):
    config = json.loads((path / name).read_text())
    change(config)
    (path / name).write_text(json.dumps(config))


def edit_weights(path, change, name="model.safetensors"):
    tensors = safetensors.torch.load_file(path / name)
    change(tensors)
    (path / name).write_bytes(safetensors.torch.save(tensors))


@pytest.mark.parametrize("scheme", ["path", "file_uri", "mock"])
def test_round_trip_is_bit_exact_with_its_preconditioning(tmp_path, scheme):
    locations = {"path": tmp_path / "m", "file_uri": f"file://{tmp_path}/m", "mock": Storage("mock://bucket/m")}
    flow_map, target = make_flow_map(), locations[scheme]
    save_model(target, flow_map, config=CONFIG)
    loaded = load_flow_map(target)
    assert torch.equal(velocity(loaded), velocity(flow_map))
    assert (loaded.space, loaded.num_classes) == (SPACE, 10)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_config_says_what_it_is(model):
    config = read_model_config(model)
    assert config == json.loads((model / "config.json").read_text())
    assert (config["format"], config["format_version"], config["interpolant"]) == ("mfm-ray-model", 1, "linear")
    assert config["network"] == make_flow_map().config()
    assert config["data"] == CONFIG["data"]
    assert config["training"] == CONFIG["training"]
    assert config["cfg_scales"] == []


def test_the_card_shows_figures_and_pictures(tmp_path):
    save_model(
        tmp_path, make_flow_map(), config=CONFIG, metrics={"posterior_sw2": 0.12345}, pictures={"samples.png": PNG}
    )
    card = (tmp_path / "README.md").read_text()
    assert "| posterior_sw2 | 0.1234 |" in card or "| posterior_sw2 | 0.1235 |" in card
    assert "![samples](samples.png)" in card
    assert '"steps": 12' in card
    assert (tmp_path / "samples.png").read_bytes() == PNG
    save_model(tmp_path, make_flow_map(), config=CONFIG, card="# mine\n")
    assert (tmp_path / "README.md").read_text() == "# mine\n"
    assert not (tmp_path / "samples.png").exists()


def test_an_interrupted_save_keeps_the_old_model(model, monkeypatch):
    before = velocity(load_flow_map(model))
    monkeypatch.setattr("mfm_ray.pretrained.save_classifier", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(model, make_flow_map(1), config=CONFIG, classifier=object())
    assert torch.equal(velocity(load_flow_map(model)), before)
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="something other than a model"):
        save_model(tmp_path, make_flow_map(), config=CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config has no 'data'"),
        ({**CONFIG, "network": {"name": "dit"}}, "config.network"),
        ({**CONFIG, "cfg_scales": [2.5]}, "config.cfg_scales"),
        ({"data": {**CONFIG["data"], "event_shape": [1, 28, 28]}}, "config.data is .*28"),
        ({"data": {**CONFIG["data"], "num_classes": 5}}, "config.data is .*5 classes"),
    ],
)
def test_a_config_that_contradicts_the_flow_map_is_not_saved(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        save_model(tmp_path / "model", make_flow_map(), config=config)
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, model):
    broken = make_flow_map()
    with torch.no_grad():
        broken.network.lift.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"network\.lift\.bias holds NaN"):
        save_model(tmp_path / "broken", broken, config=CONFIG)
    assert not (tmp_path / "broken").exists()
    edit_weights(model, lambda tensors: tensors["network.lift.bias"].fill_(float("inf")))
    assert "network.lift.bias holds NaN or infinity" in refusal(model)


@pytest.mark.parametrize("name", ["../up.png", "a/b.png", "model.safetensors", "x.jpg"])
def test_pictures_have_plain_png_names(tmp_path, name):
    with pytest.raises(InputError, match=r"not the name of a \.png file"):
        save_model(tmp_path / "model", make_flow_map(), config=CONFIG, pictures={name: PNG})


def test_missing_things_are_named(tmp_path, model):
    assert f"model={tmp_path}/nowhere does not exist" in refusal(tmp_path / "nowhere")
    assert f"{tmp_path}/config.json is missing" in refusal(tmp_path)
    assert "config.json is missing" in refusal(model / "config.json")
    (model / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(model)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_named(model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is truncated or no safetensors file" in refusal(model)


def test_a_pickle_is_never_opened(model, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (model / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    assert "no safetensors file" in refusal(model)
    torch.save({"a": torch.zeros(1)}, model / "model.safetensors")
    assert "no safetensors file" in refusal(model)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("network.lift.bias"), "lacks network.lift.bias of ResidualMLPFlowMap"),
        (lambda t: t.pop("gaussian.mean"), "lacks gaussian.mean"),
        (lambda t: t.update(extra=torch.zeros(1)), "has extra that ResidualMLPFlowMap does not know"),
        (
            lambda t: t.update({"network.lift.bias": torch.zeros(9)}),
            "network.lift.bias has shape (9,), expected (8,)",
        ),
        (
            lambda t: t.update({"network.lift.bias": torch.zeros(8, dtype=torch.int32)}),
            "network.lift.bias has type torch.int32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_tensor_by_tensor(model, change, reason):
    edit_weights(model, change)
    message = refusal(model)
    assert "model.safetensors" in message
    assert reason in message


def test_weights_of_another_network_are_named(model, tmp_path):
    save_model(tmp_path / "wide", make_flow_map(width=16), config=CONFIG)
    (model / "model.safetensors").write_bytes((tmp_path / "wide" / "model.safetensors").read_bytes())
    assert "has shape" in refusal(model)
    edit(model, lambda config: config["network"].update(num_blocks=3))
    assert "lacks network.blocks.2.condition.weight, network.blocks.2.contract.bias" in refusal(model)
    assert "and 2 more" in refusal(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "{}"])
def test_unreadable_configs_are_named(model, text):
    (model / "config.json").write_text(text)
    assert "config.json" in refusal(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(format="other"), "has format 'other', expected 'mfm-ray-model'"),
        (lambda c: c.update(format_version=2), "has format_version 2, this version of mfm-ray reads 1"),
        (lambda c: c.pop("format_version"), "has format_version None"),
        (lambda c: c.pop("network"), "has no 'network'"),
        (lambda c: c.pop("data"), "has no 'data'"),
        (lambda c: c["network"].update(name="transformer"), "'transformer'"),
        (lambda c: c["network"].pop("name"), "network.name=None"),
        (lambda c: c["network"].update(depth=3), "depth"),
        (lambda c: c["network"].update(width="wide"), "config.json"),
        (lambda c: c["network"].update(width=0), "width=0"),
        (lambda c: c.update(network=[1]), "config.json"),
        (lambda c: c.update(data=3), "config.json"),
        (lambda c: c["data"].update(kind="audio"), "kind='audio'"),
        (lambda c: c["data"].pop("event_shape"), "'event_shape'"),
        (lambda c: c["data"].update(num_classes="ten"), "config.json"),
    ],
)
def test_configs_that_make_no_sense_are_named(model, change, reason):
    edit(model, change)
    message = refusal(model)
    assert "config.json" in message
    assert reason in message


def test_classifier_round_trip(tmp_path):
    torch.manual_seed(0)
    classifier = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
    save_model(tmp_path / "m", make_flow_map(), config=CONFIG, classifier=classifier, heldout_accuracy=0.99)
    loaded = load_classifier(tmp_path / "m")
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded(images), classifier(images))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert json.loads((tmp_path / "m" / "classifier.json").read_text())["heldout_accuracy"] == 0.99


def test_classifier_refusals_are_named(tmp_path, model):
    assert "comes without a classifier" in refusal(model, load_classifier)
    save_classifier(model, DigitClassifier(num_classes=10, event_shape=(1, 8, 8)))
    load_classifier(model)
    edit(model, lambda config: config.update(num_classes=11), "classifier.json")
    assert "classifier.safetensors: layers.10.bias has shape (10,), expected (11,)" in refusal(model, load_classifier)
    edit(model, lambda config: config.update(event_shape="8x8"), "classifier.json")
    assert "classifier.json" in refusal(model, load_classifier)
    edit(model, lambda config: config.update(event_shape=[1, 8, 8], num_classes=10), "classifier.json")
    (model / "classifier.safetensors").write_bytes(b"")
    assert "classifier.safetensors is truncated" in refusal(model, load_classifier)
    (model / "classifier.safetensors").unlink()
    assert "classifier.safetensors is missing" in refusal(model, load_classifier)


def test_importing_it_does_not_load_pyarrow():
    code = "import sys, mfm_ray.pretrained, mfm_ray.rewards; print({'pyarrow', 'sklearn', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
