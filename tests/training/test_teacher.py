"""What a distilled objective asks of its teacher is asked before a worker starts."""

from pathlib import Path

import pytest
import torch

from mfm_ray.config import load_config
from mfm_ray.data.datasets import Dataset, Split
from mfm_ray.data.shards import read_manifest, write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.errors import InputError
from mfm_ray.networks import build_network
from mfm_ray.networks.computation import AutocastFlowMap
from mfm_ray.pretrained import save_model
from mfm_ray.training.launch import check_config, model_config
from mfm_ray.training.teacher import check_objective, check_teacher, load_teacher, teacher_location


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A model directory for points in 2D without labels."""
    data = Dataset(
        "points", DataSpace("coordinates", (2,)), {"train": Split(torch.randn(20, 2), torch.full((20,), -1))}
    )
    write_shards(tmp_path / "data", data)
    config = load_config("train", ["experiment=gmm", "network.width=16"])
    manifest = read_manifest(tmp_path / "data")
    network = build_network(config.network, space=manifest.space)
    save_model(tmp_path / "teacher", network, config=model_config(config, manifest))
    return tmp_path / "teacher"


def test_objectives_without_a_teacher_name_no_place() -> None:
    assert teacher_location({"name": "semigroup", "teacher": None}) is None
    check_objective({"name": "semigroup", "teacher": None})


def test_a_teacher_is_found_and_loaded_frozen_in_the_precision_of_the_training(teacher: Path) -> None:
    objective = {"name": "eulerian_teacher", "teacher": str(teacher)}
    check_objective(objective)
    check_teacher(objective, read_manifest(teacher.parent / "data"))
    for precision in ("fp32", "bf16"):
        flow_map = load_teacher(teacher_location(objective), precision=precision, device=torch.device("cpu"))
        assert flow_map is not None
        assert not any(parameter.requires_grad for parameter in flow_map.parameters())
        assert isinstance(flow_map, AutocastFlowMap) == (precision == "bf16")


def test_a_missing_teacher_is_named_before_anything_starts(teacher: Path) -> None:
    words = ["experiment=gmm", "objective=eulerian_teacher"]
    with pytest.raises(InputError, match="objective.teacher=null: expected a model directory"):
        check_config(load_config("train", words))
    with pytest.raises(InputError, match="nowhere does not exist, expected a model directory"):
        check_config(load_config("train", [*words, f"objective.teacher={teacher.parent / 'nowhere'}"]))
    check_config(load_config("train", [*words, f"objective.teacher={teacher}"]))


def test_a_teacher_nobody_asks_is_a_mistake(teacher: Path) -> None:
    with pytest.raises(InputError, match="objective=semigroup with diagonal=data has no use for it"):
        check_config(load_config("train", ["experiment=gmm", f"objective.teacher={teacher}"]))
    check_config(load_config("train", ["experiment=gmm", f"objective.teacher={teacher}", "objective.diagonal=teacher"]))


def test_a_teacher_of_other_data_is_refused_with_both_shapes(teacher: Path, tmp_path: Path) -> None:
    split = Split(torch.randn(20, 3), torch.arange(20) % 2)
    data = Dataset("solids", DataSpace("coordinates", (3,)), {"train": split}, class_names=("a", "b"))
    write_shards(tmp_path / "solids", data)
    objective = {"name": "lagrangian_teacher", "teacher": str(teacher)}
    with pytest.raises(InputError, match=r"made for shape \(2,\) and 0 classes, expected \(3,\) and 2, as solids has"):
        check_teacher(objective, read_manifest(tmp_path / "solids"))
