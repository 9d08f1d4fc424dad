"""The pictures in the README, made from the application: `python -m tests.tui.pictures`."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from PIL import Image

from tests.tui.scenes import Scene, still_clock
from w2c_tui.core.config import paths
from w2c_tui.core.store import Store
from w2c_tui.web.render import PageSource, Renderer

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = {
    "conversation": ("picture", (130, 38), "textual-dark"),
    "compare": ("compare", (120, 38), "textual-light"),
}


async def drawing(scene: str, size: tuple[int, int], theme: str) -> str:
    """The screen as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("CONFIG", "DATA", "CACHE"):
            os.environ[f"W2C_{name}_DIR"] = f"{folder}/{name}"
        with still_clock(), Store.open(paths().sessions) as store:
            shown = Scene(scene, store, theme)
            async with shown.app.run_test(size=size) as pilot:
                await shown.prepare(pilot)
                return shown.app.export_screenshot()


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    with Renderer() as renderer:
        for name, scene in PICTURES.items():
            svg = asyncio.run(drawing(*scene))
            html = f"<!DOCTYPE html><body style='margin:0'>{svg}"
            picture = renderer.render(PageSource(html, name=name, width=1400)).picture
            few = picture.quantize(96, dither=Image.Dither.NONE)
            few.save(DOCS / f"{name}.png", optimize=True)
            print(DOCS / f"{name}.png", few.size)


if __name__ == "__main__":
    main()
