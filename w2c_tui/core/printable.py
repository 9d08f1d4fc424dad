"""What may be put on a terminal: text in which nothing steers the terminal or hides.

Knows nothing about markup; who shows text must also not interpret it.
"""

from __future__ import annotations

import re

# Control characters, the marks that reorder what is read (CVE-2021-42574), lone surrogates.
_unsafe = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` with control characters made visible; tabs and line ends stay (CR LF as LF)."""
    return _unsafe.sub("\ufffd", text.replace("\r\n", "\n"))
