"""How the application looks: snapshots that were looked at, and plain ASCII."""

from __future__ import annotations

import difflib
import html
import re
from pathlib import Path

import pytest

from tests.tui.conftest import wait_until
from tests.tui.scenes import Scene, still_clock
from w2c_tui.tui.plain import plain


@pytest.mark.parametrize("scene", ["empty", "streaming", "error", "compare"])
@pytest.mark.parametrize(
    ("size", "theme"),
    [
        pytest.param((80, 24), "textual-dark", id="80x24-dark"),
        pytest.param((120, 40), "textual-light", id="120x40-light"),
    ],
)
def test_it_looks_as_it_did(own_folders, store, snap_compare, request, scene, size, theme):
    with still_clock():
        shown = Scene(scene, store, theme)
        same = snap_compare(shown.app, terminal_size=size, run_before=shown.prepare)
    # A log has no room for two pictures; their words and places tell what moved.
    known = Path(__file__).parent / "__snapshots__" / "test_appearance" / f"{request.node.name}.svg"
    assert same, "\n".join(difflib.unified_diff(pieces(known.read_text()), pieces(shown.svg), n=1))


def pieces(svg):
    """What an SVG snapshot draws: its filled cells and its texts, each with its place and style."""
    found = re.findall(r'<rect fill="([^"]+)" x="([^"]+)" y="([^"]+)" width="([^"]+)"', svg)
    texts = re.findall(r'<text class="\S+-(r\d+)" x="([^"]+)" y="([^"]+)"[^>]*>([^<]*)', svg)
    return [html.unescape(" ".join(piece)) for piece in found + texts]


def drawn(app):
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


def closed(app):
    """No dialog and no settings are open."""
    return len(app.screen_stack) == 1 and not app.screen.query("#settings")


async def test_ascii_is_enough_for_every_screen(own_folders, store):
    scene = Scene("sessions", store, ascii=True)
    app = scene.app
    async with app.run_test(size=(100, 40)) as pilot:
        await scene.prepare(pilot)
        assert drawn(app).isascii()
        assert "Prompt" in drawn(app)
        assert "<html" in drawn(app)
        for key, name in (
            *(("ctrl+b", ""), ("f2", "#settings"), ("f2", ""), ("f3", "#picture-frame HalfCells")),
            *(("ctrl+o", "#known"), ("escape", ""), ("ctrl+t", "#preview"), ("escape", "")),
            *(("f1", "Keys"), ("escape", ""), ("ctrl+p", "CommandPalette Input")),
        ):
            await pilot.press(key)
            if name:
                await wait_until(
                    pilot, lambda name=name: app.screen.query(name) or name in str(app.screen)
                )
            else:
                await wait_until(pilot, lambda: closed(app))
            await pilot.pause(0.1)
            foreign = {c for c in drawn(app) if not c.isascii()}
            assert not foreign, (key, foreign)


def test_plain_text_is_as_wide_as_the_text():
    assert plain("caf\u00e9 \u2026 \u2502\u256d\u2500") == "cafe . |+-"
    assert plain("\u65e5\u672c x") == "? ?  x"
