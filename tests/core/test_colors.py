"""Colours by name: distances as people see them, and the nearest name."""

from __future__ import annotations

import itertools

import pytest

from w2c_tui.core.colors import COLORS, contrast, distance, lab, name_of, rgb


@pytest.mark.parametrize(
    ("color", "expected"),
    # Values of the CIE for sRGB under D65.
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((128, 128, 128), (53.59, 0.0, 0.0)),
    ],
)
def test_lab_is_that_of_the_cie(
    color: tuple[int, int, int], expected: tuple[float, float, float]
) -> None:
    assert lab(color) == pytest.approx(expected, abs=0.02)


def test_every_colour_of_the_list_is_its_own_name() -> None:
    assert all(name_of(rgb(name)) == name for name in COLORS)


def test_colours_near_a_name_get_it() -> None:
    assert name_of((250, 100, 75)) == "tomato"
    assert name_of((1, 2, 126)) == "navy"
    assert name_of((36, 35, 34)) == "#222"


def test_names_of_strong_colours_are_apart() -> None:
    """Two pale ones may be alike; no two others are one colour for the eye."""
    strong = [name for name in COLORS if min(rgb(name)) < 200]
    pairs = itertools.combinations(strong, 2)
    assert min(distance(rgb(one), rgb(other)) for one, other in pairs) > 4


def test_contrast_is_that_of_wcag() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)
