"""The `w2c` command: its subcommands, each imported only when it runs, and how errors end it.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed,
2 wrong usage, 130 interrupted. Knows nothing about models: the engine process does.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from w2c_tui import __version__
from w2c_tui.core.errors import W2CError
from w2c_tui.core.printable import printable as printable

COMMANDS = {
    "generate": "Turn screenshots into pages.",
    "chat": "Talk about a screenshot, line by line.",
    "models": "See which models there are, and fetch them.",
    "doctor": "Show what this machine has and which models fit.",
    "completion": "Print the shell's completion script.",
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is used, not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"w2c_tui.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if close:
                hint = f" Did you mean {close[0]}?"
            elif os.path.exists(args[0]):
                hint = f" To turn a screenshot into a page: w2c generate {args[0]}"
            else:
                raise
            raise click.UsageError(error.message + hint, ctx) from error


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: w2c generate screenshot.png    The full-screen application is w2c-tui.",
)
@click.version_option(__version__, "-V", "--version", prog_name="w2c")
def w2c() -> None:
    """Turn a screenshot of a web page into its code, on your own machine."""


def main() -> None:
    """Run `w2c` and end the process with its status."""
    sys.exit(run(w2c))


def run(command: click.Command, args: list[str] | None = None, **extra: Any) -> int:
    """Run a click command and return its exit status; errors are shown, tracebacks are not."""
    try:
        status = command.main(args, standalone_mode=False, prog_name=command.name, **extra)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
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
    click.secho(f"{prefix}: ", fg="red", bold=True, err=True, nl=False)
    click.echo(printable(error.message), err=True)
    if error.hint:
        click.echo(f"  {printable(error.hint)}", err=True)
