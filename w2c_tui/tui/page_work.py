"""Work on the pages of the session in sight: comparing, previewing, correcting, several tries.

Owns how these are begun and what is said about them above the prompt. What they come to is sent
by the screen. Rendering and scoring are `pages`' work, the tries `better_run`'s.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from textual import work
from textual.message import Message as Event
from textual.widgets import Static

from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import StoreError, W2CError
from w2c_tui.core.printable import printable
from w2c_tui.tui.app import W2CApp, guarded
from w2c_tui.tui.open_session import OpenSession

if TYPE_CHECKING:
    from w2c_tui.core.store import Store
    from w2c_tui.core.versions import Version
    from w2c_tui.tui.better_run import BetterRun
    from w2c_tui.tui.pages import Compared


class PageWork(Static):
    """Shown while there is something to say."""

    app: W2CApp

    class Changed(Event):
        """Another branch may be in sight."""

    class Request(Event):
        """A turn that is to be sent: `message`, below the answer `answer_id`."""

        def __init__(self, session_id: str, answer_id: int | None, message: Message) -> None:
            super().__init__()
            self.session_id = session_id
            self.answer_id = answer_id
            self.message = message

    def __init__(self, place: OpenSession) -> None:
        super().__init__(id="page-work", markup=False)
        self._place = place
        self._doing = ""
        self.has_pages = False

    def look(self) -> None:
        """The session in sight is another one, or another state of it."""
        ident = self._place.id
        self.has_pages = bool(ident and self.app.pages.versions(ident).current())

    def tell(self, doing: str | None = None) -> None:
        """Say what is being done, and how the tries stand."""
        self._doing = self._doing if doing is None else doing
        run = self.app.better
        text = _words(run) if run is not None else self._doing
        self.display = bool(text)
        self.update(printable(text))

    # ── seeing ────────────────────────────────────────────────────────────────────────────────

    def compare(self) -> None:
        """Open the screen with all versions."""
        from w2c_tui.tui.compare_screen import CompareScreen

        def done(wish: str | None) -> None:
            self.post_message(self.Changed())
            if wish == "fix":
                self.fix()
            elif wish == "preview":
                self.preview()

        self.app.push_screen(CompareScreen(self._place.id), done)

    def preview(self) -> None:
        """The session in the browser, where it follows what is written."""
        if self._place.id:
            self._open_preview(self._place.id)
        else:
            self.notify("There is nothing to show yet.", timeout=3)

    @work(thread=True, group="preview", exit_on_error=False)
    def _open_preview(self, session_id: str) -> None:
        try:
            opened = self.app.preview.open(session_id)
        except W2CError as error:
            self.call_later(self._failed, error)
        else:
            self.call_later(self._opened, opened)

    def _opened(self, opened: bool) -> None:
        # What is being written now is newer than what the store has of it.
        for answer in self.app.answers.values():
            self.app.preview.follow(answer)
        url = self.app.preview.url
        if opened:
            self.notify(f"The preview is in your browser: {url}", timeout=6, markup=False)
        else:
            self.app.copy_to_clipboard(url)
            self.notify(f"Open this in a browser (copied): {url}", timeout=30, markup=False)

    def _failed(self, error: W2CError) -> None:
        self.tell("")
        self.app.show_error(error)

    # ── correcting ────────────────────────────────────────────────────────────────────────────

    def fix(self) -> None:
        """Have the model correct what differs between its page and the screenshot."""
        if not self.has_pages:
            self.notify("There is no page yet that could be corrected.", timeout=4)
            return
        self.tell("Looking for what differs …")
        self._find_differences(self._place.id)

    @work(thread=True, exclusive=True, group="fix", exit_on_error=False)
    def _find_differences(self, session_id: str) -> None:
        pages = self.app.pages
        versions = pages.versions(session_id)
        try:
            current = versions.current()
            assert current is not None
            found = pages.compared(versions, current.number)
            message = self._correction(session_id, found)
        except W2CError as error:
            self.call_later(self._failed, error)
        else:
            self.call_later(self._found, session_id, found, message)

    def _correction(self, session_id: str, found: Compared) -> Message | None:
        """On a thread: the request to correct what differs; None when nothing does.

        A model that takes several pictures is shown how its page looks, beside the original that
        the conversation has already, if that and another page have room in its context.
        """
        from w2c_tui.core.context_cost import Meter
        from w2c_tui.core.versions import screenshot_above
        from w2c_tui.tui.pages import render_of
        from w2c_tui.web.better import takes_several
        from w2c_tui.web.differences import SHOWS_RENDER

        if not found.request:
            return None
        in_words = Message("user", found.request)
        info, store = self.app.info, self.app.store
        render = render_of(found.version)
        if info is None or render is None or not takes_several(info):
            return in_words
        branch = store.branch(session_id, _below(store, found.version))
        meter = Meter(branch)
        if meter.cost is None or screenshot_above(store, branch) is None:
            return in_words
        shown = Message("user", f"{SHOWS_RENDER}\n{found.request}", (render,))
        # There must be room for a page like this one.
        page = meter.cost.tokens([Message("assistant", found.version.html)])
        needed = meter.tokens(self._place.iteration, shown) + page
        return shown if needed <= info.context_length else in_words

    def _found(self, session_id: str, found: Compared, message: Message | None) -> None:
        self.tell("")
        if message is None:
            score = f" The score is {found.score:.3f}." if found.score is not None else ""
            self.notify(f"Nothing differs that could be told.{score}", timeout=6)
        else:
            answer_id = _below(self.app.store, found.version)
            self.post_message(self.Request(session_id, answer_id, message))

    # ── several tries ─────────────────────────────────────────────────────────────────────────

    @guarded
    def begin(self, question_id: int, best_of: int, refine: int) -> None:
        """Several tries at an answer to a question that has a screenshot."""
        from w2c_tui.core.versions import screenshot_above
        from w2c_tui.tui.better_run import BetterRun

        store = self.app.store
        branch = store.branch(store.message(question_id).session_id, question_id)
        screenshot = screenshot_above(store, branch)
        if screenshot is None:
            self.notify("There is no screenshot to compare the pages with.", timeout=5)
            return
        run = BetterRun(
            question_id,
            screenshot,
            self._place.params,
            iteration=self._place.iteration,
            best_of=best_of,
            refine=refine,
            begins_pages=self.app.begins_pages,
            began=self.app.try_began,
            ended=self.app.try_ended,
        )
        self.app.begin_better(run)
        self.tell()

    def over(self, run: BetterRun) -> None:
        """There will be no more tries."""
        self.tell()
        best = run.best
        if best is not None and best.score is not None:
            self.notify(
                f"{best.version} is the nearest of {len(run.steps)}: {best.score:.3f}. "
                "F4 compares them.",
                timeout=8,
            )


def _words(run: BetterRun) -> str:
    """Each try with its score, the best one marked."""
    lines = [f"Try {max(1, len(run.steps))} of {run.total}. Esc stops and keeps the best."]
    best = run.best
    for number, step in enumerate(run.steps, 1):
        if step.version:
            mark = "  best so far" if step is best else ""
            lines.append(f"{number}. {step.kind} {step.version}  {step.score or 0:.3f}{mark}")
        else:
            lines.append(f"{number}. {step.kind}  {step.error or 'being written'}")
    return "\n".join(lines)


def _below(store: Store, version: Version) -> int | None:
    """The answer that what is asked about a version follows; None for the end of the branch in
    sight, where its own was deleted."""
    answer_id = version.meta.message_id
    with contextlib.suppress(StoreError):
        if answer_id is not None and store.message(answer_id).deleted_at is None:
            return answer_id
    return None
