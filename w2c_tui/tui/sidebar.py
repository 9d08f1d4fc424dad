"""The list of sessions, with a search over titles and all messages.

Owns what is listed. What happens to a session is up to the screen, which is told by messages.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar, Literal

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from w2c_tui.core.printable import printable

if TYPE_CHECKING:
    from w2c_tui.tui.app import W2CApp

MOST = 200
_TITLE = 28


class SessionList(OptionList):
    """The list itself, with the keys that act on the session under the bar."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "ask('rename')", "Rename", id="session-rename"),
        Binding("d,delete", "ask('delete')", "Delete", id="session-delete"),
        Binding("e", "ask('export')", "Export", id="session-export"),
        Binding("slash", "search", "Search", id="session-search"),
    ]

    def action_ask(self, action: Literal["rename", "delete", "export"]) -> None:
        if self.highlighted is not None:
            ident = self.get_option_at_index(self.highlighted).id or ""
            self.post_message(Sidebar.Asked(action, ident.split(":")[1]))

    def action_search(self) -> None:
        self.screen.query_one("#search", Input).focus()


class Sidebar(Vertical):
    """Sessions, last used first; while a search is typed, its hits."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Close", show=False),
        # From the search box, which has no use for it.
        Binding("down", "list", show=False),
    ]

    app: W2CApp

    class Opened(Message):
        """A session is wanted, perhaps at one of its messages."""

        def __init__(self, session_id: str, message_id: int | None) -> None:
            super().__init__()
            self.session_id = session_id
            self.message_id = message_id

    class Asked(Message):
        """Something is to be done with a session."""

        def __init__(self, action: Literal["rename", "delete", "export"], session_id: str) -> None:
            super().__init__()
            self.action = action
            self.session_id = session_id

    class Closed(Message):
        """The user is done with it."""

    def __init__(self) -> None:
        super().__init__(id="sidebar")
        self._current = ""

    def compose(self) -> ComposeResult:
        yield Input(placeholder="Search all messages", id="search", compact=True)
        yield SessionList(id="sessions", compact=True)
        yield Static(markup=False, id="sidebar-note")

    def tell(self, current: str | None = None) -> None:
        """List what there is now; `current` is the id of the session that is open."""
        if current is not None:
            self._current = current
        query = self.query_one("#search", Input).value
        store = self.app.store
        sessions = store.sessions(query)
        options: list[Option] = []
        for session in sessions[:MOST]:
            mark = "> " if session.id == self._current else "  "
            title = printable(session.title).replace("\n", " ") or "Untitled"
            title = title if len(title) <= _TITLE else title[: _TITLE - 1] + "…"
            when = Content.styled(f"  {_when(session.updated_at)}", "dim")
            label = Content.assemble(mark, title, "\n", when)
            options.append(Option(label, id=f"s:{session.id}"))
        if query.strip():
            for hit in store.search(query, limit=30):
                snippet = Content(f'  "{printable(hit.snippet)}"'.replace("\n", " "))
                for start, end in hit.marks:
                    snippet = snippet.stylize("bold underline", start + 3, end + 3)
                options.append(Option(snippet, id=f"m:{hit.session_id}:{hit.message_id}"))
        listed = self.query_one(SessionList)
        before = listed.highlighted
        listed.clear_options()
        listed.add_options(options)
        if options:
            listed.highlighted = min(before or 0, len(options) - 1)
        note = "" if options else "Nothing found." if query else "No sessions yet."
        if len(sessions) > MOST:
            note = f"{len(sessions) - MOST} more: search for them."
        self.query_one("#sidebar-note", Static).update(note)

    @on(Input.Changed, "#search")
    def _searched(self) -> None:
        self.tell()

    @on(Input.Submitted, "#search")
    def action_list(self) -> None:
        """To the list below the search box."""
        self.query_one(SessionList).focus()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        kind, session_id, *rest = (event.option_id or "").split(":")
        self.post_message(self.Opened(session_id, int(rest[0]) if kind == "m" else None))

    def action_leave(self) -> None:
        search = self.query_one("#search", Input)
        if search.value:
            search.value = ""
        else:
            self.post_message(self.Closed())


def _when(seconds: float) -> str:
    then, now = time.localtime(seconds), time.localtime()
    if then[:3] == now[:3]:
        return time.strftime("today %H:%M", then)
    return time.strftime("%d %b" if then.tm_year == now.tm_year else "%d %b %Y", then)
