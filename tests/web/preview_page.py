"""What the tests of the preview share: a browser, a tab in it, a server with a page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, FrameLocator, Page, sync_playwright

from w2c_tui.web.preview import PreviewServer, Shown

CHROMIUM = next(
    filter(
        None,
        map(shutil.which, ("chromium", "google-chrome", "chrome", "chromium-headless-shell")),
    ),
    None,
)
PAGE = "<!DOCTYPE html><html><head><title>T</title></head><body><h1>{}</h1></body></html>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium or Chrome on PATH")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Page]:
    with chromium.new_context(viewport={"width": 1200, "height": 800}) as context:
        yield context.new_page()


@pytest.fixture
def server() -> Iterator[PreviewServer]:
    with PreviewServer(Shown(title="A page", html=PAGE.format("Hello"))) as running:
        yield running


def in_page(tab: Page) -> FrameLocator:
    return tab.frame_locator("#frame")


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Waits outside of the page: its policy lets nobody evaluate text in it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
