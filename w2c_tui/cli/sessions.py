"""What commands about sessions share: opening the store, and finding the session that was meant."""

from __future__ import annotations

from w2c_tui.console.terminal import say
from w2c_tui.core.config import paths
from w2c_tui.core.errors import StoreError
from w2c_tui.core.store import Session, Store

LAST = "last"


def open_store() -> Store:
    """The user's sessions; says so when they were damaged. Raises StoreError, also when there are
    none yet."""
    path = paths().sessions
    if not path.exists():
        raise StoreError(
            "There are no sessions yet.", hint="w2c-tui begins one with the first message."
        )
    store = Store.open(path)
    if store.recovery is not None:
        say(store.recovery, err=True)
    return store


def find_session(store: Store, name: str) -> Session:
    """The session whose id begins with `name`, or the one used last. Raises StoreError."""
    sessions = store.sessions()
    if name == LAST and sessions:
        return sessions[0]
    found = [session for session in sessions if session.id.startswith(name.casefold())]
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(session.id for session in found[:5])
        raise StoreError(f"{name!r} begins several sessions: {some}.", hint="Type more of it.")
    raise StoreError(
        f"There is no session {name!r}, and no file of that name.",
        hint="w2c versions list shows the sessions with pages; last is the one used last.",
    )
