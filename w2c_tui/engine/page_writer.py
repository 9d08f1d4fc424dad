"""One answer that is to be a page: from a conversation to the page in what the model wrote.

Owns how it is begun for a model that would not know how to, and when it is over for our purpose.
Knows nothing about screens, files or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import msgspec

from w2c_tui.backends.base import Event, Finished, FinishReason, Stats, Text
from w2c_tui.core.artifact import Page, best_page
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Message
from w2c_tui.core.page_text import begun_page
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.engine.client import EngineClient

END = "</html>"
"""Whatever else a model wants to say after it, it is not the page."""
_BEGUN_TOKENS = 100
"""Tokens beside those of the page's words."""


class Answer(msgspec.Struct, frozen=True):
    """`text` is raw, with the beginning that the conversation gave it; `page` is what it holds.

    `reason` "stop" also means that the page had ended before the model did.
    """

    text: str
    page: Page | None
    reason: FinishReason
    stats: Stats


def begun(
    messages: Sequence[Message], params: GenerationParams
) -> tuple[list[Message], GenerationParams] | None:
    """The first request for a page, put so that a small text-only model can write it down: its
    answer is begun, see `begun_page`. None for all other turns, and without the picture's text.
    """
    questions = [message for message in messages if message.role == "user"]
    if len(questions) != 1 or questions[0].text != PAGE_PROMPT:
        return None
    images = questions[0].attachments
    image = next((i for i in images if any(line.text for line in i.page_text or ())), None)
    if image is None:
        return None
    asked = begun_page(image)
    if messages[-1].role == "assistant":
        asked[-1] = messages[-1]
    # Without an end of its own such a model goes round in circles.
    length = _BEGUN_TOKENS + sum(len(line.text) for line in image.page_text or ())
    length = min(params.max_new_tokens, length)
    return asked, msgspec.structs.replace(params, max_new_tokens=length)


def write_page(
    engine: EngineClient,
    messages: Sequence[Message],
    params: GenerationParams,
    ahead: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generator[Event, None, Answer]:
    """The answer's events; returns the answer. Ends it at `END`. Raises as `stream` does.

    A last message of the assistant is the beginning of the answer. `ahead` as in `stream`.
    `cancelled` is asked at each event, as what cancels the engine may come before the request.
    """
    raw = [messages[-1].text if messages[-1].role == "assistant" else ""]
    finished: Finished | None = None
    told = False
    for event in engine.stream(messages, params, ahead, END):
        if isinstance(event, Text):
            raw.append(event.delta)
        elif isinstance(event, Finished):
            finished = event
        if not told and cancelled():
            told = True
            engine.cancel()
        yield event
    assert finished is not None, "a stream ends with Finished or raises"
    text = "".join(raw)
    return Answer(text, best_page(text), finished.reason, finished.stats)
