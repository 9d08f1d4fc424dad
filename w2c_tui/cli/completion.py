"""`w2c completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from w2c_tui.console.terminal import say

_HOW = """Add one line to your shell's start-up file:

\b
  bash  (~/.bashrc)                    eval "$(w2c completion bash)"
  zsh   (~/.zshrc)                     eval "$(w2c completion zsh)"
  fish  (~/.config/fish/config.fish)   w2c completion fish | source
"""


@click.command(help=f"Print the completion script of a shell.\n\n{_HOW}")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    from w2c_tui.cli import w2c

    kind = get_completion_class(shell)
    assert kind is not None
    say(kind(w2c, {}, "w2c", "_W2C_COMPLETE").source())
