"""The one way to the terminal for what the commands write.

Names, titles, answers and error messages are other people's text: whatever would steer the
terminal is made visible, on a terminal and in a pipe alike, since most pipes end in a terminal.
Only a page on standard output stays as it is where there is a pipe (`write_bytes`). Knows nothing
about what is written.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import click
import msgspec

from w2c_tui.core.printable import UNSAFE, printable


def say(text: object = "", *, err: bool = False, nl: bool = True, **style: Any) -> None:
    """A line of plain text; `style` is what `click.style` takes."""
    click.secho(printable(str(text)), err=err, nl=nl, **style)


def say_json(value: object, indent: int | None = None) -> None:
    """One JSON object or array; what would steer the terminal is escaped and so means the same."""
    text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False, indent=indent)
    click.echo(re.sub(UNSAFE, lambda match: f"\\u{ord(match[0]):04x}", text))


def write_bytes(page: bytes) -> None:
    """The bytes of a page to standard output; on a terminal, what can be shown of them."""
    if sys.stdout.isatty():
        page = printable(page.decode("utf-8", "replace")).encode("utf-8")
    sys.stdout.flush()
    sys.stdout.buffer.write(page)
    sys.stdout.buffer.flush()
