"""The engine process: owns one backend and its model, and does one request after another.

Started by `EngineClient` as `python -m w2c_tui.engine.child`; it ends when its standard input
does, so that it never outlives its front end. What native code prints goes to the log file that
the client gave it as standard error. Knows nothing about screens, sessions or settings.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import BinaryIO

import msgspec

from w2c_tui.backends.base import Backend, ModelInfo, Report
from w2c_tui.backends.choice import choose_backend
from w2c_tui.core.config import LoadSpec
from w2c_tui.core.errors import EngineError, W2CError
from w2c_tui.core.locate import bundled_folder, display_name
from w2c_tui.core.page_text import recognises_text
from w2c_tui.engine import wire
from w2c_tui.export.outcome import Exported


def main() -> None:
    """Serve requests from standard input until it closes."""
    requests, replies = _take_over_pipes()
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _offer_self_to_oom_killer()
    _quiet_libraries()
    Engine(requests, replies).serve()


class Engine:
    """One backend, one queue of requests, one writer."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests = requests
        self._replies = replies
        self._waiting: queue.SimpleQueue[wire.Request] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._backend: Backend | None = None

    def serve(self) -> None:
        threading.Thread(target=self._read_requests, daemon=True).start()
        while True:
            request = self._waiting.get()
            try:
                self._reply(self._answer(request))
            except W2CError as error:
                traceback.print_exc()
                self._reply_failure(request, error)
            except Exception as error:  # noqa: BLE001 - a defect must not end the process
                traceback.print_exc()
                failure = EngineError(
                    f"{type(error).__name__}: {error}",
                    hint="This is a defect of w2c-tui; the engine's log has the details.",
                )
                self._reply_failure(request, failure)
            self._cancelled.discard(request.request)

    def _read_requests(self) -> None:
        status = 1
        try:
            while (request := wire.read_frame(self._requests, wire.request_decoder)) is not None:
                if isinstance(request, wire.Cancel):
                    self._cancelled.add(request.request)
                else:
                    self._waiting.put(request)
            status = 0
        finally:
            # The front end is gone, or would wait for ever, as when this thread ran out of memory.
            # A native call may be running, so do not wait for anything.
            os._exit(status)

    def _answer(self, request: wire.Request) -> wire.Reply:
        ident = request.request
        match request:
            case wire.Load():
                return wire.Done(ident, info=self._load(request))
            case wire.Stream():
                if self._backend is None:
                    raise EngineError("No model is loaded.", hint="Load one first.")
                stream = self._backend.stream(
                    request.messages,
                    request.params,
                    lambda: ident in self._cancelled,
                    request.ahead,
                    request.until,
                )
                for event in stream:
                    self._reply(wire.Emitted(ident, event))
            case wire.Prefill():
                if self._backend is None:
                    raise EngineError("No model is loaded.", hint="Load one first.")
                steps = self._backend.prefill(
                    request.messages, request.params, lambda: ident in self._cancelled
                )
                for step in steps:
                    self._reply(wire.Emitted(ident, step))
            case wire.ReadText():
                from w2c_tui.core.image import open_image
                from w2c_tui.models.page_text import read_hints

                lines = read_hints(open_image(request.image), request.hints)
                return wire.Done(ident, lines=lines)
            case wire.Plan():
                report = self._reporter(ident)
                spec = _with_file(request.spec, report)
                chosen = choose_backend(spec)
                if chosen == "openai":
                    return wire.Done(ident, shares=())
                if chosen == "gguf":
                    from w2c_tui.backends.gguf import plan_placement
                else:
                    from w2c_tui.backends.hf import plan_placement
                shares = plan_placement(spec, report)
                return wire.Done(ident, shares=shares)
            case wire.Convert():
                from w2c_tui.core.config import paths
                from w2c_tui.core.locate import locate
                from w2c_tui.models.checkpoint import convert

                report = self._reporter(ident)
                source = locate(request.source, paths().models, report)
                convert(source, request.out, report, cache_dir=paths().models)
            case wire.Export():
                return wire.Done(ident, exported=self._export(request))
        return wire.Done(ident)

    def _export(self, request: wire.Export) -> Exported:
        from w2c_tui.core.config import paths
        from w2c_tui.core.locate import locate
        from w2c_tui.export.gguf_export import export

        report = self._reporter(request.request)
        source = locate(request.source, paths().models, report)
        return export(
            source,
            Path(request.out),
            request.spec,
            report,
            name=request.name,
            force=request.force,
            cache_dir=paths().models,
        )

    def _load(self, request: wire.Load) -> ModelInfo:
        self._unload()
        report = self._reporter(request.request)
        spec = _with_file(request.spec, report)
        backend = _backend(spec)
        info = backend.load(spec, report)
        self._backend = backend
        if request.pictures_soon and info.hints != "none" and recognises_text():
            threading.Thread(target=_prepare_recognition, daemon=True).start()
        if spec is request.spec:
            return info
        return msgspec.structs.replace(info, name=display_name(request.spec.name))

    def _reporter(self, ident: int) -> Report:
        """Progress for request `ident`; raises EngineError once it is cancelled."""
        last = ("", 0.0)

        def report(phase: str, done: int, total: int) -> None:
            if ident in self._cancelled:
                raise EngineError("The work was cancelled.")
            # Every tensor reports; nobody needs to see more than ten of them in a second.
            nonlocal last
            now = time.monotonic()
            if phase != last[0] or now - last[1] > 0.1 or done == total:
                last = (phase, now)
                self._reply(wire.Progress(ident, phase, done, total))

        return report

    def _unload(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    def _reply_failure(self, request: wire.Request, error: W2CError) -> None:
        name = type(error).__name__
        self._reply(wire.Failed(request.request, name, error.message, error.hint))

    def _reply(self, reply: wire.Reply) -> None:
        try:
            wire.write_frame(self._replies, reply)
        except OSError:
            os._exit(0)


def _prepare_recognition() -> None:
    """For a model that wants to be told what is on its pictures: the first one comes soon."""
    from w2c_tui.models.page_text import prepare

    with contextlib.suppress(W2CError):
        prepare()


def _with_file(spec: LoadSpec, report: Report) -> LoadSpec:
    """`spec` with a GGUF file in place of a bundled model, made on first use, where one is run."""
    from w2c_tui.core.config import paths

    folder = bundled_folder(spec.name)
    if folder is None or choose_backend(spec) != "gguf":
        return spec
    from w2c_tui.export.bundled import gguf_of

    path = gguf_of(folder, paths().models, report)
    return msgspec.structs.replace(spec, name=str(path))


def _backend(spec: LoadSpec) -> Backend:
    chosen = choose_backend(spec)
    if chosen == "gguf":
        from w2c_tui.backends.gguf import GGUFBackend

        return GGUFBackend()
    if chosen == "openai":
        from w2c_tui.backends.openai import OpenAIBackend

        return OpenAIBackend()
    from w2c_tui.backends.hf import HFBackend

    return HFBackend()


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Private handles for the two pipes; descriptors 0 and 1 become harmless for libraries."""
    requests, replies = os.dup(0), os.dup(1)
    if sys.platform == "win32":
        import msvcrt

        for descriptor in (requests, replies):
            msvcrt.setmode(descriptor, os.O_BINARY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", buffering=0), write_through=True)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _offer_self_to_oom_killer() -> None:
    """On Linux: when memory runs out, lose this process and not the interface or the desktop."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def _quiet_libraries() -> None:
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    native = logging.getLogger("llama.cpp")
    native.addHandler(logging.StreamHandler())
    native.setLevel(logging.INFO)
    warnings.simplefilter("default")


if __name__ == "__main__":
    main()
