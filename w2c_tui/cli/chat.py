"""`w2c chat`: a line-based conversation for pipes, plain terminals and screen readers."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from typing import Any

import click

from w2c_tui.backends.base import Finished, ModelInfo, Text, Trimmed
from w2c_tui.cli.flags import generation_options, model_options, settings_from
from w2c_tui.console.terminal import say
from w2c_tui.core.config import Settings
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import W2CError

_HELP = """\
/image PATH|URL   attach an image to the next message
/save FILE        write the page of the last answer to FILE
/regenerate       answer the last message again
/reset            start over
/help             this list
/quit             leave (as does the end of input)
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer and keeps what came."""


@click.command(epilog="Example:  w2c chat --image shot.png --model LLM360/CrystalChat-7B-Web2Code")
@click.option(
    "-i",
    "--image",
    "--image-file",
    "images",
    multiple=True,
    metavar="PATH|URL",
    help="Attach this image to the first message (repeatable).",
)
@generation_options
@model_options
def chat(images: tuple[str, ...], **flags: Any) -> int:
    """Talk about a screenshot, line by line.

    Questions are read from standard input, answers are written to standard output as they come;
    /help lists the commands.
    """
    from w2c_tui.cli.running import loaded_engine

    settings = settings_from(flags)
    with loaded_engine(settings) as (engine, info):
        return _Chat(settings, engine, info).run(images)


class _Chat:
    """The conversation so far and what the next message will carry."""

    def __init__(self, settings: Settings, engine: Any, info: ModelInfo) -> None:
        self.settings = settings
        self.engine = engine
        self.info = info
        self.interactive = sys.stdin.isatty()
        self.messages: list[Message] = []
        self.pending: list[Attachment] = []
        self.failed = False
        self._reset()

    def run(self, images: tuple[str, ...]) -> int:
        for image in images:
            self._attach(image)
        if self.interactive:
            say("Type a message, or /help.", err=True)
        while (line := self._read()) is not None:
            try:
                if line.startswith("/"):
                    if not self._command(line):
                        break
                elif line.strip() or self.pending:
                    self._ask(line)
            except W2CError as error:
                self._failure(error)
        return 1 if self.failed and not self.interactive else 0

    def _read(self) -> str | None:
        lines: list[str] = []
        while True:
            if self.interactive:
                say("> " if not lines else ". ", nl=False, err=True)
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                say("  (/quit leaves)", err=True)
                lines = []
                continue
            if not line:
                return "\n".join(lines) if lines else None
            line = line.rstrip("\r\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _command(self, line: str) -> bool:
        """Do one `/command`; False to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/help":
            say(_HELP, err=True)
        elif name == "/image" and argument:
            self._attach(argument)
        elif name == "/save" and argument:
            self._save(Path(argument).expanduser())
        elif name == "/reset":
            self._reset()
            say("A new conversation.", err=True)
        elif name == "/regenerate":
            self._regenerate()
        else:
            self._failure(W2CError(f"{line!r} is not a command.", hint="/help lists them."))
        return True

    def _ask(self, text: str) -> None:
        self.messages.append(Message("user", text, tuple(self.pending)))
        self.pending = []
        try:
            self._answer()
        except W2CError:
            # The question can be asked again, with its images.
            self.pending = list(self.messages.pop().attachments)
            raise

    def _answer(self) -> None:
        from w2c_tui.cli.running import interrupt_cancels, load_model

        if self.engine.model is None:
            self.info = load_model(self.engine, self.settings)
        raw: list[str] = []
        with interrupt_cancels(self.engine):
            for event in self.engine.stream(self.messages, self.settings.generation):
                if isinstance(event, Text):
                    raw.append(event.delta)
                    say(event.delta, nl=False)
                elif isinstance(event, Trimmed):
                    self._trim(event)
                elif isinstance(event, Finished):
                    say()
                    self._tell(event)
        self.messages.append(Message("assistant", "".join(raw)))

    def _trim(self, event: Trimmed) -> None:
        say(
            f"[the first {event.num_messages} messages no longer fit the context of "
            f"{event.context_length:,} tokens and were left out; their images stay]",
            err=True,
        )

    def _tell(self, event: Finished) -> None:
        stats = event.stats
        note = {"stop": "", "length": "cut at the length limit, ", "cancelled": "stopped, "}
        if self.interactive:
            say(
                f"[{note[event.reason]}{stats.new_tokens} tokens, first after "
                f"{stats.time_to_first_token_s:.1f} s, {stats.tokens_per_s:.0f} tokens/s, context "
                f"{stats.context_used:,}/{stats.context_length:,}]",
                dim=True,
                err=True,
            )
        elif note[event.reason]:
            say(f"[{note[event.reason]}{stats.new_tokens} tokens]", err=True)

    def _attach(self, reference: str) -> None:
        from w2c_tui.cli.running import attach
        from w2c_tui.core.reference import parse_reference

        image = attach(parse_reference(reference), self.settings, self.engine, self.info)
        self.pending.append(image)
        say(f"[{image.name}, {image.width}x{image.height}]", err=True)
        if self.interactive:
            asked = [*self.messages, Message("user", "", tuple(self.pending))]
            threading.Thread(
                target=self._read_ahead, args=(asked,), name="read ahead", daemon=True
            ).start()

    def _read_ahead(self, messages: list[Message]) -> None:
        """Have the model read the picture while the question is typed."""
        with contextlib.suppress(W2CError):
            for _ in self.engine.prefill(messages, self.settings.generation):
                pass

    def _save(self, path: Path) -> None:
        from w2c_tui.core.artifact import best_page
        from w2c_tui.core.files import write_atomically

        answers = [m.text for m in self.messages if m.role == "assistant"]
        page = best_page(answers[-1]) if answers else None
        if page is None:
            raise W2CError("There is no page to save.", hint="Ask for one first.")
        write_atomically(path, page.html)
        say(f"[saved {path}]", err=True)

    def _regenerate(self) -> None:
        if not self.messages or self.messages[-1].role != "assistant":
            raise W2CError("There is no answer to give again.")
        answer = self.messages.pop()
        try:
            self._answer()
        except W2CError:
            self.messages.append(answer)
            raise

    def _reset(self) -> None:
        system = self.settings.system
        self.messages = [Message("system", system)] if system else []
        self.pending = []

    def _failure(self, error: W2CError) -> None:
        from w2c_tui.console import show_error

        self.failed = True
        show_error(error)
