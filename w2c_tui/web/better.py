"""Better pages for more compute: several candidates, and corrections of what differs.

Owns the loop: ask, render, score, keep the nearest to the screenshot, say what differs, ask again.
It never returns a page that is farther from the screenshot than the first. Candidates are asked
for one after another, and the engine is told how many will follow: it computes the prompt with its
image once, and writes the others beside the first where it can. Knows nothing about screens or
files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import msgspec

from w2c_tui.backends.base import Event, ModelInfo
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.context_cost import Cost, cost_of
from w2c_tui.core.conversation import RENDER_SOURCE, Attachment, Message
from w2c_tui.core.errors import ConfigError, RenderError, W2CError
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.stand_in import stand_in
from w2c_tui.engine.client import EngineClient
from w2c_tui.engine.page_writer import Answer, write_page
from w2c_tui.web.differences import SHOWS_RENDER, fix_request
from w2c_tui.web.render import PageSource, Renderer, window_for
from w2c_tui.web.score import Comparison, compare
from w2c_tui.web.view import View

SEVERAL_IMAGES = frozenset(
    {
        "aya_vision",
        "gemma3",
        "gemma4",
        "idefics3",
        "internvl",
        "mistral3",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "smolvlm",
    }
)
"""Families that were trained on conversations with more than one picture; LLaVA 1.5 was not."""

GOOD_ENOUGH = 0.999
"""From here on there is nothing left to correct."""


def takes_several(info: ModelInfo) -> bool:
    """Whether the model can be shown its page beside the screenshot."""
    return info.reads_images and info.family in SEVERAL_IMAGES


class Begun(msgspec.Struct, frozen=True):
    """Try `number` of `total` begins; `asked` is the conversation that the model is given."""

    number: int
    total: int
    kind: Literal["candidate", "correction"]
    seed: int
    asked: tuple[Message, ...] = ()


class Try(msgspec.Struct, frozen=True, eq=False):
    """What came of one try. `error` says why there is no page, or no picture of it."""

    number: int
    kind: Literal["candidate", "correction"]
    seed: int
    answer: Answer | None = None
    view: View | None = None
    comparison: Comparison | None = None
    error: str = ""

    @property
    def html(self) -> str | None:
        """The page, as the model wrote it."""
        return self.answer.page.html if self.answer and self.answer.page else None

    @property
    def score(self) -> float:
        """Nearness to the screenshot in 0..1; 0 without a page."""
        return self.comparison.score.score if self.comparison else 0.0


def best_try(tries: Sequence[Try]) -> Try | None:
    """The nearest page, the earliest of equals; None without any page."""
    pages = [one for one in tries if one.html is not None]
    return max(pages, key=lambda one: one.score, default=None)


def check_best_of(best_of: int, params: GenerationParams) -> None:
    """Raises ConfigError where all candidates would be the same."""
    if best_of > 1 and params.temperature == 0:
        raise ConfigError(
            f"Of {best_of} candidates at temperature 0 all are the same.",
            hint="Give a --temperature over 0, such as 0.4, or leave out --best-of.",
        )


def better_pages(
    engine: EngineClient,
    renderer: Renderer,
    messages: Sequence[Message],
    params: GenerationParams,
    reference: View,
    info: ModelInfo,
    *,
    best_of: int = 1,
    refine: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Begun | Event | Try]:
    """Write `best_of` candidates for `messages`, then correct the best one `refine` times.

    Yields `Begun`, the engine's events and `Try` for each try; `best_try` of those is the result.
    The first candidate is what a plain answer with `params` would be. `reference` is the
    screenshot; pages are rendered in a window like its own. Ends early when `cancelled` or when
    nothing differs any more. A try that fails is reported and the others go on; only the first
    one's failure of the engine is raised.
    """
    check_best_of(best_of, params)
    first_seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4), "big")
    tries: list[Try] = []
    cost: Cost | None = None
    total = best_of + refine
    for number in range(1, total + 1):
        kind: Literal["candidate", "correction"] = (
            "candidate" if number <= best_of else "correction"
        )
        best = best_try(tries)
        asked: Sequence[Message] = messages
        if kind == "correction":
            if best is None or best.score >= GOOD_ENOUGH:
                return
            found = _correction(messages, best, reference, info, cost)
            if found is None:
                return
            asked = found
        seed = (first_seed + number - 1) % 2**63
        yield Begun(number, total, kind, seed, tuple(asked))
        try:
            answer = yield from write_page(
                engine,
                asked,
                msgspec.structs.replace(params, seed=seed),
                ahead=max(best_of - number, 0),
                cancelled=cancelled,
            )
        except W2CError as error:
            if not tries:
                raise
            done = Try(number, kind, seed, error=error.message)
        else:
            if answer.reason == "cancelled" and tries:
                return
            done = _judged(number, kind, seed, answer, renderer, reference)
            stats = answer.stats
            cost = cost or cost_of(asked, answer.text, stats.context_used, stats.new_tokens)
        tries.append(done)
        yield done
        if cancelled():
            return


def _judged(
    number: int,
    kind: Literal["candidate", "correction"],
    seed: int,
    answer: Answer,
    renderer: Renderer,
    reference: View,
) -> Try:
    if answer.page is None:
        return Try(number, kind, seed, answer, error="The answer holds no page.")
    view, error = None, ""
    try:
        width, height = window_for(reference.picture.size, renderer.settings)
        html = stand_in(answer.page.html, labels=False).html
        page = PageSource(html, name=f"try {number}", width=width, height=height)
        view = renderer.render(page)
    except RenderError as problem:
        error = problem.message
    return Try(number, kind, seed, answer, view, compare(reference, view), error)


def _correction(
    messages: Sequence[Message], best: Try, reference: View, info: ModelInfo, cost: Cost | None
) -> list[Message] | None:
    """The conversation that asks for what differs: the question, the best page, the request, and
    how that page looks where the model takes several pictures and `cost` says that it has room.

    Earlier corrections are left out: they are about other pages and would fill the context.
    """
    assert best.answer is not None
    assert best.comparison is not None
    request = fix_request(reference, best.view, best.comparison)
    if not request:
        return None
    question = messages[:-1] if messages[-1].role == "assistant" else messages
    written = Message("assistant", best.answer.text)
    in_words = [*question, written, Message("user", request)]
    if best.view is None or cost is None or not takes_several(info):
        return in_words
    request = f"{SHOWS_RENDER}\n{request}"
    shown = [*question, written, Message("user", request, (_attachment(best.view),))]
    # There must be room for a page like this one.
    return shown if cost.tokens([*shown, written]) <= info.context_length else in_words


def _attachment(view: View) -> Attachment:
    buffer = io.BytesIO()
    view.picture.save(buffer, "PNG", compress_level=1)
    return attachment_from_bytes(buffer.getvalue(), "your page.png", RENDER_SOURCE)
