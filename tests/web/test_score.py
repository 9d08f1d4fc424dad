"""The score: what it is 1 and 0 for, that damage lowers it, and its parts against other code."""

from __future__ import annotations

import difflib
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.web.pages import CARDS, shop
from w2c_tui.core.conversation import TextLine
from w2c_tui.core.image import attachment_from_picture
from w2c_tui.web.differences import difference_picture, differences, fix_request
from w2c_tui.web.render import PageSource
from w2c_tui.web.score import compare, score, ssim, tree_bleu
from w2c_tui.web.view import Line, Tree, View, view_of_picture

DAMAGE = {
    "one colour": shop(style="h1 { color: #c2185b }"),
    "one block moved": shop(style=".card:nth-child(2) { position: relative; top: 180px }"),
    "words": shop(
        title="Build pages that nobody sees",
        cards=tuple((head, text.replace("e", "o")) for head, text in CARDS),
    ),
    "half": shop(cards=(), footer=""),
    "another page": "<!DOCTYPE html><body style='background:#000;color:#0f0;font:14px monospace'>"
    + "".join(f"<div style='margin:30px'>$ make target-{n}</div>" for n in range(20)),
}


@pytest.fixture(scope="module")
def views(renderer):
    pages = {"same": shop(), **DAMAGE}
    found = list(renderer.render_all(PageSource(html) for html in pages.values()))
    return dict(zip(pages, found, strict=True))


def picture_view(view: View, lines=None) -> View:
    return view_of_picture(attachment_from_picture(view.picture, "shot.png", ""), lines)


def test_the_same_page_scores_1(views):
    total = score(views["same"], views["same"])
    assert total.score == 1
    assert set(total.parts.values()) == {1.0}
    assert total.structure == 1
    assert differences(views["same"], views["same"], compare(views["same"], views["same"])) == []
    assert fix_request(views["same"], views["same"], compare(views["same"], views["same"])) == ""


def test_more_damage_scores_less(views):
    scores = [score(views["same"], view).score for view in views.values()]
    assert scores == sorted(scores, reverse=True), dict(zip(views, scores, strict=True))
    assert len(set(scores)) == len(scores)
    assert scores[1] > 0.95
    assert scores[-1] < 0.35


def test_each_part_sees_its_damage_and_no_other(views):
    same = views["same"]
    color = score(same, views["one colour"])
    assert color.color < 1
    assert (color.block_match, color.text, color.position) == (1, 1, 1)
    moved = score(same, views["one block moved"])
    assert moved.position < 1
    assert (moved.block_match, moved.text, moved.color) == (1, 1, 1)
    words = score(same, views["words"])
    assert words.text < 1 or words.block_match < 1
    half = score(same, views["half"])
    assert half.block_match < 0.8
    assert half.structure < 1
    assert half.ssim < 0.9


def test_all_parts_are_symmetric_and_bounded(views):
    for first, second in itertools.combinations(views.values(), 2):
        there, back = score(first, second), score(second, first)
        assert there.parts == pytest.approx(back.parts, abs=2e-3)
        for value in (*there.parts.values(), there.score, there.structure):
            assert 0 <= value <= 1


def blank(color: str = "white", size=(1280, 800)) -> View:
    return View(picture=Image.new("RGB", size, color), lines=(), tree=Tree((), ()))


def test_blank_and_failed_pages_score_0(views):
    for nothing in (blank(), blank("#123456", (1280, 1)), None):
        comparison = compare(views["same"], nothing)
        assert comparison.score.score == 0
        assert set(comparison.score.parts.values()) == {0.0}
        assert comparison.failed
        assert "Fresh layouts" in " ".join(block.text for block in comparison.missing)
        assert "Fresh layouts" in fix_request(views["same"], nothing, comparison)
    # A blank screenshot is matched by a blank page only.
    assert score(blank(), blank()).score == 1
    assert score(blank(), views["same"]).score < 0.5


def test_pages_of_other_heights_and_widths(renderer, views):
    longer = renderer.render(PageSource(shop(style="footer { margin-top: 2500px }")))
    total = score(views["same"], longer)
    assert 0.5 < total.score < 0.98
    assert total.ssim < 0.6
    assert difference_picture(views["same"], longer).size == longer.picture.size
    half_size = views["same"].picture.reduce(2)
    small = View(
        picture=half_size,
        lines=tuple(
            Line(line.text, tuple(side // 2 for side in line.box), line.color)
            for line in views["same"].lines
        ),
        tree=views["same"].tree,
        page_height=half_size.height,
    )
    total = score(views["same"], small)
    assert total.score > 0.97
    assert total.position > 0.995


def test_extreme_pictures_never_fail():
    sizes = [(1, 1), (1, 1500), (1500, 1), (7, 5), (640, 480)]
    pictures = [
        View(picture=Image.effect_noise(size, 90).convert("RGB"), lines=(), page_height=size[1])
        for size in sizes
    ]
    odd = Line("x" * 5000, (0, 0, 1, 1)), Line("", (0, 0, 0, 0)), Line("out", (9000, 0, 9100, 10))
    pictures.append(View(picture=Image.new("RGB", (50, 50), "red"), lines=odd))
    for first, second in itertools.product(pictures, repeat=2):
        assert 0 <= score(first, second).score <= 1
        difference_picture(first, second)


def test_pictures_without_text_have_only_what_is_known(views):
    shot = picture_view(views["same"])
    total = score(shot, views["one colour"])
    assert total.parts.keys() == {"ssim"}
    assert total.score == total.ssim
    assert total.structure is None
    assert score(shot, None).score == 0


def test_read_text_gives_pictures_their_blocks(views):
    lines = [TextLine(line.text, line.box) for line in views["same"].lines]
    shot = picture_view(views["same"], lines)
    assert score(shot, views["same"]).score == pytest.approx(1)
    assert score(shot, views["one colour"]).color < 1
    damaged = [score(shot, views[name]).score for name in ("same", *DAMAGE)]
    assert damaged == sorted(damaged, reverse=True)


def test_blocks_that_one_page_splits_are_joined():
    picture = Image.effect_noise((600, 200), 200).convert("RGB")
    words = "A sentence that one page draws as a single line of text"
    whole = View(picture=picture, lines=(Line(words, (10, 10, 500, 30)),), page_height=200)
    parts = (Line(words[:30], (10, 10, 250, 30)), Line(words[31:], (280, 10, 500, 30)))
    split = View(picture=picture, lines=parts, page_height=200)
    for first, second in ((whole, split), (split, whole)):
        comparison = compare(first, second)
        assert len(comparison.pairs) == 1
        assert comparison.score.block_match == 1
        assert comparison.score.text == 1


def test_equal_texts_are_told_apart_by_their_place():
    picture = Image.effect_noise((900, 900), 200).convert("RGB")
    boxes = [(100, top, 200, top + 20) for top in (100, 300, 500, 700)]
    first = View(picture=picture, lines=tuple(Line("Read more", box) for box in boxes))
    second = View(picture=picture, lines=tuple(Line("Read more", box) for box in boxes[::-1]))
    assert score(first, second).position == 1


def test_text_likeness_is_near_that_of_difflib():
    """Design2Code takes difflib's ratio, which depends on the order of its arguments."""
    for first, second in (
        ("Prices and plans", "Prices & plan"),
        ("Sign in", "Sign up"),
        ("a", "b"),
    ):
        picture = Image.effect_noise((300, 100), 200).convert("RGB")
        views = [
            View(picture=picture, lines=(Line(text, (10, 10, 200, 40)),))
            for text in (first, second)
        ]
        ratio = difflib.SequenceMatcher(None, first, second).ratio()
        found = score(*views).text
        assert found == pytest.approx(ratio if ratio >= 0.5 else 0, abs=0.1)


def test_structural_similarity_against_its_definition():
    random = np.random.default_rng(1)
    first = random.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    second = np.clip(first + random.integers(-60, 60, first.shape), 0, 255).astype(np.uint8)
    x = np.arange(-5, 6)
    window = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def filtered(values):
        padded = np.pad(values, ((5, 5), (5, 5)), mode="edge")
        views = np.lib.stride_tricks.sliding_window_view(padded, (11, 11))
        return (views * window).sum(axis=(-1, -2))

    maps = []
    for channel in range(3):
        a, b = first[..., channel].astype(float), second[..., channel].astype(float)
        ma, mb = filtered(a), filtered(b)
        va, vb, cov = filtered(a * a) - ma**2, filtered(b * b) - mb**2, filtered(a * b) - ma * mb
        c1, c2 = 6.5025, 58.5225
        maps.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    images = Image.fromarray(first), Image.fromarray(second)
    assert ssim(*images) == pytest.approx(np.mean(maps), abs=1e-3)
    assert ssim(images[0], images[0]) == 1


def test_tree_bleu_counts_distinct_subtrees_of_the_reference():
    reference = Tree(("body", "ul", "li", "li", "p"), (-1, 0, 1, 1, 0))
    assert tree_bleu(reference, reference) == 1
    other = Tree(("body", "ul", "li", "p"), (-1, 0, 1, 0))
    assert tree_bleu(reference, other) == 0.5
    assert tree_bleu(reference, Tree((), ())) == 0
    assert tree_bleu(Tree((), ()), Tree((), ())) == 1


def test_differences_say_what_to_do(renderer, views):
    same = views["same"]

    def request(name: str) -> str:
        return fix_request(same, views[name], compare(same, views[name]))

    assert '"Build pages that people like" is #c2185b and should be #222222' in request(
        "one colour"
    )
    assert "180 px too low" in request("one block moved")
    assert 'should read "' in request("words") or "is missing" in request("words")
    half = request("half")
    assert '"Fresh layouts" is missing; it belongs at left' in half
    assert "shorter than the original" in half
    assert half.startswith("Your page differs from the original")
    assert half.count("\n- ") <= 12
    other = differences(same, views["another page"], compare(same, views["another page"]))
    assert "is not on the original" in next(d for d in other if d.kind == "surplus").message


def test_the_difference_picture_marks_what_differs(views):
    same = views["same"]
    assert not red(difference_picture(same, same)).any()
    marked = red(difference_picture(same, views["one colour"]))
    (heading,) = (line for line in same.lines if line.text.startswith("Build"))
    left, top, right, bottom = heading.box
    assert marked[top:bottom, left:right].any()
    marked[top:bottom, left:right] = False
    assert not marked.any()


def red(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture).astype(int)
    return pixels[..., 0] - pixels[..., 1] > 60


def w2c(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "w2c_tui.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_the_command_compares_and_reports(views, own_folders, browser_path):
    shot, page, broken = (own_folders / name for name in ("shot.png", "page.html", "bad.png"))
    views["same"].picture.save(shot)
    page.write_text(DAMAGE["one colour"])
    report, difference = own_folders / "report.html", own_folders / "difference.png"
    done = w2c(
        "compare", shot, page, "--no-ocr", "--json", "--report", report, "--difference", difference
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert 0.9 < row["score"] == row["ssim"] < 1
    assert row["text"] is None
    html = report.read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("data:image/png;base64") == 3
    with Image.open(difference) as picture:
        assert picture.size == views["same"].picture.size
    original = own_folders / "original.html"
    original.write_text(shop())
    done = w2c("compare", original, page)
    assert done.returncode == 0, done.stderr
    assert "#c2185b and should be #222222" in done.stdout
    broken.write_bytes(b"no picture")
    assert w2c("compare", broken, page).returncode == 1


def test_the_command_compares_a_short_screenshot_with_its_page(own_folders, browser_path, renderer):
    """In the usual window of 800 px, half of the page's picture would be compared with nothing."""
    shot, page = own_folders / "shot.png", own_folders / "page.html"
    page.write_text("<!DOCTYPE html><body style='margin:0;background:#246;height:400px'><b>Hello")
    source = PageSource(page.read_text(), width=900, height=400)
    renderer.render(source).picture.save(shot)
    for pair in ((shot, page), (page, shot)):
        done = w2c("compare", *pair, "--no-ocr", "--json")
        assert json.loads(done.stdout)["score"] == 1, done.stderr
    done = w2c("compare", shot, page, "--no-ocr", "--json", "--width", 900, "--height", 800)
    assert json.loads(done.stdout)["score"] == 0.5


def test_the_command_reads_the_text_of_pictures(views, own_folders, browser_path):
    shot, page = own_folders / "shot.png", own_folders / "page.html"
    views["same"].picture.save(shot)
    page.write_text(shop())
    done = w2c("compare", shot, page, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["score"] > 0.97
    assert row["block_match"] > 0.95
