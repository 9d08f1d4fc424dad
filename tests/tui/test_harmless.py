"""Nothing in a drawn line steers the terminal."""

from __future__ import annotations

import sys

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color

from w2c_tui.core.printable import printable
from w2c_tui.tui.harmless import HarmlessLines

BLACK = Color(0, 0, 0)


def test_every_character_that_steers_is_replaced_by_as_many_cells_and_no_other_one():
    lines = HarmlessLines()
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        text = f"a{character}b"
        (segment,) = lines.apply([Segment(text)], BLACK)
        if character in "\t\n" or printable(character) != character:
            assert segment.text == "a" + "\ufffd" * cell_len(character) + "b", hex(number)
        else:
            assert segment.text == text, hex(number)


def test_a_control_code_of_the_library_stays_beside_what_is_replaced():
    bell = Segment("\x07", None, [(1,)])
    assert HarmlessLines().apply([bell], BLACK) == [bell]
    assert HarmlessLines().apply([bell, Segment("\x1b[2J")], BLACK)[0] == bell
    assert "\x1b" not in HarmlessLines().apply([bell, Segment("\x1b[2J")], BLACK)[1].text
