"""The engine process and its client, with real models in a real child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from tests.backends.contract import GREEDY, picture, text_of, user
from tests.tiny import save_llama
from w2c_tui.backends.base import Finished, Prefill, Text
from w2c_tui.core.config import GenerationParams, LoadSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import (
    ConfigError,
    EngineCrashedError,
    EngineError,
    ModelNotFoundError,
    PromptError,
)
from w2c_tui.engine.client import EngineClient


@pytest.fixture
def engine(own_folders):
    with EngineClient(own_folders / "engine.log") as client:
        yield client


@pytest.fixture(scope="module")
def slow_llama(tmp_path_factory):
    """Large enough that 3,000 tokens of prompt take seconds on one thread."""
    return save_llama(
        tmp_path_factory.mktemp("models") / "slow-llama",
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=8192,
    )


def spec(folder) -> LoadSpec:
    return LoadSpec(name=str(folder), dtype="float32", device_map="cpu", threads=1)


def gone(pid: int, within_s: float = 20.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


class Since:
    """What an engine has done since this was made.

    Its own computing is what is held to a limit, as a busy machine does not lengthen it; the clock
    has a loose one, for an engine that waits instead.
    """

    def __init__(self, engine: EngineClient) -> None:
        self.process = psutil.Process(engine.pid)
        self.computed, self.began = self._computed(), time.monotonic()

    def _computed(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def is_within(self, seconds: float) -> bool:
        waited = time.monotonic() - self.began
        return self._computed() - self.computed < seconds and waited < 20 * seconds


def test_load_reports_progress_and_stream_answers(engine, tiny_llava):
    phases = []
    info = engine.load(spec(tiny_llava), lambda *progress: phases.append(progress))
    assert info.reads_images
    assert engine.model == info
    assert ("Loading weights", phases[-1][2], phases[-1][2]) == phases[-1]
    found = list(engine.stream([user("Code?", picture("red"))], GREEDY))
    assert isinstance(found[0], Prefill)
    assert isinstance(found[-1], Finished)
    assert text_of(found)


def test_the_process_answers_as_the_backend_does(engine, tiny_llama):
    from tests.backends.test_hf import load

    engine.load(spec(tiny_llama))
    messages = [user("<s>Prices</s> für 🎉")]
    expected = text_of(list(load(tiny_llama).stream(messages, GREEDY, lambda: False)))
    assert text_of(list(engine.stream(messages, GREEDY))) == expected


def test_errors_cross_the_process_with_class_message_and_hint(engine, tiny_llama, tmp_path):
    with pytest.raises(EngineError, match="No model is loaded"):
        list(engine.stream([user("Hi")], GREEDY))
    with pytest.raises(ModelNotFoundError, match="no-such") as caught:
        engine.load(spec(tmp_path / "no-such"))
    assert caught.value.hint
    engine.load(spec(tiny_llama))
    with pytest.raises(PromptError, match="reads text only"):
        list(engine.stream([user("Hi", picture("red"))], GREEDY))
    assert text_of(list(engine.stream([user("Hi")], GREEDY)))


def test_wrong_parameters_are_refused_before_they_are_sent(engine):
    with pytest.raises(ConfigError, match="temperature"):
        list(engine.stream([user("Hi")], GenerationParams(temperature=-1)))
    assert engine.pid is None


def test_cancel_ends_a_long_prompt_within_half_a_second(engine, slow_llama):
    engine.load(spec(slow_llama))
    messages = [user("word " * 1500)]
    stream = engine.stream(messages, GREEDY)
    assert isinstance(next(stream), Prefill)
    time.sleep(0.3)
    cancelled = Since(engine)
    engine.cancel()
    found = list(stream)
    assert cancelled.is_within(0.5)
    assert found[-1].reason == "cancelled"
    assert not text_of(found)
    done = [event.done for event in found if isinstance(event, Prefill)]
    assert not done or done[-1] < found[-1].stats.prompt_tokens


def test_cancel_ends_writing_within_half_a_second_and_keeps_what_came(engine, slow_llama):
    engine.load(spec(slow_llama))
    params = GenerationParams(temperature=1.0, max_new_tokens=5000, seed=1)
    found = []
    for event in engine.stream([user("Write")], params):
        found.append(event)
        if sum(isinstance(e, Text) for e in found) == 5:
            cancelled = Since(engine)
            engine.cancel()
    assert cancelled.is_within(0.5)
    assert found[-1].reason == "cancelled"
    assert text_of(found)


def test_leaving_a_stream_cancels_it_and_frees_the_engine(engine, slow_llama):
    engine.load(spec(slow_llama))
    params = GenerationParams(temperature=1.0, max_new_tokens=8000)
    stream = engine.stream([user("Write")], params)
    assert isinstance(next(stream), Prefill)
    cancelled = Since(engine)
    stream.close()
    assert cancelled.is_within(1.0)
    short = GenerationParams(temperature=0, max_new_tokens=3)
    assert list(engine.stream([user("Hi")], short))[-1].stats.new_tokens <= 3


def test_what_is_read_ahead_gives_way_and_stays_read(engine, slow_llama):
    engine.load(spec(slow_llama))
    long = [user("word " * 500)]
    steps: list[Prefill] = []
    some = threading.Event()

    def read_ahead() -> None:
        for step in engine.prefill(long, GREEDY):
            steps.append(step)
            if len(steps) > 1:
                some.set()

    thread = threading.Thread(target=read_ahead)
    thread.start()
    assert some.wait(60)
    found = list(engine.stream(long, GenerationParams(temperature=0, max_new_tokens=3)))
    thread.join(20)
    assert not thread.is_alive()
    assert steps[-1].done < steps[-1].total
    first = next(event for event in found if isinstance(event, Prefill))
    assert steps[-1].done <= first.done < first.total


def test_nothing_is_read_ahead_while_the_engine_works(engine, tiny_llama):
    engine.load(spec(tiny_llama))
    stream = engine.stream([user("Write")], GREEDY)
    next(stream)
    assert list(engine.prefill([user("Hi")], GREEDY)) == []
    stream.close()
    assert list(engine.prefill([user("Hi")], GREEDY))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [
        (signal.SIGKILL, "memory", "Load the model again"),
        (signal.SIGSEGV, "segmentation fault", "Load the model again"),
        (signal.SIGILL, "this CPU does not know", "--no-cache-dir"),
    ],
)
def test_a_killed_engine_is_an_error_that_names_the_cause_and_can_be_replaced(
    engine, slow_llama, tiny_llama, number, cause, remedy
):
    engine.load(spec(slow_llama))
    params = GenerationParams(temperature=1.0, max_new_tokens=5000)
    stream = engine.stream([user("Write")], params)
    while not isinstance(next(stream), Text):
        pass
    os.kill(engine.pid, number)
    with pytest.raises(EngineCrashedError, match=cause) as caught:
        list(stream)
    assert str(engine.log_path) in caught.value.hint
    assert remedy in caught.value.hint
    assert engine.model is None
    engine.load(spec(tiny_llama))
    assert text_of(list(engine.stream([user("Hi")], GREEDY)))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_engine_that_died_while_idle_is_noticed_by_the_next_request(engine, tiny_llama):
    engine.load(spec(tiny_llama))
    pid = engine.pid
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    with pytest.raises(EngineError):
        list(engine.stream([user("Hi")], GREEDY))
    assert engine.model is None
    engine.load(spec(tiny_llama))
    assert text_of(list(engine.stream([user("Hi")], GREEDY)))


def test_running_out_of_memory_never_hangs_and_is_not_the_end(engine, tiny_llama):
    """A real allocation failure: the address space of the child is limited while it runs."""
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    engine.load(spec(tiny_llama))
    size = psutil.Process(engine.pid).memory_info().vms
    resource.prlimit(engine.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    outcomes = []
    for _ in range(3):
        try:
            outcomes.append(text_of(list(engine.stream([user("word " * 240)], GREEDY))))
        except EngineError as error:
            outcomes.append(error)
            break
    # Whatever the allocator still had, nobody waited for ever and the next engine works.
    assert all(outcomes)
    if engine.pid is not None:
        resource.prlimit(engine.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    engine.load(spec(tiny_llama))
    assert text_of(list(engine.stream([user("Hi")], GREEDY)))


def test_unload_gives_the_memory_back(engine, tiny_llama):
    engine.load(spec(tiny_llama))
    pid = engine.pid
    engine.unload()
    assert engine.model is None
    assert gone(pid)
    engine.load(spec(tiny_llama))
    assert engine.pid != pid


def test_close_ends_the_process_in_the_middle_of_its_work(own_folders, slow_llama):
    engine = EngineClient(own_folders / "engine.log")
    engine.load(spec(slow_llama))
    pid = engine.pid
    stream = engine.stream([user("word " * 1500)], GREEDY)
    next(stream)
    began = time.monotonic()
    engine.close()
    assert gone(pid)
    assert time.monotonic() - began < 15
    with pytest.raises(EngineError):
        list(stream)


def test_two_threads_share_one_model(engine, tiny_llama):
    engine.load(spec(tiny_llama))
    expected = {n: text_of(list(engine.stream([user(f"Say {n}")], GREEDY))) for n in range(4)}
    got: dict[int, str] = {}

    def ask(number: int) -> None:
        got[number] = text_of(list(engine.stream([user(f"Say {number}")], GREEDY)))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == expected


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_the_engine_ends_when_its_front_end_is_killed(own_folders, tiny_llama):
    script = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from w2c_tui.core.config import LoadSpec
        from w2c_tui.engine.client import EngineClient
        engine = EngineClient(Path({str(own_folders / "engine.log")!r}))
        engine.load(LoadSpec(name={str(tiny_llama)!r}, dtype="float32", device_map="cpu"))
        print(engine.pid, flush=True)
        time.sleep(60)
        """
    )
    front_end = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with front_end:
        pid = int(front_end.stdout.readline())
        front_end.kill()
    assert gone(pid)


def test_what_libraries_print_goes_to_the_log(engine, tiny_llama, capfd):
    engine.load(spec(tiny_llama))
    with pytest.raises(PromptError):
        list(engine.stream([user("Hi", picture("red"))], GREEDY))
    assert capfd.readouterr() == ("", "")
    assert "PromptError" in engine.log_path.read_text()


def test_the_conversation_may_carry_large_images(engine, tiny_llava):
    engine.load(spec(tiny_llava))
    large = picture("red", (2000, 1500))
    messages = [user("Code?", large, picture("blue")), Message("assistant", "x"), user("y")]
    assert text_of(list(engine.stream(messages, GREEDY)))
