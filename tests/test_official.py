"""Bare weights, the official meta flow map's, DMF's and SiT's, read in every packing and refused in every damage."""

import argparse
import collections
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from mfm_ray.errors import InputError
from mfm_ray.networks.dit_layouts import layout_of
from mfm_ray.official import sha256_of
from mfm_ray.pretrained import load_flow_map, read_model_config, save_model
from mfm_ray.storage import Storage
from tests.networks import dit_reference as reference

SIZE = {"width": 32, "depth": 3, "patch": 2, "channels": 4, "grid": 4, "classes": 5}
FACTS = {"num_heads": 2, "encoder_depth": 2}
OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "official_dit"
needs_official_numbers = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the official network's numbers lie beside a developer's checkout, not in the project"
)


def mfm(**changes):
    return reference.random_weights(**{**SIZE, **changes})


def saved(path, content):
    torch.save(content, path)
    return path


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def same(flow_map, weights):
    state = flow_map.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def refusal(source, **keywords):
    with pytest.raises(InputError) as caught:
        load_flow_map(source, **{**FACTS, **keywords})
    assert "\n" not in str(caught.value)
    return str(caught.value)


PACKINGS = {
    "bare": lambda weights: weights,
    "dit": lambda weights: prefixed(weights, "dit."),
    "wrapper": lambda weights: prefixed(weights, "model.dit."),
    "lightning module": lambda weights: prefixed(weights, "model.model.dit."),
    "compiled and distributed": lambda weights: prefixed(weights, "module._orig_mod.model._orig_mod.dit."),
    "state_dict": lambda weights: {"state_dict": prefixed(weights, "model.model.dit.")},
    "lightning checkpoint": lambda weights: {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(weights, "model.model.dit."),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "hyper_parameters": {"lr": 1e-4},
    },
    "lightning checkpoint configured by hydra": lambda weights: {
        "state_dict": prefixed(weights, "model.model.dit."),
        "hyper_parameters": OmegaConf.create({"lr": 1e-4, "layers": [1, 2], "name": "mfm", "nested": {"flag": True}}),
    },
    "SiT's own checkpoint": lambda weights: {
        "model": {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
        "ema": weights,
        "opt": {},
        "args": argparse.Namespace(image_size=256),
    },
    "averaged model": lambda weights: {"n_averaged": torch.tensor(7), **prefixed(weights, "module.")},
    "ordered": lambda weights: collections.OrderedDict(weights),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_weights(tmp_path, packing):
    weights = mfm()
    flow_map = load_flow_map(saved(tmp_path / "mfm.pt", PACKINGS[packing](weights)), **FACTS)
    assert same(flow_map, weights)
    assert not flow_map.training
    assert not any(parameter.requires_grad for parameter in flow_map.parameters())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize("how", ["path", "text", "file_uri", "folder", "remote"])
def test_every_place_and_suffix(tmp_path, suffix, how):
    weights, name = mfm(), f"mfm{suffix}"
    if suffix == ".safetensors":
        save_file(prefixed(weights, "dit."), tmp_path / name)
    else:
        saved(tmp_path / name, weights)
    mock = Storage(f"mock://bucket/{name}")
    if how == "remote":
        mock.write_bytes("", (tmp_path / name).read_bytes())
    sources = {
        "path": tmp_path / name,
        "text": str(tmp_path / name),
        "file_uri": f"file://{tmp_path / name}",
        "folder": tmp_path,
        "remote": mock,
    }
    assert same(load_flow_map(sources[how], **FACTS), weights)


@needs_official_numbers
def test_the_official_file_gives_the_official_numbers(tmp_path):
    weights = load_file(OFFICIAL / "weights.safetensors")
    io = load_file(OFFICIAL / "io.safetensors")
    condition = {key: io[key] for key in ("t", "x_t", "label", "cfg_scale")}
    for path in (OFFICIAL / "weights.safetensors", saved(tmp_path / "mfm.pt", prefixed(weights, "model.model."))):
        flow_map = load_flow_map(path, **FACTS)
        given = flow_map.velocity(io["x_s"], io["s"], io["u"], **condition)
        assert float((given - io["velocity"]).norm() / io["velocity"].norm()) < 1e-5


def test_shapes_say_sizes_and_the_rest_has_the_values_of_xl_2(tmp_path):
    config = read_model_config(saved(tmp_path / "mfm.pt", mfm(guidance=2)), **FACTS)
    assert config["network"] == {
        "name": "dit",
        "patch_size": 2,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 2,
        "encoder_depth": 2,
        "time_flip": True,
        "cfg_scales": [2.5],
    }
    assert config["data"] == {
        "name": "imagenet",
        "kind": "latent",
        "event_shape": [4, 8, 8],
        "range": None,
        "scale": 0.18215,
        "num_classes": 5,
        "class_names": [],
    }
    assert read_model_config(tmp_path / "mfm.pt", scale=0.5, **FACTS)["data"]["scale"] == 0.5


@pytest.mark.parametrize(
    ("hidden", "depth", "expected"),
    [(1152, 28, (16, 20)), (768, 12, (12, 8)), (1024, 24, (16, 20)), (64, 20, (16, 20))],
)
def test_heads_and_encoder_of_a_published_size_are_its_own(hidden, depth, expected):
    """On tensors of no device: XL/2 as it is published."""
    with torch.device("meta"):
        tensors = {
            "x_embedder.proj.weight": torch.empty(hidden, 4, 2, 2),
            "pos_embed": torch.empty(1, 256, hidden),
            "y_embedder.embedding_table.weight": torch.empty(1001, hidden),
            "final_layer.linear.weight": torch.empty(16, hidden),
            "guidance_embedder.embedding_table.weight": torch.empty(2, hidden),
            **{f"blocks.{index}.attn.qkv.bias": torch.empty(3 * hidden) for index in range(depth)},
        }
    layout = layout_of(tensors)
    network = layout.network()
    assert (network["num_heads"], network["encoder_depth"]) == expected
    assert (layout.event_shape, layout.num_classes, network["cfg_scales"]) == ((4, 32, 32), 1000, [2.5])


@pytest.mark.slow
def test_a_file_of_the_size_of_xl_2_is_read_without_a_keyword(tmp_path):
    """313 tensors with 684,286,864 numbers in half precision, as a Lightning module names them."""
    weights = {
        f"model.model.dit.{name}": tensor.bfloat16()
        for name, tensor in reference.random_weights(width=1152, depth=28, grid=16, classes=1000).items()
    }
    assert len(weights) == 313
    path = saved(tmp_path / "mfm-xl2.pt", {"state_dict": weights})
    flow_map = load_flow_map(path)
    path.unlink()
    state = flow_map.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 684_286_864
    assert (flow_map.num_heads, flow_map.encoder_depth, flow_map.time_flip) == (16, 20, True)
    assert all(torch.equal(state[name.removeprefix("model.model.dit.")].bfloat16(), weights[name]) for name in weights)


def test_a_dmf_file_and_a_sit_file_are_told_apart(tmp_path):
    of_training = {"logvar_linear.weight": torch.zeros(1, 3), "projectors.0.0.weight": torch.zeros(4, 32)}
    dmf = mfm(kind="one_time") | of_training
    flow_map = load_flow_map(saved(tmp_path / "dmf.pt", prefixed(dmf, "module.")), **FACTS)
    assert flow_map.config()["time_flip"]
    sit = mfm(kind="one_time", sigma=True)
    assert not load_flow_map(saved(tmp_path / "sit.pt", sit), **FACTS).config()["time_flip"]
    assert not load_flow_map(tmp_path / "dmf.pt", time_flip=False, **FACTS).config()["time_flip"]


def test_what_dmf_leaves_open_is_the_same_every_time_and_leaves_the_callers_randomness_alone(tmp_path):
    path = saved(tmp_path / "dmf.pt", mfm(kind="one_time"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_flow_map(path, **FACTS)
    assert torch.equal(torch.rand(3), expected)
    assert same(load_flow_map(path, **FACTS), first.state_dict())


def test_averaged_weights_are_taken_where_there_are_any(tmp_path):
    plain, averaged = mfm(seed=1), mfm(seed=2)
    both = {
        "containers": {"model": plain, "ema": averaged},
        "ema_state_dict": {"state_dict": prefixed(plain, "model.dit."), "ema_state_dict": averaged},
        "prefixes": {**prefixed(plain, "model.model.dit."), **prefixed(averaged, "ema_model.dit.")},
    }
    for name, content in both.items():
        path = saved(tmp_path / f"{name}.pt", content)
        assert same(load_flow_map(path, **FACTS), averaged)
        assert same(load_flow_map(path, ema=True, **FACTS), averaged)
        assert same(load_flow_map(path, ema=False, **FACTS), plain)
    assert "ema=true: holds no averaged weights" in refusal(saved(tmp_path / "plain.pt", plain), ema=True)
    only = saved(tmp_path / "only.pt", {"ema": averaged})
    assert "ema=false: holds no weights but averaged ones" in refusal(only, ema=False)


def test_half_precision_is_read_as_float32(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in mfm().items()}
    flow_map = load_flow_map(saved(tmp_path / "mfm.pt", weights), **FACTS)
    assert same(flow_map, {name: tensor.float() for name, tensor in weights.items()})


def test_a_model_directory_made_of_it_is_the_same_map(tmp_path):
    flow_map = load_flow_map(saved(tmp_path / "mfm.pt", mfm()), **FACTS)
    config = read_model_config(tmp_path / "mfm.pt", **FACTS)
    save_model(tmp_path / "model", flow_map, config={"data": config["data"], "training": {}})
    assert same(load_flow_map(tmp_path / "model"), flow_map.state_dict())
    assert same(load_flow_map(tmp_path / "model", cfg_scales=(2.5,), scale=0.18215, **FACTS), flow_map.state_dict())
    assert "config.json says 2" in refusal(tmp_path / "model", num_heads=4)
    assert "ema=False: " in refusal(tmp_path / "model", ema=False)
    # and back: its weights are bare weights in the official layout
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "bare.safetensors")
    assert same(load_flow_map(tmp_path / "bare.safetensors", **FACTS), flow_map.state_dict())


def without(name):
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


def with_tensor(name, tensor):
    return lambda weights: {**weights, name: tensor}


def filled(name, value):
    def change(weights):
        weights[name].view(-1)[-1] = value
        return weights

    return change


DAMAGES = {
    "one missing": (without("blocks.1.mlp.fc1.bias"), "lacks blocks.1.mlp.fc1.bias"),
    "no patches": (without("x_embedder.proj.weight"), "lacks x_embedder.proj.weight, which every MFM, DMF and SiT"),
    "no positions": (without("pos_embed"), "lacks pos_embed"),
    "half the outer state": (without("x_cond_adaLN.1.weight"), "lacks x_cond_adaLN.1.weight"),
    "no guidance table": (
        without("guidance_embedder.embedding_table.weight"),
        "lacks guidance_embedder.embedding_table.weight",
    ),
    "of another training": (with_tensor("logvar_linear.weight", torch.zeros(1)), "has logvar_linear.weight that this"),
    "one extra": (with_tensor("head.weight", torch.zeros(2)), "has head.weight that this layout does not know"),
    "a block left out": (
        lambda weights: {key: tensor for key, tensor in weights.items() if not key.startswith("blocks.1.")},
        "has the blocks 0, 2, expected 0, 1, ... without a gap",
    ),
    "shape off by one": (
        with_tensor("blocks.2.attn.proj.weight", torch.zeros(32, 33)),
        "blocks.2.attn.proj.weight has shape (32, 33), expected (32, 32)",
    ),
    "transposed": (with_tensor("s_embedder.mlp.0.weight", torch.zeros(256, 32)), "s_embedder.mlp.0.weight has shape"),
    "integers": (
        with_tensor("t_embedder.mlp.2.bias", torch.zeros(32).long()),
        "t_embedder.mlp.2.bias has type torch.int64",
    ),
    "not a number": (
        filled("y_embedder.embedding_table.weight", float("nan")),
        "y_embedder.embedding_table.weight holds NaN",
    ),
    "infinite": (filled("final_layer.linear.bias", float("inf")), "final_layer.linear.bias holds NaN or infinity"),
    "oblong grid": (with_tensor("pos_embed", torch.zeros(1, 15, 32)), "pos_embed has shape (1, 15, 32), expected"),
    "positions of another width": (with_tensor("pos_embed", torch.zeros(1, 16, 48)), "pos_embed has shape (1, 16, 48)"),
    "positions without a batch": (with_tensor("pos_embed", torch.zeros(16, 32)), "pos_embed has shape (16, 32)"),
    "oblong patches": (with_tensor("x_embedder.proj.weight", torch.zeros(32, 4, 2, 1)), "expected square patches"),
    "output of other channels": (
        with_tensor("final_layer.linear.weight", torch.zeros(24, 32)),
        "final_layer.linear.weight has 24 rows, expected 16",
    ),
    "a learned sigma where none belongs": (
        with_tensor("final_layer.linear.weight", torch.zeros(32, 32)),
        "final_layer.linear.weight has 32 rows, expected 16",
    ),
    "a second name": (with_tensor("dit.pos_embed", torch.zeros(1, 16, 32)), "a second tensor of the name pos_embed"),
    "no tensor": (with_tensor("epoch", 3), "epoch is a int, expected a tensor"),
    "another network": (
        lambda weights: {"layers.0.weight": torch.zeros(3, 3)},
        "its tensors begin with layers.0.weight",
    ),
    "a list": (lambda weights: list(weights.values()), "holds a list, expected tensors by name"),
    "nothing": (lambda weights: {}, "holds no tensors by name"),
    "an optimiser": (lambda weights: {"optimizer": {"lr": 1.0}}, "holds no tensors by name"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named(tmp_path, damage):
    change, reason = DAMAGES[damage]
    path = saved(tmp_path / "mfm.pt", change(mfm()))
    message = refusal(path)
    assert str(path) in message
    assert reason in message


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"num_heads": 5}, "num_heads=5: expected a divisor of the file's hidden size 32"),
        ({"encoder_depth": 4}, "encoder_depth=4: expected 1 to 3, the file's number of blocks"),
        ({"encoder_depth": None}, "encoder_depth=20: expected 1 to 3"),
        ({"cfg_scales": [1.5, 2.5]}, "guidance_embedder.embedding_table.weight has 2 rows, expected 1 scales"),
        ({"cfg_scales": []}, "cfg_scales=[]: guidance_embedder"),
        ({"cfg_scales": [float("nan")]}, "expected numbers above 0"),
        ({"cfg_scales": 2.5}, "cfg_scales=2.5: expected a list of numbers"),
        ({"cfg_scales": "2"}, "cfg_scales=2: expected a list of numbers"),
        ({"num_heads": "2"}, "num_heads=2: expected a whole number"),
        ({"num_heads": 0}, "num_heads=0: expected a divisor"),
        ({"encoder_depth": 1.5}, "encoder_depth=1.5: expected a whole number"),
        ({"time_flip": "yes"}, "time_flip=yes: expected true or false"),
        ({"ema": "yes"}, "ema=yes: expected true, false or null"),
        ({"scale": "wide"}, "scale=wide: expected a number"),
        ({"scale": 0.0}, "scale=0.0"),
    ],
)
def test_keywords_that_contradict_the_file_are_named(tmp_path, keywords, reason):
    path = saved(tmp_path / "mfm.pt", mfm())
    message = refusal(path, **keywords)
    assert str(path) in message
    assert reason in message


def test_scales_that_no_shape_tells_are_asked_for(tmp_path):
    path = saved(tmp_path / "mfm.pt", mfm(guidance=4))
    assert "has 4 rows, expected 3 scales" in refusal(path)
    assert load_flow_map(path, cfg_scales=[1.5, 2.5, 4.0], **FACTS).cfg_scales == (1.5, 2.5, 4.0)
    alone = saved(tmp_path / "alone.pt", mfm(guidance=1))
    assert load_flow_map(alone, **FACTS).cfg_scales == ()
    sit = saved(tmp_path / "sit.pt", mfm(kind="one_time", sigma=True))
    assert "time_flip=true: the file predicts a variance" in refusal(sit, time_flip=True)
    assert load_flow_map(sit, cfg_scales=[1.5, 4.0], **FACTS).cfg_scales == (1.5, 4.0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, -1])
def test_truncated_files_are_named(tmp_path, suffix, keep):
    path = tmp_path / f"mfm{suffix}"
    save_file(mfm(), path) if suffix == ".safetensors" else saved(path, mfm())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    message = refusal(path)
    assert str(path) in message
    assert "truncated" in message


def test_a_flipped_byte_of_the_index_is_named(tmp_path):
    path = saved(tmp_path / "mfm.pt", mfm())
    content = bytearray(path.read_bytes())
    at = content.index(b"data.pkl") + 200
    content[at : at + 60] = bytes(60)
    path.write_bytes(content)
    assert str(path) in refusal(path)


class Code:
    def __reduce__(self):
        return (os.mkdir, (str(Path(os.environ["MARK"])),))


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "beside the weights"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, monkeypatch, form):
    monkeypatch.setenv("MARK", str(tmp_path / "owned"))
    path = tmp_path / "mfm.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Code()))
    else:
        content = {"state_dict": mfm(), "hyper_parameters": Code()} if form == "beside the weights" else Code()
        torch.save(content, path, _use_new_zipfile_serialization=form != "old torch")
    message = refusal(path)
    assert str(path) in message
    assert not (tmp_path / "owned").exists()
    if form == "beside the weights":
        assert "posix.mkdir, and nothing but tensors is unpickled; save its state_dict alone" in message


def test_the_older_form_of_torch_save_is_read(tmp_path):
    weights = mfm()
    torch.save(weights, tmp_path / "mfm.pt", _use_new_zipfile_serialization=False)
    assert same(load_flow_map(tmp_path / "mfm.pt", **FACTS), weights)


def test_what_is_no_weights_file_is_named(tmp_path):
    assert "nowhere.pt does not exist, expected a model directory or a file of weights" in refusal(
        tmp_path / "nowhere.pt", num_heads=None, encoder_depth=None
    )
    for name in ("a.pt", "b.pt"):
        saved(tmp_path / name, mfm())
    assert "config.json is missing" in refusal(tmp_path, num_heads=None, encoder_depth=None)


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    import hashlib

    (tmp_path / "a.pt").write_bytes(os.urandom(3000))
    assert sha256_of(Storage(tmp_path / "a.pt")) == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
