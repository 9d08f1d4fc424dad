"""The dialog in which a model is picked, loaded and given back.

Owns the list of what there is to pick and the words about it. Loading itself is the application's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, get_args, get_type_hints

import msgspec
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, Select, Static
from textual.widgets.option_list import Option

from w2c_tui.core.catalog import (
    ENTRIES,
    BundledModel,
    CatalogEntry,
    PackagedFile,
    find,
    memory_needed,
)
from w2c_tui.core.config import LoadSpec
from w2c_tui.core.errors import W2CError
from w2c_tui.core.printable import printable
from w2c_tui.tui.status_line import amount, progress, short_name

if TYPE_CHECKING:
    from w2c_tui.machine import Machine
    from w2c_tui.tui.app import W2CApp

_QUANTIZATION = {"none": "not quantised", "8bit": "8 bit weights", "4bit": "4 bit weights"}
_BACKENDS = {"hf": "transformers", "gguf": "llama.cpp", "openai": "a server"}


def _choices(field: str) -> list[str]:
    """What a setting of `LoadSpec` can be; those are stated there and nowhere else."""
    annotation = get_type_hints(LoadSpec)[field]
    return [str(value) for value in get_args(annotation)]


class ModelScreen(ModalScreen[None]):
    """Catalogue, local folders and a free field; what they need against what is free."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("ctrl+l", "load", "Load"),
        Binding("ctrl+u", "unload", "Unload", priority=True),
        Binding("ctrl+d", "plan", "Plan", priority=True),
    ]

    app: W2CApp

    def __init__(self) -> None:
        super().__init__()
        self._machine: Machine | None = None

    def compose(self) -> ComposeResult:
        spec = self.app.spec
        with Vertical(classes="dialog -large", id="models"):
            yield Static("Model", markup=False, classes="dialog-title")
            yield Input(
                spec.name,
                placeholder="Name, folder, .gguf file or OWNER/NAME of a hub",
                id="name",
                select_on_focus=False,
                compact=True,
            )
            with Horizontal(id="model-choice"):
                yield OptionList(id="known", compact=True)
                with VerticalScroll(id="model-about", can_focus=False):
                    yield Static(markup=False, id="about")
            with Horizontal(id="model-how"):
                quantizations = [(_QUANTIZATION[q], q) for q in _choices("quantization")]
                yield _choice(quantizations, spec.quantization, "quantization")
                yield _choice([(f"dtype {d}", d) for d in _choices("dtype")], spec.dtype, "dtype")
                backends = [(f"by {_BACKENDS.get(b, b)}", b) for b in _choices("backend")]
                yield _choice(backends, spec.backend, "backend")
                yield Input(spec.device_map, placeholder="device", id="device", compact=True)
            yield Static(markup=False, id="model-state")
            with Horizontal(classes="dialog-buttons"):
                yield Button("Load (Ctrl+L)", id="load", variant="primary", compact=True)
                yield Button("Unload (Ctrl+U)", id="unload", compact=True)
                yield Button("Plan (Ctrl+D)", id="plan", compact=True)
                yield Button("Stop loading", id="stop-loading", compact=True)
                yield Button("Close (Esc)", id="close", compact=True)

    def on_mount(self) -> None:
        known = self.query_one("#known", OptionList)
        names = [*(entry.id for entry in ENTRIES), *_local(self.app.paths.models)]
        current = find(self.app.spec.name)
        for name in names:
            entry = find(name)
            title = entry.title if entry else short_name(name)
            note = "sees images" if entry and entry.vision else "text only" if entry else "on disk"
            known.add_option(
                Option(
                    Content.assemble(printable(title), Content.styled(f"  {note}", "dim")), id=name
                )
            )
        at = current.id if current else self.app.spec.name
        known.highlighted = names.index(at) if at in names else None
        known.focus()
        self.model_changed()
        self._inspect()

    @work(thread=True, exit_on_error=False)
    def _inspect(self) -> None:
        from w2c_tui.machine import inspect_machine

        machine = inspect_machine()
        self.app.call_later(self._inspected, machine)

    def _inspected(self, machine: Machine) -> None:
        self._machine = machine
        if self.is_mounted:
            self._describe()

    # ── what is picked ────────────────────────────────────────────────────────────────────────

    @on(OptionList.OptionHighlighted, "#known")
    def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        self.query_one("#name", Input).value = event.option_id or ""

    @on(OptionList.OptionSelected, "#known")
    def _selected(self) -> None:
        self.action_load()

    @on(Input.Changed, "#name")
    @on(Select.Changed, "#quantization")
    def _describe(self) -> None:
        name = self.query_one("#name", Input).value.strip()
        entry = find(name)
        lines = self._about(entry) if entry else [self._about_path(name)]
        self.query_one("#about", Static).update(printable("\n".join(lines)))

    def _about(self, entry: CatalogEntry) -> list[str]:
        source = entry.source
        where = source
        if isinstance(source, PackagedFile):
            where = source.package
        elif isinstance(source, BundledModel):
            where = f"this program, over {source.language_model}"
        size = f"{entry.parameters / 1e9:.1f}B" if entry.parameters >= 1e9 else ""
        lines = [
            f"{entry.title}  {size or f'{entry.parameters / 1e6:.0f}M'} parameters",
            "Sees images." if entry.vision else "Reads text only, also that found on images.",
            f"Context {entry.context:,} tokens. Licence: {entry.licence}.",
            f"From {where}.",
        ]
        machine = self._machine
        if machine is None:
            lines.append("Looking at this machine …")
        else:
            chosen = str(self.query_one("#quantization", Select).value)
            free = max(machine.gpu_memory_bytes, machine.memory_available_bytes)
            place = "GPU" if free == machine.gpu_memory_bytes else "memory"
            lines.append(f"Free {place}: {amount(free)}. Needed:")
            for bits, key in ((16, "none"), (8, "8bit"), (4, "4bit")):
                need = memory_needed(entry, bits)  # type: ignore[arg-type]
                fits = "fits" if need <= free else "does not fit"
                mark = ">" if key == chosen else " "
                lines.append(f"{mark} {bits:>2} bit {amount(need):>8}  {fits}")
        if entry.note:
            lines.append(entry.note)
        return lines

    def _about_path(self, name: str) -> str:
        if not name:
            return "Choose a model from the list, or name one above."
        path = Path(name).expanduser()
        if path.is_dir():
            size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
            return f"A folder on this machine, {amount(size)} of weights."
        if path.is_file():
            return f"A file on this machine, {amount(path.stat().st_size)}."
        if "/" in name:
            return "Will be looked for on the model hub, and fetched from there."
        return "Not in the catalogue, and no file or folder here."

    # ── loading ───────────────────────────────────────────────────────────────────────────────

    @on(Button.Pressed, "#load")
    @on(Input.Submitted)
    def action_load(self) -> None:
        spec = self._spec()
        if spec is not None:
            self.app.cancel_answers()
            self.app.load_model(spec)

    def _spec(self) -> LoadSpec | None:
        """What is picked; None while nothing is, or while another model is loading."""
        name = self.query_one("#name", Input).value.strip()
        if not name or self.app.model_state == "loading":
            return None
        return msgspec.structs.replace(
            self.app.spec,
            name=name,
            quantization=str(self.query_one("#quantization", Select).value),
            dtype=str(self.query_one("#dtype", Select).value),
            backend=str(self.query_one("#backend", Select).value),
            device_map=self.query_one("#device", Input).value.strip() or "auto",
        )

    @on(Button.Pressed, "#plan")
    def action_plan(self) -> None:
        """Say which device would hold what, without loading."""
        spec = self._spec()
        if spec is not None:
            self._say("Planning ...")
            self._plan(spec)

    @work(thread=True, exclusive=True, exit_on_error=False)
    def _plan(self, spec: LoadSpec) -> None:
        try:
            shares = self.app.engine.plan(spec)
        except W2CError as error:
            text = str(error)
        else:
            parts = [f"{share.device}: {amount(share.num_bytes)}" for share in shares]
            text = f"{short_name(spec.name)} would go to {', '.join(parts)}."
            if not shares:
                text = "Only loading it would tell where it goes."
        self.app.call_later(self._say, text)

    def _say(self, text: str) -> None:
        if self.is_attached:
            self.query_one("#model-state", Static).update(printable(text))

    @on(Button.Pressed, "#unload")
    def action_unload(self) -> None:
        self.app.unload_model()

    @on(Button.Pressed, "#stop-loading")
    def _stop(self) -> None:
        self.app.cancel_loading()

    @on(Button.Pressed, "#close")
    def _close(self) -> None:
        self.dismiss(None)

    def model_changed(self) -> None:
        """The application says that the model is another one, or further."""
        app = self.app
        loading = app.model_state == "loading"
        self.query_one("#load", Button).disabled = loading
        self.query_one("#unload", Button).disabled = app.info is None
        self.query_one("#stop-loading", Button).display = loading
        info, error = app.info, app.model_error
        if loading:
            text = f"{short_name(app.spec.name)}: {progress(app, self.size.width - 20)}"
        elif info is not None:
            bits = info.dtype if info.quantization == "none" else info.quantization
            sees = "sees images" if info.reads_images else "reads text only"
            text = (
                f"Loaded: {short_name(info.name)}, {info.num_parameters / 1e6:,.0f}M parameters, "
                f"{bits} on {', '.join(info.devices)} by {info.runtime}, {sees}, "
                f"in {info.load_time_s:.1f} s"
            )
            if info.note:
                text += f"\n{info.note}"
        elif app.model_state == "failed" and error is not None:
            text = str(error)
        else:
            text = "No model is loaded."
        self._say(text)


def _choice(options: list[tuple[str, str]], value: str, ident: str) -> Select[str]:
    return Select(options, value=value, allow_blank=False, id=ident, compact=True)


def _local(models: Path) -> list[str]:
    """Checkpoint folders and GGUF files in the models folder."""
    found: list[str] = []
    try:
        for path in sorted(models.rglob("*")):
            known = any(
                isinstance(entry.source, PackagedFile) and Path(entry.source.name).stem in str(path)
                for entry in ENTRIES
            )
            # What bundled models were put together to is used under their names.
            known = known or path.is_relative_to(models / "bundled")
            # An image encoder is found by itself beside its model.
            is_model = path.suffix == ".gguf" and "mmproj" not in path.name.casefold()
            if not known and (is_model or path.name == "config.json"):
                found.append(str(path if path.suffix == ".gguf" else path.parent))
    except OSError:
        return []
    return found
