"""The `w2c` command: its subcommands, each imported only when it runs, and how errors end it.

Results go to standard output, everything else to standard error. Exit status: 0 done, 1 failed,
2 wrong usage, 130 interrupted. Knows nothing about models: the engine process does.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from w2c_tui import __version__
from w2c_tui.console import run

COMMANDS = {
    "generate": "Turn screenshots into pages.",
    "chat": "Talk about a screenshot, line by line.",
    "watch": "Turn new screenshots in a folder into pages.",
    "preview": "See a page in the browser while it is written.",
    "versions": "See, compare, save and edit the versions of a page.",
    "evaluate": "Measure how good a model is.",
    "bench": "Measure how fast a model is.",
    "render": "Turn pages into pictures.",
    "compare": "Say how near one page or picture is to another.",
    "models": "See which models there are, and fetch them.",
    "export-gguf": "Write a model as GGUF files for llama.cpp.",
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
        name = cmd_name.replace("-", "_")
        module = importlib.import_module(f"w2c_tui.cli.{name}")
        command: click.Command = getattr(module, name)
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
