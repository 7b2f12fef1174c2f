"""From pressing Generate to the first preview on the screen, as the page itself marks it, in headless Chromium.

    python -m benchmarks.playground --model outputs/demo/model [--repeats 15] [--pictures docs/images]

A local Ray and the real HTTP endpoint, rewards in the sampler's process; the page as it opens (4 images, MFM-G
towards symmetry, 50 steps), another seed each time. The browser draws with the same cores. Needs what `make test-
browser` installs. Writes benchmarks/results/playground.md, and with
`--pictures` the pictures of docs/playground.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.served import application, one_thread_in_replicas
from serve.settings import AppSettings, RewardSettings

RESULTS = Path(__file__).parent / "results" / "playground.md"
REWARDS = ("symmetry", "brightness", "masked_observation", "class_probability", "class_mixture")
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory of images")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures of docs/playground.md")
    given = parser.parse_args()
    one_thread_in_replicas()
    settings = AppSettings(
        model=given.model, rewards=[RewardSettings(name=name, placement="colocated") for name in REWARDS]
    )
    with application(settings) as url:
        before = os.getloadavg()[0]
        with chromium() as browser:
            previews, wholes = measure(browser, url, given.repeats)
            if given.pictures:
                take_pictures(browser, url, given.pictures)
    RESULTS.write_text(table(previews, wholes, before))
    print(RESULTS.read_text())


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        yield browser
        browser.close()


def measure(browser: Any, url: str, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds until the first preview and until all is there, the first few runs left out."""
    page = _open(browser, url)
    runs = [_run(page, seed) for seed in range(WARM_UP + repeats)][WARM_UP:]
    page.close()
    return [preview for preview, _ in runs], [whole for _, whole in runs]


def take_pictures(browser: Any, url: str, folder: Path) -> None:
    """Two settings side by side; a drawn observation on a phone in the dark."""
    page = _open(browser, url, viewport={"width": 1160, "height": 1040})
    page.locator("label", has_text=re.compile("^3$")).first.click()
    page.get_by_label("Reward", exact=True).select_option("brightness")
    page.get_by_label("Compare two settings").check()
    page.get_by_label("target").locator("visible=true").fill("0.2")
    _run(page, seed=4, sides=2)
    page.screenshot(path=folder / "playground.png")
    phone = _open(browser, url, viewport={"width": 390, "height": 1300}, color_scheme="dark", has_touch=True)
    phone.get_by_label("Reward", exact=True).select_option("masked_observation")
    phone.get_by_text("What I draw").click()
    phone.get_by_text("64 of 64 pixels seen").wait_for()
    phone.get_by_role("button", name="Upper half").click()
    _run(phone, seed=1)
    phone.locator(".card").screenshot(path=folder / "playground-drawn.png")
    phone.locator(".side").screenshot(path=folder / "playground-phone.png")


def _open(browser: Any, url: str, **options: Any) -> Any:
    page = browser.new_page(**options)
    page.goto(url)
    page.locator("#controls").wait_for()
    return page


def _run(page: Any, seed: int, sides: int = 1) -> tuple[float, float]:
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    page.locator(".side.done").nth(sides - 1).wait_for()
    marks = page.evaluate(
        "Object.fromEntries(performance.getEntriesByType('mark').map(mark => [mark.name, mark.startTime]))"
    )
    assert page.locator("figcaption .reward").count() == 4 * sides
    seconds = float(page.locator(".status").first.inner_text().partition(" s")[0])
    return marks["first-preview"] - marks["generate"], 1000 * seconds


def table(previews: list[float], wholes: list[float], load: float) -> str:
    rows = [_row("first preview", previews), _row("all images", wholes)]
    return (
        "| | median, ms | 9 of 10 within, ms | slowest, ms |\n|---|---|---|---|\n"
        + "".join(rows)
        + f"\n{len(previews)} runs, {os.cpu_count()} cores, load average {load:.2f} when it began. "
        + "Made by `python -m benchmarks.playground`.\n"
    )


def _row(name: str, values: list[float]) -> str:
    ordered = sorted(values)
    return (
        f"| {name} | {statistics.median(ordered):.0f} | {ordered[int(0.9 * len(ordered))]:.0f} | {ordered[-1]:.0f} |\n"
    )


if __name__ == "__main__":
    main()
