"""One message on the screen.

Owns how a message looks and how its view follows an answer that is being written. What is shown is
made printable; what is copied or saved is always the raw text. Knows nothing about the engine or
the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from textual import on
from textual._styles_cache import StylesCache
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.document._syntax_aware_document import SyntaxAwareDocument
from textual.dom import DOMNode
from textual.geometry import Size
from textual.message import Message
from textual.widgets import Markdown, Static, TextArea

from w2c_tui.core.printable import printable
from w2c_tui.core.store import StoredAttachment, StoredMessage
from w2c_tui.tui.blocks import Block, split
from w2c_tui.tui.picture import HalfCells
from w2c_tui.tui.text_area import WrappedArea

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from PIL import Image

    from w2c_tui.tui.answer import Answer

_FOLDED_CHARS = 4000
_HIGHLIGHTED_ROWS = 40
_LANGUAGES = {"html", "css", "javascript", "json", "python", "xml", "markdown", "bash", "sql"}
_ALIASES = {"js": "javascript", "py": "python", "sh": "bash", "md": "markdown", "svg": "xml"}

Action = Literal[
    "copy", "copy_page", "edit", "delete", "regenerate", "continue", "fork", "picture", "editor"
]


def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # Tags that an answer mentions are words to be read, not markup to be dropped.
    return MarkdownIt("gfm-like", {"html": False})


class Prose(Markdown):
    """Words of an answer. It is written on by `follow`, which takes the whole text each time."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text or None, parser_factory=_parser, open_links=False)
        self._shown = text
        self._stream: Any = None

    async def follow(self, text: str) -> None:
        if text == self._shown:
            return
        if text.startswith(self._shown):
            if self._stream is None:
                self._stream = Markdown.get_stream(self)
            await self._stream.write(text[len(self._shown) :])
        else:
            await self.settle()
            await self.update(text)
        self._shown = text

    async def settle(self) -> None:
        """Let what was written last come to rest."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.stop()


class CodeArea(WrappedArea):
    """A read-only text area of which there may come and go thousands. While it is `growing`, only
    its end is highlighted."""

    growing = False
    following = True
    """Whether the end stays in sight while it grows: until the user scrolls back."""

    def watch(
        self,
        obj: DOMNode,
        attribute_name: str,
        callback: Callable[..., Any],
        init: bool = True,
    ) -> None:
        # Textual keeps what watches the application's theme until that changes. `take_theme` of
        # the part that holds this one does the same without.
        if obj is not self.app:
            super().watch(obj, attribute_name, callback, init)

    def on_unmount(self) -> None:
        # The subscription that Textual makes would keep the whole widget.
        self.screen.text_selection_started_signal.unsubscribe(self)
        self._forget_tree()

    def _build_highlight_map(self) -> None:
        document = self.document
        if not self.growing or not isinstance(document, SyntaxAwareDocument):
            super()._build_highlight_map()
            return
        # To query the whole tree for every piece would take longer than to draw the piece.
        first = max(0, document.line_count - max(_HIGHLIGHTED_ROWS, self.size.height))
        whole = document.query_syntax_tree
        vars(document)["query_syntax_tree"] = partial(whole, start_point=(first, 0))
        try:
            super()._build_highlight_map()
        finally:
            del vars(document)["query_syntax_tree"]

    def _refresh_size(self) -> None:
        height = self.wrapped_document.height
        if self.growing and self.size.height < self.virtual_size.height <= height:
            # It scrolls already, so that its own height stays: no layout of the screen.
            self.set_reactive(TextArea.virtual_size, Size(0, height))
            self._refresh_scrollbars()
            self.refresh()
        else:
            super()._refresh_size()
        if self.growing and self.following:
            self.scroll_end(animate=False, immediate=True)

    def on_mouse_scroll_up(self) -> None:
        self.following = False

    def on_mouse_scroll_down(self) -> None:
        self.following = self.scroll_offset.y >= self.max_scroll_y - 3

    def _set_document(self, text: str, language: str | None) -> None:
        self._forget_tree()
        super()._set_document(text, language)

    def _forget_tree(self) -> None:
        """A syntax tree and its document hold each other where the garbage collector does not
        see it."""
        if "document" in vars(self):
            vars(self.document).pop("_syntax_tree", None)


class Code(Vertical):
    """A page or other code of an answer: a line about it and the code, as raw as can be shown."""

    def __init__(self, block: Block, text: str, *, growing: bool) -> None:
        super().__init__()
        self._kind = block.kind
        self._shown = text
        self._language = _ALIASES.get(block.language, block.language)
        self._title = Static(markup=False, classes="code-title")
        self._named = ""
        self.area = CodeArea(
            text.removesuffix("\n"),
            read_only=True,
            soft_wrap=True,
            show_cursor=False,
            show_line_numbers=False,
            highlight_cursor_line=False,
            max_checkpoints=1,
            compact=True,
        )
        # Not given to the constructor, which would parse the text twice.
        self.area.language = self._language if self._language in _LANGUAGES else None
        self.area.can_focus = False
        self.area.growing = growing

    def compose(self) -> ComposeResult:
        yield self._title
        yield self.area

    def on_mount(self) -> None:
        self._name_it()
        self.take_theme()

    def take_theme(self) -> None:
        """Dark or light, as the application is."""
        self.area.theme = "monokai" if self.app.current_theme.dark else "github_light"

    def become(self, block: Block) -> None:
        """What began as some code may turn out to be a page."""
        if block.kind != self._kind:
            self._kind = block.kind
            self._language = _ALIASES.get(block.language, block.language)
            self.area.language = self._language if self._language in _LANGUAGES else None

    async def follow(self, text: str) -> None:
        if text == self._shown:
            return
        area = self.area
        shown, self._shown = self._shown.removesuffix("\n"), text
        text = text.removesuffix("\n")
        if text.startswith(shown):
            area.insert(text[len(shown) :], area.document.end)
        else:
            area.load_text(text)
        self._name_it()

    async def settle(self) -> None:
        if self.area.growing:
            self.area.growing = False
            self.area.load_text(self.area.text)
            # At once and in any case: a scroll that waits for the next layout can be overtaken by
            # one to the end, and is dropped where the scrollbar is not there yet.
            self.area.scroll_to(0, 0, animate=False, force=True, immediate=True)
        self._name_it()

    def _name_it(self) -> None:
        name = {"page": "HTML page"}.get(self._kind, self._language or "code")
        num_lines = self._shown.removesuffix("\n").count("\n") + 1
        more = "" if self._kind != "page" else "   F6: p copies it, x shows all of it"
        lines = "1 line" if num_lines == 1 else f"{num_lines:,} lines"
        # Counting along would draw one more widget with every piece.
        title = name if self.area.growing else f"{name}, {lines}, {_size(len(self._shown))}{more}"
        if title != self._named:
            self._named = title
            self._title.update(title, layout=False)


class Thumbnail(Horizontal):
    """A small picture and what is known about it; a click shows it large."""

    def __init__(self, picture: StoredAttachment, number: int) -> None:
        super().__init__(classes="thumbnail")
        self.picture = picture
        self._cells = HalfCells()
        rows = 6
        self._cells.styles.width = max(4, min(20, round(2 * rows * picture.width / picture.height)))
        text = f"[Image #{number}] {printable(picture.name)}\n{picture.width} x {picture.height} px"
        if picture.page_text is not None:
            num_lines = sum(bool(line.text) for line in picture.page_text)
            text += f"\n{num_lines} lines of text read"
        self._label = Static(text, markup=False)

    def compose(self) -> ComposeResult:
        yield self._cells
        yield self._label

    def on_mount(self) -> None:
        self.post_message(PictureWanted(self))

    def show(self, image: Image.Image) -> None:
        self._cells.image = image

    def on_click(self) -> None:
        self.post_message(MessageView.Asked("picture", None, self.picture))


class PictureWanted(Message):
    """A thumbnail came into being and needs its pixels."""

    def __init__(self, thumbnail: Thumbnail) -> None:
        super().__init__()
        self.thumbnail = thumbnail


class MessageView(Vertical, can_focus=True):
    """One message. When it has the focus, single letters act on it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "ask('copy')", "Copy", id="message-copy"),
        Binding("p", "ask('copy_page')", "Copy page", id="message-copy-page"),
        Binding("e", "ask('edit')", "Edit", id="message-edit"),
        Binding("r", "ask('regenerate')", "Regenerate", id="message-regenerate"),
        Binding("n", "ask('continue')", "Continue", id="message-continue"),
        Binding("d,delete", "ask('delete')", "Delete", id="message-delete"),
        Binding("f", "ask('fork')", "Fork", id="message-fork"),
        Binding("v", "ask('picture')", "View picture", id="message-picture"),
        Binding("o", "ask('editor')", "Open in editor", id="message-editor", show=False),
        Binding("x", "unfold", "Show all", id="message-unfold"),
        Binding("left,left_square_bracket", "version(-1)", "Earlier version", id="version-earlier"),
        Binding("right,right_square_bracket", "version(1)", "Later version", id="version-later"),
        Binding("up,k", "go(-1)", "Up", id="message-up", show=False),
        Binding("down,j", "go(1)", "Down", id="message-down", show=False),
        Binding("home", "go_far(-1)", "First", show=False),
        Binding("end", "go_far(1)", "Last", show=False),
    ]

    class Asked(Message):
        """The user wants something done with a message."""

        def __init__(
            self,
            action: Action,
            message: StoredMessage | None,
            picture: StoredAttachment | None = None,
        ) -> None:
            super().__init__()
            self.action = action
            self.message = message
            self.picture = picture

    class Step(Message):
        """The focus is to go to the message beside this one."""

        def __init__(self, view: MessageView, step: int) -> None:
            super().__init__()
            self.view = view
            self.step = step

    class Far(Message):
        """The focus is to go to the first or the last message."""

        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

    class VersionWanted(Message):
        """Another version of a message is to be shown."""

        def __init__(self, message_id: int) -> None:
            super().__init__()
            self.message_id = message_id

    def __init__(self, message: StoredMessage, answer: Answer | None = None) -> None:
        super().__init__(classes=f"message -{message.role}")
        self.message = message
        self.answer = answer
        self._head = Static(markup=False, classes="message-head")
        self._foot = Static(markup=False, classes="message-foot")
        self._body = Vertical(classes="message-body")
        self._parts: list[Prose | Code] = []
        self._folded = False
        self._told: tuple[object, ...] = ()
        self._drawing = asyncio.Lock()

    def compose(self) -> ComposeResult:
        yield self._head
        with self._body:
            if self.message.role == "assistant":
                yield from self._build()
            else:
                yield from self._typed()
        yield self._foot

    def on_mount(self) -> None:
        self.tell()

    def on_unmount(self) -> None:
        # Textual's memory of this method's results keeps up to 1,024 widgets that are gone, each
        # with the lines that it drew.
        StylesCache.get_inner_outer.cache_clear()

    # ── content ───────────────────────────────────────────────────────────────────────────────

    def _typed(self) -> ComposeResult:
        for number, picture in enumerate(self.message.attachments, 1):
            yield Thumbnail(picture, number)
        text = printable(self.message.text)
        self._folded = len(text) > _FOLDED_CHARS
        if self._folded:
            text = f"{text[:_FOLDED_CHARS]}… ({_size(len(text))}; x shows all of it)"
        if text:
            yield Static(text, markup=False, classes="typed")

    def _build(self) -> ComposeResult:
        text = self.text
        for block in split(text, growing=self.answer is not None):
            part = self._part(block, text)
            self._parts.append(part)
            yield part

    def _part(self, block: Block, text: str) -> Prose | Code:
        shown = printable(text[block.start : block.end])
        if block.kind == "prose":
            return Prose(_without_line_separators(shown))
        return Code(block, shown, growing=self.answer is not None)

    @property
    def text(self) -> str:
        """Raw."""
        return self.answer.text if self.answer is not None else self.message.text

    async def follow(self) -> None:
        """Show what the answer has by now."""
        async with self._drawing:
            await self._follow()

    async def _follow(self) -> None:
        text = self.text
        blocks = split(text, growing=self.answer is not None)
        kinds = [Prose if block.kind == "prose" else Code for block in blocks]
        if [type(part) for part in self._parts] != kinds[: len(self._parts)]:
            # Rare: what was taken for prose turned out to be part of a page.
            await self._body.remove_children()
            self._parts = []
        for at, block in enumerate(blocks):
            if at < len(self._parts):
                if at >= len(self._parts) - 1 or self.answer is None:
                    shown = printable(text[block.start : block.end])
                    if block.kind == "prose":
                        shown = _without_line_separators(shown)
                    part = self._parts[at]
                    if isinstance(part, Code):
                        part.become(block)
                    await part.follow(shown)
            else:
                if self._parts:
                    await self._parts[-1].settle()
                part = self._part(block, text)
                self._parts.append(part)
                await self._body.mount(part)
        self.tell()

    async def finish(self, message: StoredMessage) -> None:
        """The answer is over and `message` is how it was stored."""
        async with self._drawing:
            self.message = message
            self.answer = None
            await self._follow()
            for part in self._parts:
                await part.settle()
            self.tell()

    def tell(self) -> None:
        """Say who speaks and how it stands with this message."""
        message = self.message
        clock = time.strftime("%H:%M", time.localtime(message.created_at))
        who = "You" if message.role == "user" else printable(message.model) or "Answer"
        versions = ""
        if len(message.siblings) > 1:
            at = message.siblings.index(message.id) + 1 if message.id in message.siblings else 0
            versions = f"  < {at}/{len(message.siblings)} >"
        foot = self._verdict()
        told = (who, versions, foot)
        if told == self._told:
            return
        head = Content.assemble((who, "bold"), (f"  {clock}", "dim"), (versions, "bold"))
        if told[:2] != self._told[:2]:
            self._head.update(head, layout=False)
        before = str(self._told[2]) if self._told else ""
        # A layout for every piece of an answer would cost more than all the rest.
        same_height = self.answer is not None and before and before.count("\n") == foot.count("\n")
        self._foot.display = bool(foot)
        self._foot.update(foot, layout=not same_height)
        self.set_class(message.status == "error", "-failed")
        self._told = told

    def _verdict(self) -> str:
        message, answer = self.message, self.answer
        if answer is not None:
            return _progress(answer)
        if message.role != "assistant":
            return ""
        if message.status == "error":
            return f"Failed: {printable(message.error)}\nF6 r tries again."
        if message.status == "streaming":
            return "Being written in another window."
        stats = message.stats
        measured = ""
        if stats:
            measured = (
                f"{stats['new_tokens']:,} tokens, first after {stats['time_to_first_token_s']:.1f}"
                f" s, {stats['tokens_per_s']:.0f} tokens/s"
            )
        if stats.get("num_left_out"):
            measured += f"\nThe first {stats['num_left_out']} messages did not fit any more."
        if message.status == "partial":
            ways = "F6 n continues it, F6 r starts anew"
            reasons = {
                "length": "Cut at the length limit: F6 n continues it.",
                "cancelled": f"Stopped: {ways}.",
            }
            why = reasons.get(message.finish_reason, f"Interrupted: {ways}.")
            return f"{why}  {measured}"
        return measured

    # ── keys ──────────────────────────────────────────────────────────────────────────────────

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        message = self.message
        is_answer = message.role == "assistant"
        if self.answer is not None and action == "ask":
            return parameters[0] in ("copy", "copy_page", "fork")
        if action == "ask":
            return {
                "copy_page": is_answer and any(isinstance(p, Code) for p in self._parts),
                "continue": is_answer and message.status in ("partial", "error"),
                "picture": bool(message.attachments),
            }.get(str(parameters[0]), True)
        if action == "version":
            return len(message.siblings) > 1
        if action == "unfold":
            return self._folded or any(isinstance(p, Code) for p in self._parts)
        return True

    def action_ask(self, action: Action) -> None:
        pictures = self.message.attachments
        self.post_message(self.Asked(action, self.message, pictures[0] if pictures else None))

    def action_version(self, step: int) -> None:
        family = self.message.siblings
        at = family.index(self.message.id) + step
        if 0 <= at < len(family):
            self.post_message(self.VersionWanted(family[at]))

    def action_unfold(self) -> None:
        if self._folded:
            self._folded = False
            self.query_one(".typed", Static).update(Content(printable(self.message.text)))
        else:
            self.toggle_class("-unfolded")

    def action_go(self, step: int) -> None:
        self.post_message(self.Step(self, step))

    def action_go_far(self, step: int) -> None:
        self.post_message(self.Far(step))

    @on(Markdown.LinkClicked)
    def _link(self, event: Markdown.LinkClicked) -> None:
        event.stop()
        # An answer is untrusted: where its links lead is said, and nothing is opened.
        self.app.copy_to_clipboard(event.href)
        self.notify(f"Copied the address: {printable(event.href)}", markup=False)

    def on_click(self) -> None:
        self.focus()


def _progress(answer: Answer) -> str:
    stopping = "Stopping. " if answer.stopping else ""
    if answer.phase == "waiting":
        return f"{stopping}Waiting for the engine …"
    if answer.phase == "reading" and answer.prefill is not None:
        done, total = answer.prefill.done, answer.prefill.total
        return f"{stopping}Reading: {done:,} of {total:,} tokens …"
    speed = f", {answer.tokens_per_s:.0f}/s" if answer.num_pieces > 2 else ""
    return f"{stopping}Writing: {answer.num_pieces:,} tokens{speed} … Esc stops."


def _size(num_chars: int) -> str:
    return f"{num_chars:,} characters" if num_chars < 10_000 else f"{num_chars / 1000:.1f} k"


def _without_line_separators(text: str) -> str:
    # Textual counts lines with str.splitlines, Markdown does not know these.
    return text.replace("\u2028", "\n").replace("\u2029", "\n\n")
