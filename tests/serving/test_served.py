"""The application on a real Ray Serve, asked by the real `openai` client: one application for all tests here."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import ray
import torch
from ray import serve

import mfm_ray as mfm
from serve.app import build_app
from serve.catalogue import RewardSource, defaults
from serve.direct import DirectPath
from serve.generation import Finished
from serve.models import ModelCard
from serve.pictures import decode_png, encode_png
from serve.remote_reward import Line, RemoteReward
from serve.resolve import Resolver
from serve.reward import canonical
from serve.schema import GenerationRequest
from serve.settings import AppSettings, Limits

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

APP, KEY = "mfm-tests", "key-of-the-tests"
SMALL = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 1, "graceful_shutdown_timeout_s": 2}
SYMMETRY = {"rewards": [{"name": "symmetry"}], "num_steps": 8}
BOTH = {"rewards": [{"name": "symmetry", "weight": 0.7}, {"name": "brightness", "weight": -0.2}], "num_steps": 6}
IMPATIENT = {"downscale_delay_s": 1, "look_back_period_s": 3, "metrics_interval_s": 1}
ENDLESS = {"rewards": [{"name": "symmetry"}], "num_steps": 1000, "num_draws": 16}


@dataclass(frozen=True)
class Served:
    url: str
    openai: openai.OpenAI
    http: httpx.Client
    models: dict[str, str]

    def generate(self, **body: Any) -> dict[str, Any]:
        response = self.http.post("/v1/images/generations", json={"model": "tiny", **body})
        assert response.status_code == 200, response.text
        return response.json()

    def sampler(self) -> Any:
        return serve.get_deployment_handle("sampler", APP)


@pytest.fixture(scope="module")
def served(
    ray_session: None, tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    never = {"min_replicas": 0, "max_replicas": 1, "initial_replicas": 0}
    settings = AppSettings.model_validate(
        {
            "model": tiny_models,
            "keys_file": str(keys),
            "sampler": {**SMALL, "models_in_memory": 1},
            "ingress": SMALL,
            "rewards": [
                {"name": "symmetry", **SMALL},
                {"name": "brightness", "placement": "colocated"},
                {
                    "name": "class_probability",  # a reward that no machine here can have
                    **SMALL,
                    "ray_actor_options": {"resources": {"absent": 1}},
                    "autoscaling_config": never,
                    "timeout_s": 0.2,
                    "attempts": 2,
                },
                {"name": "class_mixture", **SMALL, "autoscaling_config": {**never, **IMPATIENT}, "timeout_s": 60},
            ],
        }
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(settings), name=APP, route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as http:
        yield Served(url, client, http, tiny_models)
    serve.shutdown()


def pixels(text: str) -> torch.Tensor:
    return decode_png(text, event_shape=(1, 8, 8), max_pixels=64)


def as_served(images: torch.Tensor) -> list[str]:
    """PNGs that a client gets of images."""
    return [encode_png(image) for image in images]


def local_images(served: Served, *, n: int = 1, seed: int, steering: dict[str, Any], model: str = "tiny") -> Any:
    """What the library makes of a request, in this process."""
    card = ModelCard(model, served.models[model], (1, 8, 8), "digits", 10, tuple("0123456789"), (), True, 196)
    resolver = Resolver({model: card}, ["symmetry", "brightness", "class_probability", "class_mixture"], Limits())
    request = {"n": n, "seed": seed, "steering": steering}
    generation = resolver.generation(GenerationRequest.model_validate(request))
    source = RewardSource(card)
    parts = [source.build(choice.name, choice.params) for choice in generation.rewards]
    weights = [choice.weight for choice in generation.rewards]
    reward: Any = parts[0] if weights == [1.0] else mfm.rewards.WeightedSum(rewards=parts, weights=weights)
    return mfm.sample(
        mfm.load_flow_map(card.source),
        num_samples=n,
        steering=mfm.GradientGuidance(reward, **generation.arguments),
        num_steps=generation.num_steps,
        dynamics=generation.dynamics,
        seed=seed,
    )


def test_the_openai_client_gets_the_images_that_the_library_makes(served: Served) -> None:
    answer = served.openai.images.generate(
        model="tiny", prompt="", n=3, response_format="b64_json", extra_body={"seed": 4, "steering": SYMMETRY}
    )
    expected = local_images(served, n=3, seed=4, steering=SYMMETRY)
    assert [image.b64_json for image in answer.data] == as_served(expected.images)
    said = answer.data[0].model_extra
    assert said["reward"] == float(expected.rewards[0])
    assert said["nfe"] == expected.nfe
    assert answer.model_extra["steering"]["num_draws"] == 1


def test_a_remote_and_a_colocated_reward_together_are_the_weighted_sum(served: Served) -> None:
    answer = served.generate(seed=2, n=2, steering=BOTH)
    expected = local_images(served, n=2, seed=2, steering=BOTH)
    assert [image["b64_json"] for image in answer["data"]] == as_served(expected.images)
    assert [image["reward"] for image in answer["data"]] == expected.rewards.tolist()
    named = answer["data"][0]["rewards"]
    assert 0.7 * named["symmetry"] - 0.2 * named["brightness"] == pytest.approx(answer["data"][0]["reward"], rel=1e-5)


@pytest.mark.parametrize("transport", ["serve", "direct"])
def test_steering_by_a_reward_in_another_process_changes_no_bit(served: Served, transport: str) -> None:
    source = RewardSource(ModelCard("tiny", served.models["tiny"], (1, 8, 8), "digits", 10, (), (), True, 0))
    params = defaults("symmetry", source.card)
    handle = serve.get_deployment_handle("reward_symmetry", APP)
    if transport == "serve":
        line = Line(handle, name="symmetry", timeout_s=60, attempts=3)
    else:  # a line without a handle: nothing else can answer
        path = DirectPath(handle, name="symmetry", timeout_s=60)
        path.refresh()
        line = Line(None, name="symmetry", timeout_s=60, attempts=1, direct=path)
    far = RemoteReward(line, name="symmetry", model="tiny", params=canonical(params))
    flow_map = mfm.load_flow_map(served.models["tiny"])
    local, remote = (
        mfm.sample(flow_map, num_samples=5, steering=mfm.GradientGuidance(reward, num_draws=3), num_steps=4, seed=1)
        for reward in (source.build("symmetry", params), far)
    )
    assert torch.equal(local.images, remote.images)
    assert torch.equal(local.rewards, remote.rewards)
    if transport == "direct":
        path.close()


def test_images_do_not_depend_on_what_else_is_in_flight(served: Served) -> None:
    wishes = [{"seed": seed, "n": 1 + seed % 2, "steering": (SYMMETRY, BOTH)[seed % 2]} for seed in range(6)]
    answers: dict[int, Any] = {}

    def ask(index: int) -> None:
        answers[index] = served.generate(**wishes[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(wishes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, wish in enumerate(wishes):
        got = [image["b64_json"] for image in answers[index]["data"]]
        assert got == as_served(local_images(served, **wish).images)


def test_openai_streaming_shows_sharp_previews_and_ends_in_the_same_image(served: Served) -> None:
    extra = {"seed": 4, "steering": SYMMETRY}
    stream = served.openai.images.generate(
        model="tiny", prompt="", n=1, stream=True, partial_images=2, extra_body=extra
    )
    events = list(stream)
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert pixels(events[0].b64_json).std() > 0
    assert events[-1].b64_json == as_served(local_images(served, seed=4, steering=SYMMETRY).images)[0]
    assert events[-1].usage.model_extra["nfe"] > 0


def test_the_async_client_with_several_requests_at_once(served: Served) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
            calls = [client.images.generate(model="tiny", prompt=str(i), extra_body={"seed": i}) for i in range(3)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(ask())
    assert len({answer.data[0].b64_json for answer in answers}) == 3


def test_the_async_client_streams_too(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
            stream = await client.images.generate(model="tiny", prompt="3", n=2, stream=True, partial_images=1)
            return [event.type async for event in stream]

    assert asyncio.run(ask()) == ["image_generation.partial_image"] * 2 + ["image_generation.completed"] * 2


def test_models_share_a_replica_one_at_a_time(served: Served) -> None:
    assert [model.id for model in served.openai.models.list().data] == ["tiny", "other"]
    images = {
        model: served.generate(model=model, seed=1, steering=SYMMETRY)["data"][0]["b64_json"]
        for model in ("other", "tiny", "other")
    }
    for model, image in images.items():
        assert image == as_served(local_images(served, seed=1, steering=SYMMETRY, model=model).images)[0]


@pytest.mark.parametrize("name", ["symmetry", "brightness"])
def test_scores_of_rewards_in_either_place(served: Served, name: str) -> None:
    images = torch.rand(3, 1, 8, 8)
    texts = [encode_png(image) for image in images]
    answer = served.http.post(f"/v1/rewards/{name}/score", json={"images": texts, "model": "tiny"}).json()
    card = ModelCard("tiny", served.models["tiny"], (1, 8, 8), "digits", 10, (), (), True, 0)
    reward = RewardSource(card).build(name, defaults(name, card))
    expected = reward(torch.stack([pixels(text) for text in texts]))
    assert answer["scores"] == pytest.approx(expected.tolist(), rel=1e-6)


def test_refusals_reach_the_client_as_openais_errors(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        served.openai.images.generate(model="tiny", prompt="", extra_body={"steering": {"num_step": 1}})
    assert wrong.value.param == "steering.num_step"
    assert "," not in wrong.value.response.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError):
        served.openai.images.generate(model="gone", prompt="")
    with pytest.raises(openai.AuthenticationError):
        served.openai.with_options(api_key="wrong").images.generate(model="tiny", prompt="")
    with pytest.raises(openai.BadRequestError, match="model: missing; expected one of tiny, other"):
        served.openai.images.generate(prompt="")


def test_a_reward_that_is_down_is_503_by_its_name_or_dropped_when_the_request_says_so(served: Served) -> None:
    rewards = [{"name": "symmetry"}, {"name": "class_probability"}]
    with pytest.raises(openai.InternalServerError, match="class_probability") as down:
        served.openai.images.generate(
            model="tiny", prompt="", extra_body={"steering": {"rewards": rewards, "num_steps": 8}}
        )
    assert (down.value.status_code, down.value.code) == (503, "reward_down")
    dropped = served.generate(seed=3, steering={"rewards": rewards, "num_steps": 8, "on_reward_failure": "drop"})
    assert dropped["steering"]["dropped"] == ["class_probability"]
    assert dropped["data"][0]["b64_json"] == served.generate(seed=3, steering=SYMMETRY)["data"][0]["b64_json"]


def test_a_reward_that_returns_no_number_is_an_error_that_names_it(served: Served) -> None:
    steering = {"rewards": [{"name": "brightness", "params": {"scale": 1e-30}}], "num_steps": 2}
    response = served.http.post("/v1/images/generations", json={"model": "tiny", "steering": steering})
    assert response.status_code == 503
    error = response.json()["error"]
    assert error["code"] == "reward_failed"
    assert "reward brightness" in error["message"]
    assert response.headers["x-should-retry"] == "false"


def wait_for(served: Served, running: bool) -> None:
    """Until the sampler has requests, or has none."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        load = served.sampler().load.remote().result(timeout_s=60)
        if bool(load["jobs_running"] + load["jobs_waiting"]) is running:
            return
        time.sleep(0.05)
    pytest.fail(f"after two minutes the sampler has {load}")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(served: Served, stream: bool) -> None:
    body = {"model": "tiny", "n": 16, "stream": stream, "partial_images": 1, "steering": ENDLESS}

    async def ask_and_leave() -> None:
        async with httpx.AsyncClient(base_url=served.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
            asked = asyncio.create_task(client.post("/v1/images/generations", json=body, timeout=None))
            await asyncio.to_thread(wait_for, served, True)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(ask_and_leave())
    wait_for(served, running=False)


def test_a_deadline_ends_the_work_too(served: Served) -> None:
    body = {"model": "tiny", "n": 16, "steering": {**ENDLESS, "deadline_s": 0.5}}
    response = served.http.post("/v1/images/generations", json=body)
    assert response.status_code == 504
    wait_for(served, running=False)


def kill_replicas(deployment: str) -> None:
    """As `kill -9` would, in the middle of whatever they do."""
    named = ray.util.list_named_actors(all_namespaces=True)
    replicas = [actor for actor in named if f"{APP}#{deployment}#" in actor["name"]]
    assert replicas, named
    for replica in replicas:
        ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]), no_restart=True)


@pytest.mark.parametrize("deployment", ["sampler", "reward_symmetry"])
def test_a_request_survives_its_replicas_and_gets_the_same_image(served: Served, deployment: str) -> None:
    wish = {"seed": 9, "n": 2, "steering": {"rewards": [{"name": "symmetry"}], "num_steps": 100}}
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(served.generate(**wish)))
    asking.start()
    wait_for(served, running=True)
    time.sleep(0.3)  # into its steps; wherever it is, the image is the same
    kill_replicas(deployment)
    asking.join(timeout=120)
    assert [image["b64_json"] for image in answers[0]["data"]] == as_served(local_images(served, **wish).images)


def replicas(deployment: str) -> int:
    states = serve.status().applications[APP].deployments[deployment].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


@pytest.mark.slow
def test_a_reward_comes_up_from_zero_stays_while_it_is_asked_directly_and_goes_again(served: Served) -> None:
    """Serve does not see direct calls: what keeps the replica is the backlog that it reports itself."""
    wish = {"seed": 5, "steering": {"rewards": [{"name": "class_mixture"}], "num_steps": 20}}
    expected = as_served(local_images(served, **wish).images)
    for _ in range(2):
        end, counts = time.monotonic() + 20, list[int]()
        assert [image["b64_json"] for image in served.generate(**wish)["data"]] == expected
        while time.monotonic() < end:
            counts.append(replicas("reward_class_mixture"))
            assert [image["b64_json"] for image in served.generate(**wish)["data"]] == expected
        assert counts
        assert set(counts) == {1}
        end = time.monotonic() + 120
        while replicas("reward_class_mixture") > 0:
            assert time.monotonic() < end
            time.sleep(0.5)


def test_the_sampler_streams_full_precision(served: Served) -> None:
    """The events that the endpoint gets: images equal to the bit, before any PNG."""
    card = ModelCard("tiny", served.models["tiny"], (1, 8, 8), "digits", 10, (), (), True, 0)
    resolver = Resolver({"tiny": card}, ["symmetry", "brightness"], Limits())
    request = GenerationRequest.model_validate({"seed": 2, "n": 2, "steering": BOTH})
    handle = served.sampler().options(stream=True, multiplexed_model_id="tiny")
    events = list(handle.generate.remote(resolver.generation(request)))
    assert isinstance(events[-1], Finished)
    expected = local_images(served, n=2, seed=2, steering=BOTH)
    assert torch.equal(torch.tensor(events[-1].images), expected.images)
    assert torch.equal(torch.tensor(events[-1].reward), expected.rewards)


def test_a_png_is_what_arrives(served: Served) -> None:
    assert base64.b64decode(served.generate(seed=1)["data"][0]["b64_json"]).startswith(b"\x89PNG")
    assert served.http.get("/readyz").status_code == 200
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
