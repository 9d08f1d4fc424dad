"""Text recognition runs for real: on drawn pages and on the example screenshots."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from w2c_tui.core.conversation import TextLine
from w2c_tui.core.errors import ImageError
from w2c_tui.models.page_text import read_page_text

pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ("Welcome", "Pricing", "Contact", "Download", "Projects", "Settings", "Monthly", "Reports")


def draw(size: tuple[int, int], texts: dict[str, tuple[int, int]], points: int = 32) -> Image.Image:
    image = Image.new("RGB", size, "white")
    font = ImageFont.load_default(points)
    for text, at in texts.items():
        ImageDraw.Draw(image).text(at, text, fill="black", font=font)
    return image


def texts(lines: tuple[TextLine, ...]) -> list[str]:
    return [line.text for line in lines]


def words(*strings: str) -> set[str]:
    return {word for text in strings for word in re.findall(r"[a-z]{3,}", text.lower())}


def test_lines_come_in_reading_order_with_boxes_on_the_image() -> None:
    at = {
        "Welcome": (60, 40),
        "Contact": (700, 44),
        "Second row": (60, 200),
        "Right side": (700, 204),
        "Copyright": (300, 500),
    }
    image = draw((1000, 600), at)
    lines = read_page_text(image)
    assert texts(lines) == list(at)
    for line in lines:
        left, top, right, bottom = line.box
        x, y = at[line.text]
        assert 0 <= left < right <= image.width
        assert 0 <= top < bottom <= image.height
        assert abs(left - x) < 20
        assert abs(top - y) < 25
        assert 0.65 <= line.score <= 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "landing.png",
            "Start Bootstrap Home About Contact A warm welcome! Bootstrap utility classes are used "
            "to create this jumbotron Call to action Fresh new layout Free to download Feature "
            "boxes Simple clean code A name you trust Copyright Your Website",
        ),
        (
            "dashboard.png",
            "Dashboard Components Utilities Pages Charts Tables Search Douglas McGee Generate "
            "Report Earnings Monthly Annual Tasks Pending Requests Overview Revenue Sources "
            "Direct Social Referral",
        ),
    ],
    ids=["landing", "dashboard"],
)
def test_example_screenshots_are_read(name: str, expected: str) -> None:
    with Image.open(EXAMPLES / name) as image:
        found = words(*texts(read_page_text(image)))
    missing = words(expected) - found
    assert len(missing) <= 0.05 * len(words(expected)), missing


def test_tall_page_is_read_in_full_and_every_line_once() -> None:
    expected = [f"{WORDS[at % len(WORDS)]} {at * 7 + 100}" for at in range(60)]
    # 97 px apart: the lines fall on every place of the bands' borders.
    image = draw(
        (800, 60 * 97 + 60), {text: (60, 40 + 97 * at) for at, text in enumerate(expected)}
    )
    found = Counter(texts(read_page_text(image)))
    assert found == Counter(expected)


def test_small_crop_is_enlarged_until_it_can_be_read() -> None:
    lines = read_page_text(draw((150, 40), {"Dashboard": (10, 10)}, points=14))
    assert texts(lines) == ["Dashboard"]
    assert lines[0].box[2] <= 150


@pytest.mark.parametrize("size", [(1, 1), (8, 3000), (3000, 8), (20, 20), (640, 480)])
def test_image_without_text_has_no_lines(size: tuple[int, int]) -> None:
    assert read_page_text(Image.new("RGB", size, "white")) == ()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_any_image_mode_is_read(mode: str) -> None:
    image = draw((400, 120), {"Settings": (40, 40)}).convert(mode)
    assert texts(read_page_text(image)) == ["Settings"]


def test_failure_is_an_image_error() -> None:
    image = Image.new("RGB", (100, 100))
    image.close()
    with pytest.raises(ImageError, match="100×100") as caught:
        read_page_text(image)
    assert caught.value.__cause__ is not None


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_recognition_is_quiet_and_imports_no_torch() -> None:
    done = run(
        "import sys; from PIL import Image; from w2c_tui.models.page_text import read_page_text;"
        f"read_page_text(Image.open({str(EXAMPLES / 'dashboard.png')!r}).resize((640, 354)));"
        "read_page_text(Image.new('RGB', (64, 64)));"
        "print('torch' in sys.modules)"
    )
    assert done.stdout == "False\n"
    assert done.stderr == ""


def test_missing_package_names_the_extra() -> None:
    done = run(
        "import sys; sys.modules['rapidocr'] = None\n"
        "from PIL import Image; from w2c_tui.core.errors import MissingPackageError\n"
        "from w2c_tui.models.page_text import read_page_text\n"
        "try: read_page_text(Image.new('RGB', (64, 64)))\n"
        "except MissingPackageError as error: print(error.hint)"
    )
    assert "pip install 'w2c-tui[ocr]'" in done.stdout
