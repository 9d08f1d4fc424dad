"""The session in sight and what was chosen for it.

Owns the difference between what a session sets itself and what follows the settings, and how both
are kept. Knows nothing about widgets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec

from w2c_tui.core.config import GenerationParams, Settings
from w2c_tui.core.conversation import Attachment
from w2c_tui.core.iteration import Iteration
from w2c_tui.core.store import Session, Store, StoredMessage


class OpenSession:
    """One of these lives as long as its screen; `session` changes."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.session: Session | None = None
        """None until there is something to keep."""
        self._settings = settings
        self._kept: tuple[object, ...] = ()
        self._follow_settings()

    def _follow_settings(self) -> None:
        settings = self._settings
        self.params: GenerationParams = settings.generation
        self.ocr: str = settings.ocr
        self.system: str = settings.system
        self.iteration: Iteration = "history"

    @property
    def id(self) -> str:
        """Empty while there is no session."""
        return self.session.id if self.session else ""

    def open(self, session_id: str) -> Session:
        """Make a stored session the one in sight. Raises StoreError."""
        self.session = session = self.store.session(session_id)
        self._follow_settings()
        saved = session.params
        own = msgspec.to_builtins(msgspec.structs.asdict(self.params)) | saved.get("generation", {})
        with contextlib.suppress(msgspec.ValidationError):
            self.params = msgspec.convert(own, GenerationParams)
        self.ocr = saved.get("ocr", self.ocr)
        self.system = session.system_prompt
        self.iteration = "latest" if saved.get("iteration") == "latest" else "history"
        return session

    def leave(self) -> None:
        """Nothing is in sight, and what is chosen from now on is for a new session."""
        self.session = None
        self._follow_settings()

    def begin(self, model: str) -> Session:
        """The session in sight, made now if there is none."""
        if self.session is None:
            self.session = self.store.create_session(
                system_prompt=self.system, model=model, params=self._own()
            )
        return self.session

    def refresh(self) -> None:
        """Take over what the store has by now."""
        if self.session is not None:
            self.session = self.store.session(self.session.id)

    def branch(self) -> list[StoredMessage]:
        """The messages in sight, in reading order."""
        self.refresh()
        return self.store.branch(self.session.id) if self.session is not None else []

    @property
    def place(self) -> int | None:
        """The message to come back to, None for the end."""
        return self.session.params.get("place") if self.session is not None else None

    def choose(self, params: GenerationParams, system: str, ocr: str, iteration: Iteration) -> None:
        """What is to hold for this session from now on."""
        self.params, self.system, self.ocr, self.iteration = params, system, ocr, iteration
        if self.session is not None:
            self.store.update_session(self.session.id, system_prompt=system, params=self._own())
            self.refresh()

    def keep(self, text: str, pictures: Sequence[Attachment], place: int | None) -> None:
        """Save the draft and the place in a session that has begun."""
        assert self.session is not None
        draft = (self.session.id, text, [(i.sha256, i.page_text) for i in pictures])
        if draft != self._kept:
            self.store.set_draft(self.session.id, text, pictures)
            self._kept = draft
        params = self._own() | ({"place": place} if place else {})
        if params != self.session.params:
            self.store.update_session(self.session.id, params=params)
        self.refresh()

    def _own(self) -> dict[str, Any]:
        """What was chosen for this session; all else follows the settings."""
        general = msgspec.structs.asdict(self._settings.generation)
        own = msgspec.structs.asdict(self.params).items()
        changed = {name: value for name, value in own if value != general[name]}
        found: dict[str, Any] = {"generation": msgspec.to_builtins(changed)} if changed else {}
        if self.ocr != self._settings.ocr:
            found["ocr"] = self.ocr
        if self.iteration != "history":
            found["iteration"] = self.iteration
        return found
