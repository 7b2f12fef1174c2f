"""Rewards as configurations hold them: what `reward=...` and its parts build, and what is refused by its place."""

import pytest
import torch

from mfm_ray.building import PROMPT_REWARDS, REWARDS, build_reward
from mfm_ray.config import group_choices, load_config, to_dict
from mfm_ray.errors import InputError
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.rewards import ClassProbability, Minimum, Symmetry, TargetBrightness, Thresholded, WeightedSum

torch.manual_seed(0)
CLASSIFIER = DigitClassifier(num_classes=10, event_shape=(1, 8, 8))
IMAGES = torch.rand(4, 1, 8, 8)
POINTS = torch.rand(4, 2)


def build(*words):
    config = load_config("sample", list(words))
    return build_reward(config.reward, load_classifier=lambda: CLASSIFIER, load_heldout=lambda place: IMAGES)


def network_words(name, folders):
    """What a reward with a published network is told beside its name: folders that are here, and a prompt."""
    source = {"hpsv2": "hpsv2", "image_reward": "image_reward"}.get(name, "clip")
    own = f"reward.head={folders / 'head'}" if name == "aesthetic" else "reward.prompt=cat"
    return [f"reward.source={folders / source}", own]


def test_every_named_reward_can_be_chosen_and_built_as_it_stands(folders):
    assert group_choices("reward") == sorted(REWARDS)
    for name in REWARDS:
        reward = build(f"reward={name}", *(network_words(name, folders) if name in PROMPT_REWARDS else ()))
        if name == "none":
            assert reward is None
        else:
            assert reward.name == name
            assert reward(POINTS if name == "linear_gaussian" else IMAGES).shape == (4,)


def test_a_weighted_sum_is_written_as_a_list_of_parts():
    parts = "[{name: symmetry, weight: 1.0, scale: 0.3}, {name: brightness, weight: 0.5}]"
    reward = build("reward=weighted_sum", f"reward.parts={parts}")
    assert isinstance(reward, WeightedSum)
    assert reward.weights == {"symmetry": 1.0, "brightness": 0.5}
    # what a part leaves out stands in conf/reward/brightness.yaml
    expected = Symmetry(scale=0.3)(IMAGES) + 0.5 * TargetBrightness(target=0.45, scale=0.01)(IMAGES)
    torch.testing.assert_close(reward(IMAGES), expected)


def test_a_minimum_of_parts_given_by_their_names():
    reward = build("reward=minimum", "reward.parts=[symmetry, {name: class_probability, weight: 20}]")
    assert isinstance(reward, Minimum)
    expected = torch.minimum(Symmetry(scale=0.1)(IMAGES), 20 * ClassProbability(classifier=CLASSIFIER, label=8)(IMAGES))
    torch.testing.assert_close(reward(IMAGES), expected)


def test_two_of_a_kind_are_told_apart():
    reward = build("reward=minimum", "reward.parts=[symmetry, {name: symmetry, axis: vertical}]")
    assert list(reward.breakdown(IMAGES)) == ["symmetry", "symmetry_2"]
    vertical = Symmetry(scale=0.1, axis="vertical")(IMAGES)
    torch.testing.assert_close(reward(IMAGES), torch.minimum(Symmetry(scale=0.1)(IMAGES), vertical))


def test_a_threshold_comes_before_the_weight_everywhere():
    plain = Symmetry(scale=0.1)(IMAGES)
    ceiling = float(plain.median())
    single = build("reward=symmetry", f"reward.threshold={ceiling}")
    assert isinstance(single, Thresholded)
    assert torch.equal(single(IMAGES), plain.clamp_max(ceiling))
    weighted = build("reward=symmetry", f"reward.threshold={ceiling}", "reward.weight=-2")
    assert weighted.name == "symmetry"
    torch.testing.assert_close(weighted(IMAGES), -2 * plain.clamp_max(ceiling))
    part = f"[{{name: symmetry, threshold: {ceiling}, weight: 3}}]"
    whole = build("reward=weighted_sum", f"reward.parts={part}", f"reward.threshold={2 * ceiling}", "reward.weight=0.5")
    torch.testing.assert_close(whole(IMAGES), 0.5 * (3 * plain.clamp_max(ceiling)).clamp_max(2 * ceiling))


def test_combinations_nest():
    inner = "{name: weighted_sum, weight: 2, parts: [symmetry, {name: masked_observation, row: 3}]}"
    config = load_config("sample", ["reward=minimum", f"reward.parts=[brightness, {inner}]"])
    reward = build("reward=minimum", f"reward.parts=[brightness, {inner}]")
    # the resolved configuration says everything, and reads back as itself
    nested = to_dict(config)["reward"]["parts"][1]["parts"]
    assert nested[0] == {"name": "symmetry", "scale": 0.1, "axis": "horizontal", "weight": 1.0, "threshold": None}
    assert (nested[1]["row"], nested[1]["noise"]) == (3, 0.1)
    bright = TargetBrightness(target=0.45, scale=0.01)(IMAGES)
    sums = reward.rewards["weighted_sum"]
    assert list(sums.breakdown(IMAGES)) == ["symmetry", "masked_observation"]
    torch.testing.assert_close(reward(IMAGES), torch.minimum(bright, 2 * sums(IMAGES)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward=minimun"], "reward=minimun: expected one of "),
        (["reward=minimun"], "did you mean minimum?"),
        (["reward=minimum", "reward.part=[symmetry]"], "reward.part: unknown key; did you mean reward.parts?"),
        (["reward=minimum", "+reward.part=1"], "reward.part: unknown key; expected parts, weight, threshold"),
        (["reward=minimum", "reward.parts=[]"], "reward.parts=[]: expected a list [...] of at least one {name"),
        (["reward=minimum", "reward.parts=null"], "reward.parts=None: expected a list"),
        (["reward=minimum", "reward.parts=symmetry"], "reward.parts=symmetry: expected a list"),
        (["reward=minimum", "reward.parts={name: symmetry}"], "reward.parts={name: symmetry}: expected a list"),
        (["reward=minimum", "reward.parts=[symmetry, 3]"], "reward.parts[1]=3: expected a reward {name: ..."),
        (["reward=minimum", "reward.parts=[symetry]"], "reward.parts[0].name=symetry: expected one of "),
        (["reward=minimum", "reward.parts=[symetry]"], "did you mean symmetry?"),
        (["reward=minimum", "reward.parts=[none]"], "reward.parts[0].name=none: expected one of masked_observation"),
        (["reward=minimum", "reward.parts=[{weight: 1}]"], "reward.parts[0].name=None: expected one of "),
        (
            ["reward=minimum", "reward.parts=[{name: symmetry, scal: 1}]"],
            "reward.parts[0].scal: unknown key; expected scale, axis, name, weight, threshold; did you mean scale?",
        ),
        (
            ["reward=minimum", "reward.parts=[{name: symmetry, scale: -1}]"],
            "reward.parts[0].scale=-1: expected a finite",
        ),
        (
            ["reward=minimum", "reward.parts=[brightness, {name: symmetry, weight: 0}]"],
            "reward.parts[1].weight=0: expected a finite number above 0",
        ),
        (
            ["reward=weighted_sum", "reward.parts=[{name: symmetry, weight: x}]"],
            "reward.parts[0].weight=x: expected a finite",
        ),
        (
            ["reward=weighted_sum", "reward.parts=[{name: minimum, parts: [{name: symmetry, threshold: high}]}]"],
            "reward.parts[0].parts[0].threshold=high: expected a finite number",
        ),
        (
            ["reward=minimum", "reward.parts=[{name: masked_observation, row: 4}]"],
            "reward.parts[0].row=4: expected a held-out row, 0 to 3",
        ),
        (
            ["reward=masked_observation", "+reward.rows=1"],
            "reward.rows: unknown key; expected data, half, noise, row, weight, threshold; did you mean row?",
        ),
        (["reward=masked_observation", "reward.noise=0"], "reward.noise=0: expected a finite number above 0"),
        (["reward=symmetry", "reward.weight=true"], "reward.weight=True: expected a finite number"),
        (["reward=symmetry", "reward.threshold=high"], "reward.threshold=high: expected a finite number"),
        (["reward=none", "+reward.threshold=1"], "reward.threshold: unknown key; reward=none takes none"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(words, message):
    with pytest.raises(InputError) as caught:
        build(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
