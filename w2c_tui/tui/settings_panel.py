"""The panel with the session's generation parameters and system prompt.

Each field of `GenerationParams` is one line here; its meaning and limits come from there. Knows
nothing about sessions: it shows values and says when they were changed.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any, ClassVar

import msgspec
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Input, Label, Select, Static, TextArea

from w2c_tui.core.config import GenerationParams
from w2c_tui.core.iteration import Iteration
from w2c_tui.tui.text_area import WrappedArea

_ITERATION = [
    ("the whole conversation", "history"),
    ("picture, latest page, request", "latest"),
]
_OCR = [
    ("auto: for models that cannot see", "auto"),
    ("on: read the text on pictures", "on"),
    ("off", "off"),
]


class SettingsPanel(VerticalScroll, can_focus=False):
    """Shown beside the conversation; every change counts from the next answer on."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Close", show=False)]

    class Changed(Message):
        """What is to hold for this session from now on."""

        def __init__(
            self, params: GenerationParams, system: str, ocr: str, iteration: Iteration
        ) -> None:
            super().__init__()
            self.iteration = iteration
            self.params = params
            self.system = system
            self.ocr = ocr

    class Closed(Message):
        """The user is done with it."""

    def __init__(self) -> None:
        super().__init__(id="settings")
        self._values: dict[str, Any] = {}

    def compose(self) -> ComposeResult:
        yield Label("System prompt")
        yield WrappedArea(id="system", compact=True)
        yield Static("Empty: the model's own.", classes="field-note", markup=False)
        yield Label("The model is given")
        yield Select(_ITERATION, allow_blank=False, id="iteration", compact=True)
        yield Static(id="costs", classes="field-note", markup=False)
        yield Label("Text recognition (OCR)")
        yield Select(_OCR, allow_blank=False, id="ocr", compact=True)
        for field in msgspec.structs.fields(GenerationParams):
            yield Label(field.name.replace("_", " "))
            yield Input(id=f"field-{field.name}", compact=True, placeholder=_default(field))
            yield Static(_description(field.type), classes="field-note", markup=False)

    def show(
        self, params: GenerationParams, system: str, ocr: str, iteration: Iteration, costs: str
    ) -> None:
        """Show these values, without taking that for a change by the user. `costs` says what each
        way to iterate takes of the context."""
        self.tell(costs)
        with self.prevent(Input.Changed, TextArea.Changed, Select.Changed):
            self._values = msgspec.to_builtins(params)
            self.query_one("#system", TextArea).text = system
            self.query_one("#ocr", Select).value = ocr
            self.query_one("#iteration", Select).value = iteration
            for field in msgspec.structs.fields(GenerationParams):
                value = self._values.get(field.name)
                if field.name == "stop":
                    value = ", ".join(map(_escaped, value or ()))
                self.query_one(f"#field-{field.name}", Input).value = (
                    "" if value is None else str(value)
                )

    def tell(self, costs: str) -> None:
        """An answer changed what each way to iterate takes."""
        self.query_one("#costs", Static).update(costs)

    @on(Input.Changed)
    @on(TextArea.Changed)
    @on(Select.Changed)
    def _changed(self) -> None:
        values: dict[str, Any] = {}
        valid = True
        for field in msgspec.structs.fields(GenerationParams):
            box = self.query_one(f"#field-{field.name}", Input)
            note = box.parent.children[box.parent.children.index(box) + 1]  # type: ignore[union-attr]
            assert isinstance(note, Static)
            text = box.value
            value: Any = text.strip()
            if field.name == "stop":
                value = [_unescaped(part.strip()) for part in text.split(",") if part.strip()]
            problem = ""
            if value:
                try:
                    msgspec.convert({field.name: value}, GenerationParams, strict=False)
                    values[field.name] = value
                except msgspec.ValidationError as error:
                    problem, valid = str(error).split(" - at")[0], False
            box.set_class(bool(problem), "-invalid")
            note.update(problem or _description(field.type))
        if valid:
            params = msgspec.convert(values, GenerationParams, strict=False)
            ocr = str(self.query_one("#ocr", Select).value)
            system = self.query_one("#system", TextArea).text
            latest = self.query_one("#iteration", Select).value == "latest"
            self.post_message(self.Changed(params, system, ocr, "latest" if latest else "history"))

    def action_leave(self) -> None:
        self.post_message(self.Closed())


def _default(field: Any) -> str:
    return "none" if field.default in (None, ()) else str(field.default)


def _description(annotation: Any) -> str:
    for meta in getattr(annotation, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.description:
            return meta.description
    if isinstance(annotation, types.UnionType):
        return next(filter(None, map(_description, typing.get_args(annotation))), "")
    return ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)
