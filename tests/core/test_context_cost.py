"""What a turn takes of the context, told from what the answers before took."""

from __future__ import annotations

import pytest

from w2c_tui.core.context_cost import Meter
from w2c_tui.core.conversation import Message
from w2c_tui.core.store import StoredAttachment, StoredMessage

CHARS_PER_TOKEN, IMAGE = 3, 600
PAGE = "<!DOCTYPE html><html><body>" + "<p>words</p>" * 200 + "</body></html>"
SHOT = StoredAttachment("0" * 64, 800, 600, "shot.png", "", None)


def branch(*, latest: bool = False, dropped: int = 0) -> list[StoredMessage]:
    """Three answers by a model of which the prices are known; the last one as is said."""
    said = [("user", "Make this page"), ("assistant", PAGE)]
    said += [("user", "Bluer, please"), ("assistant", PAGE.replace("words", "azure sky"))]
    said += [("user", "And larger"), ("assistant", PAGE.replace("words", "large"))]
    found: list[StoredMessage] = []
    for number, (role, text) in enumerate(said):
        stats = {}
        if role == "assistant":
            last = number == len(said) - 1
            prompt = [found[0], *found[-2:]] if latest and last else found[dropped * last :]
            chars = sum(len(message.text) for message in prompt) + len(text)
            stats = {
                "context_used": round(chars / CHARS_PER_TOKEN) + IMAGE,
                "new_tokens": round(len(text) / CHARS_PER_TOKEN),
                "context_length": 8192,
            }
            if last:
                stats |= {"iteration": "latest" if latest else "history", "num_left_out": dropped}
        pictures = () if found else (SHOT,)
        found.append(
            StoredMessage(
                *(number, "s", None, 0.0, None, role, "complete", "stop", "", "m"),
                *(stats, text, pictures),
            )
        )
    return found


@pytest.mark.parametrize("how", [{}, {"latest": True}, {"dropped": 2}])
def test_both_ways_to_iterate_are_told_however_the_last_answer_was_made(how):
    messages = branch(**how)
    meter = Meter(messages)
    request = Message("user", "Round the corners of all boxes")
    text = [len(message.text) for message in messages]
    whole = (sum(text) + len(request.text)) / CHARS_PER_TOKEN + IMAGE
    latest = (text[0] + text[-1] + len(request.text)) / CHARS_PER_TOKEN + IMAGE
    assert meter.tokens("history", request) == pytest.approx(whole, rel=0.02)
    assert meter.tokens("latest", request) == pytest.approx(latest, rel=0.02)
    assert f"About {meter.tokens('history'):,} tokens with the whole conversation" in str(meter)
    assert f"{meter.tokens('latest'):,} with the latest page only, of 8,192" in str(meter)


def test_another_picture_costs_what_the_first_one_did():
    meter = Meter(branch())
    assert meter.cost.tokens_per_image == pytest.approx(IMAGE, rel=0.02)


def test_nothing_is_told_before_an_answer_was_measured():
    (question, *_) = branch()
    for messages in ([], [question]):
        assert str(Meter(messages)) == "Known after the first answer."
        assert Meter(messages).tokens("history") == 0
