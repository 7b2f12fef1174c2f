"""The playground's files, and what the API tells a page: methods, held-out images, traces, drawn masks."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from mfm_ray.building import STEERING
from mfm_ray.rewards import half_mask
from serve.catalogue import RewardSource, defaults
from serve.generation import Finished, Preview
from serve.methods import describe_methods
from serve.models import heldout_images
from serve.page import FOLDER, PREFIX, page_files
from serve.pictures import decode_mask, decode_png, encode_png
from serve.settings import Limits

GENERATIONS = "/v1/images/generations"
SHAPE = {"event_shape": (1, 8, 8), "max_pixels": 64}


class Links(HTMLParser):
    """What a page refers to, and what its policy would refuse: code or style within it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [
            value for name, value in attrs if name in ("src", "href") and value and not value.startswith("#")
        ]
        self.inline += [name for name, _ in attrs if name == "style" or name.startswith("on")]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in dict(attrs)) else []


def test_the_page_needs_no_key_and_asks_nothing_of_anybody_else(make_client):
    client = make_client(keys=["k"], address="10.0.0.1")
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    links = Links()
    links.feed(answer.text)
    assert not links.inline
    assert {"playground/main.js", "playground/style.css"} <= set(links.found)
    for link in links.found:
        assert link == "docs" or client.get(f"/{link}").status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert client.get("/docs").status_code == 401


def test_below_a_prefix_the_same_is_open(make_client):
    client = make_client(keys=["k"])
    client.app.root_path = "/models"  # as Serve mounts an application with route_prefix /models
    assert client.get("/models/").headers["content-type"].startswith("text/html")
    assert client.get("/models/healthz").status_code == client.get("/models/playground/main.js").status_code == 200
    assert client.get("/models/v1/models").status_code == 401
    assert client.get("/models/models/healthz").status_code == 401


@pytest.mark.parametrize("name", [path.name for path in sorted(FOLDER.iterdir()) if path.suffix == ".js"])
def test_scripts_import_only_each_other(name):
    imported = re.findall(r'from "(.+?)"', (FOLDER / name).read_text())
    assert all(module.startswith("./") and module[2:] in page_files() for module in imported), imported


@pytest.mark.parametrize("name", ["..%2fgate.py", "%2e%2e/gate.py", "gate.py", "main.js%00", ""])
def test_nothing_but_the_pages_files_is_read(client, name):
    answer = client.get(PREFIX + name)
    assert answer.status_code == 404
    assert "class Gate" not in answer.text


def test_methods_are_those_that_requests_take_with_their_defaults(client, backend):
    answer = client.get("/v1/methods").json()
    assert [method["id"] for method in answer["data"]] == [*STEERING, "none"]
    assert answer["limits"] == Limits().model_dump()
    for method in answer["data"]:
        rewards = [{"name": "symmetry"}] if method["takes_rewards"] else []
        steering = {"method": method["id"], "rewards": rewards}
        asked = client.post(GENERATIONS, json={"quality": "medium", "steering": steering}).json()["steering"]
        assert asked["dynamics"] == method["dynamics"]
        stated = {key: allowed["default"] for key, allowed in method["arguments"].items()}
        assert {key: asked[key] for key in stated} == stated


def test_choices_of_a_method_are_its_own():
    search = next(method for method in describe_methods(Limits(draws=7)) if method["id"] == "search")["arguments"]
    assert search["resampling"]["enum"] == ["max_overall", "max_per_particle"]
    assert search["num_draws"] == {"default": 4, "minimum": 1, "maximum": 7}


def test_a_heldout_image_is_the_one_that_a_row_means(client, card):
    answer = client.get("/v1/models/tiny/heldout/3").json()
    expected = heldout_images(card.data_name)[3]
    assert torch.allclose(decode_png(answer["b64_json"], **SHAPE), expected, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("row", ["-1", "1000000", "x", "1.5"])
def test_a_row_that_is_none_is_named(client, row):
    answer = client.get(f"/v1/models/tiny/heldout/{row}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "row"


def test_a_trace_comes_where_it_is_asked_for_with_null_for_no_number(client, backend):
    trace = {"value": np.array([[-np.inf, 1.0], [2.0, 3.0]], np.float32)}

    async def events(generation):
        yield Preview(0, np.zeros((2, 1, 8, 8), np.float32), step=4)
        zeros = np.zeros(2, np.float32)
        yield Finished(np.zeros((2, 1, 8, 8), np.float32), zeros, {"symmetry": zeros}, 1.0, {}, trace=trace)

    backend.events = events
    body = {"n": 2, "steering": {"rewards": [{"name": "symmetry"}]}}
    data = client.post(GENERATIONS, json={**body, "include": ["trace"]}).json()["data"]
    assert [image["trace"]["value"] for image in data] == [[None, 2.0], [1.0, 3.0]]
    assert "trace" not in client.post(GENERATIONS, json=body).json()["data"][0]
    streamed = client.post(GENERATIONS, json={**body, "include": ["trace"], "stream": True, "partial_images": 1}).text
    assert '"step": 4, "num_steps": 50' in streamed
    assert '"trace": {"value": [null, 2.0]}' in streamed


def test_timing_comes_where_it_is_asked_for(client, backend):
    async def events(generation):
        seconds = {"first_step_s": 0.1, "steps_s": 0.2, "scoring_s": 0.3}
        yield Finished(np.zeros((1, 1, 8, 8), np.float32), None, {}, 1.0, {}, timing=seconds)

    backend.events = events
    answer = client.post(GENERATIONS, json={"include": ["timing"]}).json()
    assert list(answer["timing"]) == ["first_step_s", "steps_s", "scoring_s", "total_s"]
    assert answer["timing"]["steps_s"] == 0.2
    assert answer["timing"]["total_s"] >= 0
    assert "timing" not in client.post(GENERATIONS, json={}).json()
    assert (
        '"timing": {"first_step_s": 0.1' in client.post(GENERATIONS, json={"include": ["timing"], "stream": True}).text
    )


def test_what_can_be_included_is_named(client):
    error = client.post(GENERATIONS, json={"include": ["everything"]}).json()["error"]
    assert error["param"] == "include[0]"
    assert "trace" in error["message"]


def test_a_drawn_mask_says_which_pixels_are_seen(card):
    image, mask = torch.rand(1, 8, 8).mul(255).round() / 255, torch.zeros(1, 8, 8)
    mask[0, 2, 3] = mask[0, 7, 0] = 1.0
    source, given = RewardSource(card), {**defaults("masked_observation", card), "observed": encode_png(image)}
    reward = source.build("masked_observation", {**given, "mask": encode_png(mask)})
    sample = torch.rand(5, 1, 8, 8)
    residual = (sample - image) * mask
    expected = -residual.flatten(1).square().sum(1) / (2 * given["noise"] ** 2)
    assert torch.allclose(reward(sample), expected, rtol=1e-5)
    as_half = source.build("masked_observation", {**given, "mask": encode_png(half_mask((1, 8, 8), "left"))})
    assert torch.equal(as_half(sample), source.build("masked_observation", {**given, "half": "left"})(sample))


def test_a_mask_of_grey_is_split_in_the_middle_and_must_show_something():
    assert decode_mask(encode_png(torch.full((1, 8, 8), 0.6)), **SHAPE).sum() == 64
    with pytest.raises(ValueError, match="at least one"):
        decode_mask(encode_png(torch.full((1, 8, 8), 0.4)), **SHAPE)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"mask": encode_png(torch.ones(1, 8, 8))}, "mask"),
        ({"observed": encode_png(torch.ones(1, 8, 8)), "mask": encode_png(torch.zeros(1, 8, 8))}, "mask"),
        ({"observed": encode_png(torch.ones(1, 8, 8)), "mask": encode_png(torch.ones(1, 8, 9))}, "mask"),
        ({"observed": encode_png(torch.ones(1, 8, 8)), "mask": "AAAA"}, "mask"),
    ],
)
def test_a_wrong_mask_is_named(client, params, param):
    body = {"steering": {"rewards": [{"name": "masked_observation", "params": params}]}}
    error = client.post(GENERATIONS, json=body).json()["error"]
    assert error["param"] == f"steering.rewards[0].params.{param}"
