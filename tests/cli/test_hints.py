"""What a model is told about a picture, without being asked for by a flag."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.tui.scripted import INFO
from trainer.pages.hints import as_recognised
from trainer.pages.write import Made, question, told_lines
from w2c_tui.cli.running import attach
from w2c_tui.core.config import Settings
from w2c_tui.core.conversation import Attachment, Message, TextLine
from w2c_tui.core.prompt import PAGE_PROMPT, V1, render
from w2c_tui.engine.client import EngineClient
from w2c_tui.models.page_boxes import with_layout

NANO = msgspec.structs.replace(INFO, hints="colors")


@pytest.mark.parametrize(
    ("hints", "sees", "ocr", "wanted", "expected"),
    [
        ("none", True, "auto", "text", "none"),
        ("none", True, "auto", "layout", "none"),
        ("none", False, "auto", "text", "text"),
        ("none", True, "on", "colors", "colors"),
        ("text", True, "auto", "text", "text"),
        ("colors", True, "auto", "text", "colors"),
        ("colors", True, "on", "layout", "layout"),
        ("layout", True, "auto", "colors", "layout"),
        ("colors", True, "off", "layout", "none"),
    ],
)
def test_a_model_is_told_what_it_was_trained_with(hints, sees, ocr, wanted, expected):
    info = msgspec.structs.replace(INFO, hints=hints, reads_images=sees)
    assert info.hints_for(ocr, wanted) == expected


@pytest.mark.parametrize("hints", ["colors", "layout"])
def test_training_asks_what_the_application_asks(hints, tmp_path: Path):
    lines = (
        TextLine("Welcome home", (100, 40, 420, 80), ink=(255, 255, 255), ground=(0, 0, 128)),
        TextLine("Sign in", (900, 44, 980, 70), ink=(20, 20, 20), ground=(250, 250, 250)),
    )
    picture = Image.new("RGB", (1280, 960), (250, 250, 250))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((60, 20, 500, 120), fill="navy")
    draw.text((110, 44), "Welcome home", fill="white", font=ImageFont.load_default(36))
    picture.save(tmp_path / "7.png")
    made = Made(7, "7.png", 1280, 960, "", "classes", "en", "", None, (), lines)
    asked = question(made, told_lines(made, hints, "seed", tmp_path))
    seen = as_recognised(lines, random.Random("w2c hints seed 7"))
    if hints == "layout":
        seen = with_layout(picture, seen)
        assert "box 0 0 441 101 navy" in asked
    assert "navy" in asked
    image = Attachment(b"...", "hash", 1280, 960, page_text=seen)
    segments = render([Message("user", PAGE_PROMPT, (image,))], V1, images=True)
    texts = [segment.text for segment in segments if segment.kind == "text"]
    assert sum(text.count(asked) for text in texts) == 1


def test_lines_come_with_colours_for_a_model_that_was_trained_with_them(tmp_path: Path):
    pytest.importorskip("rapidocr", reason="rapidocr is not installed")
    picture = Image.new("RGB", (640, 480), "navy")
    font = ImageFont.load_default(36)
    ImageDraw.Draw(picture).text((40, 60), "Welcome home", fill="white", font=font)
    path = tmp_path / "page.png"
    picture.save(path)
    with EngineClient(tmp_path / "engine.log") as engine:
        (line,) = attach(str(path), Settings(), engine, NANO).page_text or ()
        assert line.text == "Welcome home"
        assert line.ground == (0, 0, 128)
        assert line.ink is not None
        plain = msgspec.structs.replace(NANO, hints="none")
        assert attach(str(path), Settings(), engine, plain).page_text is None
