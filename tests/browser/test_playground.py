"""What people do on the page: generate, compare, draw, be refused, copy; by pointer, by keys, on a phone, in the dark.

The endpoint is real, its model small and untrained: what is looked at is the page.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from serve.pictures import decode_png

from .conftest import KEY

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

DONE = ".side.done"


def generate(page: Any) -> None:
    page.get_by_role("button", name="Generate").click()
    page.locator(DONE).first.wait_for()
    page.wait_for_function("!document.querySelector('.side:not(.done)')")


def bodies(page: Any) -> list[dict[str, Any]]:
    """Keeps what the page asks from now on."""
    asked: list[dict[str, Any]] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if r.url.endswith("generations") else None)
    return asked


def answer_of(served: Any, body: dict[str, Any]) -> dict[str, Any]:
    sent = {key: value for key, value in body.items() if key not in ("stream", "partial_images")}
    response = httpx.post(f"{served.open}v1/images/generations", json=sent, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def shown_images(page: Any) -> list[str]:
    return [
        source.partition(",")[2] for source in page.locator("figure img").evaluate_all("all => all.map(i => i.src)")
    ]


def test_images_come_with_previews_rewards_calls_and_the_values_way(served, visit):
    page = visit(served.open)
    asked = bodies(page)
    page.evaluate(
        """() => { window.kinds = []; new MutationObserver(changes => changes.forEach(
            c => window.kinds.push(c.target.className))).observe(document.querySelector('#stage'),
            { attributes: true, attributeFilter: ['class'], subtree: true }) }"""
    )
    page.locator("label", has_text=re.compile("^3$")).first.click()
    page.get_by_label("Images", exact=True).fill("3")
    generate(page)
    assert "preview" in page.evaluate("window.kinds")
    body = asked[0]
    assert (body["prompt"], body["n"], body["seed"], body["stream"], body["partial_images"]) == ("3", 3, 0, True, 3)
    answer = answer_of(served, body)
    assert shown_images(page) == [image["b64_json"] for image in answer["data"]]
    rewards = page.locator("figcaption .reward").all_inner_texts()
    expected = [image["reward"] for image in answer["data"]]
    assert [float(text.replace(",", "").replace("−", "-")) for text in rewards] == pytest.approx(
        expected, rel=0.02, abs=0.51
    )
    status = page.locator(".status").inner_text()
    assert f"{answer['data'][0]['nfe']:,.0f} network calls an image" in status
    drawn = page.locator("svg.plot path.trace")
    assert drawn.count() == 3
    steps = len(answer["data"][0]["trace"]["value"])
    assert drawn.first.get_attribute("d").count("L") == steps - 1
    assert page.locator("svg.plot").get_attribute("aria-label").startswith("Mean value estimate")


def test_every_field_reaches_the_request(served, visit):
    page = visit(served.open)
    page.get_by_label("Method").select_option("search")
    for label, value in {"Draws": 3, "Particles": 5, "Steps": 7, "Seed": 11, "Weight": 0.5}.items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_label("scale", exact=True).fill("0.3")
    page.get_by_role("button", name="Add a reward").click()
    page.get_by_label("Reward", exact=True).last.select_option("class_mixture")
    page.get_by_role("group", name="weights").get_by_label("4").fill("2")
    page.get_by_text("More of the method").click()
    page.get_by_label("transition").select_option("deterministic")
    asked = bodies(page)
    generate(page)
    steering = asked[0]["steering"]
    assert asked[0]["seed"] == 11
    assert steering["method"] == "search"
    assert (steering["num_draws"], steering["num_particles"], steering["num_steps"]) == (3, 5, 7)
    assert steering["transition"] == "deterministic"
    symmetry, mixture = steering["rewards"]
    assert symmetry == {"name": "symmetry", "weight": 0.5, "params": {"scale": 0.3}}
    assert mixture["params"]["weights"][4] == 2
    page.get_by_role("button", name="Remove this reward").first.click()
    generate(page)
    assert [reward["name"] for reward in asked[1]["steering"]["rewards"]] == ["class_mixture"]


def test_unsteered_has_no_reward_and_says_so(served, visit):
    page = visit(served.open)
    page.get_by_role("button", name="Remove this reward").click()
    generate(page)
    assert page.locator("figcaption .reward").all_inner_texts() == ["unsteered"] * 4
    assert page.locator(".chart").inner_text() == "Without rewards there is no value to estimate."


def test_two_settings_are_compared_at_the_same_seed(served, visit):
    page = visit(served.open)
    page.get_by_label("Weight").fill("2")
    page.get_by_label("Compare two settings").check()
    assert page.get_by_role("tab", selected=True).inner_text() == "Setting B"
    panel = page.get_by_role("tabpanel", name="Setting B")
    assert panel.get_by_label("Weight").input_value() == "2"
    panel.get_by_label("Weight").fill("0.1")
    panel.get_by_label("axis").select_option("vertical")
    asked = bodies(page)
    generate(page)
    first, second = sorted(asked, key=lambda body: -body["steering"]["rewards"][0]["weight"])
    assert first["seed"] == second["seed"]
    assert [side["steering"]["rewards"][0]["weight"] for side in (first, second)] == [2, 0.1]
    sides = page.locator("section.side").all()
    assert len(sides) == 2
    assert [side.locator("h2").text_content() for side in sides] == [
        "Agradient towards symmetry × 2",
        "Bgradient towards symmetry (axis vertical) × 0.1",
    ]
    boxes = [side.bounding_box() for side in sides]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    for side, body in zip(sides, (first, second), strict=True):
        pictures = side.locator("img").evaluate_all("all => all.map(i => i.src.split(',')[1])")
        assert pictures == [image["b64_json"] for image in answer_of(served, body)["data"]]
    assert page.locator("svg.plot path.mean").count() == 2
    page.get_by_role("tab", name="Setting B").press("ArrowLeft")
    assert page.get_by_role("tab", selected=True).inner_text() == "Setting A"


def test_a_mask_is_drawn_and_erased_by_pointer(served, visit):
    page = visit(served.open)
    page.get_by_label("Reward", exact=True).select_option("masked_observation")
    page.get_by_text("What I draw").click()
    page.get_by_text("64 of 64 pixels seen").wait_for()  # the held-out image came
    page.get_by_role("button", name="Clear").click()
    canvas = page.get_by_role("application")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()

    def at(column: float, row: float) -> tuple[float, float]:
        return box["x"] + box["width"] * (column + 0.5) / 8, box["y"] + box["height"] * (row + 0.5) / 8

    page.mouse.move(*at(1, 2))
    page.mouse.down()
    page.mouse.move(*at(5, 2), steps=24)
    page.mouse.up()
    page.get_by_text("5 of 64 pixels seen").wait_for()
    page.get_by_text("Erase", exact=True).click()
    page.mouse.click(*at(3, 2))
    page.get_by_text("4 of 64 pixels seen").wait_for()
    asked = bodies(page)
    generate(page)
    params = asked[0]["steering"]["rewards"][0]["params"]
    mask, observed = (decode_png(params[key], event_shape=(1, 8, 8), max_pixels=64) for key in ("mask", "observed"))
    expected = torch.zeros(1, 8, 8)
    expected[0, 2, [1, 2, 4, 5]] = 1.0
    assert torch.equal(mask, expected)
    assert torch.equal(observed, expected)  # white ink


def test_a_generated_image_can_be_observed(served, visit):
    page = visit(served.open)
    generate(page)
    picture = shown_images(page)[1]
    page.get_by_role("button", name="Observe image 2").click()
    page.get_by_text("64 of 64 pixels seen").wait_for()
    asked = bodies(page)
    generate(page)
    params = asked[0]["steering"]["rewards"][-1]["params"]
    seen, made = (decode_png(text, event_shape=(1, 8, 8), max_pixels=64) for text in (params["observed"], picture))
    assert torch.equal(seen, made)


def test_the_key_is_asked_for_and_kept_nowhere(served, visit):
    page = visit(served.keyed, ready=False)
    field = page.get_by_label("API key")
    field.wait_for()
    assert page.locator("#controls").is_hidden()
    assert "Authorization: Bearer" in page.locator("#key-asked").inner_text()
    field.fill("wrong")
    page.get_by_role("button", name="Use key").click()
    page.get_by_text("wrong key; expected one that this server was given").wait_for()
    field.fill(KEY)
    field.press("Enter")
    page.locator("#controls").wait_for()
    generate(page)
    assert page.locator("figure img").count() == 4
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert KEY not in kept + page.content()
    page.reload()
    field.wait_for()


def test_a_key_that_is_refused_later_is_asked_for_again_and_nothing_is_lost(served, visit):
    page = visit(served.keyed, ready=False)
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use key").click()
    page.get_by_label("Steps", exact=True).fill("4")
    error = {"message": "wrong key", "type": "authentication_error", "param": None, "code": "invalid_api_key"}
    page.route("**/v1/images/generations", lambda route: route.fulfill(status=401, json={"error": error}))
    page.get_by_role("button", name="Generate").click()
    page.locator("#key-error", has_text="wrong key").wait_for()
    page.unroute_all()
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use key").click()
    page.locator("#key-form").wait_for(state="hidden")
    asked = bodies(page)
    generate(page)
    assert [body["steering"]["num_steps"] for body in asked] == [4]


def test_a_refusal_stands_beside_its_field_in_the_servers_words(served, visit):
    page = visit(served.open)
    page.get_by_label("scale", exact=True).fill("-1")
    page.get_by_role("button", name="Generate").click()
    page.locator(DONE).wait_for()
    wrong = page.locator("[aria-invalid=true]")
    assert wrong.get_attribute("data-param") == "steering.rewards[0].params.scale"
    assert wrong.evaluate("i => i === document.activeElement")
    said = page.locator(f"[id='{wrong.get_attribute('aria-describedby').split()[-1]}']").inner_text()
    asked = {"steering": {"rewards": [{"name": "symmetry", "params": {"scale": -1}}]}}
    assert said == httpx.post(f"{served.open}v1/images/generations", json=asked).json()["error"]["message"]
    assert page.locator(".side [role=alert]").inner_text() == said
    assert page.locator("figure").count() == 0
    page.get_by_label("scale", exact=True).fill("0.1")
    generate(page)
    assert page.locator("[aria-invalid=true]").count() == 0
    assert page.locator("figcaption .reward").count() == 4


@pytest.mark.parametrize(
    ("label", "value", "param"), [("Images", "99", "n"), ("Seed", "-5", "seed"), ("Steps", "0", None)]
)
def test_other_fields_are_named_too(served, visit, label, value, param):
    page = visit(served.open)
    page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Generate").click()
    page.locator(DONE).wait_for()
    assert page.locator("[aria-invalid=true]").get_attribute("data-param") == (param or "steering.num_steps")


def test_what_runs_can_be_stopped(served, visit):
    page = visit(served.open)
    page.get_by_label("Steps", exact=True).fill("1000")
    page.get_by_label("Draws", exact=True).fill("16")
    page.get_by_label("Images", exact=True).fill("16")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped", exact=True).wait_for()
    assert page.get_by_role("button", name="Stop").count() == 0


def test_a_server_that_is_gone_is_said_plainly(served, visit):
    page = visit(served.open)
    page.route("**/v1/images/generations", lambda route: route.fulfill(status=503, content_type="text/plain", body="x"))
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("the server answered 503").wait_for()
    page.unroute_all()


def test_all_of_it_by_keys_alone(served, visit):
    page = visit(served.open)

    def tab_to(name: str) -> None:
        """Tab until the focus is on what is called so."""
        seen = []
        for _ in range(60):
            page.keyboard.press("Tab")
            here = page.evaluate(
                "(e => e.getAttribute('aria-label') ?? e.labels?.[0]?.innerText ?? e.innerText)(document.activeElement)"
            )
            seen.append(here)
            if here.lower() == name.lower():
                return
        raise AssertionError(f"{name} not reached: {seen}")

    asked = bodies(page)
    tab_to("any")
    page.keyboard.press("ArrowRight")  # class 0
    tab_to("Reward")
    page.keyboard.type("masked")
    tab_to("Half of an image")
    page.keyboard.press("ArrowRight")  # what is drawn
    page.get_by_text("64 of 64 pixels seen").wait_for()
    tab_to("Picture of 8 by 8 pixels")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.locator(".told", has_text="row 2, column 2: seen").count() == 1
    tab_to("Draw")
    page.keyboard.press("ArrowRight")  # erase
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    page.get_by_text("63 of 64 pixels seen").wait_for()
    assert page.locator(".told", has_text="row 2, column 2: open").count() == 1
    tab_to("Generate")
    page.keyboard.press("Enter")
    page.locator(DONE).wait_for()
    assert asked[0]["prompt"] == "0"
    mask = decode_png(asked[0]["steering"]["rewards"][0]["params"]["mask"], event_shape=(1, 8, 8), max_pixels=64)
    assert mask[0, 1, 1] == 0 and mask.sum() == 63


@pytest.mark.parametrize("width", [320, 768])
def test_a_phone_needs_no_sideways_scrolling(served, visit, width):
    page = visit(served.open, width=width, height=640, has_touch=True)
    page.get_by_label("Compare two settings").check()
    page.get_by_role("button", name="Add a reward").locator("visible=true").click()
    page.get_by_label("Reward", exact=True).locator("visible=true").last.select_option("masked_observation")
    page.get_by_text("What I draw").locator("visible=true").click()
    page.get_by_label("Reward", exact=True).locator("visible=true").first.select_option("class_mixture")
    for summary in page.locator("summary").locator("visible=true").all():
        summary.click()
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(
        "[...document.querySelectorAll('body *:not(pre *):not(.skip)')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []
    small = page.locator("button, select, input:not([type=radio]):not([role=switch])").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).filter(r => r.height && r.height < 24).length"
    )
    assert small == page.locator("input[type=range]").locator("visible=true").count()


def test_copied_curl_and_python_make_the_images_on_the_page(served, visit, tmp_path: Path):
    page = visit(served.open)
    page.get_by_label("Reward", exact=True).select_option("masked_observation")
    page.get_by_text("What I draw").click()
    page.get_by_text("64 of 64 pixels seen").wait_for()
    page.get_by_role("button", name="Upper half").click()
    page.get_by_label("Images", exact=True).fill("2")
    page.get_by_label("Steps", exact=True).fill("9")
    generate(page)
    copied = {}
    for kind in ("curl", "Python"):
        page.locator("summary", has_text=re.compile(f"^{kind}$")).click()
        page.get_by_role("button", name=f"Copy {kind}").click()
        page.get_by_text("Copied").locator("visible=true").last.wait_for()
        copied[kind] = page.evaluate("navigator.clipboard.readText()")
    by_curl = subprocess.run(["bash", "-c", copied["curl"]], capture_output=True, text=True, check=True, timeout=60)
    assert [image["b64_json"] for image in json.loads(by_curl.stdout)["data"]] == shown_images(page)
    subprocess.run([sys.executable, "-c", copied["Python"]], cwd=tmp_path, check=True, timeout=60)
    page_images = [decode_png(text, event_shape=(1, 8, 8), max_pixels=64) for text in shown_images(page)]
    assert [_file(tmp_path / f"image_{i}.png").equal(page_images[i]) for i in range(2)] == [True, True]


def test_copied_code_reads_the_key_from_the_environment(served, visit, tmp_path: Path):
    page = visit(served.keyed, ready=False)
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use key").click()
    page.locator("#controls").wait_for()
    page.get_by_label("Steps", exact=True).fill("3")
    environment = {**os.environ, "MFM_RAY_API_KEY": KEY}
    for kind, command in {"curl": ["bash", "-c"], "Python": [sys.executable, "-c"]}.items():
        code = page.locator(f"[data-kind={kind}] code").text_content()
        assert KEY not in code
        done = subprocess.run(
            [*command, code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=True, timeout=60
        )
        assert "b64_json" in done.stdout if kind == "curl" else done.stdout.startswith("0 ")


def _file(path: Path) -> torch.Tensor:
    import base64

    return decode_png(base64.b64encode(path.read_bytes()).decode(), event_shape=(1, 8, 8), max_pixels=64)
