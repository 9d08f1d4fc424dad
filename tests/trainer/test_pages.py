"""Composed pages: the same from the same seed, readable, short, and on disk exactly once."""

from __future__ import annotations

import hashlib
import html
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from trainer.pages.__main__ import main
from trainer.pages.caption import colors_of
from trainer.pages.compose import ComposedPage, compose
from trainer.pages.palette import contrast
from w2c_tui.core.colors import COLORS
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.page_text import HEADER
from w2c_tui.core.prompt import TEMPLATES, render

PAGES = [compose(7, index) for index in range(120)]
_VOID = {"meta", "input"}


def rows(folder: Path) -> list[bytes]:
    return (folder / "pages.jsonl").read_bytes().splitlines()


def make(folder: Path, *arguments: str) -> None:
    result = CliRunner().invoke(main, ["--out", str(folder), "--tabs", "1", *arguments])
    assert result.exit_code == 0, result.output


class Reader(HTMLParser):
    """Raises at the first tag that does not close what was opened last."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_seed_makes_the_same_pages_in_another_process() -> None:
    code = (
        "import hashlib; from trainer.pages.compose import compose;"
        "print(hashlib.sha256(''.join(compose(7, i).html for i in range(20)).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()
    here = "".join(page.html for page in PAGES[:20]).encode()
    assert told == hashlib.sha256(here).hexdigest()
    assert compose(8, 0).html != PAGES[0].html
    # A page is itself whatever was composed before it.
    assert compose(7, 15) == PAGES[15]


def test_every_page_is_well_formed_and_has_words() -> None:
    for page in PAGES:
        reader = Reader(page.html)
        assert reader.tags[:5] == ["html", "head", "meta", "title", "style"]
        assert len(reader.text.split()) > 8
        assert page.blocks


def test_pages_are_varied() -> None:
    assert len({page.layout for page in PAGES}) >= 7
    assert len({page.theme.page for page in PAGES}) >= 20
    assert len({page.width for page in PAGES}) == 5
    assert len({block.kind for page in PAGES for block in page.blocks}) >= 18
    assert {page.dialect for page in PAGES} == {"inline", "classes"}
    assert len({page.language for page in PAGES}) >= 4
    assert max(sum(p.theme.page == q.theme.page for p in PAGES) for q in PAGES) < len(PAGES) / 3


def test_colors_are_those_that_have_a_name_and_texts_can_be_read() -> None:
    for page in PAGES:
        styles = page.html.replace("transparent", "")
        for color in colors_of(page.html):
            assert color in COLORS
        assert "rgb(" not in styles
        assert contrast(page.theme.text, page.theme.page) >= 3


def test_inline_pages_have_no_classes_and_shared_styles_have_names() -> None:
    for page in PAGES:
        styles = page.html[: page.html.index("</style>")]
        if page.dialect == "inline":
            assert "class=" not in page.html
            assert styles.count("{") == 2
    named = [
        page.html for page in PAGES if page.dialect == "classes" and 'class="card"' in page.html
    ]
    assert named
    assert all(".card{" in html and html.count('class="card"') > 1 for html in named)


def test_most_pages_are_short() -> None:
    """Characters stand for tokens here: SmolLM2's are 2.4 characters long on such pages."""
    lengths = sorted(len(page.html) for page in PAGES)
    assert lengths[len(lengths) // 2] < 1500
    assert lengths[-1] < 2600


def test_parts_are_cut_from_pages_or_composed_freely_and_are_as_narrow_as_cards() -> None:
    parts = [compose(7, index, part_share=1.0) for index in range(80)]
    assert compose(7, 3, part_share=1.0) == parts[3]
    assert 25 <= sum(part.layout == "freely" for part in parts) <= 55
    assert min(part.width for part in parts) < 400
    assert max(part.width for part in parts) > 1000
    # As high as what is in them, whatever the window.
    assert {part.height for part in parts} == {0}
    for part in parts:
        assert Reader(part.html).text.split()
        for block in part.blocks:
            assert html.escape(block.first_text, quote=False) in part.html
    whole = sorted(len(page.html) for page in PAGES)
    cut = sorted(len(part.html) for part in parts)
    assert cut[40] < 0.8 * whole[len(whole) // 2]
    # Without the option a seed makes the same pages as ever.
    assert [compose(7, index, part_share=0.0) for index in range(5)] == PAGES[:5]


def test_stacks_are_many_sections_of_which_many_are_alike() -> None:
    stacks = [compose(7, index, stack_share=1.0) for index in range(40)]
    assert compose(7, 3, stack_share=1.0) == stacks[3]
    assert {stack.layout for stack in stacks} == {"stacked"}
    usual, stacked = (
        [page.html.count("<section") for page in pages] for pages in (PAGES[:40], stacks)
    )
    assert sum(stacked) > 1.5 * sum(usual)
    assert sum(count >= 3 for count in stacked) > 5 + sum(count >= 3 for count in usual)
    for stack in stacks:
        for block in stack.blocks:
            assert html.escape(block.first_text, quote=False) in stack.html
    assert any(compose(7, i, part_share=0.5, stack_share=1.0).layout != "stacked" for i in range(9))
    assert [compose(7, index, stack_share=0.0) for index in range(5)] == PAGES[:5]


def test_records_are_what_the_application_would_ask_and_pictures_hold_the_whole_page(
    tmp_path: Path,
) -> None:
    make(tmp_path, "--count", "3", "--seed", "7", "--hints", "colors")
    pages = json.loads((tmp_path / "pages.json").read_text())
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert [record["id"] for record in pages] == [f"composed-7-{n:07}" for n in range(3)]
    for record, caption, line in zip(pages, captions, rows(tmp_path), strict=True):
        made = json.loads(line)
        page: ComposedPage = PAGES[made["index"]]
        human, answer = (turn["value"] for turn in record["conversations"])
        assert answer == page.html
        with Image.open(tmp_path / record["image"]) as image:
            size = image.size
        assert size == (made["width"], made["height"])
        assert size[0] == page.width
        assert size[1] >= page.height
        lowest = max(text["box"][3] for text in made["lines"])
        assert lowest <= size[1]
        header = HEADER.format(width=size[0], height=size[1], colors=" ink ground")
        assert human.startswith(f"<image>\n{header}\n")
        # The prompt is what `--ocr` makes of the same lines.
        question = human.removeprefix("<image>\n")
        segments = render(
            [Message("user", question, (Attachment(b"", "", *size),))], TEMPLATES["v1"]
        )
        assert question in "".join(segment.text for segment in segments)
        said = caption["conversations"][1]["value"]
        assert said.startswith(f"page {page.theme.page}, text {page.theme.text}")
        assert len(said.split("\n")) == 1 + len(page.blocks)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["seed"] == 7
    assert "MIT" in manifest["licence"]
    assert manifest["browser"]
    # Other hints need no browser's work: the pictures stay as they are.
    before = (tmp_path / pages[0]["image"]).stat().st_mtime_ns
    make(tmp_path, "--count", "3", "--seed", "7", "--hints", "none")
    assert (tmp_path / pages[0]["image"]).stat().st_mtime_ns == before
    plain = json.loads((tmp_path / "pages.json").read_text())
    assert "Text on the page" not in plain[0]["conversations"][0]["value"]
    make(tmp_path, "--count", "3", "--seed", "7", "--hints", "layout")
    outlined = json.loads((tmp_path / "pages.json").read_text())
    for record, line in zip(outlined, rows(tmp_path), strict=True):
        made, asked = json.loads(line), record["conversations"][0]["value"]
        assert f"\npage {made['width']} {made['height']} " in asked
        assert asked.count("\n ") >= 0.6 * len(made["lines"])


def test_the_same_pixels_again_after_being_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.pages", "--count", "12", "--tabs", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [*command, "--out", str(killed)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    journal = killed / "pages.jsonl"
    while not (journal.is_file() and journal.stat().st_size > 4000):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with journal.open("ab") as file:
        file.write(b'{"index":5,"ima')
    done = {json.loads(line)["index"]: line for line in rows(killed)[:-1]}
    assert 0 < len(done) < 12
    times = {
        path: path.stat().st_mtime_ns
        for index in done
        for path in [killed / f"images/0000/{index:07}.png"]
    }
    make(killed, "--count", "12")
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    make(whole, "--count", "12")
    for name in ("pages.json", "captions.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for record in json.loads((whole / "pages.json").read_text()):
        assert (killed / record["image"]).read_bytes() == (whole / record["image"]).read_bytes()


def test_a_folder_holds_pages_of_one_plan(tmp_path: Path) -> None:
    make(tmp_path, "--count", "1", "--widths", "480")
    result = CliRunner().invoke(main, ["--out", str(tmp_path), "--count", "1", "--seed", "3"])
    assert result.exit_code == 1
    assert "seed 0, not 3" in result.output


@pytest.mark.parametrize("widths", ["", "wide", "10", "1280,99999"])
def test_widths_that_no_window_has_are_refused(tmp_path: Path, widths: str) -> None:
    result = CliRunner().invoke(
        main, ["--out", str(tmp_path / "new"), "--count", "1", "--widths", widths]
    )
    assert result.exit_code == 2
    assert not (tmp_path / "new").exists()
