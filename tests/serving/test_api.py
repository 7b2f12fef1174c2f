"""What clients get from the routes, over a backend that computes nothing."""

import asyncio
import json

import numpy as np
import pytest

from serve.errors import part_down
from serve.generation import Accepted, Finished
from serve.heartbeat import with_heartbeats
from serve.pictures import encode_png
from serve.settings import Limits

GENERATIONS = "/v1/images/generations"
SYMMETRY = {"rewards": [{"name": "symmetry"}]}


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    return error


def events_of(response):
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    return [(head.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for head, data in blocks]


def test_an_answer_has_openais_fields_and_ours(client, backend):
    answer = client.post(GENERATIONS, json={"prompt": "3", "n": 2, "seed": 5, "steering": SYMMETRY}).json()
    assert [image["seed"] for image in answer["data"]] == [5, 5]
    first = answer["data"][0]
    assert {"b64_json", "seed", "reward", "rewards", "nfe"} <= set(first)
    assert first["rewards"] == {"symmetry": 0.0}
    assert answer["usage"]["nfe"] == 20.0
    assert answer["usage"]["total_tokens"] == 0
    assert answer["steering"]["method"] == "gradient"
    assert backend.asked[0].label == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"seed": -1}, "seed"),
        ({"partial_images": 4}, "partial_images"),
        ({"output_format": "webp"}, "output_format"),
        ({"response_format": "url"}, "response_format"),
        ({"quality": "hd"}, "quality"),
        ({"pormpt": "x"}, "pormpt"),
        ({"steering": {"num_step": 3}}, "steering.num_step"),
        ({"steering": {"num_draws": 1.5}}, "steering.num_draws"),
        ({"steering": {"rewards": [{"weight": 1}]}}, "steering.rewards[0].name"),
        ({"steering": {"rewards": [{"name": "symmetry", "wieght": 1}]}}, "steering.rewards[0].wieght"),
        ({"steering": {"method": "magic"}}, "steering.method"),
        ({"steering": {"max_nfe": 0}}, "steering.max_nfe"),
    ],
)
def test_a_wrong_value_is_400_and_named(client, body, param):
    response = client.post(GENERATIONS, json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_a_misspelt_field_gets_the_nearest_one(client):
    error = error_of(client.post(GENERATIONS, json={"steering": {"rewards": [{"name": "symmetry", "wieght": 1}]}}))
    assert error["message"] == "steering.rewards[0].wieght: unknown field; did you mean weight?"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"seed": NaN}', b'{"cfg_scale": Infinity}', b"\xff"])
def test_what_is_no_request_is_400(client, content):
    response = client.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_unknown_models_rewards_and_routes_are_404(client):
    assert error_of(client.post(GENERATIONS, json={"model": "gone"}))["code"] == "model_not_found"
    assert error_of(client.post("/v1/rewards/gone/score", json={"images": ["x"]}))["code"] == "reward_not_found"
    for response in (client.get("/v1/models/gone"), client.get("/v1/nothing"), client.get("/../etc/passwd")):
        assert response.status_code == 404
        error_of(response)
    assert client.get(GENERATIONS).status_code == 405


def test_only_json_is_taken_so_that_other_pages_in_a_browser_cannot_ask(client):
    response = client.post(GENERATIONS, content="{}", headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "content-type"


def test_a_body_too_large_is_413_with_and_without_its_length(make_client):
    client = make_client(limits=Limits(body_bytes=100))
    assert client.post(GENERATIONS, json={"prompt": "x" * 200}).status_code == 413

    def pieces():
        for _ in range(50):
            yield b'{"prompt": "'

    response = client.post(GENERATIONS, content=pieces(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


def test_keys_are_asked_for_everywhere_but_for_health(make_client):
    client = make_client(keys=["secret"], address="10.0.0.1")
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    for response in (client.get("/v1/models"), client.post(GENERATIONS, json={}), client.get("/docs")):
        assert response.status_code == 401
        assert error_of(response)["type"] == "authentication_error"
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_without_keys_other_machines_are_refused(make_client):
    assert make_client(address="192.168.1.9").get("/v1/models").status_code == 401


def test_request_ids_are_returned_and_made_up_where_none_came(client):
    assert client.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/healthz", headers={"x-request-id": "b\tad"}).headers["x-request-id"] != "b\tad"


def test_models_and_rewards_are_lists_in_openais_shape(client):
    models, rewards = client.get("/v1/models").json(), client.get("/v1/rewards").json()
    assert (models["object"], [model["id"] for model in models["data"]]) == ("list", ["tiny"])
    assert [reward["id"] for reward in rewards["data"]][:2] == ["symmetry", "brightness"]
    assert rewards["data"][0]["parameters"]["axis"]["enum"] == ["horizontal", "vertical"]
    assert client.get("/v1/models/tiny").json()["size"] == "8x8"
    assert "/v1/images/generations" in client.get("/openapi.json").json()["paths"]


def test_a_stream_shows_previews_then_every_image(client):
    response = client.post(GENERATIONS, json={"stream": True, "partial_images": 2, "n": 2, "seed": 1})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    assert [kind for kind, _ in events] == ["image_generation.partial_image"] * 4 + ["image_generation.completed"] * 2
    assert [data["partial_image_index"] for _, data in events[:4]] == [0, 0, 1, 1]
    assert [data["image_index"] for _, data in events[:4]] == [0, 1, 0, 1]
    assert events[-1][1]["index"] == 1


def test_a_stream_that_waits_says_so_in_comments(make_client, backend):
    async def slow(generation):
        await asyncio.sleep(0.2)  # not even taken up yet
        yield Accepted()
        await asyncio.sleep(0.2)
        yield Finished(np.zeros((1, 1, 8, 8), np.float32), None, {}, 5.0, {})

    backend.events = slow
    text = make_client(heartbeat_s=0.05).post(GENERATIONS, json={"stream": True}).text
    comments, event = text.split("event: ", 1)
    assert comments.startswith(": keep-alive\n\n")
    assert set(comments.split("\n\n")) == {": keep-alive", ""}
    assert event.startswith("image_generation.completed")


def test_a_stream_that_is_refused_after_its_first_comment_ends_in_an_error_event(make_client, backend):
    async def late(generation):
        await asyncio.sleep(0.2)
        raise part_down("the sampler is down")
        yield

    backend.events = late
    response = make_client(heartbeat_s=0.05).post(GENERATIONS, json={"stream": True})
    assert response.status_code == 200
    assert response.text.startswith(": keep-alive\n\n")
    assert "event: error" in response.text


def test_heartbeats_end_what_they_wait_for():
    async def closed_while_waiting():
        ended = []

        async def endless():
            try:
                yield 1
                await asyncio.sleep(60)
            finally:
                ended.append(True)

        beats = with_heartbeats(endless(), 0.01)
        assert [await anext(beats), await anext(beats)] == [1, None]
        await beats.aclose()
        return ended

    assert asyncio.run(closed_while_waiting()) == [True]


def test_partial_images_without_a_stream_are_not_made(client, backend):
    client.post(GENERATIONS, json={"partial_images": 2})
    assert backend.asked[0].previews == 0


def test_an_error_before_a_stream_begins_has_a_status_and_later_an_event(client, backend):
    async def at_once(generation):
        raise part_down("reward symmetry: is down", code="reward_down")
        yield

    backend.events = at_once
    response = client.post(GENERATIONS, json={"stream": True})
    assert response.status_code == 503
    assert error_of(response)["code"] == "reward_down"

    async def later(generation):
        yield Accepted()
        raise part_down("reward symmetry: is down", code="reward_down")

    backend.events = later
    kind, data = events_of(client.post(GENERATIONS, json={"stream": True}))[0]
    assert (kind, data["error"]["code"]) == ("error", "reward_down")


def test_what_nobody_expected_is_500_without_a_trace(client, backend):
    async def broken(generation):
        raise RuntimeError("secret detail")
        yield

    backend.events = broken
    response = client.post(GENERATIONS, json={})
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal"
    assert "secret" not in response.text


def test_a_deadline_is_504_and_the_work_is_told_to_stop(client, backend):
    stopped = []

    async def slow(generation):
        yield Accepted()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(True)

    backend.events = slow
    response = client.post(GENERATIONS, json={"steering": {"deadline_s": 0.05}})
    assert response.status_code == 504
    assert error_of(response)["param"] == "steering.deadline_s"
    assert stopped == [True]


def test_more_requests_than_are_held_get_429_with_a_time_to_come_back(make_client, backend):
    client = make_client(limits=Limits(requests=1))

    async def asks_itself(generation):
        inner = await asyncio.to_thread(client.post, GENERATIONS, json={})
        assert inner.status_code == 429
        assert inner.headers["retry-after"] == "1"
        assert inner.headers["x-should-retry"] == "true"
        assert error_of(inner)["type"] == "rate_limit_error"
        raise part_down("seen")
        yield

    backend.events = asks_itself
    assert client.post(GENERATIONS, json={}).status_code == 503
    backend.events = None
    assert client.post(GENERATIONS, json={}).status_code == 200


def test_a_request_sent_again_with_its_key_gets_the_same_answer(client, backend):
    headers = {"Idempotency-Key": "one"}
    with client:  # one event loop for all requests, as a server has
        first = client.post(GENERATIONS, json={"n": 2}, headers=headers)
        second = client.post(GENERATIONS, json={"n": 2}, headers=headers)
        assert first.json() == second.json()
        assert len(backend.asked) == 1
        other = client.post(GENERATIONS, json={"n": 1}, headers=headers)
        assert other.status_code == 400
        assert error_of(other)["param"] == "idempotency-key"


def test_the_seed_follows_from_the_key_so_that_any_replica_makes_the_same_image(make_client, backend):
    headers = {"Idempotency-Key": "one"}
    seeds = [make_client().post(GENERATIONS, json={}, headers=headers).json()["data"][0]["seed"] for _ in range(2)]
    assert seeds[0] == seeds[1]
    assert len(backend.asked) == 2


def test_images_are_scored_in_their_order(client):
    import torch

    images = [encode_png(torch.full((1, 8, 8), level)) for level in (0.0, 1.0)]
    answer = client.post("/v1/rewards/brightness/score", json={"images": images, "params": {"target": 0.4}}).json()
    assert answer["scores"] == [0.0, 1.0]
    assert answer["params"] == {"target": 0.4, "scale": 0.01, "threshold": None}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"images": []}, "images"),
        ({}, "images"),
        ({"images": ["no picture"]}, "images[0]"),
        ({"images": ["AAAA"] * 100}, "images"),
        ({"images": ["AAAA"], "params": {"scale": 0}}, "params.scale"),
        ({"images": ["AAAA"], "prompt": "a cat"}, "prompt"),
    ],
)
def test_scoring_refuses_by_name(client, body, param):
    response = client.post("/v1/rewards/symmetry/score", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_not_ready_is_503(client, backend):
    backend.is_ready = False
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


def test_the_access_log_has_no_secrets(backend, resolver, caplog):
    from starlette.testclient import TestClient

    from serve.api import build_api
    from serve.keys import Keys

    client = TestClient(build_api(backend, resolver, Keys.of(["secret-key"]), access_log=True))
    headers = {"Authorization": "Bearer secret-key", "x-request-id": "mine", "cookie": "secret-cookie"}
    with caplog.at_level("INFO", logger="ray.serve.mfm_access"):
        made = client.post(GENERATIONS, json={"prompt": "3", "user": "secret-user"}, headers=headers)
        client.get("/v1/models?key=secret-query", headers={"Authorization": "Bearer secret-guess"})
    lines = [json.loads(record.message) for record in caplog.records if record.name == "ray.serve.mfm_access"]
    assert [(line["request_id"] == "mine", line["path"], line["status"]) for line in lines] == [
        (True, GENERATIONS, 200),
        (False, "/v1/models", 401),
    ]
    assert lines[0]["bytes_sent"] == len(made.content)
    assert len(lines[0]["caller"]) == 8 and lines[1]["caller"] == ""
    assert "secret" not in caplog.text


def test_without_being_asked_for_there_is_no_access_log(client, caplog):
    with caplog.at_level("INFO", logger="ray.serve.mfm_access"):
        client.get("/v1/models")
    assert not [record for record in caplog.records if record.name == "ray.serve.mfm_access"]
