"""Configuration: every YAML composes into its typed root, and every mistake is one line with the way out."""

import dataclasses
import json
from importlib import resources

import pytest
import torch
import yaml

from mfm_ray.config import ROOTS, TrainConfig, compose, flatten, group_choices, load_config, sweep_files, to_dict
from mfm_ray.errors import InputError
from mfm_ray.finetuning import METHODS
from mfm_ray.finetuning.adapters import ADAPTERS
from mfm_ray.networks import NETWORKS, build_network
from mfm_ray.objectives import OBJECTIVES, build_objective, needs_teacher
from mfm_ray.settings import from_dict, nearest
from mfm_ray.training.zero import split_batch

RECIPE = {"train": ["experiment=digits"], "tune": ["sweep=methods"]}
GROUPS = {
    "train": ("data", "network", "objective", "experiment"),
    "prepare_data": ("data",),
    "finetune": ("method", "adapter", "reward"),
    "sample": ("steering", "reward"),
    "tune": ("steering", "reward", "sweep"),
    "evaluate": ("protocol",),
    "demo": ("protocol",),
    "export": (),
    "deploy": (),
}
SWEPT_GROUPS = {
    "job",
    "scheduler",
}  # of jobs.tune; tests/tuning and tests/jobs/test_training_sweep.py use their choices
OF_TRAININGS = [name for name, file in sweep_files().items() if yaml.safe_load(file.read_text()).get("job") == "train"]
EVERY_CHOICE = [
    (root, f"{group}={choice}")
    for root, groups in GROUPS.items()
    for group in groups
    for choice in group_choices(group)
]


@pytest.mark.parametrize("root", ROOTS)
def test_root_composes_and_travels_as_json(root: str) -> None:
    config = load_config(root, RECIPE.get(root, []))
    plain = json.loads(json.dumps(to_dict(config)))
    assert from_dict(ROOTS[root], plain) == config


@pytest.mark.parametrize(("root", "choice"), EVERY_CHOICE)
def test_every_choice_composes(root: str, choice: str) -> None:
    group, _, name = choice.partition("=")
    further = ["experiment=gmm"] if root == "tune" and name in OF_TRAININGS else []
    config = load_config(root, [*RECIPE.get(root, []), choice, *further])
    chosen = getattr(config, group)
    found = chosen if group in ("experiment", "sweep") else dataclasses.asdict(config)[group]["name"]
    assert found == name


def test_every_yaml_belongs_to_a_root_or_to_a_group_of_one() -> None:
    files = [file.name for file in resources.files("mfm_ray.conf").iterdir()]
    assert {name.removesuffix(".yaml") for name in files if name.endswith(".yaml")} == set(ROOTS)
    folders = {name for name in files if "." not in name and not name.startswith("__")}
    groups = {group for groups in GROUPS.values() for group in groups} | SWEPT_GROUPS
    assert folders == groups - {"sweep"}  # tune_configs/


@pytest.mark.parametrize("experiment", group_choices("experiment"))
def test_what_a_recipe_names_can_be_built(experiment: str) -> None:
    from mfm_ray.data_space import DataSpace

    config = load_config("train", [f"experiment={experiment}"])
    assert isinstance(config, TrainConfig)
    assert config.name == experiment
    space = {
        "digits": DataSpace("image", (1, 8, 8)),
        "mnist": DataSpace("image", (1, 28, 28)),
        "gmm": DataSpace("coordinates", (2,)),
        "images": DataSpace("latent", (4, 32, 32), scale=0.18215),
    }[config.data.name]
    with torch.device("meta"):
        network = build_network(config.network, space=space, num_classes=1000)
    build_objective(config.objective, teacher=network if needs_teacher(config.objective) else None)
    sizes = {"imagenet_b2": 134_847_760, "imagenet_xl2": 684_286_864, "imagenet_xl2_distilled": 684_286_864}
    if experiment in sizes:  # as published, with the 256 fixed positions
        assert sum(tensor.numel() for tensor in network.state_dict().values()) == sizes[experiment]
    split_batch(config.global_batch_size, num_workers=8, micro_batch_size=config.micro_batch_size)


def test_choices_and_registries_name_the_same_classes() -> None:
    assert group_choices("network") == sorted(NETWORKS)
    assert group_choices("objective") == sorted(OBJECTIVES)
    assert group_choices("method") == sorted(METHODS)
    assert group_choices("adapter") == sorted(ADAPTERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_stepz=1"], "max_stepz: unknown key; did you mean max_steps?"),
        (["zero.stag=1"], "zero.stag: unknown key; did you mean zero.stage?"),
        (["stage=1"], "stage: unknown key; did you mean zero.stage?"),
        (["network.with=3"], "network.with: unknown key; did you mean network.width?"),
        (["reward=symmetry"], "reward: unknown key"),
        (["experiment=digit"], "experiment=digit: expected one of digits, gmm, imagenet_b2, imagenet_xl2,"),
        (["experiment=[digits,gmm]"], "expected one of digits, gmm, imagenet_b2,"),
        (["objective=semigroop"], "did you mean semigroup?"),
        (["network=null"], "network=null: expected one of "),
        (["max_steps=abc"], "max_steps=abc: expected a whole number of at least 1"),
        (["max_steps=1.5"], "max_steps=1.5: expected a whole number"),
        (["max_steps=0"], "max_steps=0: expected a whole number of at least 1"),
        (["max_steps="], "max_steps=: expected a whole number"),
        (["max_steps=1,2"], "max_steps=1,2: expected one value, not a sweep"),
        (["max_steps"], "max_steps: cannot be read; expected key=value"),
        (["max_seconds=nan"], "max_seconds=nan: expected a number above 0, or null"),
        (["seed=-1"], "seed=-1: expected a whole number of at least 0"),
        (["seed=true"], "seed=true: expected a whole number"),
        (["ema_decay=1"], "ema_decay=1: expected a number or a list [...] of numbers of at least 0 and below 1"),
        (["precision=fp16"], "precision=fp16: expected one of fp32, bf16; did you mean"),
        (["zero=3"], "zero=3: expected a group of keys"),
        (["zero.stage=4"], "zero.stage=4: expected one of 0, 1, 2, 3"),
        (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: expected a list [...] of 2 numbers of at least 0"),
        (["resume=maybe"], "resume=maybe: expected true or false"),
        (["+foo=1"], "can keys be added; write foo=1"),
        (["~seed"], "~seed: keys cannot be removed"),
        (["hydra.run.dir=/x"], "hydra's own keys are not taken"),
        (["name=${nothing}"], "nothing"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words: list[str], message: str) -> None:
    recipe = [] if words[0].startswith("experiment") else ["experiment=digits"]
    with pytest.raises(InputError) as caught:
        load_config("train", [*recipe, *words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_training_needs_a_recipe() -> None:
    with pytest.raises(InputError, match=r"experiment: missing; .* one of digits, gmm, imagenet_b2, "):
        load_config("train", ["max_steps=3"])


@pytest.mark.parametrize("value", ["007", "1e3", "true", "a,b", "s3://bucket/x?region=y&z=1", "it's", "a b=c"])
def test_text_is_taken_as_it_stands(value: str) -> None:
    assert load_config("export", [f"storage={value}"]).storage == value


def test_an_argument_of_a_constructor_can_be_added() -> None:
    assert compose("train", ["experiment=digits", "+network.depth=3"]).values["network"]["depth"] == 3


def test_later_words_win() -> None:
    assert load_config("train", ["experiment=gmm", "experiment=digits", "seed=1", "seed=2"]).seed == 2


def test_flatten_names_every_node() -> None:
    assert flatten({"a": {"b": 1}, "c": 2}) == {"a": {"b": 1}, "a.b": 1, "c": 2}


@pytest.mark.parametrize(
    ("word", "expected"),
    [("sead", "seed"), ("workers", "scaling.num_workers"), ("num_worker", "scaling.num_workers"), ("q", None)],
)
def test_nearest_name(word: str, expected: str | None) -> None:
    assert nearest(word, ["seed", "storage", "scaling.num_workers"]) == expected


def test_a_mapping_on_the_command_line_replaces_keys_and_adds_the_ones_its_constructor_takes() -> None:
    words = ["experiment=gmm", "objective.consistency_weighting={name: adaptive, power: 0.5}"]
    config = load_config("train", words)
    assert isinstance(config, TrainConfig)
    assert config.objective["consistency_weighting"] == {"name": "adaptive", "power": 0.5}
    short = load_config("train", ["experiment=gmm", "objective.consistency_weighting=log"])
    assert isinstance(short, TrainConfig)
    build_objective(short.objective)
