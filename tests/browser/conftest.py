"""The playground of a real served endpoint, in headless Chromium: one Serve and one browser for all tests here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.free_port import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

KEY = "key-of-the-browser-tests"
SMALL = {"ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 2}
SCREENSHOTS = os.environ.get("MFM_RAY_SCREENSHOTS")
"""A folder for pictures of what each test ended with; none are taken without it."""


@dataclass(frozen=True)
class Served:
    """open: answers this machine without a key. keyed: the same with one, below a prefix."""

    open: str
    keyed: str


@pytest.fixture(scope="session")
def served(
    ray_session: None, tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from ray import serve

    from serve.app import build_app
    from serve.settings import AppSettings

    model = os.environ.get("MFM_RAY_BROWSER_MODEL", tiny_models["tiny"])  # a trained one, for pictures worth showing
    port, keys = free_port(), tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    names = ("symmetry", "brightness", "masked_observation", "class_probability", "class_mixture")
    settings = {
        "model": {"digits": model},
        "rewards": [{"name": name, "placement": "colocated"} for name in names],
        "sampler": SMALL,
        "ingress": SMALL,
    }
    serve.run(build_app(AppSettings.model_validate(settings)), name="open", route_prefix="/")
    keyed = AppSettings.model_validate({**settings, "keys_file": str(keys)})
    serve.run(build_app(keyed), name="keyed", route_prefix="/keyed")
    yield Served(f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/keyed/")
    serve.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "no Chromium; `make test-browser` says how to get one"
    # root, as in containers, may run Chromium only without its sandbox; it sees nothing but this machine's pages
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Callable[..., Page]]:
    """`visit(url, width=320, dark=True)`: the page, ready. What the browser complains about fails the test, and so
    does a request to anywhere else."""
    opened: list[Any] = []
    complaints: list[str] = []

    def visit_page(url: str, *, width: int = 1240, height: int = 900, ready: bool = True, **options: Any) -> Page:
        options.setdefault("permissions", ["clipboard-read", "clipboard-write"])
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if _complains(said) else None)
        page.on(
            "response", lambda got: complaints.append(got.url) if got.status >= 400 and "/v1/" not in got.url else None
        )
        page.on("request", lambda asked: complaints.append(asked.url) if not _is_own(asked.url, url) else None)
        opened.append((context, page))
        page.goto(url)
        if ready:
            page.locator("#controls").wait_for()
        return page

    yield visit_page
    for number, (context, page) in enumerate(opened):
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(SCREENSHOTS) / f"{request.node.name}-{number}.png", full_page=True)
        context.close()
    assert not complaints, complaints


def _complains(said: Any) -> bool:
    """A refusal of the API is no fault of the page."""
    return said.type in ("error", "warning") and not said.text.startswith("Failed to load resource")


def _is_own(asked: str, url: str) -> bool:
    return asked.startswith(("data:", url))
