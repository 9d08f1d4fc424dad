"""A session as a document: Markdown and HTML to read, JSON with every branch to process.

Knows nothing about widgets. What models wrote is kept byte for byte, and is never markup of the
document that it stands in.
"""

from __future__ import annotations

import base64
import html
import re
import time
from pathlib import Path

import msgspec

from w2c_tui.core.errors import W2CError
from w2c_tui.core.image import media_type
from w2c_tui.core.store import Session, Store, StoredMessage
from w2c_tui.tui.blocks import split

FORMATS = (".md", ".json", ".html")


def export(store: Store, session_id: str, suffix: str) -> str:
    """The text of the document in the format that a file with `suffix` has. Raises W2CError."""
    session = store.session(session_id)
    match suffix.lower():
        case ".md" | ".markdown":
            return _markdown(session, store.branch(session_id))
        case ".json":
            messages = [msgspec.to_builtins(message) for message in store.tree(session_id)]
            document = {"session": msgspec.to_builtins(session), "messages": messages}
            return msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"
        case ".html" | ".htm":
            return _html(session, store.branch(session_id), store)
    raise W2CError(
        f"There is no export to {suffix or 'a file without an ending'}.",
        hint=f"End the name with {', '.join(FORMATS)}.",
    )


def file_name(session: Session) -> str:
    """A file name made from the title, without an ending."""
    return re.sub(r"[^\w.-]+", "-", Path(session.title).stem).strip("-.")[:60] or "session"


def _who(message: StoredMessage) -> str:
    name = {"user": "You", "system": "System"}.get(message.role, message.model or "Answer")
    return f"{name}, {time.strftime('%Y-%m-%d %H:%M', time.localtime(message.created_at))}"


def _markdown(session: Session, messages: list[StoredMessage]) -> str:
    parts = [f"# {session.title or 'Session'}\n"]
    if session.system_prompt:
        parts.append(f"## System\n\n{session.system_prompt}\n")
    for message in messages:
        parts.append(f"## {_who(message)}\n")
        for image in message.attachments:
            parts.append(f"*Image: {image.name}, {image.width} x {image.height} px*\n")
        if message.role == "user":
            parts.append(f"{message.text}\n")
            continue
        for block in split(message.text):
            text = message.text[block.start : block.end]
            if block.kind == "prose":
                parts.append(f"{text.strip()}\n")
                continue
            longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
            fence = "`" * (longest + 1)
            end = "" if text.endswith("\n") else "\n"
            parts.append(f"{fence}{block.language}\n{text}{end}{fence}\n")
        if message.status != "complete":
            parts.append(f"*({message.status}: {message.finish_reason or message.error})*\n")
    return "\n".join(parts)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
article { border-left: 4px solid #888; padding: 0 0 0 1rem; margin: 1.5rem 0 }
article.user { border-color: #36c }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
pre.code { background: #8881; padding: .75rem }
img { max-width: 100%; max-height: 30rem; border: 1px solid #8884 }
h2 { font-size: 1rem }
:root { color-scheme: light dark }
"""


def _html(session: Session, messages: list[StoredMessage], store: Store) -> str:
    title = html.escape(session.title or "Session")
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; img-src data:\">",
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>",
    ]
    for message in messages:
        parts.append(f'<article class="{message.role}"><h2>{html.escape(_who(message))}</h2>')
        for image in message.attachments:
            data = store.image(image.sha256)
            kind = media_type(data)
            encoded = base64.b64encode(data).decode()
            name = html.escape(image.name)
            parts.append(f'<p><img alt="{name}" src="data:{kind};base64,{encoded}"></p>')
        for block in split(message.text) if message.role == "assistant" else ():
            text = html.escape(message.text[block.start : block.end])
            parts.append(f"<pre{'' if block.kind == 'prose' else ' class=code'}>{text}</pre>")
        if message.role != "assistant":
            parts.append(f"<pre>{html.escape(message.text)}</pre>")
        if message.status != "complete":
            parts.append(f"<p><em>{html.escape(message.finish_reason or message.error)}</em></p>")
        parts.append("</article>")
    parts.append("</body></html>\n")
    return "\n".join(parts)
