"""How different two colours look: CIEDE2000.

Knows nothing about pages.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# IEC 61966-2-1 (sRGB), white point D65.
_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])


def lab(rgb: ArrayLike) -> Floats:
    """(..., 3) sRGB in 0..255 as CIELAB under D65."""
    values = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(lab1: ArrayLike, lab2: ArrayLike) -> Floats:
    """The colour difference of (..., 3) CIELAB colours; 1 is just noticeable, 100 black to white.

    Sharma, Wu, Dalal 2005: The CIEDE2000 Color-Difference Formula, equations 2 to 22.
    """
    first, second = np.asarray(lab1, dtype=np.float64), np.asarray(lab2, dtype=np.float64)
    l1, a1, b1 = (first[..., i] for i in range(3))
    l2, a2, b2 = (second[..., i] for i in range(3))
    c_mean7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 0.5 * (1 - np.sqrt(c_mean7 / (c_mean7 + 25.0**7)))
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    grey = c1 * c2 == 0
    dh = np.where(grey, 0.0, (h2 - h1 + 180) % 360 - 180)
    # A difference of exactly 180 keeps its sign in the published formula.
    dh = np.where((dh == -180) & (h2 - h1 == 180), 180.0, dh)
    big_dh = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(dh / 2))
    l_mean, c_mean = (l1 + l2) / 2, (c1 + c2) / 2
    total = h1 + h2
    far = np.abs(h1 - h2) > 180
    h_mean = np.where(grey, total, (total + np.where(far, np.where(total < 360, 360, -360), 0)) / 2)
    t = (
        1
        - 0.17 * np.cos(np.radians(h_mean - 30))
        + 0.24 * np.cos(np.radians(2 * h_mean))
        + 0.32 * np.cos(np.radians(3 * h_mean + 6))
        - 0.20 * np.cos(np.radians(4 * h_mean - 63))
    )
    turn = 30 * np.exp(-(((h_mean - 275) / 25) ** 2))
    c_mean7 = c_mean**7
    r_c = 2 * np.sqrt(c_mean7 / (c_mean7 + 25.0**7))
    s_l = 1 + 0.015 * (l_mean - 50) ** 2 / np.sqrt(20 + (l_mean - 50) ** 2)
    s_c, s_h = 1 + 0.045 * c_mean, 1 + 0.015 * c_mean * t
    r_t = -np.sin(np.radians(2 * turn)) * r_c
    part_l, part_c, part_h = (l2 - l1) / s_l, (c2 - c1) / s_c, big_dh / s_h
    squared = part_l**2 + part_c**2 + part_h**2 + r_t * part_c * part_h
    difference: Floats = np.sqrt(np.maximum(squared, 0))
    return difference


def similarity(rgb1: ArrayLike, rgb2: ArrayLike) -> Floats:
    """1 - CIEDE2000 / 100 of (..., 3) sRGB colours, in 0..1, as Design2Code has it."""
    return np.clip(1 - ciede2000(lab(rgb1), lab(rgb2)) / 100, 0, 1)
