"""The application: one engine, one session store, one model shared by all sessions.

Owns what outlives a screen: loading the model, answers that are being written, reading text off
screenshots, the theme, and what happens when something breaks. Knows nothing about layout.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import msgspec
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.message import Message
from textual.screen import Screen
from textual.theme import Theme

from w2c_tui.backends.base import ModelInfo, Prefill
from w2c_tui.core.config import GenerationParams, LoadSpec, Paths, Settings
from w2c_tui.core.conversation import Attachment, Hints
from w2c_tui.core.conversation import Message as Turn
from w2c_tui.core.errors import EngineError, W2CError
from w2c_tui.core.iteration import Iteration, given
from w2c_tui.core.page_text import WITHOUT_TEXT, recognises_text
from w2c_tui.core.printable import printable
from w2c_tui.core.store import Parent, Store
from w2c_tui.engine.client import EngineClient
from w2c_tui.tui.answer import Answer
from w2c_tui.tui.harmless import HarmlessLines
from w2c_tui.tui.live_preview import LivePreview
from w2c_tui.tui.pages import Pages
from w2c_tui.tui.picture import protocol_for
from w2c_tui.tui.plain import KEYS, PlainAscii

if TYPE_CHECKING:
    from w2c_tui.tui.better_run import BetterRun

log = logging.getLogger("w2c_tui.tui")
log.addHandler(logging.NullHandler())
F = TypeVar("F", bound=Callable[..., Any])
ModelState = Literal["none", "loading", "ready", "failed"]


def guarded(method: F) -> F:
    """A handler or action whose W2CErrors are shown instead of ending the application."""
    import inspect

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def run_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return await method(self, *args, **kwargs)
            except W2CError as error:
                self.app.show_error(error)

        return run_async  # type: ignore[return-value]

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except W2CError as error:
            self.app.show_error(error)

    return run  # type: ignore[return-value]


class ModelChanged(Message):
    """The model, its state or the progress of loading it is another one."""


class AnswerOver(Message):
    """An answer ended, in whatever way."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class TryBegan(Message):
    """One of several tries at a page begins."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class BetterOver(Message):
    """There will be no more tries."""


class TextRead(Message):
    """Text recognition on a picture ended."""

    def __init__(self, image: Attachment, error: W2CError | None) -> None:
        super().__init__()
        self.image = image
        self.error = error


class ReadsAhead(Message):
    """How far the model is with a draft that was not sent; None when it is not at it any more."""

    def __init__(self, number: int, progress: Prefill | None) -> None:
        super().__init__()
        self.number = number
        self.progress = progress


class Remembered(msgspec.Struct):
    """What the application keeps between runs beside the sessions."""

    theme: str = "textual-dark"
    sidebar: bool = False


class W2CApp(App[int]):
    """See the module. `run` returns the exit status. An `engine` that is given is left open."""

    TITLE = "w2c-tui"
    CSS_PATH = Path(__file__).with_name("app.tcss")
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-narrow"),
        (100, "-medium"),
        (140, "-wide"),
    ]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "keys", "Keys", id="help"),
        Binding("ctrl+q", "quit", "Quit", id="quit", priority=True),
    ]

    def __init__(
        self,
        settings: Settings,
        paths: Paths,
        store: Store,
        *,
        images: Sequence[str] = (),
        session: str | None = None,
        new: bool = False,
        engine: EngineClient | None = None,
    ) -> None:
        super().__init__()
        _use_one_arena()
        self.settings = settings
        self.paths = paths
        self.store = store
        self.engine = engine or EngineClient(paths.engine_log)
        self.spec = settings.model
        self.model_state: ModelState = "none"
        self.model_error: W2CError | None = None
        self.progress: tuple[str, int, int] = ("", 0, 0)
        self.phase_began = 0.0
        self.answers: dict[int, Answer] = {}
        self.protocol = protocol_for(settings.interface.pictures)
        self.plain = _wants_ascii(settings.interface.ascii)
        self._harmless = HarmlessLines()
        self._ascii = PlainAscii()
        self.pages = Pages(store, self.engine, settings, paths.pages)
        self.preview = LivePreview(store, paths.pages)
        self.better: BetterRun | None = None
        """Several tries at one page, while they are made."""
        self._owns_engine = engine is None
        self._loading = threading.Lock()
        self._loaded_spec: LoadSpec | None = None
        self._state_file = paths.data / "interface.json"
        self._remembered = _recall(self._state_file)
        self._start = (list(images), session, new)
        self._ending = False
        self._without_text = ""
        self._ahead = 0
        """Counts what is read ahead: only the latest is wanted."""

    @property
    def info(self) -> ModelInfo | None:
        """The loaded model."""
        return self.engine.model if self.model_state == "ready" else None

    def get_line_filters(self) -> Sequence[LineFilter]:
        filters = [*super().get_line_filters(), self._harmless]
        return [*filters, self._ascii] if self.plain else filters

    def get_key_display(self, binding: Binding) -> str:
        shown = super().get_key_display(binding)
        if self.plain:
            for sign, name in KEYS.items():
                shown = shown.replace(sign, name)
        return shown

    # ── start and end ─────────────────────────────────────────────────────────────────────────

    def get_default_screen(self) -> Screen[None]:
        from w2c_tui.tui.chat_screen import ChatScreen
        from w2c_tui.tui.open_session import OpenSession

        return ChatScreen(OpenSession(self.store, self.settings), *self._start)

    def on_mount(self) -> None:
        theme = self.settings.interface.theme or self._remembered.theme
        if theme in self.available_themes:
            self.theme = theme
        else:
            names = ", ".join(sorted(self.available_themes))
            self.notify(f"There is no theme {theme!r}. There are: {names}.", markup=False)
        self.set_keymap(self.settings.interface.keys)
        if self.store.recovery is not None:
            self.notify(
                printable(str(self.store.recovery)), severity="warning", timeout=30, markup=False
            )
        self.theme_changed_signal.subscribe(self, self._theme_changed)
        self._end_on_signals()
        if self.settings.interface.keys:
            self.set_timer(0.5, self._check_keys)
        # After the first frame: starting a process costs more than drawing does.
        self.set_timer(0.05, self.load_model)

    def _end_on_signals(self) -> None:
        """Leave properly when asked to end from outside, so that the terminal is restored."""
        import asyncio
        import signal

        if threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGTERM", "SIGHUP"):
            with contextlib.suppress(AttributeError, NotImplementedError, ValueError):
                number = getattr(signal, name)
                asyncio.get_running_loop().add_signal_handler(number, self.exit, 128 + number)

    def on_unmount(self) -> None:
        self.shut_down()

    def shut_down(self) -> None:
        """End the engine and write what is unwritten: threads wait for it. Harmless repeated."""
        self._ending = True
        self.cancel_answers()
        if self._owns_engine:
            self.engine.close()
        for answer in list(self.answers.values()):
            answer.wait(2.0)
        self.preview.close()
        self.pages.close()

    async def action_quit(self) -> None:
        from w2c_tui.tui.chat_screen import ChatScreen

        for screen in self.screen_stack:
            if isinstance(screen, ChatScreen):
                screen.keep()
        self.exit(0)

    def _handle_exception(self, error: Exception) -> None:
        log.error("The interface failed", exc_info=error)
        super()._handle_exception(error)

    def _fatal_error(self) -> None:
        # Textual would print the traceback with all local variables; it is in the log instead.
        from rich.segment import Segments

        text = (
            "w2c-tui stopped because of a defect of its own. Your sessions are saved.\n"
            f"Details: {self.paths.app_log}"
        )
        self._exit_renderables.append(Segments(self.console.render(text)))
        self._close_messages_no_wait()

    def show_error(self, error: W2CError) -> None:
        """What failed and what to do, for as long as it takes to read."""
        log.warning("%s: %s", type(error).__name__, error)
        self.notify(printable(str(error)), severity="error", timeout=15, markup=False)

    def copy(self, text: str, what: str) -> None:
        """To the clipboard: through its own program, and through the terminal over SSH."""
        self.copy_to_clipboard(text)
        if "SSH_CONNECTION" not in os.environ:
            import pyperclip

            try:
                pyperclip.copy(text)
            except pyperclip.PyperclipException:
                log.info("no clipboard program; the terminal was asked")
        self.notify(f"Copied {what}.", timeout=3, markup=False)

    # ── what is kept between runs ─────────────────────────────────────────────────────────────

    @property
    def remembered(self) -> Remembered:
        return self._remembered

    def _theme_changed(self, theme: Theme) -> None:
        self._remember(theme=theme.name)
        code: Any
        for code in self.screen_stack[0].query("Code"):
            code.take_theme()

    def _remember(self, **changes: Any) -> None:
        self._remembered = msgspec.structs.replace(self._remembered, **changes)
        try:
            self._state_file.parent.mkdir(parents=True, exist_ok=True)
            self._state_file.write_bytes(msgspec.json.encode(self._remembered))
        except OSError as error:
            log.warning("%s cannot be written: %s", self._state_file, error)

    # ── the model ─────────────────────────────────────────────────────────────────────────────

    def load_model(self, spec: LoadSpec | None = None) -> None:
        """Load `spec` (or the one that is set) in the background."""
        self.spec = spec or self.spec
        self.model_state = "loading"
        self.progress = ("Starting the engine", 0, 0)
        self._tell_model()
        self.run_worker(self._load_quietly, thread=True, group="model", exit_on_error=False)

    def unload_model(self) -> None:
        self.cancel_answers()
        self.model_state = "none"
        self._tell_model()
        self.run_worker(self.engine.unload, thread=True, group="model", exit_on_error=False)

    def cancel_loading(self) -> None:
        self.engine.cancel()

    def ready(self) -> None:
        """On a thread: return when the model is loaded. Raises what loading raises."""
        with self._loading:
            spec = self.spec
            if self.engine.is_ready and self._loaded_spec == spec:
                if self.model_state != "ready":
                    self.model_state = "ready"
                    self._tell_model()
                return
            self.model_state = "loading"
            try:
                self.engine.load(spec, self._report, pictures_soon=True)
            except W2CError as error:
                self.model_state, self.model_error = "failed", error
                raise
            else:
                self._loaded_spec, self.model_error = spec, None
                self.model_state = "ready"
            finally:
                self._tell_model()

    def _load_quietly(self) -> None:
        try:
            self.ready()
        except W2CError as error:
            log.warning("%s: %s", type(error).__name__, error)
        except Exception:
            log.exception("loading a model failed")
            raise

    def _report(self, phase: str, done: int, total: int) -> None:
        if phase != self.progress[0]:
            self.phase_began = time.monotonic()
        self.progress = (phase, done, total)
        self._tell_model()

    def _tell_model(self) -> None:
        if not self._ending and self.is_running:
            self.post_message(ModelChanged())

    def on_model_changed(self) -> None:
        for screen in self.screen_stack:
            if (tell := getattr(screen, "model_changed", None)) is not None:
                tell()

    # ── answers ───────────────────────────────────────────────────────────────────────────────

    def begin_answer(
        self,
        session_id: str,
        params: GenerationParams,
        iteration: Iteration,
        *,
        parent: Parent = "leaf",
    ) -> Answer:
        """Start answering below `parent`, with as much of the conversation as `iteration` says."""
        name = self.info.name if self.info else self.spec.name
        writer = self.store.begin_answer(session_id, parent=parent, model=_short(name))
        answer = Answer(writer, self.store.message(writer.message_id))
        return self._answer(answer, params, iteration)

    def continue_answer(
        self, message_id: int, params: GenerationParams, iteration: Iteration
    ) -> Answer:
        """Write on at the end of an answer."""
        writer = self.store.continue_answer(message_id)
        return self._answer(Answer(writer, self.store.message(message_id)), params, iteration)

    def _answer(self, answer: Answer, params: GenerationParams, iteration: Iteration) -> Answer:
        self.answers[answer.message_id] = answer

        def work() -> None:
            try:
                answer.run(
                    self.engine,
                    self.store,
                    params,
                    self.ready,
                    iteration,
                    begins_pages=self.begins_pages,
                )
                self.pages.keep(answer.message_id, params)
            except W2CError as error:
                # The answer itself is in the store; only its page could not be kept.
                self.call_later(self.show_error, error)
            except Exception as error:
                log.exception("answering failed")
                answer.error = EngineError(
                    f"{type(error).__name__}: {error}", hint=f"Details: {self.paths.app_log}"
                )
            finally:
                if not self._ending:
                    self.post_message(AnswerOver(answer))

        self.run_worker(work, thread=True, group="answers", exit_on_error=False)
        return answer

    def begins_pages(self) -> bool:
        """Whether the loaded model would not know how to begin one."""
        from w2c_tui.backends.choice import knows_pages

        return not knows_pages(self._loaded_spec or self.spec)

    def on_answer_over(self, event: AnswerOver) -> None:
        answer = event.answer
        answer.fetch()
        self.answers.pop(answer.message_id, None)
        if answer.error is not None:
            log.warning("%s: %s", type(answer.error).__name__, answer.error)
            self._look_for_model()
        for screen in self.screen_stack:
            if (tell := getattr(screen, "answer_over", None)) is not None:
                screen.call_later(tell, answer)

    def _look_for_model(self) -> None:
        """After a failure: it may be gone with the engine."""
        if self.engine.model is None and self.model_state == "ready":
            self.model_state = "none"
            self._tell_model()

    def read_ahead(
        self,
        conversation: Callable[[], list[Turn]],
        params: GenerationParams,
        iteration: Iteration,
    ) -> None:
        """Have the model read what may be sent soon, until something else is wanted of it.

        `conversation` is asked for on a thread. Failures come again when it is sent.
        """
        self._ahead += 1
        number = self._ahead

        def work() -> None:
            from w2c_tui.engine.page_writer import begun

            messages, asked = given(conversation(), iteration), params
            if self.begins_pages() and (helped := begun(messages, params)) is not None:
                messages, asked = helped
            steps = self.engine.prefill(messages, asked)
            with contextlib.closing(steps):  # type: ignore[type-var]
                for step in steps:
                    if self._ending or number != self._ahead:
                        return
                    self.post_message(ReadsAhead(number, step))

        def work_quietly() -> None:
            try:
                work()
            except W2CError as error:
                log.info("reading ahead: %s", error)
                self._look_for_model()
            except Exception:
                log.exception("reading ahead failed")
            finally:
                if not self._ending:
                    self.post_message(ReadsAhead(number, None))

        self.run_worker(work_quietly, thread=True, group="ahead", exit_on_error=False)

    def read_no_further(self) -> None:
        """Leave what is read ahead: it is not wanted any more."""
        self._ahead += 1
        self.post_message(ReadsAhead(self._ahead, None))

    def on_reads_ahead(self, event: ReadsAhead) -> None:
        if event.number != self._ahead:
            return
        for screen in self.screen_stack:
            if (tell := getattr(screen, "reads_ahead", None)) is not None:
                tell(event.progress)

    def cancel_answers(self) -> None:
        if self.better is not None:
            self.better.cancel()
        for answer in list(self.answers.values()):
            answer.cancel()

    def begin_better(self, run: BetterRun) -> None:
        """Make several tries at one page. `BetterRun.began` and `ended` are ours."""
        self.better = run

        def work() -> None:
            try:
                self.ready()
                assert self.engine.model is not None
                run.run(self.engine, self.store, self.pages, self.engine.model)
            except W2CError as error:
                run.error, run.outcome = error, "failed"
            except Exception as error:
                log.exception("making better pages failed")
                run.outcome = "failed"
                run.error = EngineError(f"{type(error).__name__}: {error}")
            finally:
                if not self._ending:
                    self.post_message(BetterOver())

        self.run_worker(work, thread=True, group="answers", exit_on_error=False)

    def try_began(self, answer: Answer) -> None:
        """From the thread of a `BetterRun`."""
        self.answers[answer.message_id] = answer
        if not self._ending:
            self.post_message(TryBegan(answer))

    def try_ended(self, answer: Answer) -> None:
        """From the same thread."""
        if not self._ending:
            self.post_message(AnswerOver(answer))

    def on_try_began(self, event: TryBegan) -> None:
        for screen in self.screen_stack:
            if (tell := getattr(screen, "try_began", None)) is not None:
                screen.call_later(tell, event.answer)

    def on_better_over(self) -> None:
        run, self.better = self.better, None
        if run is None:
            return
        if run.error is not None:
            self.show_error(run.error)
        for screen in self.screen_stack:
            if (tell := getattr(screen, "better_over", None)) is not None:
                screen.call_later(tell, run)

    # ── text on pictures ──────────────────────────────────────────────────────────────────────

    def wants_text(self, image: Attachment, ocr: str) -> bool | None:
        """Whether the text of `image` is still to be read; None while that is not known, because
        it depends on the model."""
        if image.page_text is not None or ocr == "off":
            return False
        if ocr == "on":
            return True
        if self.info is None:
            return None
        if self.info.hints_for("auto", "none") == "none":
            return False
        if not self.info.reads_images or recognises_text():
            return True
        if self._without_text != self.info.name:
            self._without_text = self.info.name
            self.notify(printable(f"{self.info.name} {WITHOUT_TEXT}"), timeout=15, markup=False)
        return False

    def read_text(self, image: Attachment) -> None:
        """In the background; `TextRead` brings the picture back with its text."""

        def work() -> None:
            found, problem = image, None
            try:
                hints: Hints = self.settings.ocr_hints
                if self.info is not None:
                    hints = self.info.hints_for("on", hints)
                lines = self.engine.read_text(image, hints)
                found = msgspec.structs.replace(image, page_text=lines)
            except W2CError as error:
                problem = error
            except Exception as error:
                log.exception("reading text failed")
                problem = EngineError(f"{type(error).__name__}: {error}")
            if not self._ending:
                self.post_message(TextRead(found, problem))

        self.run_worker(work, thread=True, group="text", exit_on_error=False)

    def on_text_read(self, event: TextRead) -> None:
        for screen in self.screen_stack:
            if (tell := getattr(screen, "text_read", None)) is not None:
                screen.call_later(tell, event.image, event.error)

    # ── commands ──────────────────────────────────────────────────────────────────────────────

    def action_keys(self) -> None:
        """List the keys as they are now, with what the configuration changed."""
        from w2c_tui.tui.dialogs import Keys

        changed = self.settings.interface.keys
        groups: dict[str, list[tuple[str, str]]] = {}
        for title, bindings in _bindings_by_place().items():
            groups[title] = keys = []
            for binding in bindings:
                if binding.description:
                    binding = binding.with_key(changed.get(binding.id or "", binding.key))
                    keys.append((self.get_key_display(binding), binding.description))
        groups["Everywhere"].append(("^p", "Every command, by name"))
        self.push_screen(Keys(groups))

    def _check_keys(self) -> None:
        """A setting that changes nothing is said, and what could have been meant."""
        known = {b.id for place in _bindings_by_place().values() for b in place if b.id}
        unknown = sorted(set(self.settings.interface.keys) - known)
        if unknown:
            self.notify(
                f"There is no command called {', '.join(unknown)} (interface.keys). "
                f"There are: {', '.join(sorted(known))}.",
                severity="warning",
                timeout=30,
                markup=False,
            )

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        offered: Callable[[], Iterable[SystemCommand]] | None = getattr(screen, "commands", None)
        if offered is not None:
            yield from offered()
        yield from super().get_system_commands(screen)


def _bindings_by_place() -> dict[str, list[Binding]]:
    from w2c_tui.tui.chat_screen import ChatScreen
    from w2c_tui.tui.compare_screen import VersionList
    from w2c_tui.tui.message_view import MessageView
    from w2c_tui.tui.picture_pane import PicturePane
    from w2c_tui.tui.prompt_box import PromptBox
    from w2c_tui.tui.sidebar import SessionList

    places: dict[str, type[Any]] = {
        "Everywhere": W2CApp,
        "Conversation": ChatScreen,
        "Prompt": PromptBox,
        "On a message (F6 goes there)": MessageView,
        "In the list of sessions": SessionList,
        "In the picture pane": PicturePane,
        "On a version (F4 goes there)": VersionList,
    }
    return {title: list(Binding.make_bindings(place.BINDINGS)) for title, place in places.items()}


def _use_one_arena() -> None:
    """On glibc: let all threads share one heap. The threads that decode pictures would otherwise
    keep tens of megabytes each, and none of them is in a hurry."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        arena_max = -8
        ctypes.CDLL(None).mallopt(arena_max, 1)


def _short(name: str) -> str:
    return Path(name).name if os.sep in name and os.path.exists(name) else name


def _wants_ascii(setting: bool | None) -> bool:
    import sys

    if setting is not None:
        return setting
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    return "utf" not in encoding.lower()


def _recall(path: Path) -> Remembered:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Remembered)
    except (OSError, msgspec.DecodeError):
        return Remembered()
