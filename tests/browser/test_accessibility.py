"""Whether everybody can use the page: axe-core's rules, contrast as computed, names of all that can be operated."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = text => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = node => { for (let e = node; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] > .99) return c; } return [255, 255, 255, 1]; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let n = walker.nextNode(); n; n = walker.nextNode()) {
    const e = n.parentElement, style = getComputedStyle(e);
    if (!n.textContent.trim() || !e.checkVisibility()) continue;
    if (e.closest('noscript, option, .skip, button:disabled')) continue;
    const colour = rgba(e instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(colour), light(behind(e).slice(0, 3))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), n.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


def fill(page: Any) -> None:
    """Everything that the page can show at once."""
    page.get_by_label("Compare two settings").check()
    page.get_by_label("Reward", exact=True).locator("visible=true").select_option("masked_observation")
    page.get_by_text("What I draw").locator("visible=true").click()
    page.get_by_text("64 of 64 pixels seen").wait_for()
    page.get_by_role("button", name="Add a reward").locator("visible=true").click()
    page.get_by_label("Reward", exact=True).locator("visible=true").last.select_option("class_mixture")
    for summary in page.locator("summary").locator("visible=true").all():
        summary.click()
    page.get_by_role("button", name="Generate").click()
    page.locator(".side.done").nth(1).wait_for()
    page.get_by_text("As numbers").click()


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(served, visit, dark):
    page = visit(served.open, color_scheme="dark" if dark else "light", bypass_csp=True)  # axe is put into the page
    fill(page)
    page.evaluate((resources.files("axe_playwright_python") / "axe.min.js").read_text())
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    assert [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found] == []


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_what_is_behind_them(served, visit, dark):
    page = visit(served.open, color_scheme="dark" if dark else "light")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    fill(page)
    page.get_by_label("Seed", exact=True).fill("-1")
    page.get_by_role("button", name="Generate").click()
    page.locator(".error:not(:empty)").first.wait_for()
    found = page.evaluate(CONTRAST)
    assert len(found) > 50
    assert [text for text in found if text[0] < 4.5] == []


def test_all_that_can_be_operated_has_a_name(served, visit):
    page = visit(served.open)
    fill(page)
    nameless = page.locator("input, select, button, canvas, summary, a, pre, progress").evaluate_all(
        "all => all.filter(e => !(e.getAttribute('aria-label') || e.innerText?.trim() || e.labels?.length))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    images = page.locator("img").evaluate_all("all => all.map(i => i.alt)")
    assert all(images) and len(set(images)) > 1
    assert page.locator("[role=status]").count() == 2
    assert page.locator("h1").count() == 1


def test_without_a_script_it_says_what_to_do(served, visit):
    page = visit(served.open, ready=False, java_script_enabled=False)
    assert "curl" in page.locator("noscript").inner_text()
