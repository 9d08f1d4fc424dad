"""What a model is given for the next page."""

from __future__ import annotations

from w2c_tui.core.conversation import RENDER_SOURCE, Attachment, Message
from w2c_tui.core.iteration import given

SHOT = Attachment(b"x", "0" * 64, 1, 1)
FIRST = "<!DOCTYPE html><html><body>one</body></html>"
SECOND = "<!DOCTYPE html><html><body>two</body></html>"
TALK = [
    Message("system", "Be brief."),
    Message("user", "Make this", (SHOT,)),
    Message("assistant", f"Here:\n```html\n{FIRST}\n```\nDone."),
    Message("user", "Bluer"),
    Message("assistant", f"```html\n{SECOND}\n```"),
    Message("user", "Thanks, what is CSS?"),
    Message("assistant", "A language."),
    Message("user", "Now red"),
]


def test_the_whole_conversation_is_given_as_it_is():
    assert given(TALK, "history") == TALK


def test_the_latest_page_stands_for_all_before_it():
    assert given(TALK, "latest") == [
        TALK[0],
        TALK[1],
        Message("assistant", SECOND + "\n"),
        TALK[-1],
    ]


def test_a_render_of_a_page_is_not_taken_for_the_screenshot():
    render = Attachment(b"y", "1" * 64, 1, 1, source=RENDER_SOURCE)
    talk = [*TALK[:3], Message("user", "Correct this", (render,)), *TALK[4:5], TALK[-1]]
    assert given(talk, "latest")[1] == TALK[1]


def test_an_answer_that_was_begun_stays_at_the_end():
    begun = Message("assistant", "<!DOCTYPE html><html>")
    assert given([*TALK, begun], "latest")[-2:] == [TALK[-1], begun]


def test_without_a_page_nothing_is_left_out():
    for talk in (TALK[:2], TALK[5:], [Message("assistant", FIRST)], []):
        assert given(talk, "latest") == talk
