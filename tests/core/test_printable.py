"""What may be shown, and what errors say of it; errors also travel between processes."""

from __future__ import annotations

import pickle
import sys

import pytest

from w2c_tui.core.errors import ImageError, W2CError, error_named
from w2c_tui.core.printable import one_line, printable, quoted, reason_of, without_password


def test_every_character_that_steers_is_made_visible_and_every_other_one_stays() -> None:
    reordering = {0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        steers = number < 32 or 127 <= number < 160 or 0xD800 <= number < 0xE000
        kept = character in "\t\n" or not (steers or number in reordering)
        assert printable(character) == (character if kept else "\ufffd"), hex(number)
    assert printable("a\r\nb\rc") == "a\nb\ufffdc"


def test_one_line_is_one_line_without_secrets() -> None:
    assert one_line("a\nb\x1b[2J") == "a\\nb\\x1b[2J"
    assert one_line("x" * 300).count("x") == 83
    assert quoted("http://me:secret@host/a") == "'http://host/a'"
    assert without_password("see ftp://a:b@c and http://d/@e") == "see ftp://c and http://d/@e"
    assert reason_of(ValueError("it broke.")) == "it broke"
    assert reason_of(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize("error", [W2CError("What", hint="Do"), ImageError("What")])
def test_an_error_keeps_its_kind_and_words_on_the_way(error: W2CError) -> None:
    for copy in (
        pickle.loads(pickle.dumps(error)),
        error_named(type(error).__name__, error.message, error.hint),
    ):
        assert (type(copy), copy.message, copy.hint) == (type(error), error.message, error.hint)
    assert str(error) == ("What\nDo" if error.hint else "What")
    assert type(error_named("NoSuchError", "What", "")) is W2CError
