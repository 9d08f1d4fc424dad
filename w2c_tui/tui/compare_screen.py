"""The screen that shows how near each version of a page is to its screenshot.

Original, render and difference side by side as pictures, the score with its parts, all versions
with their parents. Owns what is done with a version. Rendering and scoring are `pages`' work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from w2c_tui.core.errors import StoreError, W2CError
from w2c_tui.core.printable import printable
from w2c_tui.core.versions import Version, Versions
from w2c_tui.tui.app import W2CApp, guarded
from w2c_tui.tui.key_line import KeyLine
from w2c_tui.tui.picture import picture_widget

if TYPE_CHECKING:
    from PIL import Image

    from w2c_tui.tui.pages import Compared

Wish = Literal["fix", "preview"]
_LOOKS = ("original", "render", "difference")
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"


class VersionList(OptionList):
    """The versions, newest first, with the keys that act on the one under the bar."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f", "screen.fix", "Fix it", id="version-fix"),
        Binding("b", "screen.preview", "Browser", id="version-preview"),
        Binding("e", "screen.edit", "Edit", id="version-edit"),
        Binding("d", "screen.diff", "Diff", id="version-diff"),
        Binding("c", "screen.copy", "Copy", id="version-copy"),
        Binding("s", "screen.save", "Save", id="version-save"),
        Binding("u", "screen.undo", "Undo", id="version-undo"),
        Binding("ctrl+y", "screen.redo", "Redo", id="version-redo", show=False),
        Binding("a", "screen.score_all", "Score all", id="version-score-all"),
        Binding("0", "screen.only(0)", "All pictures", id="look-all", show=False),
        Binding("1", "screen.only(1)", "Original alone", id="look-original", show=False),
        Binding("2", "screen.only(2)", "Render alone", id="look-render", show=False),
        Binding("3", "screen.only(3)", "Difference alone", id="look-difference", show=False),
    ]


class CompareScreen(Screen[Wish | None]):
    """See the module. Is dismissed with what is to be done next in the conversation."""

    AUTO_FOCUS = "VersionList"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back", id="compare-back"),
    ]

    app: W2CApp

    def __init__(self, session_id: str) -> None:
        super().__init__()
        self._versions: Versions = self.app.pages.versions(session_id)
        self._title = self.app.store.session(session_id).title
        self._listed: list[Version] = []

    def compose(self) -> ComposeResult:
        yield Static(markup=False, id="compare-title")
        with Horizontal(id="looks"):
            for name in _LOOKS:
                with Vertical(id=f"look-{name}", classes="look"):
                    yield Static(name.capitalize(), markup=False, classes="look-name")
                    yield Container(classes="look-frame")
        with Horizontal(id="compare-below"):
            yield VersionList(id="version-list", compact=True)
            with VerticalScroll(id="version-about"):
                yield Static(markup=False, id="scores")
        yield KeyLine(show_command_palette=False)

    @guarded
    def on_mount(self) -> None:
        self._list()
        self._look()

    # ── the list ──────────────────────────────────────────────────────────────────────────────

    @property
    def _listing(self) -> VersionList:
        return self.query_one(VersionList)

    @property
    def version(self) -> Version:
        """The one under the bar. Raises StoreError when there is none."""
        at = self._listing.highlighted
        if at is None:
            raise StoreError("There is no version yet.")
        return self._versions.get(int(self._listing.get_option_at_index(at).id or 0))

    def _list(self, *, at: Version | None = None) -> None:
        """Bring the list in line with the disk, the bar where it was, or `at` a version."""
        self._listed = list(reversed(self._versions.all()))
        current = self._versions.current()
        listing = self._listing
        kept = str(at.number) if at is not None else None
        if kept is None and listing.highlighted is not None:
            kept = listing.get_option_at_index(listing.highlighted).id
        with self.prevent(OptionList.OptionHighlighted):
            listing.clear_options()
            listing.add_options(
                Option(_line(version, current), id=str(version.number)) for version in self._listed
            )
            chosen = kept or (str(current.number) if current else None)
            if chosen is not None:
                listing.highlighted = listing.get_option_index(chosen)
        num = len(self._listed)
        count = f"{num} version" + ("" if num == 1 else "s")
        title = printable(self._title) or "Session"
        self.query_one("#compare-title", Static).update(f"Compare  {title}  {count}")

    def _bring(self, version: Version) -> None:
        """A version comes into sight, and the conversation goes on from its answer."""
        message_id = version.meta.message_id
        if message_id is not None:
            self.app.store.go_back_to(message_id)
        self._list(at=version)
        self._look()

    @on(OptionList.OptionHighlighted, "#version-list")
    @guarded
    def _look(self) -> None:
        if not self._listed:
            return
        version = self.version
        self._tell(version, "Rendering and comparing …" if version.meta.score is None else "")
        self._compare(version.number)

    @on(OptionList.OptionSelected, "#version-list")
    @guarded
    def _picked(self) -> None:
        version = self._versions.select(self.version.number)
        self._bring(version)
        self.notify(f"The conversation goes on from {version.name}.", timeout=4)

    # ── looks ─────────────────────────────────────────────────────────────────────────────────

    @work(thread=True, exclusive=True, group="compare", exit_on_error=False)
    def _compare(self, number: int) -> None:
        try:
            found = self.app.pages.compared(self._versions, number)
        except W2CError as error:
            self.app.call_later(self._not_compared, number, error)
        else:
            self.app.call_later(self._compared, found)

    def _not_compared(self, number: int, error: W2CError) -> None:
        if self.is_attached and self.version.number == number:
            self._tell(self.version, str(error))

    async def _compared(self, found: Compared) -> None:
        if not self.is_attached or self.version.number != found.version.number:
            return
        names = ("Original", f"{found.version.name} rendered", "Difference")
        pictures = (found.original, found.render, found.difference)
        for look, name, picture in zip(_LOOKS, names, pictures, strict=True):
            await self._draw(look, name, picture)
        if self.query("#scores"):
            # It may have been closed while the pictures were drawn.
            self._list()
            self._tell(found.version, found.failed, found)

    async def _draw(self, look: str, name: str, picture: Image.Image | None) -> None:
        part = self.query_one(f"#look-{look}")
        frame = part.query_one(Container)
        await frame.remove_children()
        if picture is None:
            await frame.mount(Static("There is none.", markup=False))
        else:
            name += f"  {picture.width} x {picture.height}"
            await frame.mount(picture_widget(picture, self.app.protocol))
        part.query_one(".look-name", Static).update(name)

    def action_only(self, which: int) -> None:
        """One of the pictures as large as the screen lets it be; 0 brings all back."""
        for number, look in enumerate(_LOOKS, 1):
            self.query_one(f"#look-{look}").display = which in (0, number)

    def _tell(self, version: Version, note: str, found: Compared | None = None) -> None:
        """The score with its parts, its course over the versions, and what differs."""
        scores = [v.meta.score for v in reversed(self._listed)]
        known = [score for score in scores if score is not None]
        lines = []
        if version.meta.score is not None:
            lines.append(f"Score {version.meta.score:.3f}  {self._bar(version.meta.score)}")
        parts = found.parts if found else version.meta.notes.get("parts", {})
        for name, value in parts.items():
            lines.append(f"  {name.replace('_', ' '):<12} {value:.3f}  {self._bar(value)}")
        if len(known) > 1:
            course = "".join("?" if s is None else self._step(s, known) for s in scores)
            lines.append(f"Versions {course}  {known[0]:.3f} to {known[-1]:.3f}")
        if note:
            lines.append(note)
        if found is not None:
            lines += [f"- {difference}" for difference in found.differences[:12]]
            if found.original is None:
                lines.append("There is no screenshot to compare it with.")
            elif not found.parts.get("text") and not found.failed:
                lines.append("Words were not compared: pip install 'w2c-tui[ocr]'.")
        self.query_one("#scores", Static).update(printable("\n".join(lines)))

    def _bar(self, value: float) -> str:
        full, empty = ("#", "-") if self.app.plain else ("█", "░")
        return full * round(12 * value) + empty * (12 - round(12 * value))

    def _step(self, score: float, known: list[float]) -> str:
        """One column of the course: the lowest score is the lowest column."""
        marks = _PLAIN_BARS if self.app.plain else _BARS
        span = max(known) - min(known)
        share = (score - min(known)) / span if span else 1.0
        return marks[round(share * (len(marks) - 1))]

    # ── keys ──────────────────────────────────────────────────────────────────────────────────

    @guarded
    def action_fix(self) -> None:
        version = self._versions.select(self.version.number)
        self._bring(version)
        self.dismiss("fix")

    @guarded
    def action_preview(self) -> None:
        self._versions.select(self.version.number)
        self.dismiss("preview")

    @guarded
    def action_undo(self) -> None:
        self._bring(self._versions.undo())

    @guarded
    def action_redo(self) -> None:
        self._bring(self._versions.redo())

    @guarded
    def action_copy(self) -> None:
        version = self.version
        self.app.copy(version.html, f"the code of {version.name}")

    @guarded
    def action_diff(self) -> None:
        from w2c_tui.tui.dialogs import ShowText

        version = self.version
        if version.meta.parent is None:
            self.notify(f"{version.name} was made from no other version.", timeout=4)
            return
        text = self._versions.diff(version.meta.parent, version.number)
        title = f"What changed from v{version.meta.parent:03d} to {version.name}"
        self.app.push_screen(ShowText(title, printable(text) or "Nothing."))

    @guarded
    def action_save(self) -> None:
        from w2c_tui.tui.dialogs import AskLine

        version = self.version

        def refuse(value: str) -> str:
            path = Path(value).expanduser()
            return f"{path} exists already: choose another name." if path.exists() else ""

        def done(value: str | None) -> None:
            if value is None:
                return
            path = Path(value).expanduser().absolute()
            try:
                self._versions.save_as(version.number, path)
            except W2CError as error:
                self.app.show_error(error)
            else:
                self.notify(f"Saved to {printable(str(path))}", timeout=8, markup=False)

        default = str(Path.cwd() / f"{version.name}.html")
        self.app.push_screen(AskLine(f"Save {version.name} to which file?", default, refuse), done)

    @guarded
    def action_edit(self) -> None:
        """In $EDITOR; what comes back is a version of its own and another answer."""
        from w2c_tui.core.artifact import best_page
        from w2c_tui.core.conversation import Message
        from w2c_tui.tui.editor import edit

        version = self.version
        edited = edit(self.app, version.html, ".html")
        if edited is None or edited == version.html:
            return
        store, message_id = self.app.store, version.meta.message_id
        before = store.message(message_id) if message_id is not None else None
        page = best_page(before.text) if before is not None else None
        if before is None or page is None or before.deleted_at is not None:
            made = self._versions.take_edit(edited.encode(), version.number)
        else:
            text = before.text[: page.start] + edited + before.text[page.end :]
            after = store.edit(before.id, Message("assistant", text))
            kept = self.app.pages.keep_edit(before, after)
            made = kept or self._versions.take_edit(edited.encode(), version.number)
        self._bring(made)

    @guarded
    def action_score_all(self) -> None:
        self._score_all([v.number for v in self._listed if v.meta.score is None])

    @work(thread=True, exclusive=True, group="compare", exit_on_error=False)
    def _score_all(self, numbers: list[int]) -> None:
        for number in numbers:
            if not self.is_attached:
                return
            try:
                self.app.pages.compared(self._versions, number)
            except W2CError as error:
                self.app.call_later(self.app.show_error, error)
                return
            self.app.call_later(self._scored)

    def _scored(self) -> None:
        if self.is_attached:
            self._list()
            self._tell(self.version, "")


def _line(version: Version, current: Version | None) -> Content:
    mark = "> " if current is not None and version.number == current.number else "  "
    score = f"{version.meta.score:.3f}" if version.meta.score is not None else "  -  "
    parent = f"from v{version.meta.parent:03d}" if version.meta.parent else "first"
    origin = {"answer": "", "unknown": ""}.get(version.meta.origin, f" {version.meta.origin}")
    ended = "" if version.meta.complete else " unfinished"
    prompt = printable(" ".join(version.meta.prompt.split()))[:60]
    return Content.assemble(
        mark, (version.name, "bold"), f"  {score}  {parent}{origin}{ended}  ", (prompt, "dim")
    )
