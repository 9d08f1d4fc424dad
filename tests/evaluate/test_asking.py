"""How a benchmark asks its model, also after the engine died."""

from __future__ import annotations

import os
import signal
import sys
import threading

import psutil
import pytest

from w2c_tui.core.config import GenerationParams, LoadSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import EngineError
from w2c_tui.engine.client import EngineClient
from w2c_tui.evaluate.asking import Asker


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_process_that_was_started_again_gets_its_model_again(tiny_llama, tmp_path):
    spec = LoadSpec(name=str(tiny_llama), dtype="float32", threads=1)
    question = [Message("user", "Write")]
    params = GenerationParams(temperature=0.0, max_new_tokens=4)
    with EngineClient(tmp_path / "engine.log") as engine:
        asker = Asker(engine, lambda: engine.load(spec), params, threading.Event())
        before = asker.ask(question, 0)
        assert engine.is_ready
        process = psutil.Process(engine.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        # Something else starts the next process, as a second candidate or text recognition does.
        with pytest.raises(EngineError):
            list(engine.stream(question, params))
        with pytest.raises(EngineError, match="model"):
            list(engine.stream(question, params))
        assert engine.pid is not None
        assert not engine.is_ready
        assert asker.ask(question, 0) == before
