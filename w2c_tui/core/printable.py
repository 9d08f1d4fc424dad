"""What may be put on a terminal: text in which nothing steers the terminal, hides or is secret.

Knows nothing about markup; who shows text must also not interpret it.
"""

from __future__ import annotations

import re

# Control characters, the marks that reorder what is read (CVE-2021-42574), lone surrogates.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with control characters made visible; tabs and line ends stay (CR LF as LF)."""
    return UNSAFE.sub("\ufffd", text.replace("\r\n", "\n"))


def one_line(text: str, limit: int = 100) -> str:
    """`text` inside a message: what is not printable escaped, no password, its middle left out."""
    text = without_password(text)
    text = text if len(text) <= limit else f"{text[: limit // 3]}…{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(text: str) -> str:
    """`one_line` between quotes, for a name that someone else chose."""
    return f"'{one_line(text)}'"


def reason_of(error: BaseException) -> str:
    """What `error` says, as `one_line` without its full stop."""
    return one_line(str(error) or type(error).__name__, 160).rstrip(".")


def without_password(url: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]*@", "", url)
