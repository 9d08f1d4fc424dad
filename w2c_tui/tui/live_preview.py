"""The session in sight in the user's browser, also while it is written.

Owns the preview server of the application, which is started by its first use. Knows nothing about
widgets.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from w2c_tui.core.errors import StoreError
from w2c_tui.core.store import Store
from w2c_tui.tui.answer import Answer

if TYPE_CHECKING:
    from w2c_tui.web.preview import PreviewServer, Shown


class LivePreview:
    """One per application. `open` belongs on a thread, all else costs nothing."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._server: PreviewServer | None = None
        self._base: tuple[int, Shown] | None = None
        self._session_id = ""

    @property
    def url(self) -> str:
        """The address; empty while there is no server."""
        return self._server.url if self._server is not None else ""

    def open(self, session_id: str) -> bool:
        """Show this session in the browser; False where there is none to be seen. Raises
        W2CError."""
        from w2c_tui.web.preview import PreviewServer, open_browser

        if self._server is None:
            server = PreviewServer()
            server.start()
            self._server = server
        self._session_id = ""
        self.show(session_id)
        return open_browser(self._server)

    def show(self, session_id: str) -> None:
        """What is in sight is another session, or another state of it."""
        if self._server is None or not session_id:
            return
        from w2c_tui.web.preview_sources import shown_session

        self._session_id, self._base = session_id, None
        try:
            self._server.show(shown_session(self._store, session_id, self._folder))
        except StoreError:
            # It was deleted meanwhile: what is shown stays.
            return

    def follow(self, answer: Answer) -> None:
        """An answer has more text."""
        if self._server is None or answer.session_id != self._session_id:
            return
        from w2c_tui.web.preview_sources import shown_session

        if self._base is None or self._base[0] != answer.message_id:
            base = shown_session(self._store, answer.session_id, self._folder)
            self._base = (answer.message_id, base)
        shown = msgspec.structs.replace(self._base[1], answer=answer.text, writing=True)
        self._server.show(shown)

    def close(self) -> None:
        """End the server. Harmless when repeated."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
