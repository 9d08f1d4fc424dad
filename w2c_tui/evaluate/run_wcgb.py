"""Runs the code generation benchmark: pages are written, and rendered and scored meanwhile.

A folder of results holds, for each page, `pages/NAME.html` as the model wrote it, small pictures in
`pictures/`, and a row of the journal. A killed run goes on where it was: a page that was written
is not written again. Knows nothing about terminals; progress is a callback.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from w2c_tui.core.artifact import visible_text
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import RenderError, W2CError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.image import (
    DEFAULT_LIMITS,
    ImageLimits,
    attachment_from_bytes,
    attachment_from_picture,
    read_header,
)
from w2c_tui.core.prompt import PAGE_PROMPT
from w2c_tui.evaluate import judge
from w2c_tui.evaluate.asking import Asker, Attach, shared_out
from w2c_tui.evaluate.journal import Journal
from w2c_tui.evaluate.wcgb import Page, PageResult, WcgbResult, total
from w2c_tui.web.differences import difference_picture
from w2c_tui.web.render import PageSource, Renderer, window_for
from w2c_tui.web.score import Comparison, compare
from w2c_tui.web.view import View, view_of_picture

_REDUCED_BY, _MAX_HEIGHT = 2, 8_000
"""Pictures are kept small, as a run may have thousands of pages."""


class Written(msgspec.Struct, frozen=True):
    """A page as it was written. `html` is None where the answer held none."""

    html: str | None
    complete: bool = False
    new_tokens: int = 0
    seconds: float = 0.0


Write = Callable[[Page, int], Written]
"""Writes page number so-and-so of the run, in any thread. Raises W2CErrors."""


def by_model(asker: Asker, attach: Attach, system: str = "") -> Write:
    """Pages by the published protocol: one question, the answer up to the page's end."""

    def write(page: Page, number: int) -> Written:
        began = time.perf_counter()
        opening = [Message("system", system)] if system else []
        question = Message("user", PAGE_PROMPT, (attach(page.image),))
        answer = asker.page([*opening, question], number)
        return Written(
            answer.page.html if answer.page else None,
            answer.reason == "stop",
            answer.stats.new_tokens,
            time.perf_counter() - began,
        )

    return write


def from_folder(folder: Path) -> Write:
    """Pages that were written elsewhere: `NAME.html`, or `NAME_output.html` as published."""

    def write(page: Page, number: int) -> Written:
        for name in (f"{page.name}.html", f"{page.name}_output.html"):
            if (folder / name).is_file():
                return Written((folder / name).read_text(encoding="utf-8", errors="replace"), True)
        return Written(None)

    return write


def run_wcgb(
    pages: Sequence[Page],
    writers: Sequence[Write],
    journal: Journal[PageResult],
    renderer: Renderer,
    *,
    render_reference: Callable[[PageSource], View] | None = None,
    read_text: Callable[[Attachment], Attachment] | None = None,
    ask_judge: Callable[[Sequence[Message], int], str] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> WcgbResult:
    """Write, render and score every page that has no row in `journal` yet; the totals of all.

    `writers` share the pages out, one page each at a time. `render_reference` is the renderer's
    own, or one that remembers (`RenderCache.render`). `read_text` gives a screenshot its text where
    the page's HTML is not known. `ask_judge` rates pictures; nothing is sent anywhere without it. A
    page that fails is a row with an error, counts 0 and is tried again by the next run. Raises
    `asking.Stopped` when the user ends the run.
    """
    render_reference = render_reference or renderer.render
    run = _Run(journal.folder, renderer, render_reference, read_text, ask_judge, limits)
    finished = {row.name for row in journal.rows if row.outcome != "failed"}
    done = len(finished & {page.name for page in pages})
    report(done, len(pages))
    waiting: deque[Future[PageResult]] = deque()
    # While one page of each tab is scored the next one is rendered.
    num_threads = 2 * renderer.num_tabs

    def keep_first() -> None:
        nonlocal done
        journal.add(waiting.popleft().result())
        done += 1
        report(done, len(pages))

    def write(writer: Write, item: tuple[int, Page]) -> tuple[int, Page, Written | PageResult]:
        number, page = item
        try:
            return number, page, run.written(page, number, writer)
        except W2CError as error:
            return number, page, PageResult(name=page.name, outcome="failed", error=error.message)

    open_ones = [(at, page) for at, page in enumerate(pages) if page.name not in finished]
    with (
        ThreadPoolExecutor(num_threads, thread_name_prefix="w2c-score") as pool,
        contextlib.closing(shared_out(open_ones, writers, write)) as all_written,
    ):
        try:
            for number, page, written in all_written:
                if isinstance(written, PageResult):
                    waiting.append(_done(written))
                else:
                    waiting.append(pool.submit(run.scored, page, number, written))
                # In order, so that an interrupted run and a whole one keep the same rows, and few
                # at a time, so that a thousand pages take the memory of a few.
                while len(waiting) > num_threads or (waiting and waiting[0].done()):
                    keep_first()
        finally:
            while waiting:
                keep_first()
    rows = {row.name: row for row in journal.rows}
    return total((rows[page.name] for page in pages), judging=ask_judge is not None)


class _Run:
    def __init__(
        self,
        folder: Path,
        renderer: Renderer,
        render_reference: Callable[[PageSource], View],
        read_text: Callable[[Attachment], Attachment] | None,
        ask_judge: Callable[[Sequence[Message], int], str] | None,
        limits: ImageLimits,
    ) -> None:
        self.folder = folder
        self.renderer = renderer
        self.render_reference = render_reference
        self.read_text = read_text
        self.ask_judge = ask_judge
        self.limits = limits

    def written(self, page: Page, number: int, write: Write) -> Written:
        """The page of an earlier run if it was written then, or else a new one."""
        place = self.folder / "pages" / f"{page.name}.json"
        if place.exists():
            return msgspec.json.decode(place.read_bytes(), type=Written)
        written = write(page, number)
        if written.html is not None:
            write_atomically(place.with_suffix(".html"), written.html)
        write_atomically(place, msgspec.json.encode(written).decode())
        return written

    def scored(self, page: Page, number: int, written: Written) -> PageResult:
        """Render and score; whatever fails is a row."""
        result = PageResult(
            name=page.name,
            outcome="no page",
            complete=written.complete,
            new_tokens=written.new_tokens,
            seconds=written.seconds,
        )
        try:
            header = read_header(page.image.read_bytes(), str(page.image), self.limits)
            size = header.width, header.height
            reference, text = self._reference(page, size)
            if written.html is None:
                return msgspec.structs.replace(result, **_text_measures(text, ""))
            result = msgspec.structs.replace(
                result, **_text_measures(text, visible_text(written.html))
            )
            try:
                view = self.renderer.render(self._beside(size, written.html, page))
            except RenderError as error:
                return msgspec.structs.replace(result, outcome="not rendered", error=error.message)
            comparison = compare(reference, view)
            self._keep_pictures(page, reference, view)
            return msgspec.structs.replace(
                result,
                outcome="rendered",
                score=comparison.score.score,
                parts=_parts(comparison),
                error=comparison.failed,
                judged=self._judged(page, view, number),
            )
        except W2CError as error:
            return msgspec.structs.replace(result, outcome="failed", error=error.message)
        except OSError as error:
            return msgspec.structs.replace(
                result, outcome="failed", error=f"{page.image}: {error.strerror or error}"
            )

    def _original(self, page: Page) -> Attachment:
        data = page.image.read_bytes()
        return attachment_from_bytes(data, page.image.name, str(page.image), self.limits)

    def _reference(self, page: Page, size: tuple[int, int]) -> tuple[View, str | None]:
        """The page to compare with, and its text. The screenshot is what counts: where there is
        HTML too, its layout tells where the text stands."""
        if page.html is not None:
            html = page.html.read_text(encoding="utf-8", errors="replace")
            source = self._beside(size, html, page, page.html.parent)
            return self.render_reference(source), visible_text(html)
        original = self._original(page)
        if self.read_text is not None:
            original = self.read_text(original)
        lines = original.page_text
        text = None if lines is None else " ".join(line.text for line in lines)
        return view_of_picture(original, limits=self.limits), text

    def _beside(
        self, size: tuple[int, int], html: str, page: Page, folder: Path | None = None
    ) -> PageSource:
        """`html` to be rendered as the screenshot of that size was."""
        width, height = window_for(size, self.renderer.settings)
        return PageSource(html, folder, page.name, width, height)

    def _keep_pictures(self, page: Page, reference: View, view: View) -> None:
        # The difference is made of small pictures, too: of whole ones it would take longer than
        # the score. JPEG, as WebP takes ten times its time for 11% less.
        small = [
            msgspec.structs.replace(each, picture=each.picture.reduce(_REDUCED_BY))
            for each in (reference, view)
        ]
        for kind, picture in (
            ("original", small[0].picture),
            ("page", small[1].picture),
            ("difference", difference_picture(*small)),
        ):
            buffer = io.BytesIO()
            picture.crop((0, 0, picture.width, min(picture.height, _MAX_HEIGHT))).save(
                buffer, "JPEG", quality=75
            )
            write_atomically(
                self.folder / "pictures" / f"{page.name}.{kind}.jpg", buffer.getvalue()
            )

    def _judged(self, page: Page, view: View, number: int) -> str | None:
        if self.ask_judge is None:
            return None
        render = attachment_from_picture(view.picture, "page.png", "", self.limits)
        return self.ask_judge(judge.request(self._original(page), render), number)


def _parts(comparison: Comparison) -> dict[str, float]:
    structure = comparison.score.structure
    return comparison.score.parts | ({} if structure is None else {"structure": structure})


def _text_measures(reference: str | None, candidate: str) -> dict[str, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popović 2015) of the visible text, as 0..1."""
    if not reference:
        return {}
    from sacrebleu import sentence_bleu, sentence_chrf

    return {
        "bleu": sentence_bleu(candidate, [reference]).score / 100,
        "chrf": sentence_chrf(candidate, [reference]).score / 100,
    }


def _done(row: PageResult) -> Future[PageResult]:
    future: Future[PageResult] = Future()
    future.set_result(row)
    return future
