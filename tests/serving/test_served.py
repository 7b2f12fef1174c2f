"""The application on a real Ray Serve, asked by the real `openai` client: one application for all tests here."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from ray import serve

import mfm_ray as mfm
from jobs import sample
from jobs.contract import JobRun, Outcome
from mfm_ray.config import load_config
from mfm_ray.storage import Storage
from serve.app import build_app
from serve.catalogue import RewardSource, defaults
from serve.direct import DirectPath
from serve.generation import Failed, Finished
from serve.models import ModelCard, read_models
from serve.pictures import decode_png, encode_png
from serve.remote_reward import Line, RemoteReward
from serve.resolve import Resolver
from serve.reward import canonical
from serve.schema import GenerationRequest
from serve.settings import AppSettings, Limits
from tests.rewards import tiny_networks

from ..conftest import LatentModel
from .hostile import NO_HTTP, goes_away, raw

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

APP, KEY = "mfm-tests", "key-of-the-tests"
SMALL = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 1, "graceful_shutdown_timeout_s": 2}
SYMMETRY = {"rewards": [{"name": "symmetry"}], "num_steps": 8}
BOTH = {"rewards": [{"name": "symmetry", "weight": 0.7}, {"name": "brightness", "weight": -0.2}], "num_steps": 6}
IMPATIENT = {"downscale_delay_s": 1, "look_back_period_s": 3, "metrics_interval_s": 1}
ENDLESS = {"rewards": [{"name": "symmetry"}], "num_steps": 1000, "num_draws": 16}
OWN_ENVIRONMENT = {"num_cpus": 0.1, "runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1"}}}
"""Of the prompt reward: a runtime environment that no other deployment has."""
ROWS_OF_ENDLESS = 16 * 16
"""Of 16 images."""
REQUESTS_HELD = 8
"""By each of the two replicas of the endpoint."""
# as jobs.tune writes them; of the model "tuned" alone, so that the other models show the built-in ones
TUNED = ["steering=gradient", "reward=symmetry", "++steering.num_draws=2", "++steering.guidance_scale=0.5"]
PRESETS = {
    "low": [*TUNED, "num_steps=8", "seed=7"],
    "medium": ["steering=search", "reward=symmetry", "++steering.num_particles=3", "num_steps=6", "max_nfe=40"],
    "high": [*TUNED, "++steering.renormalise=rescale", "num_steps=12", "dynamics=ode"],
}


@dataclass(frozen=True)
class Served:
    url: str
    openai: openai.OpenAI
    http: httpx.Client
    models: dict[str, str]
    presets: str
    clip: str
    """Source of the prompt reward."""

    def generate(self, **body: Any) -> dict[str, Any]:
        response = self.http.post("/v1/images/generations", json={"model": "tiny", **body})
        assert response.status_code == 200, response.text
        return response.json()

    def sampler(self) -> Any:
        return serve.get_deployment_handle("sampler", APP)


@pytest.fixture(scope="module")
def served(
    serve_url: str, tiny_models: dict[str, str], latent_model: LatentModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    keys, presets = folder / "keys", folder / "presets.yaml"
    keys.write_text(KEY)
    presets.write_text(yaml.safe_dump({quality: {"words": words} for quality, words in PRESETS.items()}))
    source = str(folder / "clip")
    tiny_networks.clip_folder(folder / "clip", image_size=28)
    models = {**tiny_models, "tuned": tiny_models["tiny"], "latents": latent_model.model}
    never = {"min_replicas": 0, "max_replicas": 1, "initial_replicas": 0}
    settings = AppSettings.model_validate(
        {
            "model": models,
            "presets": {"tuned": str(presets)},
            "keys_file": str(keys),
            "heartbeat_s": 0.2,
            "limits": {"requests": REQUESTS_HELD, "rows_waiting": 4 * ROWS_OF_ENDLESS},
            "sampler": {**SMALL, "models_in_memory": 1, "max_rows": ROWS_OF_ENDLESS},
            "ingress": {**SMALL, "num_replicas": 2},
            "rewards": [
                {"name": "symmetry", **SMALL, "patience_s": 60},
                {"name": "brightness", "placement": "colocated"},
                {
                    "name": "class_probability",  # a reward that no machine here can have
                    **SMALL,
                    "ray_actor_options": {"resources": {"absent": 1}},
                    "autoscaling_config": never,
                    "timeout_s": 0.2,
                    "attempts": 2,
                },
                {"name": "pickscore", **SMALL, "ray_actor_options": OWN_ENVIRONMENT, "weights": {"source": source}},
                {"name": "class_mixture", **SMALL, "autoscaling_config": {**never, **IMPATIENT}, "timeout_s": 60},
            ],
        }
    )
    serve.run(build_app(settings), name=APP, route_prefix="/")
    with (
        openai.OpenAI(base_url=f"{serve_url}/v1", api_key=KEY, max_retries=0, timeout=120) as client,
        httpx.Client(base_url=serve_url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as http,
    ):
        yield Served(serve_url, client, http, models, str(presets), source)


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


def test_a_call_of_a_sampler_passes_those_of_a_training_that_wait_at_the_same_replica(served: Served) -> None:
    handle, calls, rows = serve.get_deployment_handle("reward_symmetry", APP), 16, 30_000
    paths = [DirectPath(handle, name="symmetry", timeout_s=60, background=background) for background in (True, False)]
    for path in paths:
        path.refresh()
    training, sampler = (
        Line(None, name="symmetry", timeout_s=60, attempts=1, direct=path, background=path is paths[0])
        for path in paths
    )
    params = canonical(defaults("symmetry", read_models({"tiny": served.models["tiny"]})["tiny"]))
    samples = np.random.default_rng(0).random((rows, 1, 8, 8), np.float32)
    expected = sampler.call("value_and_gradient", "tiny", params, samples[:4])
    with concurrent.futures.ThreadPoolExecutor(calls) as pool:
        asked = [pool.submit(training.call, "value_and_gradient", "tiny", params, samples) for _ in range(calls)]
        while handle.record_autoscaling_stats.remote().result(timeout_s=30)["rows"] < 8 * rows:
            time.sleep(0.02)
            assert not all(call.done() for call in asked), "they never waited together"
        before = sum(call.done() for call in asked)
        answer = sampler.call("value_and_gradient", "tiny", params, samples[:4])
        passed = sum(call.done() for call in asked) - before
        answers = [call.result() for call in asked]
    # in the order of their coming it would have been the last of at least eight
    assert passed <= 3
    assert all(np.array_equal(one, other) for one, other in zip(answer, expected, strict=True))
    assert all(np.array_equal(part[:4], own) for each in answers for part, own in zip(each, expected, strict=True))
    for path in paths:
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
    assert [model.id for model in served.openai.models.list().data] == ["tiny", "other", "tuned", "latents"]
    images = {
        model: served.generate(model=model, seed=1, steering=SYMMETRY)["data"][0]["b64_json"]
        for model in ("other", "tiny", "other")
    }
    for model, image in images.items():
        assert image == as_served(local_images(served, seed=1, steering=SYMMETRY, model=model).images)[0]


def test_a_model_of_latents_is_served_as_pictures(served: Served) -> None:
    """Previews and images are the library's pictures, decoded; rewards, here and elsewhere, saw those."""
    shown = next(model for model in served.http.get("/v1/models").json()["data"] if model["id"] == "latents")
    assert (shown["size"], shown["channels"], shown["class_names"]) == ("8x8", 3, ["a", "b", "c"])
    body = {"model": "latents", "prompt": "b", "size": "8x8", "extra_body": {"seed": 4, "steering": BOTH}}
    stream = served.openai.images.generate(**body, stream=True, partial_images=1)
    preview, image = [decode_png(event.b64_json, event_shape=(3, 8, 8), max_pixels=64) for event in stream]
    assert preview.std() > 0
    card = read_models({"latents": served.models["latents"]})["latents"]
    resolver = Resolver({"latents": card}, ["symmetry", "brightness"], Limits())
    asked = GenerationRequest.model_validate({"prompt": "b", "seed": 4, "steering": BOTH})
    generation, source = resolver.generation(asked), RewardSource(card)
    parts = [source.build(choice.name, choice.params) for choice in generation.rewards]
    reward = mfm.rewards.WeightedSum(rewards=parts, weights=[0.7, -0.2])
    expected = mfm.sample(
        mfm.load_flow_map(served.models["latents"]),
        num_samples=1,
        steering=mfm.GradientGuidance(reward, **generation.arguments),
        num_steps=6,
        dynamics=generation.dynamics,
        seed=4,
        label=1,
    )
    assert encode_png(image) == as_served(expected.images)[0]
    with pytest.raises(openai.BadRequestError, match="size=4x4: expected auto or 8x8"):
        served.openai.images.generate(**{**body, "size": "4x4"})
    texts = [encode_png(image), encode_png(1 - image)]
    scores = served.http.post("/v1/rewards/symmetry/score", json={"images": texts, "model": "latents"}).json()
    assert len(scores["scores"]) == 2


@pytest.mark.parametrize("name", ["symmetry", "brightness"])
def test_scores_of_rewards_in_either_place(served: Served, name: str) -> None:
    images = torch.rand(3, 1, 8, 8)
    texts = [encode_png(image) for image in images]
    answer = served.http.post(f"/v1/rewards/{name}/score", json={"images": texts, "model": "tiny"}).json()
    card = ModelCard("tiny", served.models["tiny"], (1, 8, 8), "digits", 10, (), (), True, 0)
    reward = RewardSource(card).build(name, defaults(name, card))
    expected = reward(torch.stack([pixels(text) for text in texts]))
    assert answer["scores"] == pytest.approx(expected.tolist(), rel=1e-6)


def test_prompts_steer_and_score_and_requests_with_different_ones_do_not_meet(served: Served) -> None:
    """A free prompt that the model itself cannot read goes to the reward; every image is that of the library."""
    prompts = ["a photo of a tabby cat", "a dog"]
    steering = {"rewards": [{"name": "pickscore", "weight": 5.0}], "num_steps": 4, "num_draws": 2}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = [pool.submit(served.generate, prompt=prompt, n=2, seed=3, steering=steering) for prompt in prompts]
    images = []
    for prompt, answer in zip(prompts, (one.result() for one in asked), strict=True):
        own = mfm.rewards.PickScore(prompt=prompt, source=served.clip)
        expected = mfm.sample(
            mfm.load_flow_map(served.models["tiny"]),
            num_samples=2,
            steering=mfm.GradientGuidance(mfm.rewards.WeightedSum(rewards=[own], weights=[5.0]), num_draws=2),
            num_steps=4,
            seed=3,
        )
        images.append([shown["b64_json"] for shown in answer["data"]])
        assert images[-1] == as_served(expected.images)
        assert answer["steering"]["rewards"][0]["params"] == {"prompt": prompt, "threshold": None}
        assert [shown["reward"] for shown in answer["data"]] == expected.rewards.tolist()
        scored = served.http.post(
            "/v1/rewards/pickscore/score", json={"images": images[-1], "model": "tiny", "prompt": prompt}
        ).json()
        seen = own(torch.stack([pixels(text) for text in images[-1]]))
        assert scored["scores"] == pytest.approx(seen.tolist(), rel=1e-6)
    assert images[0] != images[1]
    assert "pickscore" in [reward["id"] for reward in served.http.get("/v1/rewards").json()["data"]]


def test_refusals_reach_the_client_as_openais_errors(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        served.openai.images.generate(model="tiny", prompt="", extra_body={"steering": {"num_step": 1}})
    assert wrong.value.param == "steering.num_step"
    assert "," not in wrong.value.response.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError):
        served.openai.images.generate(model="gone", prompt="")
    with pytest.raises(openai.AuthenticationError):
        served.openai.with_options(api_key="wrong").images.generate(model="tiny", prompt="")
    with pytest.raises(openai.BadRequestError, match="model: missing; expected one of tiny, other, tuned, latents"):
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


def sampled(served: Served, folder: Path, *words: str) -> tuple[Outcome, Any]:
    """What `python -m jobs.sample` makes of the words: its figures, and the table of its images."""
    config = load_config("sample", [f"model={served.models['tuned']}", f"storage={folder}", "batch_size=4", *words])
    run = JobRun(config=config, storage=Storage(str(folder)), log=lambda line: None)
    outcome = sample.body(run)
    return outcome, pq.read_table(outcome.artifacts["samples"])


@pytest.mark.parametrize("quality", ["low", "medium", "high"])
def test_a_served_quality_is_the_preset_that_a_sweep_wrote(served: Served, tmp_path: Path, quality: str) -> None:
    made, table = sampled(served, tmp_path, f"preset={served.presets}#{quality}", "seed=3", "num_samples=4")
    asked = {"model": "tuned", "quality": quality, "n": 4, "seed": 3}
    answer = served.generate(**asked, steering={"rewards": [{"name": "symmetry"}]})
    images = torch.tensor(table["image"].combine_chunks().to_numpy_ndarray())
    assert [image["b64_json"] for image in answer["data"]] == as_served(images)
    assert [image["reward"] for image in answer["data"]] == table["reward"].to_pylist()
    assert {image["nfe"] for image in answer["data"]} == {made.metrics["nfe"]}
    assert answer["quality"] == quality
    again = served.generate(**asked, steering=answer["steering"])
    assert again["data"] == answer["data"]


def test_the_smallest_of_several_rewards_and_a_threshold_are_served_too(served: Served, tmp_path: Path) -> None:
    rewards = [
        {"name": "symmetry", "weight": 0.5, "params": {"threshold": -20.0}},
        {"name": "brightness", "params": {"scale": 0.02}},
    ]
    steering = {"method": "gradient", "rewards": rewards, "combine": "minimum", "num_steps": 5}
    answer = served.generate(model="tuned", seed=3, n=3, steering=steering)
    parts = ["{name: symmetry, weight: 0.5, threshold: -20.0}", "{name: brightness, scale: 0.02}"]
    words = ["steering=gradient", "reward=minimum", f"reward.parts=[{','.join(parts)}]", "num_steps=5"]
    _, table = sampled(served, tmp_path, *words, "seed=3", "num_samples=3")
    images = torch.tensor(table["image"].combine_chunks().to_numpy_ndarray())
    assert [image["b64_json"] for image in answer["data"]] == as_served(images)
    assert [image["reward"] for image in answer["data"]] == table["reward"].to_pylist()
    for image in answer["data"]:
        named = image["rewards"]
        assert named["symmetry"] <= -20.0
        assert image["reward"] == pytest.approx(min(0.5 * named["symmetry"], named["brightness"]), rel=1e-6)


class Recorded(httpx.BaseTransport):
    """The way to the server, with a note of every byte that comes back."""

    def __init__(self) -> None:
        self._way, self.received = httpx.HTTPTransport(), b""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._way.handle_request(request)
        return httpx.Response(response.status_code, headers=response.headers, stream=self._noted(response.stream))

    def close(self) -> None:
        self._way.close()

    def _noted(self, stream: Any) -> Any:
        record = self

        class Noted(httpx.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                for chunk in stream:
                    record.received += chunk
                    yield chunk

            def close(self) -> None:
                stream.close()

        return Noted()


def test_the_openai_client_does_not_see_the_comments_of_a_stream_that_waits(served: Served) -> None:
    way = Recorded()
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, http_client=httpx.Client(transport=way)
    ) as client:
        steering = {**SYMMETRY, "num_steps": 400}
        stream = client.images.generate(
            model="tiny", prompt="", stream=True, extra_body={"seed": 1, "steering": steering}, timeout=120
        )
        events = list(stream)
    assert b": keep-alive\n\n" in way.received
    assert [event.type for event in events] == ["image_generation.completed"]


def test_a_client_that_leaves_a_waiting_stream_frees_its_rows(served: Served) -> None:
    body = {"model": "tiny", "n": 16, "stream": True, "steering": ENDLESS}
    with served.http.stream("POST", "/v1/images/generations", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert next(response.iter_lines()) == ": keep-alive"
    wait_for(served, running=False)


async def refused(served: Served, *, count: int, at_least: int, **body: Any) -> list[httpx.Response]:
    """Answers that come while requests without an end, half of them streams, fill a queue; then all others leave."""
    headers = {"Authorization": f"Bearer {KEY}"}
    everyone = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=120, limits=everyone) as client:
        bodies = [{"model": "tiny", "steering": ENDLESS, **body, "stream": bool(i % 2)} for i in range(count)]
        asked = [asyncio.create_task(client.post("/v1/images/generations", json=each)) for each in bodies]
        while sum(task.done() for task in asked) < at_least:
            await asyncio.sleep(0.05)
        for task in asked:
            task.cancel()
        ended = await asyncio.gather(*asked, return_exceptions=True)
    return [response for response in ended if isinstance(response, httpx.Response)]


@pytest.mark.parametrize(
    ("count", "at_least", "images", "says"),
    [
        (2 * REQUESTS_HELD + 16, 16, 1, "requests are being answered already"),  # each replica of the endpoint is full
        (11, 4, 16, "rows are waiting already"),  # the sampler is: one in the next pass, four behind it
    ],
)
def test_a_full_queue_is_429_with_a_time_to_come_back_in_json_and_in_streams(
    served: Served, count: int, at_least: int, images: int, says: str
) -> None:
    asking = asyncio.wait_for(refused(served, count=count, at_least=at_least, n=images), timeout=120)
    answers = asyncio.run(asking)
    assert {answer.status_code for answer in answers} == {429}
    assert {b'"stream":true' in answer.request.content for answer in answers} == {True, False}
    for answer in answers:
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["x-should-retry"] == "true"
        assert answer.json()["error"]["code"] == "queue_full"
    assert any(says in answer.json()["error"]["message"] for answer in answers)
    wait_for(served, running=False)


def test_a_repeated_request_gets_its_image_from_either_replica_of_the_endpoint(served: Served) -> None:
    body = {"model": "tiny", "n": 2, "steering": SYMMETRY}
    headers = {"Idempotency-Key": "one-of-the-tests"}
    answers = [served.http.post("/v1/images/generations", json=body, headers=headers).json() for _ in range(8)]
    assert all(answer["data"] == answers[0]["data"] for answer in answers)
    assert served.generate(n=2, steering=SYMMETRY)["data"] != answers[0]["data"]


def test_when_serve_itself_runs_out_of_time_it_is_504_in_openais_shape(served: Served) -> None:
    impatient = {"x-request-timeout-seconds": "0.3"}  # Serve's own header; else http_options.request_timeout_s
    body = {"model": "tiny", "n": 16, "steering": ENDLESS}
    response = served.http.post("/v1/images/generations", json=body, headers=impatient)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["x-request-id"]
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


def test_the_sampler_ends_what_a_dead_endpoint_asked_for_at_its_deadline(served: Served) -> None:
    card = ModelCard("tiny", served.models["tiny"], (1, 8, 8), "digits", 10, (), (), True, 0)
    resolver = Resolver({"tiny": card}, ["symmetry"], Limits())
    steering = {**ENDLESS, "deadline_s": 0.5}
    asked = resolver.generation(GenerationRequest.model_validate({"n": 16, "steering": steering}))
    handle = served.sampler().options(stream=True, multiplexed_model_id="tiny")
    events = list(handle.generate.remote(asked))
    assert isinstance(events[-1], Failed)
    wait_for(served, running=False)


@pytest.mark.slow
def test_a_dead_endpoint_is_503_in_openais_shape_and_an_event_in_a_stream(served: Served) -> None:
    body = {"model": "tiny", "n": 16, "steering": {**ENDLESS, "deadline_s": 10.0}}

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=120) as client:
            calls = [client.post("/v1/images/generations", json={**body, "stream": stream}) for stream in (False, True)]
            asked = [asyncio.create_task(call) for call in calls]
            await asyncio.to_thread(wait_for, served, True)
            await asyncio.sleep(1.0)  # the stream has begun: its first comment was due after 0.2 s
            await asyncio.to_thread(kill_replicas, "endpoint")
            return tuple(await asyncio.gather(*asked))  # type: ignore[return-value]

    plain, stream = asyncio.run(ask())
    assert (plain.status_code, stream.status_code) == (503, 200)
    assert plain.json()["error"]["code"] == "endpoint_down"
    assert plain.headers["x-should-retry"] == "true"
    assert plain.headers["x-request-id"]
    assert '"code": "endpoint_down"' in stream.text.split("event: error\ndata: ")[1]
    wait_for(served, running=False)
    assert served.generate(seed=1)["data"]  # the next request waits for a new replica


def replicas(deployment: str) -> int:
    states = serve.status().applications[APP].deployments[deployment].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


@pytest.mark.slow
def test_a_reward_comes_up_from_zero_stays_while_it_is_asked_directly_and_goes_again(served: Served) -> None:
    """Serve does not see direct calls: what keeps the replica is the backlog that it reports itself."""
    wish = {"seed": 5, "steering": {"rewards": [{"name": "class_mixture"}], "num_steps": 20}}
    expected = as_served(local_images(served, **wish).images)
    for _ in range(2):
        assert [image["b64_json"] for image in served.generate(**wish)["data"]] == expected
        end = time.monotonic() + 60
        while (
            replicas("reward_class_mixture") == 0
        ):  # one that leaves answers until it is gone, and only then a new one comes
            assert time.monotonic() < end
            assert [image["b64_json"] for image in served.generate(**wish)["data"]] == expected
        end, counts = time.monotonic() + 20, list[int]()
        while time.monotonic() < end:
            counts.append(replicas("reward_class_mixture"))
            assert [image["b64_json"] for image in served.generate(**wish)["data"]] == expected
        assert counts
        assert set(counts) == {1}
        end = time.monotonic() + 120
        while replicas("reward_class_mixture") > 0:
            assert time.monotonic() < end
            time.sleep(0.5)


def test_trace_and_timing_are_those_of_the_run(served: Served) -> None:
    wish = {"seed": 4, "n": 2, "steering": SYMMETRY}
    began = time.monotonic()
    answer = served.generate(**wish, include=["trace", "timing"])
    took, expected = time.monotonic() - began, local_images(served, **wish)
    for index, image in enumerate(answer["data"]):
        assert image["trace"]["value"] == expected.trace["value"][:, index].tolist()
        assert set(image["trace"]) == set(expected.trace)
    *parts, total = answer["timing"].values()
    assert list(answer["timing"]) == ["first_step_s", "steps_s", "scoring_s", "total_s"]
    assert min(parts) >= 0
    assert sum(parts) <= total <= took


def test_what_is_no_http_and_clients_that_go_away_harm_nobody(served: Served) -> None:
    wish = {"seed": 3, "steering": SYMMETRY}
    expected = [image["b64_json"] for image in served.generate(**wish)["data"]]
    port = int(served.url.rpartition(":")[2])
    said = [raw(port, content) for content in NO_HTTP]
    assert [line for line in said if line.startswith(b"HTTP/1.1 5")] == []
    for number in range(6):
        goes_away(port, KEY, {"model": "tiny", "n": 4, "stream": number % 2 == 0, "steering": ENDLESS}, 0.03 * number)
        assert [image["b64_json"] for image in served.generate(**wish)["data"]] == expected
    wait_for(served, running=False)


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
