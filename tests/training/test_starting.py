"""Where a training begins and what it distils, when these are official files: checked first, and exactly theirs."""

from pathlib import Path

import pytest
import torch

from mfm_ray.config import group_defaults, load_config
from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data.shards import read_manifest, write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.networks import build_network
from mfm_ray.pretrained import load_flow_map, save_model
from mfm_ray.training.launch import check_config
from mfm_ray.training.starting import absolute, begin_at, check_start
from mfm_ray.training.teacher import check_objective, check_teacher, load_teacher, teacher_location
from tests.networks import dit_reference as reference

SPACE = DataSpace("latent", (4, 8, 8), scale=0.18215)
SIZE = {"width": 32, "depth": 3, "patch": 2, "channels": 4, "grid": 4, "classes": 5}
NETWORK = {
    "name": "dit",
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "encoder_depth": 2,
    "cfg_scales": [2.5],
    "time_flip": True,
}
FACTS = {"num_heads": 2, "encoder_depth": 2, "time_flip": True, "cfg_scales": [2.5]}


def file_of(path: Path, **changes) -> str:
    torch.save(reference.random_weights(**{**SIZE, **changes}), path)
    return str(path)


def network(**changes):
    return build_network({**NETWORK, **changes}, space=SPACE, num_classes=5)


def test_a_training_begins_as_minus_dmf(tmp_path):
    source = file_of(tmp_path / "dmf.pt", kind="one_time")
    check_start(source, NETWORK, space=SPACE, num_classes=5)
    flow_map = begin_at(network(), source)
    assert all(parameter.requires_grad for parameter in flow_map.parameters())
    weights = reference.doubled(torch.load(source, weights_only=True))
    x, s, u = torch.randn(4, 4, 8, 8), torch.rand(4) / 2, torch.rand(4) / 2 + 0.5
    label = torch.arange(4)
    flow_map.requires_grad_(False)
    given = flow_map.velocity(x, s, u, t=torch.rand(4), x_t=torch.randn(4, 4, 8, 8), label=label, cfg_scale=2.5)
    expected = -reference.dmf(weights, x.double(), 1 - s.double(), 1 - u.double(), label, heads=2, encoder_depth=2)
    assert float((given.double() - expected).norm() / expected.norm()) < 1e-5


def test_without_a_source_the_network_stays_as_it_is():
    torch.manual_seed(0)
    flow_map = network()
    before = {name: tensor.clone() for name, tensor in flow_map.state_dict().items()}
    begin_at(flow_map, None)
    check_start(None, NETWORK, space=SPACE, num_classes=5)
    assert all(torch.equal(before[name], tensor) for name, tensor in flow_map.state_dict().items())


def test_a_training_goes_on_from_a_model_directory(tmp_path):
    torch.manual_seed(0)
    trained = network()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    described = {"name": "images", **SPACE.config(), "num_classes": 5, "class_names": list("abcde")}
    save_model(tmp_path / "model", trained, config={"data": described})
    check_start(str(tmp_path / "model"), NETWORK, space=SPACE, num_classes=5)
    begun = begin_at(network(), str(tmp_path / "model")).state_dict()
    assert all(torch.equal(begun[name], tensor) for name, tensor in trained.state_dict().items())
    for changes, reason in (
        ({"num_heads": 4}, f"network.num_heads=4: init_from={tmp_path}/model has 2"),
        ({"depth": 2, "encoder_depth": 1}, "network.depth=2: "),
        ({"time_flip": False}, "network.time_flip=false: "),
    ):
        with pytest.raises(InputError, match=reason):
            check_start(str(tmp_path / "model"), {**NETWORK, **changes}, space=SPACE, num_classes=5)


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ({}, {"hidden_size": 64}, "network.hidden_size=64: .*start.pt has 32"),
        ({}, {"depth": 4}, "network.depth=4: .*start.pt has 3"),
        (
            {"channels": 3},
            {},
            r"init_from=.*start.pt: of shape \(3, 8, 8\) and 5 classes, the data's are \(4, 8, 8\) and 5",
        ),
        ({"grid": 2}, {}, r"of shape \(4, 4, 4\)"),
        ({"classes": 7}, {}, "and 7 classes"),
        (
            {"kind": "mfm", "guidance": 3},
            {},
            r"network.cfg_scales=\[2.5\]: .*start.pt has 3 rows of guidance, expected 2",
        ),
        (
            {"kind": "one_time", "sigma": True},
            {},
            "network.time_flip=true: .*start.pt predicts a variance .*expected false",
        ),
        ({}, {"name": "unet"}, "network.name=unet: .*start.pt holds a DiT, expected network=dit"),
    ],
)
def test_a_start_that_contradicts_the_network_or_the_data_is_named(tmp_path, file, changes, reason):
    source = file_of(tmp_path / "start.pt", **file)
    described = group_defaults("network", "unet") if changes.get("name") == "unet" else {**NETWORK, **changes}
    with pytest.raises(InputError, match=reason) as caught:
        check_start(source, described, space=SPACE, num_classes=5)
    assert "\n" not in str(caught.value)


def test_a_start_that_is_damaged_or_missing_is_named(tmp_path):
    weights = reference.random_weights(**SIZE)
    weights["pos_embed"][0, 0, 0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    for source, reason in (
        (tmp_path / "nan.pt", "nan.pt: pos_embed holds NaN or infinity"),
        (tmp_path / "no.pt", "init_from=.*no.pt does not exist, expected a model directory or a file of weights"),
        (tmp_path, "config.json is missing"),
    ):
        source = str(source)
        if source == str(tmp_path):
            torch.save(weights, tmp_path / "second.pt")
        with pytest.raises(InputError, match=reason):
            check_start(source, NETWORK, space=SPACE, num_classes=5)


@pytest.fixture
def manifest(tmp_path):
    split = Split(torch.randn(20, 4, 8, 8), torch.arange(20) % 5)
    write_shards(tmp_path / "data", Dataset("images", SPACE, {"train": split}, class_names=tuple("abcde")))
    return read_manifest(tmp_path / "data")


def test_an_official_file_is_a_teacher(tmp_path, manifest):
    source = file_of(tmp_path / "dmf.pt", kind="one_time")
    objective = {"name": "eulerian_teacher", "teacher": {"source": source, **FACTS}, "teacher_guidance": "model"}
    check_objective(objective)
    check_teacher(objective, manifest)
    location = teacher_location(objective)
    assert location is not None
    assert str(location) == source
    teacher = load_teacher(location, precision="fp32", device=torch.device("cpu"))
    expected = load_flow_map(source, **FACTS)
    assert teacher is not None
    assert all(torch.equal(expected.state_dict()[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_teachers_that_cannot_be_are_named_before_anything_starts(tmp_path, manifest):
    source = file_of(tmp_path / "dmf.pt", kind="one_time", classes=7)
    objective = {"name": "eulerian_teacher", "teacher": {"source": source, **FACTS}}
    with pytest.raises(InputError, match=r"made for shape \(4, 8, 8\) and 7 classes, expected \(4, 8, 8\) and 5"):
        check_teacher(objective, manifest)
    weights = torch.load(source, weights_only=True)
    weights["final_layer.linear.bias"][0] = float("inf")
    torch.save(weights, source)
    with pytest.raises(InputError, match="dmf.pt: final_layer.linear.bias holds NaN or infinity"):
        check_objective(objective)
    with pytest.raises(InputError, match="objective.teacher.num_head: unknown key; .* did you mean num_heads"):
        check_objective({**objective, "teacher": {"source": source, "num_head": 2}})
    with pytest.raises(InputError, match="num_heads=5: expected a divisor"):
        check_objective({**objective, "teacher": {"source": source, "num_heads": 5}})


def test_the_recipe_that_distils_wants_its_start():
    with pytest.raises(InputError, match="objective.teacher=null: expected a model directory or weights file"):
        check_config(load_config("train", ["experiment=imagenet_xl2_distilled", "data.path=/data"]))


def test_places_are_the_same_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("a/dmf.pt") == str(tmp_path / "a" / "dmf.pt")
    assert absolute("hf://owner/name") == "hf://owner/name"
    assert absolute(None) is None
