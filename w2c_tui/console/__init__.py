"""What every command line of this project does alike, those of the trainer too: how errors end it,
settings as flags, progress.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed,
2 wrong usage, 130 interrupted. Knows no command and no model.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from w2c_tui.console.terminal import say
from w2c_tui.core.errors import W2CError


def run(command: click.Command, args: list[str] | None = None, **extra: Any) -> int:
    """Run a click command and return its exit status; errors are shown, tracebacks are not."""
    try:
        status = command.main(args, standalone_mode=False, prog_name=command.name, **extra)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        # What was typed may be a name that somebody else gave a file.
        shown = io.StringIO()
        error.show(shown)
        say(shown.getvalue(), err=True, nl=False)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        say("Interrupted.", err=True)
        return 130
    except W2CError as error:
        show_error(error)
        return 1
    except BrokenPipeError:
        # The reader of our output has left, as `head` does; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status if isinstance(status, int) else 0


def show_error(error: W2CError, prefix: str = "Error") -> None:
    """One line for what failed, and one for what to do."""
    say(f"{prefix}: ", fg="red", bold=True, err=True, nl=False)
    say(error.message, err=True)
    if error.hint:
        say(f"  {error.hint}", err=True)
