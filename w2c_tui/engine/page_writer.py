"""One answer that is to be a page: from a conversation to the page in what the model wrote.

Owns when the answer is over for our purpose. Knows nothing about screens, files or scores.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import msgspec

from w2c_tui.backends.base import Event, Finished, FinishReason, Stats, Text
from w2c_tui.core.artifact import Page, best_page
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Message
from w2c_tui.engine.client import EngineClient


class Answer(msgspec.Struct, frozen=True):
    """`text` is raw, with the beginning that the conversation gave it; `page` is what it holds.

    `reason` "stop" also means that the page had ended before the model did.
    """

    text: str
    page: Page | None
    reason: FinishReason
    stats: Stats


def write_page(
    engine: EngineClient, messages: Sequence[Message], params: GenerationParams, ahead: int = 0
) -> Generator[Event, None, Answer]:
    """The answer's events; returns the answer. Ends it at `</html>`. Raises as `stream` does.

    A last message of the assistant is the beginning of the answer. `ahead` as in `stream`.
    """
    begun = messages[-1].text if messages[-1].role == "assistant" else ""
    raw = [begun]
    ended = False
    finished: Finished | None = None
    for event in engine.stream(messages, params, ahead):
        if isinstance(event, Text):
            if ended:
                # An answer that was written ahead comes faster than it can be stopped.
                continue
            raw.append(event.delta)
            if "</html>" in "".join(raw[-8:]).lower():
                # Whatever else the model wants to say, it is not the page.
                ended = True
                engine.cancel()
        elif isinstance(event, Finished):
            finished = event
        yield event
    assert finished is not None, "a stream ends with Finished or raises"
    text = "".join(raw)
    return Answer(text, best_page(text), "stop" if ended else finished.reason, finished.stats)
