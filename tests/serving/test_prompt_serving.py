"""Prompt rewards as they are served: whose prompt a request has, one pass for many prompts, the same bits as here."""

import asyncio
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.served_reward import ServedReward
from mfm_ray.config import load_config
from mfm_ray.errors import InputError
from mfm_ray.rewards import PickScore
from mfm_ray.steering.reward_gradient import evaluate
from serve.app import build_app
from serve.catalogue import KINDS, RewardSource, describe, network_arguments, reads_prompts, resolve_params
from serve.errors import ApiError
from serve.pictures import encode_png
from serve.remote_reward import Line, RemoteReward
from serve.resolve import Resolver
from serve.reward import RewardServer, canonical
from serve.schema import GenerationRequest
from serve.settings import AppSettings, Limits, RewardSettings
from tests.rewards import tiny_networks
from tests.serving.test_remote_reward import FakeHandle

CAT, DOG = "a photo of a tabby cat", "a dog"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks") / "clip"
    tiny_networks.clip_folder(folder, image_size=28)
    return str(folder)


@pytest.fixture(scope="module")
def server(card, source):
    return RewardServer([card], RewardSettings(name="pickscore", weights={"source": source}))


@pytest.fixture
def prompted(card):
    return Resolver({card.id: card}, ["symmetry", "pickscore", "aesthetic"], Limits(prompt_chars=100))


def remote(server, card, prompt, threshold=None):
    line = Line(FakeHandle(server), name="pickscore", timeout_s=30, attempts=1)
    params = canonical({"prompt": prompt, "threshold": threshold})
    return RemoteReward(line, name="pickscore", model=card.id, params=params)


def test_values_and_gradients_equal_the_local_ones_to_the_bit(card, server, source):
    samples = torch.rand(6, 1, 8, 8) * 1.2 - 0.1
    for threshold in (None, float(PickScore(prompt=CAT, source=source)(samples).median())):
        params = {"prompt": CAT, "threshold": threshold}
        local = RewardSource(card, {"pickscore": {"source": source}}).build("pickscore", params)
        far = remote(server, card, CAT, threshold)
        assert torch.equal(far(samples), local(samples))
        gradients = []
        for reward in (local, far):
            inner = samples.clone().requires_grad_()
            gradients.append(torch.autograd.grad(evaluate(reward, inner).sum(), inner)[0])
        assert torch.equal(*gradients)
        assert (gradients[0].flatten(1).abs().sum(1) > 0).sum() == (6 if threshold is None else 3)


def test_callers_with_different_prompts_and_models_share_one_pass(card, source):
    """Two models, three sets of parameters, one evaluation; images of another shape are another one."""
    other = replace(card, id="other")
    server = RewardServer([card, other], RewardSettings(name="pickscore", weights={"source": source}))
    samples = [np.random.default_rng(seed).random((count, 1, 8, 8), np.float32) for seed, count in enumerate((3, 2, 1))]
    wide = np.random.default_rng(9).random((2, 3, 8, 8), np.float32)
    passes, evaluate_batch = [], server._batcher._evaluate

    def note(key, rows, labels):
        passes.append((key, len(rows), len(set(labels))))
        return evaluate_batch(key, rows, labels)

    server._batcher._evaluate = note
    vision, images = server._scorer.clip.network.vision_model, []
    hook = vision.register_forward_hook(lambda module, given, out: images.append(len(out[0])))
    asked = [("tiny", CAT, samples[0]), ("other", DOG, samples[1]), ("tiny", "cat", samples[2])]

    async def all_at_once():
        with server._batcher._changed:  # the thread waits until all have been asked
            calls = [
                server._submit(("gradient", model, canonical({"prompt": prompt, "threshold": None})), rows, False)
                for model, prompt, rows in [*asked, ("tiny", CAT, wide)]
            ]
        return await asyncio.gather(*map(asyncio.wrap_future, calls))

    results = asyncio.run(all_at_once())
    hook.remove()
    assert passes == [(("gradient", (1, 8, 8)), 6, 3), (("gradient", (3, 8, 8)), 2, 1)]
    assert images == [8, 4]  # one call of the image encoder for all six, padded to a multiple of four
    for (_, prompt, rows), (values, gradients) in zip(asked, results[:3], strict=True):
        inner = torch.tensor(rows, requires_grad=True)
        alone = PickScore(prompt=prompt, source=source)(inner)
        assert values.tolist() == alone.tolist()
        assert np.array_equal(gradients, torch.autograd.grad(alone.sum(), inner)[0].numpy())


def test_scores_are_of_clamped_images(card, server, source):
    images = torch.rand(3, 1, 8, 8) * 2 - 0.5
    params = canonical({"prompt": CAT, "threshold": None})
    scores = asyncio.run(server.score(card.id, params, images.numpy()))
    assert scores.tolist() == PickScore(prompt=CAT, source=source)(images.clamp(0, 1)).tolist()


def generation(resolver, **fields):
    return resolver.generation(GenerationRequest.model_validate(fields))


def steering(name="pickscore", **params):
    return {"rewards": [{"name": name, "params": params}]}


def test_the_prompt_of_a_reward_is_its_own_or_the_requests_or_the_name_of_its_class(prompted):
    def prompt_of(**fields):
        return generation(prompted, **fields).rewards[0].params["prompt"]

    assert prompt_of(prompt=DOG, steering=steering(prompt=CAT)) == CAT
    assert prompt_of(prompt=DOG, steering=steering()) == DOG
    assert prompt_of(prompt="3", steering=steering()) == "3"
    assert prompt_of(class_label=4, steering=steering()) == "4"
    with pytest.raises(ApiError) as refused:
        generation(prompted, steering=steering())
    assert refused.value.param == "steering.rewards[0].params.prompt"
    assert "empty; expected a text here, or as the request's prompt" in refused.value.message


def test_a_free_prompt_is_for_rewards_and_a_class_name_still_the_class(prompted):
    assert generation(prompted, prompt=DOG, steering=steering()).label is None
    assert generation(prompted, prompt=DOG, class_label=2, steering=steering()).label == 2
    assert generation(prompted, prompt="3", steering=steering()).label == 3
    for fields in ({"prompt": DOG}, {"prompt": DOG, "steering": steering("aesthetic")}):
        with pytest.raises(ApiError) as refused:
            generation(prompted, **fields)
        assert refused.value.param == "prompt"


@pytest.mark.parametrize("value", [3, None, ["a"], "x" * 101])
def test_a_prompt_that_is_no_text_or_too_long_is_refused_by_its_place(prompted, value):
    with pytest.raises(ApiError) as refused:
        generation(prompted, prompt=DOG, steering=steering(prompt=value))
    assert (refused.value.status, refused.value.param) == (400, "steering.rewards[0].params.prompt")


def test_scoring_takes_a_prompt(backend, prompted):
    from starlette.testclient import TestClient

    from serve.api import build_api
    from serve.keys import Keys

    client = TestClient(build_api(backend, prompted, Keys.of([]), heartbeat_s=10), client=("127.0.0.1", 50000))
    images = [encode_png(torch.rand(1, 8, 8))]

    def post(name, **body):
        return client.post(f"/v1/rewards/{name}/score", json={"images": images, **body})

    assert post("pickscore", prompt=CAT).json()["params"] == {"prompt": CAT, "threshold": None}
    assert post("pickscore", params={"prompt": CAT}).json()["params"]["prompt"] == CAT
    assert post("aesthetic").json()["params"] == {"threshold": None}
    for response, param in (
        (post("pickscore"), "params.prompt"),
        (post("pickscore", prompt=CAT, params={"prompt": DOG}), "prompt"),
        (post("aesthetic", prompt=CAT), "prompt"),
        (post("pickscore", prompt="x" * 101), "params.prompt"),
        (post("pickscore", prompt=CAT, params={"source": "/etc"}), "params.source"),
    ):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


def test_what_is_told_of_a_prompt_reward_is_its_prompt_and_no_path(card):
    for name in ("pickscore", "hpsv2", "image_reward", "clip_score"):
        assert reads_prompts(name)
        assert describe(name, [card])["parameters"].keys() == {"prompt", "threshold"}
    assert describe("aesthetic", [card])["parameters"].keys() == {"threshold"}
    with pytest.raises(InputError, match=r"^params.prompt: empty"):
        resolve_params("pickscore", card, {"prompt": " "}, place="params", max_pixels=64)


def test_networks_are_served_where_the_operator_names_them(tiny_models, source):
    def deployments(**settings):
        app = build_app(AppSettings.model_validate({"model": tiny_models["tiny"], **settings}))
        return {node.name: node for node in found(app)}

    assert not any(KINDS[name.removeprefix("reward_")].has_network for name in deployments() if "reward_" in name)
    environment = {"env_vars": {"HF_HUB_OFFLINE": "1"}}
    actor = {"num_gpus": 1, "num_cpus": 2, "runtime_env": environment}
    own = {"name": "pickscore", "weights": {"source": source}, "ray_actor_options": actor}
    options = deployments(rewards=[own])["reward_pickscore"].ray_actor_options
    assert {key: options[key] for key in actor} == actor
    with pytest.raises(InputError, match=r"^rewards.pickscore.weights.sauce: unknown key; .* did you mean source"):
        deployments(rewards=[{"name": "pickscore", "weights": {"sauce": source}}])
    for key in ("prompt", "name"):
        with pytest.raises(InputError, match=rf"^rewards.pickscore.weights.{key}: unknown key"):
            deployments(rewards=[{"name": "pickscore", "weights": {key: "x"}}])
    with pytest.raises(InputError, match=r"^rewards.symmetry.weights: this reward has no network"):
        deployments(rewards=[{"name": "symmetry", "weights": {"source": source}}])


def found(app):
    """The deployments of an application, those that others are bound to among them."""
    bound = app._bound_deployment
    yield bound
    for argument in (*bound.init_args, *bound.init_kwargs.values()):
        for inner in argument.values() if isinstance(argument, dict) else [argument]:
            if hasattr(inner, "_bound_deployment"):
                yield from found(inner)


def test_a_fine_tuning_asks_a_served_prompt_reward_for_its_prompt_alone(tiny_models, source):
    def asked(*words):
        words = [f"model={tiny_models['tiny']}", "reward_app=mfm", "reward=pickscore", *words]
        return ServedReward.of(load_config("finetune", words)).names()

    assert asked(f"reward.prompt='{CAT}'") == ["pickscore"]
    with pytest.raises(InputError, match=r"^reward.prompt: empty"):
        asked()
    with pytest.raises(InputError, match=r"^reward.source=.*: a served pickscore has the weights of its deployment"):
        asked(f"reward.prompt='{CAT}'", f"reward.source={source}")


def test_what_an_operator_leaves_out_stands_in_the_rewards_file(source):
    whole = network_arguments("pickscore", {"source": source})
    assert whole == {"source": source, "tokenizer": None, "rows_per_call": 8}
    assert network_arguments("aesthetic", {})["head"].startswith("hf://")
    assert network_arguments("symmetry", {}) == {}


def test_a_replica_whose_weights_are_missing_does_not_start(card, tmp_path):
    with pytest.raises(InputError, match=r"source=.*/nowhere does not exist"):
        RewardServer([card], RewardSettings(name="hpsv2", weights={"source": str(tmp_path / "nowhere")}))


def test_a_colocated_reward_of_two_prompts_has_one_network(card, source):
    rewards = RewardSource(card, {"pickscore": {"source": source}})
    one, two = (rewards.build("pickscore", {"prompt": prompt, "threshold": None}) for prompt in (CAT, DOG))
    assert one.scorer is two.scorer
    assert copy.deepcopy(one.scorer)(torch.rand(1, 1, 8, 8), [CAT]).shape == (1,)
