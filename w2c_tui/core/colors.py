"""Colours by name: few, far apart, and each a word of CSS.

Owns the list in which the colours of a screenshot are put before a model and in which the pages
that small models learn from are written. Names and values: CSS Color Module Level 4.
"""

from __future__ import annotations

import functools
import math

PALE = (
    *("white", "whitesmoke", "#eee", "#ddd", "lavender", "lightcyan", "honeydew", "cornsilk"),
    *("mistyrose", "linen", "lightblue", "palegoldenrod", "thistle", "wheat", "lightpink"),
    *("palegreen", "beige"),
)
DARK = (
    *("black", "#222", "#333", "#444", "midnightblue", "navy", "darkslategray", "indigo"),
    *("darkgreen", "maroon", "darkslateblue"),
)
VIVID = (
    *("royalblue", "dodgerblue", "steelblue", "navy", "teal", "darkcyan", "seagreen"),
    *("mediumseagreen", "forestgreen", "olivedrab", "gold", "orange", "coral", "tomato"),
    *("crimson", "firebrick", "maroon", "deeppink", "palevioletred", "orchid", "purple"),
    *("rebeccapurple", "slateblue", "mediumpurple", "indigo", "chocolate", "sienna", "peru"),
    *("slategray", "turquoise", "skyblue", "darkkhaki", "limegreen", "hotpink"),
)
GREYS = ("#222", "#333", "#444", "#555", "#777", "#999", "#bbb", "#ccc", "#ddd", "#eee")
COLORS: tuple[str, ...] = tuple(dict.fromkeys((*PALE, *DARK, *VIVID, *GREYS)))
"""Every colour of the list, as CSS writes it."""

RGB = tuple[int, int, int]


@functools.cache
def rgb(color: str) -> RGB:
    """sRGB of a CSS name or `#rgb`, `#rrggbb`. Raises ValueError for what is none."""
    from PIL import ImageColor

    red, green, blue = ImageColor.getrgb(color)[:3]
    return red, green, blue


def lab(color: RGB) -> tuple[float, float, float]:
    """CIE L*a*b* of an sRGB colour under D65, in which distances are about as we see them."""
    red, green, blue = (_linear(value / 255) for value in color)
    x = (0.4124564 * red + 0.3575761 * green + 0.1804375 * blue) / 0.95047
    y = 0.2126729 * red + 0.7151522 * green + 0.0721750 * blue
    z = (0.0193339 * red + 0.1191920 * green + 0.9503041 * blue) / 1.08883
    x, y, z = (
        value ** (1 / 3) if value > (6 / 29) ** 3 else value / (3 * (6 / 29) ** 2) + 4 / 29
        for value in (x, y, z)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def distance(one: RGB, other: RGB) -> float:
    """ΔE*ab (CIE 1976): about 2 is just visible, 10 is another shade, 100 is black to white."""
    pairs = zip(lab(one), lab(other), strict=True)
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs))


@functools.lru_cache(maxsize=65536)
def name_of(color: RGB) -> str:
    """The colour of the list that looks most like `color`."""
    return min(COLORS, key=lambda name: distance(rgb(name), color))


def luminance(color: RGB) -> float:
    """Relative luminance in 0..1 (WCAG 2)."""
    red, green, blue = (_linear(value / 255) for value in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: RGB, other: RGB) -> float:
    """1 (the same) to 21 (black on white), as WCAG 2 defines it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
