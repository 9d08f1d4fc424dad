"""Themes: colours of `core.colors`, a font and lengths that make the blocks of one page fit.

Every text of a theme can be read on its background. Knows nothing about markup.
"""

from __future__ import annotations

import random
from typing import Literal

import msgspec

from w2c_tui.core import colors
from w2c_tui.core.colors import DARK, PALE, VIVID, rgb

# The bundled fonts of desktops: a name that is not installed falls back to the generic one.
FONTS = ("sans-serif", "serif", "monospace", "Inter", "Lato", "Roboto", "Open Sans", "Noto Serif")
_FONT_WEIGHTS = (34, 14, 4, 12, 12, 10, 10, 4)


def contrast(one: str, other: str) -> float:
    return colors.contrast(rgb(one), rgb(other))


def is_dark(color: str) -> bool:
    return colors.luminance(rgb(color)) < 0.18


def ink_on(background: str) -> str:
    """White or nearly black, whichever can be read."""
    return "white" if contrast("white", background) >= 3 else "#222"


class Theme(msgspec.Struct, frozen=True):
    """What makes the blocks of one page look as one. Lengths in px."""

    page: str
    text: str
    muted: str
    surface: str
    line: str
    accent: str
    second: str
    band: str
    font: str
    radius: int
    space: int
    card: Literal["flat", "border", "shadow", "top"]
    button: Literal["solid", "outline", "pill"]
    centered: bool

    @property
    def dark(self) -> bool:
        return is_dark(self.page)

    @property
    def font_family(self) -> str:
        if self.font in ("sans-serif", "serif", "monospace"):
            return self.font
        return f"{self.font},{'serif' if 'Serif' in self.font else 'sans-serif'}"


def draw_theme(rng: random.Random) -> Theme:
    """A theme whose texts can all be read on their backgrounds."""
    mood = rng.choices(("plain", "tinted", "dark", "bold"), (42, 28, 20, 10))[0]
    if mood == "dark":
        page = rng.choice(DARK)
    elif mood == "bold":
        page = rng.choice([c for c in VIVID if c not in DARK])
    elif mood == "plain":
        page = rng.choices(("white", "whitesmoke", "#eee"), (6, 3, 2))[0]
    else:
        page = rng.choice(PALE[3:])
    text = "white" if ink_on(page) == "white" else rng.choice(("#222", "#333", "black"))
    dark = is_dark(page)
    if dark:
        surfaces = [c for c in (*DARK, "#555") if 1.15 < contrast(c, page) < 4]
    elif mood == "bold":
        surfaces = ["white", "#eee", *(c for c in DARK if contrast(c, page) > 2)]
    else:
        surfaces = [c for c in PALE if c != page and contrast(c, page) > 1.03]
        surfaces += ["white"] * 12 if page != "white" else ["whitesmoke", "#eee"] * 5
    accents = [c for c in VIVID if contrast(c, page) > 1.7 and c != page]
    accent, second = rng.sample(accents, 2)
    surface = rng.choice(surfaces or ["white"])
    band = rng.choice([accent, accent, second, surface, rng.choice(DARK), page])
    return Theme(
        page=page,
        text=text,
        muted=_muted(page),
        surface=surface,
        line="#555" if dark else rng.choice(("#ccc", "#bbb", "#ddd")),
        accent=accent,
        second=second,
        band=band,
        font=rng.choices(FONTS, _FONT_WEIGHTS)[0],
        radius=rng.choice((0, 0, 4, 8, 8, 12, 20)),
        space=rng.choice((12, 16, 16, 20, 24, 24, 32)),
        card=rng.choices(("flat", "border", "shadow", "top"), (5, 4, 2, 2))[0],
        button=rng.choices(("solid", "outline", "pill"), (6, 2, 3))[0],
        centered=rng.random() < 0.3,
    )


def _muted(background: str) -> str:
    for grey in ("#777", "#555", "#bbb", "#ddd", "#333"):
        if contrast(grey, background) >= 4:
            return grey
    return ink_on(background)
