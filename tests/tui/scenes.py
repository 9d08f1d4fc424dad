"""The main screens as a user meets them, the same on every machine: for snapshots and pictures.

The clock stands still and the engine is scripted; everything else is the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
from textual.pilot import Pilot
from textual.widgets import Static

from tests.tui.scripted import INFO, STATS, ScriptedEngine
from w2c_tui.core.config import InterfaceSettings, LoadSpec, Settings, paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import OutOfMemoryError
from w2c_tui.core.image import ImageSpec, open_image
from w2c_tui.core.reference import load_attachment
from w2c_tui.core.store import Store
from w2c_tui.tui.answer import Answer
from w2c_tui.tui.app import W2CApp
from w2c_tui.tui.pages import Compared, Pages
from w2c_tui.tui.picture import HalfCells
from w2c_tui.tui.status_line import Notice, StatusLine
from w2c_tui.tui.transcript import Transcript
from w2c_tui.tui.welcome import EXAMPLE
from w2c_tui.web.differences import difference_picture
from w2c_tui.web.view import View

MODEL = "crystalchat-7b-web2code"
ANSWER = """\
The page has a dark bar, a hero with one button and six feature boxes in two columns:

```html
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Start Bootstrap</title>
<style>
  body { margin: 0; font-family: Inter, system-ui, sans-serif; color: #212529 }
  nav, footer { background: #212529; color: #fff; padding: 16px 118px }
  .hero { margin: 48px 118px; padding: 96px; background: #f8f9fa; text-align: center }
  .button { background: #0d6efd; color: #fff; padding: 12px 18px; border-radius: 8px }
  .features { display: grid; grid-template-columns: 1fr 1fr; gap: 48px; margin: 0 118px }
</style>
</head>
<body>
<nav>Start Bootstrap</nav>
<section class="hero">
  <h1>A warm welcome!</h1>
  <p>Bootstrap utility classes are used to create this jumbotron.</p>
  <a class="button" href="#">Call to action</a>
</section>
<section class="features">
  <article><h2>Fresh new layout</h2><p>We have created a fresh new layout!</p></article>
  <article><h2>Free to download</h2><p>A powerful collection of free templates.</p></article>
</section>
<footer>Copyright &copy; Your Website 2023</footer>
</body>
</html>
```

The icons are left out: the model cannot draw them.
"""
OUT_OF_MEMORY = OutOfMemoryError(
    "The model ran out of GPU memory: 512 MB more were needed.",
    hint="Choose a smaller model or shorter context (Ctrl+O), or end other programs on the GPU.",
)
_PARTS = {"block_match": 0.74, "text": 0.93, "position": 0.88, "color": 0.91, "ssim": 0.75}
_DIFFERENCES = (
    '"Jumbotron hero header" is missing; it belongs at left 229, top 917 (276 \u00d7 22 px).',
    '"Feature boxes" is missing; it belongs at left 831, top 917 (165 \u00d7 22 px).',
    'The background of "Call to action" is #0b5ed7 and should be #0d6efd.',
)
_NOW = 1_000_000_000.0
_INFO = msgspec.structs.replace(
    INFO,
    name=MODEL,
    num_parameters=7_000_000_000,
    dtype="bfloat16",
    quantization="4bit",
    devices=("cuda:0",),
    context_length=2048,
    image_spec=ImageSpec(),
)
_STATS = msgspec.structs.replace(
    STATS,
    new_tokens=441,
    tokens_per_s=41.0,
    time_to_first_token_s=0.4,
    context_used=1083,
    context_length=2048,
)


@contextlib.contextmanager
def still_clock() -> Iterator[None]:
    """Messages are of one moment, the same in every time zone, and writing has one speed."""
    zone = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    clock = SimpleNamespace(time=lambda: _NOW)
    speed = property(lambda _: 41.0)
    try:
        with (
            mock.patch("w2c_tui.core.store.time", clock),
            mock.patch.object(Answer, "tokens_per_s", speed),
            mock.patch.object(StatusLine, "_measure"),
        ):
            yield
    finally:
        os.environ.pop("TZ")
        if zone is not None:
            os.environ["TZ"] = zone
        time.tzset()


class Scene:
    """An application that `prepare` brings to the moment to be looked at."""

    def __init__(
        self, name: str, store: Store, theme: str = "textual-dark", *, ascii: bool = False
    ) -> None:
        self.name = name
        self.store = store
        self.svg = ""
        """What was drawn last, once it is prepared."""
        settings = Settings(
            model=LoadSpec(name=MODEL),
            interface=InterfaceSettings(theme=theme, pictures="half-cells", ascii=ascii),
        )
        begin = ANSWER.index("<section")
        self._hold = begin // 4
        engine = {
            "streaming": ScriptedEngine(ANSWER, info=_INFO, hold=self._hold),
            "error": ScriptedEngine(ANSWER[:begin], info=_INFO, error=OUT_OF_MEMORY),
        }.get(name, ScriptedEngine(ANSWER, info=_INFO, stats=_STATS))
        self.app = W2CApp(settings, paths(), store, engine=engine, new=True)

    async def prepare(self, pilot: Pilot[Any]) -> None:
        """Do what leads there, as a user would, and wait until all of it is drawn."""
        screen: Any = self.app.screen
        await _until(pilot, lambda: screen.is_mounted and screen.query_one(Notice).is_mounted)
        # A key that comes before the prompt has the focus goes nowhere.
        await _until(pilot, lambda: self._ready() and self.app.focused is screen.prompt)
        screen.prompt.cursor_blink = False
        if self.name != "empty":
            screen.composer.add_picture(load_attachment(EXAMPLE))
            await _until(pilot, lambda: len(screen.composer.pictures) == 1)
        if self.name not in ("empty", "draft"):
            await pilot.press("enter")
            await _until(pilot, self._answered)
        if self.name == "sessions":
            _earlier_sessions(self.store)
            await pilot.press("ctrl+b")
            await _until(pilot, lambda: screen.query("SessionList"))
            await _until(pilot, lambda: screen.query_one("SessionList").option_count > 3)
        if self.name == "compare":
            await self._compare(pilot)
        if self.name == "picture":
            await pilot.press("f3")
            await _until(pilot, lambda: screen.query("#picture-frame HalfCells"))
        await self._rest(pilot)

    def _ready(self) -> bool:
        """The model is loaded, and all parts of the screen know."""
        screen = self.app.screen
        told = str(screen.query_one(StatusLine).content).startswith(MODEL)
        return self.app.model_state == "ready" and told and not screen.query_one(Notice).display

    def _answered(self) -> bool:
        """The last answer stands there as far as it comes, below the picture it is about."""
        transcript: Any = self.app.screen.query_one(Transcript)
        if len(transcript.views) < 2 or any(not view.is_mounted for view in transcript.views):
            return False
        thumbnails = list(transcript.query("Thumbnail HalfCells").results(HalfCells))
        if not thumbnails or any(cells.image is None for cells in thumbnails):
            return False
        view = transcript.views[-1]
        foot = str(view.query_one(".message-foot", Static).content)
        if self.name == "streaming":
            written = f"Writing: {self._hold:,} tokens"
            return foot.startswith(written) and _shows(view, ANSWER[: 4 * self._hold])
        if self.app.answers or view.answer is not None:
            return False
        text = ANSWER[: ANSWER.index("<section")] if self.name == "error" else ANSWER
        told = "Failed: " if self.name == "error" else f"{_STATS.new_tokens} tokens"
        return foot.startswith(told) and _shows(view, text)

    async def _compare(self, pilot: Pilot[Any]) -> None:
        """Two versions that were rendered and scored before, with pictures made here: those of a
        browser depend on its fonts."""
        session = self.store.sessions()[0]
        versions = self.app.pages.versions(session.id)
        first = versions.all()[0]
        versions.note(first.number, score=0.613, parts=_PARTS)
        self.store.add_message(session.id, Message("user", "The hero is lighter than that"))
        with self.store.begin_answer(session.id, model=MODEL) as answer:
            answer.append(ANSWER.replace("#f8f9fa", "#fafbfc"))
            answer.finish()
        second = self.app.pages.keep(answer.message_id, self.app.settings.generation)
        assert second is not None
        noted = versions.note(second.number, score=0.842, parts=_PARTS)
        original = open_image(load_attachment(EXAMPLE))
        render = original.copy()
        render.paste("#f8f9fa", (118, 580, 1162, 1290))
        difference = difference_picture(View(picture=original), View(picture=render))
        found = Compared(
            version=noted,
            original=original,
            render=render,
            difference=difference,
            score=noted.meta.score,
            parts=_PARTS,
            differences=_DIFFERENCES,
        )
        with mock.patch.object(Pages, "compared", return_value=found):
            await self.app.screen.branch.show()
            await pilot.press("f4")
            await _until(pilot, lambda: len(self.app.screen.query("#looks HalfCells")) == 3)
            scores = self.app.screen.query_one("#scores", Static)
            await _until(pilot, lambda: _DIFFERENCES[0] in str(scores.content))
            await self._rest(pilot)

    async def _rest(self, pilot: Pilot[Any]) -> None:
        """Until nothing is left to be drawn, and what is drawn stays as it is."""
        shown, same = "", 0
        while same < 3:
            await _until(pilot, self._quiet)
            await pilot.wait_for_scheduled_animations()
            before, shown = shown, self.app.export_screenshot(simplify=True)
            same = same + 1 if shown == before else 0
            await asyncio.sleep(0.05)
        self.svg = shown

    def _quiet(self) -> bool:
        """Nothing works in the background but the answer that is held, no widget has messages to
        handle or a layout to come, the conversation is at its end and the keys in the footer are
        those that do something."""
        screen = self.app.screen
        if any(not w.is_finished and w.group != "answers" for w in self.app.workers):
            return False
        widgets = [self.app, *screen.walk_children(with_self=True)]
        if any(w._message_queue is not None and w._message_queue.qsize() for w in widgets):
            return False
        if screen._layout_required or screen._callbacks or screen._dirty_widgets:
            return False
        for transcript in screen.query(Transcript):
            if transcript.display and transcript.scroll_y != transcript.max_scroll_y:
                return False
        wanted = {}
        for _, binding, enabled, _ in screen.active_bindings.values():
            if binding.show:
                wanted.setdefault(binding.action, not enabled)
        keys = screen.query("FooterKey").exclude(".-command-palette").results()
        return {key.action: key.disabled for key in keys} == wanted


def _shows(view: Any, text: str) -> bool:
    """Whether the last part of an answer shows the end of `text`."""
    return bool(view._parts) and view._parts[-1]._shown.rstrip()[-20:] == text.rstrip()[-20:]


def _earlier_sessions(store: Store) -> None:
    for title in ("Checkout with three steps", "dashboard.png", "Pricing table, dark"):
        store.create_session(title)


async def _until(pilot: Pilot[Any], condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, condition
        await pilot.pause()
        await asyncio.sleep(0.02)


def example_picture() -> Path:
    """The screenshot that the scenes are about."""
    return EXAMPLE
