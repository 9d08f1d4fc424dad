"""Other people's text on a terminal: answers, refusals of servers, names of files and sessions.

Each command writes it once to pipes and once to a pseudo terminal, and nothing in it may steer.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.backends.openai_server import Server, refusal, stream
from tests.security.terminal import (
    COMMAND,
    EVIL,
    EVIL_NAME,
    Terminal,
    assert_harmless,
    on_terminal,
    piped,
)
from w2c_tui.core.config import paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.store import Store
from w2c_tui.core.versions import Versions, keep_answer
from w2c_tui.machine import find_browser

PAGE = f"<!DOCTYPE html><html><body><p>{EVIL}</p></body></html>"


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def evil_folder(own_folders: Path) -> Path:
    """A folder of that name, with a picture, a page and something broken of that name."""
    folder = own_folders / f"folder {EVIL_NAME}"
    folder.mkdir()
    (folder / f"{EVIL_NAME}.png").write_bytes(png())
    (folder / f"{EVIL_NAME}.html").write_text(PAGE)
    (folder / f"broken {EVIL_NAME}.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    return folder


@pytest.fixture
def session(own_folders: Path) -> str:
    """A session whose title, question, picture, model and page are hostile."""
    with Store.open(paths().sessions) as store:
        session = store.create_session(f"Title {EVIL}").id
        shot = attachment_from_bytes(png(), f"{EVIL_NAME}.png")
        store.add_message(session, Message("user", f"Ask {EVIL}", (shot,)))
        for text in ("One", "Two"):
            answer = store.begin_answer(session, model=f"Model {EVIL}")
            answer.append(f"{text} {EVIL}\n```html\n{PAGE.replace('<p>', f'<p>{text}')}\n```")
            answer.finish()
            keep_answer(store, answer.message_id, paths().pages)
            store.add_message(session, Message("user", "Again"))
    return session


# Each leads to words about what was named: that it is there, written, wrong or unknown.
ABOUT_FILES = (
    ("generate", "{folder}/broken {evil}.png"),
    ("generate", "{folder}", "{folder}", "--out", "{folder}/{evil}.html"),
    ("generate", "{folder}/nothing {evil}"),
    ("generate", "{folder}/{evil}.png", "--out", "{folder}/{evil}.html"),
    ("generate", "{folder}/{evil}.png", "--out", "{folder}/{evil}.html", "--json"),
    ("chat", "--image", "{folder}/broken {evil}.png"),
    ("watch", "{folder}/nothing {evil}"),
    ("watch", "{folder}", "--out", "{folder}/{evil}.html"),
    ("preview", "{folder}/nothing {evil}.html"),
    ("preview", "nothing {evil}"),
    ("render", "{folder}/nothing {evil}.html"),
    ("compare", "{folder}/{evil}.png", "{folder}/nothing {evil}.html"),
    ("compare", "{folder}/broken {evil}.png", "{folder}/{evil}.png"),
    ("evaluate", "compare", "{folder}", "{folder}"),
    ("evaluate", "wcgb", "--images", "{folder}", "--predictions", "{folder}/nothing {evil}"),
    ("models", "info", "{evil}"),
    ("models", "convert", "{folder}", "--out", "{folder}/out"),
    ("models", "pull", "{evil}"),
    ("export-gguf", "{folder}", "--out", "{folder}/out"),
    ("doctor", "--model", "{evil}"),
    ("doctor", "--model", "{evil}", "--json"),
    ("doctor", "--dtype", "{evil}"),
    ("versions", "show", "{folder}"),
    ("versions", "show", "last", "{evil}"),
    ("versions", "list", "{evil}"),
    ("{evil}",),
    ("generate", "--{evil}"),
)


@pytest.mark.parametrize("arguments", ABOUT_FILES, ids=lambda words: "-".join(words[:3])[:40])
def test_names_that_are_asked_for_in_vain(evil_folder: Path, arguments: tuple[str, ...]) -> None:
    named = [a.format(folder=evil_folder, evil=EVIL_NAME) for a in arguments]
    output, status = piped(*named)
    # Many write only that they failed, the others what they were asked about.
    assert output, status
    assert "Traceback" not in output
    assert_harmless(output, terminal=False)
    if sys.platform != "win32":
        shown, _ = on_terminal(*named)
        assert "Traceback" not in shown
        assert_harmless(shown, terminal=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("versions",),
        ("versions", "--json"),
        ("versions", "last"),
        ("versions", "last", "--json"),
        ("versions", "diff", "last"),
        ("versions", "diff", "last", "1", "2"),
        ("versions", "show", "last"),
        ("versions", "save", "last", "--out", "{folder}/saved {evil}.html"),
        ("versions", "edit", "last", "--from", "{folder}/{evil}.html"),
        ("versions", "undo", "last"),
    ],
    ids=lambda words: "-".join(words)[:30],
)
def test_sessions_and_their_pages(
    evil_folder: Path, session: str, arguments: tuple[str, ...]
) -> None:
    named = [a.format(folder=evil_folder, evil=EVIL_NAME) for a in arguments]
    shown, _ = on_terminal(*named)
    assert shown
    assert_harmless(shown, terminal=True)
    output, _ = piped(*named)
    if arguments[1:2] == ("show",):
        # What is piped on purpose is the page, to the byte.
        pages = Versions(paths().pages / session)
        assert output.encode() == pages.current().data
        assert EVIL in output
    else:
        assert_harmless(output, terminal=False)


def test_what_is_rendered_and_compared(evil_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright")
    if find_browser() is None:
        pytest.skip("there is no browser")
    page, shot = evil_folder / f"{EVIL_NAME}.html", evil_folder / f"{EVIL_NAME}.png"
    monkeypatch.chdir(evil_folder)
    for arguments in (("render", page), ("compare", shot, page, "--no-ocr")):
        output, status = piped(*arguments)
        assert status == 0, output
        assert_harmless(output, terminal=False)
        assert_harmless(on_terminal(*arguments)[0], terminal=True)


@pytest.fixture
def evil_picture(evil_folder: Path) -> Path:
    return evil_folder / f"{EVIL_NAME}.png"


def asked(server: Server, *, name: str = "m") -> list[str]:
    return ["--base-url", server.url, "--model", name, "--no-ocr"]


def test_answers_of_a_model_and_the_names_it_gives_itself(evil_picture: Path) -> None:
    pytest.importorskip("openai")
    name = f"[red]m[/] {EVIL}"
    answer = f"See {EVIL} [link=x]y[/]"
    with Server(stream(answer[:20], answer[20:]), models=({"id": name},)) as server:
        flags = ["--base-url", server.url, "--no-ocr"]
        output, status = piped("chat", "--image", evil_picture, *flags, stdin="Hello\n")
        assert status == 0, output
        assert "[red]m[/]" in output
        assert "[link=x]y[/]" in output
        assert_harmless(output, terminal=False)
        with Terminal([*COMMAND, "chat", "--image", str(evil_picture), *flags]) as terminal:
            terminal.until("Type a message")
            terminal.type("Hello\n")
            terminal.until("tokens/s, context")
            terminal.type(f"/{EVIL_NAME.split(chr(8))[0]}\n/save {evil_picture}.html\n/quit\n")
            terminal.to_the_end()
        assert "[red]m[/]" in terminal.plain()
        assert "[link=x]y[/]" in terminal.plain()
        assert_harmless(terminal.written, terminal=True)
        # No page in the answer: the message quotes how it begins.
        output, status = piped("generate", evil_picture, "--out", "-", *flags)
        assert status == 1
        assert "holds no page" in output
        assert_harmless(output, terminal=False)


def test_a_page_goes_to_a_pipe_as_it_is_and_to_a_terminal_as_it_can_be_shown(
    evil_picture: Path, evil_folder: Path
) -> None:
    pytest.importorskip("openai")
    with Server(stream(f"```html\n{PAGE}\n```")) as server:
        flags = [evil_picture, *asked(server)]
        output, status = piped("generate", *flags, "--out", "-")
        assert status == 0, output
        assert f"{PAGE}\n" in output
        shown, status = on_terminal("generate", *flags, "--out", "-")
        assert status == 0, shown
        assert "<!DOCTYPE html>" in shown
        assert_harmless(shown, terminal=True)
        output, _ = piped("generate", *flags, "--out", "-", "--json")
        assert_harmless(output, terminal=False)
        row = next(json.loads(line) for line in output.splitlines() if line.startswith("{"))
        assert row["html"] == PAGE
        target = evil_folder / f"new {EVIL_NAME}.html"
        for write in (piped, on_terminal):
            output, status = write("generate", *flags, "--out", target, "--force")
            assert status == 0, output
            assert_harmless(output, terminal=write is on_terminal)
        assert target.read_bytes().decode() == PAGE


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_what_a_server_says_when_it_refuses(evil_picture: Path, status: int) -> None:
    pytest.importorskip("openai")
    with Server(refusal(status, f"Refused {EVIL} [bold]")) as server:
        output, _ = piped("chat", *asked(server), stdin="Hello\n")
        assert "Refused" in output
        assert "[bold]" in output
        assert_harmless(output, terminal=False)
        shown, _ = on_terminal("generate", evil_picture, *asked(server))
        assert "Refused" in shown
        assert_harmless(shown, terminal=True)


def test_names_of_served_models_in_a_refusal(own_folders: Path) -> None:
    pytest.importorskip("openai")
    with Server(stream("x"), models=({"id": EVIL}, {"id": "b"})) as server:
        output, status = piped("chat", *asked(server, name="c"))
        assert status == 1
        assert "It serves" in output
        assert_harmless(output, terminal=False)


def test_half_a_character_from_a_server_ends_nothing(evil_picture: Path) -> None:
    pytest.importorskip("openai")
    page = "<!DOCTYPE html><html><body>\ud83d</body></html>"
    with Server(stream(f"```html\n{page}\n```"), models=({"id": "m\udc80"},)) as server:
        flags = ["--base-url", server.url, "--no-ocr"]
        output, status = piped("generate", evil_picture, "--out", "-", *flags)
        assert status == 0, output
        assert "<html><body>\ufffd</body></html>" in output


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_unicode(own_folders: Path) -> None:
    pytest.importorskip("openai")
    shot = own_folders / os.fsdecode(b"caf\xe9.png")
    shot.write_bytes(png())
    with Server(stream(f"```html\n{PAGE}\n```")) as server:
        for more in ((), ("--json",)):
            out = own_folders / f"out{len(more)}"
            out.mkdir()
            output, status = piped("generate", shot, "--out", out, *asked(server), *more)
            assert status == 0, output
            (page,) = out.iterdir()
            assert page.name == os.fsdecode(b"caf\xe9.html")
        row = next(json.loads(line) for line in output.splitlines() if line.startswith("{"))
        assert row["output"] == str(page)


def test_the_application_with_everything_hostile(session: str, evil_folder: Path) -> None:
    """Title, question, picture, model, answer and draft, the trees and boxes that show them."""
    pytest.importorskip("openai")
    with Store.open(paths().sessions) as store:
        store.set_draft(session, f"Draft {EVIL}")
    name = f"Served {EVIL}"
    with Server(
        stream(f"Said {EVIL}"), refusal(400, f"Refused {EVIL}"), models=({"id": name},)
    ) as server:
        flags = ["--base-url", server.url, "--no-ocr", "--temperature", "0"]
        with Terminal([sys.executable, "-m", "w2c_tui", *flags], (140, 45)) as terminal:
            for shown in ("Title", "Draft", "Two", "Model", "Served"):
                terminal.until(shown)
            terminal.type("\r")
            terminal.until("Said")
            terminal.type("again\r")
            terminal.until("Refused")
            terminal.type("\x11")
            assert terminal.to_the_end() == 0
        assert_harmless(terminal.written, terminal=True)
