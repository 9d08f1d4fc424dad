"""Small questions in front of the main screen: a line of text, a longer text, a picture file.

Each returns what was chosen, or None. They know nothing about what it is used for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, DirectoryTree, Input, Static, TextArea

from w2c_tui.core.errors import W2CError
from w2c_tui.core.printable import printable
from w2c_tui.tui.picture import HalfCells
from w2c_tui.tui.text_area import WrappedArea

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


class AskLine(ModalScreen[str | None]):
    """One line of text. `refuse` says what is wrong with it, or nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(
        self, question: str, value: str = "", refuse: Callable[[str], str] = lambda _: ""
    ) -> None:
        super().__init__()
        self._question = question
        self._value = value
        self._refuse = refuse

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(printable(self._question), markup=False, classes="dialog-title")
            yield Input(self._value, select_on_focus=False)
            yield Static("Enter accepts, Esc cancels.", markup=False, classes="dialog-note")

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        problem = self._refuse(event.value)
        if problem:
            self.query_one(".dialog-note", Static).update(printable(problem))
        else:
            self.dismiss(event.value)


class EditText(ModalScreen[str | None]):
    """A longer text, in a full text area."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "accept", "Save", priority=True),
        Binding("escape", "dismiss(None)", "Cancel"),
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog -large"):
            yield Static(self._title, markup=False, classes="dialog-title")
            yield WrappedArea(self._text, soft_wrap=True, show_line_numbers=False)
            yield Static("Ctrl+S saves it as another version, Esc cancels.", markup=False)

    def action_accept(self) -> None:
        self.dismiss(self.query_one(TextArea).text)


class ShowText(ModalScreen[None]):
    """A longer text to read, and to scroll in."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss(None)", "Close")]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog -large"):
            yield Static(f"{self._title} (Esc closes)", markup=False, classes="dialog-title")
            yield WrappedArea(
                self._text, read_only=True, show_line_numbers=False, show_cursor=False
            )


class AskTries(ModalScreen[tuple[int, int] | None]):
    """How many candidates and how many corrections are worth it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("A better page for more time", markup=False, classes="dialog-title")
            yield Static(
                "Every page is rendered and compared with the screenshot; the nearest one stays "
                "in sight, the others are kept as versions.",
                markup=False,
                classes="dialog-note",
            )
            yield Static("Candidates, each at a seed of its own", markup=False)
            yield Input("3", type="integer", id="best-of", compact=True)
            yield Static("Corrections of what differs in the best one", markup=False)
            yield Input("1", type="integer", id="refine", compact=True)
            yield Static(
                "Enter begins, Esc cancels.", markup=False, classes="dialog-note", id="tries-note"
            )

    @on(Input.Submitted)
    def _submitted(self) -> None:
        try:
            best_of = int(self.query_one("#best-of", Input).value)
            refine = int(self.query_one("#refine", Input).value)
        except ValueError:
            best_of = refine = -1
        if 1 <= best_of <= 100 and 0 <= refine <= 100:
            self.dismiss((best_of, refine))
        else:
            note = "1 to 100 candidates, 0 to 100 corrections."
            self.query_one("#tries-note", Static).update(note)


class Keys(ModalScreen[None]):
    """Which keys there are, by place; `groups` has pairs of key and meaning for each."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q", "dismiss(None)", "Close")]

    def __init__(self, groups: dict[str, list[tuple[str, str]]]) -> None:
        super().__init__()
        self._groups = groups

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog -large"):
            yield Static("Keys (Esc closes)", markup=False, classes="dialog-title")
            with VerticalScroll():
                for title, keys in self._groups.items():
                    lines = "\n".join(f"  {key:<22} {meaning}" for key, meaning in keys)
                    yield Static(f"{title}\n{lines}\n", markup=False)

    def on_mount(self) -> None:
        self.query_one(VerticalScroll).focus()


class _Pictures(DirectoryTree):
    ICON_NODE = "+ "
    ICON_NODE_EXPANDED = "- "
    ICON_FILE = "  "

    def filter_paths(self, paths: Iterable[Path]) -> Iterable[Path]:
        shown = []
        for path in paths:
            with contextlib.suppress(OSError):
                if not path.name.startswith(".") and (
                    path.suffix.lower() in _SUFFIXES or path.is_dir()
                ):
                    shown.append(path)
        return shown


class PickPicture(ModalScreen[str | None]):
    """A picture file, chosen from a tree with a preview, or a path or address that is typed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Cancel"),
        Binding("backspace", "up", "Folder above"),
    ]

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog -large"):
            yield Static("Attach a picture", markup=False, classes="dialog-title")
            yield Input(placeholder="Path or address, or choose below", select_on_focus=False)
            with Horizontal():
                yield _Pictures(self._folder)
                with Vertical(id="preview"):
                    yield HalfCells()
                    yield Static(markup=False, id="preview-name")
            with Horizontal(classes="dialog-buttons"):
                yield Button("Folder above", id="up", compact=True)
                yield Button("Home", id="home", compact=True)
                yield Button("Cancel", id="cancel", compact=True)

    def on_mount(self) -> None:
        self.query_one(_Pictures).focus()

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        if event.value.strip():
            self.dismiss(event.value)

    @on(DirectoryTree.FileSelected)
    def _chosen(self, event: DirectoryTree.FileSelected) -> None:
        self.dismiss(str(event.path))

    @on(DirectoryTree.NodeHighlighted)
    def _highlighted(self, event: DirectoryTree.NodeHighlighted[Any]) -> None:
        entry = event.node.data
        if entry is not None and entry.path.suffix.lower() in _SUFFIXES:
            self._preview(entry.path)

    @work(thread=True, exclusive=True, exit_on_error=False)
    def _preview(self, path: Path) -> None:
        from w2c_tui.core.image import open_image
        from w2c_tui.core.reference import load_attachment

        try:
            attachment = load_attachment(path)
            image = open_image(attachment)
            image.thumbnail((200, 200))
        except W2CError as error:
            self.app.call_later(self._show_preview, None, error.message)
        else:
            size = f"{attachment.width} x {attachment.height} px"
            self.app.call_later(self._show_preview, image, f"{attachment.name}\n{size}")

    def _show_preview(self, image: Any, text: str) -> None:
        if self.is_mounted:
            self.query_one(HalfCells).image = image
            self.query_one("#preview-name", Static).update(printable(text))

    @on(Button.Pressed, "#up")
    def action_up(self) -> None:
        tree = self.query_one(_Pictures)
        tree.path = Path(tree.path).absolute().parent

    @on(Button.Pressed, "#home")
    def _home(self) -> None:
        self.query_one(_Pictures).path = Path.home()

    @on(Button.Pressed, "#cancel")
    def _cancel(self) -> None:
        self.dismiss(None)
