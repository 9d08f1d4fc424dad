"""What a model is given of a conversation: all of it, or only what the next page is made from.

Knows nothing about tokens, models or screens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from w2c_tui.core.conversation import RENDER_SOURCE, Message

Iteration = Literal["history", "latest"]
"""`history`: every turn. `latest`: the screenshot, the latest page and the request."""


def given(messages: Sequence[Message], iteration: Iteration) -> list[Message]:
    """What of `messages` the model is given for the answer to the last question.

    For "latest": the system prompt, the question with the latest screenshot, the latest page as
    its answer, and the request; an answer that was begun stays at the end. Without a page so far
    it is all of them.
    """
    if iteration == "history":
        return list(messages)
    # Late, as the application starts without.
    from w2c_tui.core.artifact import best_page

    system = [message for message in messages[:1] if message.role == "system"]
    turns = list(messages[len(system) :])
    begun = [turns.pop()] if turns and turns[-1].role == "assistant" else []
    if not turns:
        return list(messages)
    request = turns.pop()
    for at in range(len(turns) - 1, -1, -1):
        page = best_page(turns[at].text) if turns[at].role == "assistant" else None
        if page is not None:
            break
    else:
        return list(messages)
    asked = [message for message in turns[:at] if message.role == "user"]
    pictured = next((message for message in reversed(asked) if _has_screenshot(message)), None)
    question = pictured or (asked[0] if asked else Message("user"))
    return [*system, question, Message("assistant", page.html), request, *begun]


def _has_screenshot(message: Message) -> bool:
    return any(image.source != RENDER_SOURCE for image in message.attachments)
