"""The front ends' side of the engine: starts the process, asks it, and survives its death.

One request runs at a time; further ones wait their turn, so that several sessions can share one
loaded model; reading a prompt before it is sent gives way to all others. Every method may be called
from any thread. Knows nothing about torch, backends' insides or screens, and imports none of them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from w2c_tui.backends.base import Event, ModelInfo, Prefill, Report
from w2c_tui.core.config import DeviceShare, ExportSpec, GenerationParams, LoadSpec, checked
from w2c_tui.core.conversation import Attachment, Hints, Message, TextLine
from w2c_tui.core.errors import EngineCrashedError, EngineError, StoreError, error_named
from w2c_tui.engine import wire
from w2c_tui.export.outcome import Exported

_LOG_LIMIT_BYTES = 5_000_000
_CLOSE_WAIT_S = 3.0


class EngineClient:
    """A handle on one engine process, started when first needed and again after a crash."""

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        self.model: ModelInfo | None = None
        self._process: _Process | None = None
        self._turn = threading.Lock()
        self._numbers = iter(range(1, sys.maxsize))
        self._current: int | None = None
        self._num_pressing = 0
        """Requests that wait or run, but for those that give way."""
        self._counting = threading.Lock()

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The engine's process id while it is alive."""
        process = self._process
        return process.popen.pid if process is not None and process.alive else None

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded in a living process; after a crash there is none."""
        return self.pid is not None and self.model is not None

    def load(
        self, spec: LoadSpec, report: Report | None = None, *, pictures_soon: bool = False
    ) -> ModelInfo:
        """Load a model, starting the process if need be; `report` hears of the progress.

        `pictures_soon`: a user is about to look for one, so that text recognition, if the model
        wants it, is made ready meanwhile.
        """
        spec = checked(spec)
        self.model = None
        done = self._ask(lambda number: wire.Load(number, spec, pictures_soon), report)
        assert done.info is not None
        self.model = done.info
        return done.info

    def stream(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        ahead: int = 0,
        until: str = "",
    ) -> Iterator[Event]:
        """The answer's events, ending with `Finished`. Leaving the iterator cancels the answer.

        `ahead`: how many requests for the same with the next seeds will follow; `until`: the text
        that ends it. See `Backend.stream`.
        """
        params = checked(params)
        replies = self._exchange(
            lambda number: wire.Stream(number, tuple(messages), params, ahead, until)
        )
        with contextlib.closing(replies):
            for reply in replies:
                if isinstance(reply, wire.Emitted):
                    yield reply.event

    def prefill(self, messages: Sequence[Message], params: GenerationParams) -> Iterator[Prefill]:
        """Have the model read what may be sent soon, see `Backend.prefill`; progress on the way.

        It gives way to any other request, and does not begin while there is one.
        """
        params = checked(params)
        if self._num_pressing:
            return
        replies = self._exchange(
            lambda number: wire.Prefill(number, tuple(messages), params), gives_way=True
        )
        with contextlib.closing(replies):
            for reply in replies:
                if isinstance(reply, wire.Emitted) and isinstance(reply.event, Prefill):
                    yield reply.event
                if self._num_pressing:
                    return

    def read_text(self, image: Attachment, hints: Hints = "text") -> tuple[TextLine, ...]:
        """The lines of text on a screenshot, by text recognition in the engine process.

        `hints`: with the colours of each line, or with the areas on which they lie, too.
        """
        done = self._ask(lambda number: wire.ReadText(number, image, hints))
        return done.lines or ()

    def plan(self, spec: LoadSpec, report: Report | None = None) -> tuple[DeviceShare, ...]:
        """What each device would hold of the model; empty where only loading it would tell."""
        spec = checked(spec)
        return self._ask(lambda number: wire.Plan(number, spec), report).shares or ()

    def convert(self, source: str, out: Path, report: Report | None = None) -> None:
        """Write the model `source` as a standard folder at `out`, which must not exist."""
        self._ask(lambda number: wire.Convert(number, source, str(out)), report)

    def export(
        self,
        source: str,
        out: Path,
        spec: ExportSpec,
        report: Report | None = None,
        *,
        name: str = "",
        force: bool = False,
    ) -> Exported:
        """Write the model `source` as GGUF files into the folder `out`.

        `name`: first part of the files' names, the model's own if empty. `force`: replace files.
        """
        spec = checked(spec)
        done = self._ask(
            lambda number: wire.Export(number, source, str(out), name, force, spec), report
        )
        assert done.exported is not None
        return done.exported

    def cancel(self) -> None:
        """End the running request, if any; it finishes with reason "cancelled"."""
        current, process = self._current, self._process
        if current is not None and process is not None:
            with contextlib.suppress(OSError, ValueError):
                process.send(wire.Cancel(current))

    def unload(self) -> None:
        """Give the model's memory back to the system, by ending the process."""
        with self._counted(), self._turn:
            self.model = None
            self._stop()

    def close(self) -> None:
        """End the engine process, whatever it does."""
        self.model = None
        self._stop()

    # --- one request -----------------------------------------------------------------------------

    def _ask(self, make: Callable[[int], wire.Request], report: Report | None = None) -> wire.Done:
        for reply in self._exchange(make):
            if isinstance(reply, wire.Progress) and report is not None:
                report(reply.phase, reply.done, reply.total)
            elif isinstance(reply, wire.Done):
                return reply
        raise AssertionError("an exchange ends with Done or an error")

    def _exchange(
        self, make: Callable[[int], wire.Request], *, gives_way: bool = False
    ) -> Generator[wire.Reply, None, None]:
        with contextlib.nullcontext() if gives_way else self._counted(), self._turn:
            process = self._started()
            number = self._current = next(self._numbers)
            finished = False
            try:
                try:
                    process.send(make(number))
                except (OSError, ValueError):
                    raise self._crash(process) from None
                while not finished:
                    reply = process.receive()
                    if reply is None:
                        finished = True
                        raise self._crash(process)
                    if reply.request != number:
                        continue
                    finished = isinstance(reply, wire.Done | wire.Failed)
                    if isinstance(reply, wire.Failed):
                        raise error_named(reply.error, reply.message, reply.hint)
                    yield reply
            finally:
                if not finished and process.alive:
                    self._abandon(process, number)
                self._current = None

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """While another request waits or runs, see `prefill`."""
        with self._counting:
            self._num_pressing += 1
        try:
            yield
        finally:
            with self._counting:
                self._num_pressing -= 1

    def _abandon(self, process: _Process, number: int) -> None:
        """Cancel a request whose reader went away, and wait until the engine is free again."""
        with contextlib.suppress(OSError, ValueError):
            process.send(wire.Cancel(number))
            while (reply := process.receive()) is not None:
                if reply.request == number and isinstance(reply, wire.Done | wire.Failed):
                    return

    # --- the process -----------------------------------------------------------------------------

    def _started(self) -> _Process:
        if self._process is None or not self._process.alive:
            self.model = None
            self._stop()
            self._process = _Process(self.log_path)
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def _crash(self, process: _Process) -> EngineError:
        self.model = None
        code = process.popen.wait()
        reason = _death(code, process.out_of_memory_kills())
        hint = "Load the model again to go on; the conversation is kept."
        if code in (-signal.SIGTERM, 0):
            return EngineError("The engine was stopped.", hint=hint)
        if code == -signal.SIGILL:
            hint += (
                " Was llama-cpp-python compiled on another machine? Then install the same version "
                "of it again, with pip install --force-reinstall --no-deps --no-cache-dir."
            )
        return EngineCrashedError(reason, hint=f"{hint} Details: {self.log_path}")


class _Process:
    """The child, its two pipes and the thread that reads from it."""

    def __init__(self, log_path: Path) -> None:
        self._kills_before = _oom_kills()
        self._log = _open_log(log_path)
        # -P: the current folder is not searched for modules, as it may hold anything.
        command = [sys.executable, "-P", "-m", "w2c_tui.engine.child"]
        # Apart from the terminal's group, so that Ctrl-C reaches the front end alone.
        own_group: dict[str, Any] = (
            {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        try:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                # Threads that wait spin a tenth of what libgomp lets them: spinning for long makes
                # a busy machine many times slower, sleeping at once a quiet one nearly twice.
                env={"GOMP_SPINCOUNT": "30000", **os.environ, "PYTHONUNBUFFERED": "1"},
                **own_group,
            )
        except OSError as error:
            self._log.close()
            raise EngineError(f"The engine process cannot be started: {error}") from error
        self._writing = threading.Lock()
        self._replies: queue.SimpleQueue[wire.Reply | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._finalizer = weakref.finalize(self, _kill, self.popen)

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def send(self, request: wire.Request) -> None:
        with self._writing:
            assert self.popen.stdin is not None
            wire.write_frame(self.popen.stdin, request)  # type: ignore[arg-type]

    def receive(self) -> wire.Reply | None:
        """The next reply; None once the process is gone."""
        while True:
            # Waiting without a limit could not be interrupted from the keyboard on Windows.
            with contextlib.suppress(queue.Empty):
                reply = self._replies.get(timeout=0.5)
                if reply is None:
                    self._replies.put(None)
                return reply

    def _read(self) -> None:
        assert self.popen.stdout is not None
        pipe: BinaryIO = self.popen.stdout  # type: ignore[assignment]
        with contextlib.suppress(OSError, ValueError):
            while (reply := wire.read_frame(pipe, wire.reply_decoder)) is not None:
                self._replies.put(reply)
        self._replies.put(None)

    def out_of_memory_kills(self) -> int:
        """How often the kernel killed for memory in this control group since the start."""
        return _oom_kills() - self._kills_before

    def stop(self) -> None:
        # With its standard input closed the child ends at once, whatever it is computing.
        with contextlib.suppress(OSError, ValueError), self._writing:
            assert self.popen.stdin is not None
            self.popen.stdin.close()
        try:
            self.popen.wait(_CLOSE_WAIT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self._reader.join(_CLOSE_WAIT_S)
        for pipe in (self.popen.stdout, self._log):
            with contextlib.suppress(OSError, ValueError):
                assert pipe is not None
                pipe.close()
        self._finalizer.detach()


def _kill(popen: subprocess.Popen[bytes]) -> None:
    if popen.poll() is None:
        popen.kill()
        popen.wait()


def _open_log(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        full = path.exists() and path.stat().st_size > _LOG_LIMIT_BYTES
        return path.open("wb" if full else "ab", buffering=0)
    except OSError as error:
        raise StoreError(
            f"The log file {path} cannot be written: {error.strerror}.",
            hint="Free disk space, or set W2C_DATA_DIR to a folder that you may write to.",
        ) from error


def _oom_kills() -> int:
    """The out-of-memory kills that Linux counted in our control group, 0 where unknown."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":")[2]
        events = Path(f"/sys/fs/cgroup{group}/memory.events").read_text().split()
        return int(events[events.index("oom_kill") + 1])
    return 0


def _death(code: int, oom_kills: int) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        if oom_kills:
            return "The engine ran out of memory and was killed by the system."
        return "The engine was killed (signal 9); most often that means it ran out of memory."
    if code < 0:
        names = {
            signal.SIGSEGV: "a segmentation fault",
            signal.SIGABRT: "an abort in native code",
            signal.SIGILL: "an instruction that this CPU does not know",
        }
        try:
            name = names.get(signal.Signals(-code), signal.Signals(-code).name)
        except ValueError:
            name = f"signal {-code}"
        return f"The engine crashed: {name}."
    return f"The engine ended unexpectedly with exit code {code}."
