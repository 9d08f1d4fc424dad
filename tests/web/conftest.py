"""One browser for all tests that render."""

from __future__ import annotations

import pytest

from w2c_tui.core.config import RenderSettings
from w2c_tui.core.errors import BrowserNotFoundError
from w2c_tui.web.render import Renderer, find_browser


@pytest.fixture(scope="session")
def browser_path():
    """The browser's program; tests that need one are skipped where there is none."""
    try:
        return find_browser()
    except BrowserNotFoundError:
        pytest.skip("no Chromium or Chrome is installed")


@pytest.fixture(scope="session")
def renderer(browser_path):
    with Renderer(RenderSettings(tabs=2, timeout_s=60)) as renderer:
        yield renderer
