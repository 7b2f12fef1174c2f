"""Requests with nothing left open: defaults, names, limits, and what a refusal says."""

from dataclasses import fields, replace

import pytest
import torch
import yaml

from mfm_ray.building import STEERING, build_steering
from mfm_ray.config import load_config, to_dict
from mfm_ray.errors import InputError
from mfm_ray.steering.budget import within_budget
from mfm_ray.tuning.words import sample_words
from serve.catalogue import KINDS, RewardSource, defaults, describe, resolve_params, rewards_of
from serve.errors import ApiError
from serve.pictures import decode_png, encode_png
from serve.presets import read_presets
from serve.resolve import row_steps
from serve.schema import GenerationRequest
from serve.settings import Limits

SYMMETRY = {"rewards": [{"name": "symmetry"}]}


def generation(resolver, **fields):
    return resolver.generation(GenerationRequest.model_validate(fields))


def refusal(resolver, **fields):
    with pytest.raises(ApiError) as refused:
        generation(resolver, **fields)
    return refused.value


def test_nothing_given_is_one_unsteered_image_with_a_seed(resolver):
    plain = generation(resolver)
    assert (plain.method, plain.num_images, plain.rewards, plain.model) == ("none", 1, (), "tiny")
    assert plain.seed != generation(resolver).seed
    assert plain.steering()["num_steps"] == 50


def test_a_reward_alone_is_gradient_guidance_with_every_default_resolved(resolver):
    steered = generation(resolver, steering=SYMMETRY)
    said = steered.steering()
    assert said["method"] == "gradient"
    assert said["rewards"] == [
        {"name": "symmetry", "weight": 1.0, "params": {"scale": 0.1, "axis": "horizontal", "threshold": None}}
    ]
    assert (said["num_draws"], said["guidance_scale"], said["dynamics"]) == (1, 1.0, "sde")


def test_what_was_resolved_can_be_sent_again_and_resolves_to_itself(resolver):
    for method in STEERING:
        steered = generation(resolver, seed=1, steering={**SYMMETRY, "method": method})
        again = generation(resolver, seed=1, steering=steered.steering())
        assert again == steered


def test_quality_sets_steps_and_draws_that_are_not_given(resolver):
    low, high = (generation(resolver, quality=quality, steering=SYMMETRY) for quality in ("low", "high"))
    assert low.num_steps < high.num_steps
    assert low.arguments["num_draws"] < high.arguments["num_draws"]
    given = generation(resolver, quality="high", steering={**SYMMETRY, "num_steps": 7, "num_draws": 2})
    assert (given.num_steps, given.arguments["num_draws"]) == (7, 2)


TRIALS = {
    "low": ["steering=gradient_free", "reward=symmetry", "steering.guidance_scale=0.5", "num_steps=20"],
    "medium": ["steering=search", "reward=symmetry", "steering.num_particles=3", "max_nfe=300", "label=3"],
    "high": ["steering=smc", "reward=brightness", "reward.weight=4", "steering.num_particles=4", "dynamics=sde"],
}


def write_presets(folder, trials):
    """As `jobs.tune` writes the words of trials."""
    presets = {
        name: {"trial": 1, "words": sample_words(to_dict(load_config("sample", words)))}
        for name, words in trials.items()
    }
    (folder / "presets.yaml").write_text(yaml.safe_dump(presets))
    return f"{folder}/presets.yaml"


@pytest.fixture
def tuned(resolver, tmp_path):
    return replace(resolver, presets=read_presets(write_presets(tmp_path, TRIALS), resolver.models))


@pytest.mark.parametrize("quality", TRIALS)
def test_a_quality_is_the_trial_that_a_sweep_chose(tuned, quality):
    trial = load_config("sample", TRIALS[quality])
    method, num_steps = build_steering(trial.steering, torch.sum), trial.num_steps or 50
    if trial.max_nfe is not None:
        method, num_steps = within_budget(method, num_steps, trial.max_nfe)
    said = generation(tuned, quality=quality, seed=1, steering=SYMMETRY)
    steering = said.steering()
    assert STEERING[said.method] is type(method)
    own = [field.name for field in fields(method) if field.name not in ("reward", "draws_at_once")]
    assert said.arguments == {name: getattr(method, name) for name in own}
    assert (said.num_steps, said.max_nfe) == (num_steps, trial.max_nfe)
    assert said.dynamics == (trial.dynamics or method.default_dynamics)
    assert said.rewards[0].name == "symmetry"  # what is wished for is the request's own
    assert said.label is None
    assert generation(tuned, quality=quality, seed=1, steering=steering) == said


def test_what_a_request_says_wins_over_the_preset(tuned):
    given = {**SYMMETRY, "guidance_scale": 2.0, "num_steps": 7}
    said = generation(tuned, quality="low", steering=given)
    assert (said.method, said.arguments["guidance_scale"], said.num_steps) == ("gradient_free", 2.0, 7)
    free = generation(tuned, quality="medium", steering={**SYMMETRY, "max_nfe": None})
    assert (free.max_nfe, free.num_steps) == (None, 50)


def test_a_preset_of_another_method_says_nothing(tuned, resolver):
    for steering in ({**SYMMETRY, "method": "dps"}, {}):
        asked = {"quality": "low", "seed": 1, "steering": steering}
        assert generation(tuned, **asked) == generation(resolver, **asked)


def test_auto_is_the_medium_preset(tuned):
    assert generation(tuned, seed=1, steering=SYMMETRY) == generation(
        tuned, seed=1, quality="medium", steering=SYMMETRY
    )


@pytest.mark.parametrize(
    ("medium", "says"),
    [
        (["steering=gradient", "reward=symmetry", "order=2"], "order=2: requests are served in steps of order 1"),
        (["steering=gradient", "reward=symmetry", "preset=paper"], "preset=paper: a request cannot ask for"),
    ],
)
def test_a_trial_that_no_request_can_ask_for_is_refused(tmp_path, medium, says):
    place = write_presets(tmp_path, {**TRIALS, "medium": medium})
    with pytest.raises(InputError, match=f"^presets={place}#medium: {says}"):
        read_presets(place, {"tiny": None})


def test_a_file_that_is_no_presets_is_refused_in_one_line(tmp_path):
    file = tmp_path / "presets.yaml"
    for content, says in (
        ("low: {words: [num_steps=3]}", "#medium: expected one of low"),
        ("low: 3", "#low: cannot be read"),
        ("low: {words: [steering=magic]}", "#low: steering=magic: expected one of"),
        ("low: {words: [num_step=3]}", "#low: num_step: unknown key; did you mean num_steps"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=f"^presets={file}{says}") as refused:
            read_presets(str(file), {"tiny": None})
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="^presets=/nowhere/presets.yaml#low: there is no such file"):
        read_presets("/nowhere/presets.yaml", {"tiny": None})
    with pytest.raises(InputError, match=r"^presets\.tinny: no such model is served; .* did you mean tiny"):
        read_presets({"tinny": str(file)}, {"tiny": None})


def test_a_minimum_has_weights_above_zero(resolver):
    least = {"rewards": [{"name": "symmetry"}, {"name": "brightness", "weight": 0.5}], "combine": "minimum"}
    assert generation(resolver, steering=least).steering()["combine"] == "minimum"
    least["rewards"][1]["weight"] = -0.5
    refused = refusal(resolver, steering=least)
    assert (refused.status, refused.param) == (400, "steering.rewards[1].weight")


def test_a_budget_of_calls_is_kept(resolver):
    cut = generation(resolver, steering={**SYMMETRY, "num_draws": 16, "max_nfe": 100})
    assert cut.num_steps * (1 + 4 * cut.arguments["num_draws"]) <= 100
    assert generation(resolver, steering={**SYMMETRY, "max_nfe": 2}).method == "none"


def test_a_prompt_is_the_name_of_a_class(resolver):
    assert generation(resolver, prompt="8").label == 8
    assert generation(resolver, class_label=3).label == 3
    assert refusal(resolver, prompt="a nice eight").param == "prompt"
    assert refusal(resolver, prompt="8", class_label=3).param == "prompt"


def test_rows_count_images_particles_and_draws(resolver):
    searched = generation(
        resolver, n=3, steering={**SYMMETRY, "method": "search", "num_particles": 4, "num_draws": 5, "num_steps": 7}
    )
    assert row_steps(searched) == 3 * 4 * 5 * 7


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"model": "gone"}, "model", "expected one of tiny"),
        ({"class_label": 10}, "class_label", "0 to 9"),
        ({"cfg_scale": 2.0}, "cfg_scale", "null alone"),
        ({"size": "1024x1024"}, "size", "auto or 8x8"),
        ({"steering": {"method": "gradient"}}, "steering.rewards", "at least one"),
        ({"steering": {**SYMMETRY, "method": "none"}}, "steering.method", "takes no rewards"),
        ({"steering": {**SYMMETRY, "num_particles": 4}}, "steering.num_particles", "unknown key"),
        ({"steering": {**SYMMETRY, "num_step": 4}}, "steering.num_step", "did you mean num_steps"),
        ({"steering": {**SYMMETRY, "reward": 4}}, "steering.reward", "unknown field"),
        ({"steering": {**SYMMETRY, "draws_at_once": 4}}, "steering.draws_at_once", "unknown field"),
        ({"steering": {**SYMMETRY, "num_draws": 0}}, "steering.num_draws", "at least 1"),
        ({"steering": {**SYMMETRY, "method": "smc", "dynamics": "ode"}}, "steering.dynamics", "sde"),
        ({"steering": {"rewards": [{"name": "nicer"}]}}, "steering.rewards[0].name", "expected one of symmetry"),
        ({"steering": {"rewards": [{"name": "class_mixture"}]}}, "steering.rewards[0].name", "not served"),
        (
            {"steering": {"rewards": [{"name": "symmetry", "params": {"scael": 1}}]}},
            "steering.rewards[0].params.scael",
            "did you mean",
        ),
        (
            {"steering": {"rewards": [{"name": "symmetry"}, {"name": "brightness", "params": {"target": 3}}]}},
            "steering.rewards[1].params.target",
            "at most 1",
        ),
        (
            {"steering": {"rewards": [{"name": "masked_observation", "params": {"row": 10**6}}]}},
            "steering.rewards[0].params.row",
            "at most 195",
        ),
        (
            {"steering": {"rewards": [{"name": "masked_observation", "params": {"observed": "AAAA"}}]}},
            "steering.rewards[0].params.observed",
            "expected a PNG",
        ),
    ],
)
def test_a_refusal_names_field_value_and_what_is_allowed(resolver, fields, param, says):
    refused = refusal(resolver, **fields)
    assert refused.status == (404 if param in ("model", "steering.rewards[0].name") else 400)
    assert refused.param == param
    assert refused.message.startswith(param)
    assert says in refused.message
    assert "\n" not in refused.message


@pytest.mark.parametrize(
    ("limits", "fields", "param"),
    [
        ({"prompt_chars": 3}, {"prompt": "four"}, "prompt"),
        ({"images": 2}, {"n": 3}, "n"),
        ({"draws": 8}, {"steering": {**SYMMETRY, "num_draws": 9}}, "steering.num_draws"),
        ({"particles": 8}, {"steering": {**SYMMETRY, "method": "best_of_n"}}, "steering.num_particles"),
        ({"steps": 10}, {"steering": {"num_steps": 11}}, "steering.num_steps"),
        ({"rewards": 1}, {"steering": {"rewards": [{"name": "symmetry"}] * 2}}, "steering.rewards"),
        ({"row_steps": 99}, {"n": 2}, "steering"),
        ({"deadline_s": 5}, {"steering": {"deadline_s": 6}}, "steering.deadline_s"),
        (
            {"image_pixels": 63},
            {"steering": {"rewards": [{"name": "masked_observation", "params": {"observed": "IMAGE"}}]}},
            "steering.rewards[0].params.observed",
        ),
    ],
)
def test_every_size_has_a_limit(resolver, limits, fields, param):
    text = encode_png(torch.zeros(1, 8, 8))
    if "observed" in param:
        fields["steering"]["rewards"][0]["params"]["observed"] = text
    assert refusal(replace(resolver, limits=Limits(**limits)), **fields).param == param


def test_two_rewards_of_a_kind_are_told_apart(resolver):
    two = generation(resolver, steering={"rewards": [{"name": "symmetry"}, {"name": "symmetry", "weight": 2.0}]})
    assert [choice.title for choice in two.rewards] == ["symmetry", "symmetry_2"]
    assert two.without("symmetry").rewards == two.rewards[1:]
    assert two.without("symmetry").without("symmetry_2").method == "none"


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.has_network])
def test_every_reward_has_defaults_with_which_it_can_be_built_and_described(card, name):
    params = resolve_params(name, card, {}, place="params", max_pixels=64)
    assert params == defaults(name, card)
    assert RewardSource(card).build(name, params).name == name
    described = describe(name, [card])["parameters"]
    assert described.keys() == params.keys()
    assert all(parameter["expected"] for parameter in described.values())


def test_a_model_without_a_classifier_has_no_class_rewards(card):
    left = rewards_of(replace(card, has_classifier=False, num_heldout=0))
    assert {name for name in left if not KINDS[name].has_network} == {"symmetry", "brightness"}


def test_an_observation_may_be_brought_along(card):
    image = (torch.rand(1, 8, 8) * 255).round() / 255
    given = {"observed": encode_png(image), "half": "left"}
    reward = RewardSource(card).build("masked_observation", {**defaults("masked_observation", card), **given})
    best = reward(image[None])
    assert float(best) == pytest.approx(0, abs=1e-9)
    half = image.clone()
    half[..., 4:] = 0
    assert float(reward(half[None])) == pytest.approx(0, abs=1e-9)


def test_a_picture_survives_its_encoding(card):
    for channels in (1, 3):
        image = (torch.rand(channels, 5, 7) * 255).round() / 255
        back = decode_png(encode_png(image), event_shape=(channels, 5, 7), max_pixels=35)
        torch.testing.assert_close(back, image)
    with pytest.raises(ValueError, match="7x5 pixels; expected 8x8"):
        decode_png(encode_png(torch.rand(1, 5, 7)), event_shape=(1, 8, 8), max_pixels=64)
