"""The OpenAI backend: the common contract on a real server, and how it meets failing ones."""

from __future__ import annotations

import base64
import collections
import contextlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx2
import msgspec
import pytest
from PIL import Image

pytest.importorskip("sse_starlette", reason="llama-cpp-python[server] is not installed")

from tests.backends.contract import (
    GREEDY,
    BackendContract,
    events,
    finish,
    picture,
    stats,
    text_of,
    user,
)
from tests.backends.gguf_files import save_mmproj, save_text_model
from tests.backends.openai_server import Server, hang_up, refusal, stream
from w2c_tui.backends.base import Text, Trimmed
from w2c_tui.backends.openai import OpenAIBackend
from w2c_tui.core.config import GenerationParams, LoadSpec
from w2c_tui.core.conversation import Message, TextLine
from w2c_tui.core.errors import (
    ConfigError,
    ContextOverflowError,
    EngineError,
    ModelNotFoundError,
    PromptError,
)
from w2c_tui.core.image import attachment_from_bytes

_connected: list[OpenAIBackend] = []


def connect(url: str, **changes) -> OpenAIBackend:
    backend = OpenAIBackend()
    backend.load(LoadSpec(base_url=url, **changes), lambda *_: None)
    _connected.append(backend)
    return backend


@pytest.fixture(scope="module", autouse=True)
def hang_up_in_the_end():
    yield
    for backend in _connected:
        backend.close()


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of llama-cpp-python's own server on a small model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.llama_library", "--port", str(port), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx2.TransportError):
                httpx2.get(f"{url}/v1/models", timeout=2)
                break
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


COMMON = ("--n_threads", "1", "--n_threads_batch", "1", "--n_ctx", "2048", "--model_alias", "tiny")


@pytest.fixture(scope="module")
def text_url(tiny_llama, tmp_path_factory):
    model = save_text_model(tiny_llama, tmp_path_factory.mktemp("text"))
    with served("--model", str(model), *COMMON) as url:
        yield url


@pytest.fixture(scope="module")
def vision_url(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    save_mmproj(folder / "mmproj.gguf", 64)
    model = save_text_model(tiny_llama, folder)
    vision = ("--clip_model_path", str(folder / "mmproj.gguf"), "--chat_format", "llava-1-5")
    with served("--model", str(model), *vision, *COMMON) as url:
        yield url


class TestContract(BackendContract):
    @pytest.fixture(scope="class")
    def fresh(self, text_url, vision_url):
        return lambda kind: connect(vision_url if kind == "vision" else text_url)

    @pytest.fixture(scope="class")
    def vision(self, fresh):
        return fresh("vision")

    @pytest.fixture(scope="class")
    def text(self, fresh):
        return fresh("text")

    # What these ask is the server's business: its tokenizer counts, its cache reuses, and
    # llama-cpp-python's server neither tells of it nor goes on inside an answer.
    test_events_come_in_order_and_the_statistics_are_true = None
    test_length_limit_and_its_reason = None
    test_only_the_first_difference_onward_is_computed = None
    test_an_unfinished_answer_is_continued = None
    # It is asked for whole answers only, see below.
    test_what_was_read_ahead_is_not_read_again = None
    test_reading_ahead_ends_when_it_is_told_to = None
    # It may answer before it was asked often enough; a silent server is below.
    test_cancel_while_reading_the_prompt = None
    test_special_strings_go_through_prompt_and_history_unharmed = None
    test_a_text_model_says_that_it_reads_no_images = None
    test_a_text_model_reads_the_page_text = None


def test_the_statistics_are_what_can_be_known_here(text_url):
    found = events(connect(text_url), [user("Write")])
    measured = stats(found)
    assert measured.new_tokens == sum(isinstance(event, Text) for event in found) <= 24
    assert 0 < measured.time_to_first_token_s <= measured.total_s


def test_the_context_is_learnt_from_the_servers_refusal(text_url):
    backend = connect(text_url)
    messages = [user("Turn 0")]
    for turn in range(12):
        messages += [Message("assistant", "word " * 120), user(f"Turn {turn + 1}")]
    trimmed = [e for e in events(backend, messages) if isinstance(e, Trimmed)]
    assert [event.context_length for event in trimmed] == [2048]


# --- servers that do as a test says --------------------------------------------------------------

OK = stream("<p>", "Hi", "</p>")


def test_connection_loss_and_overload_are_retried_before_the_first_token():
    with Server(hang_up, refusal(503, "loading"), OK) as server:
        found = events(connect(server.url), [user("Code?")])
    assert text_of(found) == "<p>Hi</p>"
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


def test_nothing_is_retried_after_the_first_token():
    with Server(stream("<p>", finish=None), OK) as server:
        backend = connect(server.url)
        found: list = []
        answer = backend.stream([user("Code?")], GREEDY, lambda: False)
        with pytest.raises(EngineError, match="broke off"):
            collections.deque(map(found.append, answer))
        assert text_of(found) == "<p>"
        assert len(server.requests) == 1
        assert text_of(events(backend, [user("Code?")])) == "<p>Hi</p>"


def test_a_server_that_is_gone_is_named():
    with Server(OK) as server:
        url = server.url
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"127\.0\.0\.1"):
        connect(url)
    assert time.monotonic() - began < 20


def test_loading_can_be_cancelled_while_the_server_is_out_of_reach():
    with Server(OK) as server:
        url = server.url
    began = time.monotonic()

    def cancelled(*_: object) -> None:
        if time.monotonic() - began > 0.3:
            raise EngineError("The work was cancelled.")

    with pytest.raises(EngineError, match="cancelled"):
        OpenAIBackend().load(LoadSpec(backend="openai", base_url=url), cancelled)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("pieces", [(30.0,), ("<p>", 30.0)])
def test_a_silent_server_can_be_cancelled_at_once(pieces):
    with Server(stream(*pieces), OK) as server:
        backend = connect(server.url)
        stop = threading.Event()
        timer = threading.Timer(0.4, stop.set)
        timer.start()
        began = time.monotonic()
        found = events(backend, [user("Code?")], cancelled=stop.is_set)
        assert time.monotonic() - began < 10
        assert finish(found).reason == "cancelled"
        assert text_of(events(backend, [user("Code?")])) == "<p>Hi</p>"


def test_usage_and_reasons_come_from_the_server():
    usage = {
        "prompt_tokens": 700,
        "completion_tokens": 9,
        "total_tokens": 709,
        "prompt_tokens_details": {"cached_tokens": 600},
    }
    with Server(stream("a", "b", finish="length", usage=usage)) as server:
        found = events(connect(server.url), [user("Code?")])
    assert finish(found).reason == "length"
    measured = stats(found)
    assert (measured.prompt_tokens, measured.reused_tokens, measured.new_tokens) == (700, 600, 9)


def test_a_server_is_not_asked_before_the_user_sends():
    with Server(stream("a")) as server:
        backend = connect(server.url)
        assert list(backend.prefill([user("Code?")], GREEDY, lambda: False)) == []
        assert server.requests == []


def test_parameters_and_pictures_go_over_the_wire():
    photo = io.BytesIO()
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010F] = "a camera"
    image.save(photo, "JPEG", exif=exif)
    attachment = attachment_from_bytes(photo.getvalue(), name="photo.jpg")
    params = GenerationParams(
        temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.1, seed=3, stop=("</html>",),
        max_new_tokens=50,
    )  # fmt: skip
    messages = [
        Message("system", "Be brief"),
        user("Code?", attachment),
        Message("assistant", "<html>"),
    ]
    with Server(OK) as server:
        events(connect(server.url), messages, params)
    (request,) = server.requests
    sent = {key: request[key] for key in ("temperature", "top_p", "top_k", "seed", "max_tokens")}
    assert sent == {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "max_tokens": 50}
    assert request["repeat_penalty"] == request["repetition_penalty"] == 1.1
    assert request["stop"] == ["</html>"]
    assert request["continue_final_message"] is True
    system, question, answer = request["messages"]
    assert system == {"role": "system", "content": "Be brief"}
    assert answer == {"role": "assistant", "content": "<html>"}
    shown, text = question["content"]
    assert text == {"type": "text", "text": "Code?"}
    head, _, data = shown["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    seen = Image.open(io.BytesIO(base64.b64decode(data)))
    assert seen.size == (20, 40)
    assert b"a camera" not in base64.b64decode(data)


def test_the_page_text_goes_with_the_question_and_a_text_model_gets_only_that():
    image = picture("red")
    read = msgspec.structs.replace(image, page_text=(TextLine("Shop", (1, 2, 3, 4)),))
    with Server(OK, models=({"id": "m", "capabilities": ["completion"]},)) as server:
        backend = connect(server.url)
        events(backend, [user("Code?", read)])
        with pytest.raises(PromptError, match="reads no images"):
            events(backend, [user("Code?", image)])
    (request,) = server.requests
    (message,) = request["messages"]
    assert "Shop" in message["content"]
    assert message["content"].endswith("Code?")


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (refusal(401, "Incorrect API key provided: sk-secret"), ConfigError, "refused the key"),
        (refusal(404, "no such route"), ConfigError, "no such route"),
        (refusal(400, "at most 1 image may be provided"), PromptError, "at most 1 image"),
        (refusal(500, "out of memory"), EngineError, "out of memory"),
        (
            refusal(400, "This model's maximum context length is 4096 tokens. However, ..."),
            ContextOverflowError,
            "4096",
        ),
        (
            refusal(400, "the request exceeds the available context size (4096 tokens)"),
            ContextOverflowError,
            "4096",
        ),
        (stream(finish=None), EngineError, "before it began"),
    ],
)
def test_refusals_say_what_was_wrong_and_never_the_key(reply, error, words, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server(reply) as server:
        backend = connect(server.url)
        with pytest.raises(error, match=words) as caught:
            events(backend, [user("Code?")])
        assert server.keys[-1] == "Bearer sk-secret"
    assert caught.value.hint
    shown: BaseException | None = caught.value
    while shown is not None:
        assert "sk-secret" not in str(shown)
        shown = None if shown.__suppress_context__ else shown.__context__


def test_the_model_is_the_one_named_or_the_only_one():
    two = ({"id": "a", "max_model_len": 4096}, {"id": "b"})
    with Server(OK, models=two) as server:
        info = connect(server.url, name="a")._info
        assert (info.name, info.context_length) == ("a", 4096)
        for name in (LoadSpec().name, "c"):
            with pytest.raises(ModelNotFoundError) as caught:
                connect(server.url, name=name)
            assert "a, b" in caught.value.hint
    with Server(OK) as server:
        assert connect(server.url)._info.name == "m"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/", "http://me:secret@host/v1"])
def test_an_address_that_is_none_is_refused_without_a_password_in_the_message(url):
    with pytest.raises(ConfigError) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_it_says_when_text_and_pictures_leave_the_machine():
    from w2c_tui.core.reference import is_this_machine

    for host in ("localhost", "127.0.0.1", "::1", "app.localhost"):
        assert is_this_machine(host)
    for host in ("example.org", "10.0.0.4", "192.168.1.2", "localhost.example.org", "2001:db8::1"):
        assert not is_this_machine(host)
    with Server(OK) as server:
        assert connect(server.url)._info.sends_to == ""


@pytest.mark.parametrize("status", [301, 307, 308])
def test_nothing_is_sent_to_where_a_server_redirects(status):
    def elsewhere(handler, _: dict) -> None:
        handler.send_response(status)
        handler.send_header("Location", other.url + "/chat/completions")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with Server(OK) as other, Server(elsewhere) as server:
        with pytest.raises(ConfigError, match="was not followed") as caught:
            events(connect(server.url), [user("Code?", picture("red"))])
        assert other.url in caught.value.message
        assert other.requests == []
        assert len(server.requests) == 1
