"""Pages in answers: finding them, choosing one, closing what was cut off, reading the words."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w2c_tui.core.artifact import (
    Page,
    best_page,
    find_pages,
    page_starts_at,
    repaired,
    visible_text,
)

DOCUMENT = "<!DOCTYPE html>\n<html>\n<body><p>Hi</p></body>\n</html>"


def only(text: str) -> Page:
    (page,) = find_pages(text)
    assert page.html == text[page.start : page.end]
    return page


# ── finding pages ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("```html\n", "\n```"),
        ("Here it is:\n\n```HTML\n", "\n```\n\nEnjoy <b>it</b>!"),
        ("```htm\n", "\n```"),
        ("```html title=index.html\n", "\n```"),
        ("```{.html}\n", "\n```"),
        ("```xml\n", "\n```"),
        ("```\n", "\n```"),
        ("~~~html\n", "\n~~~"),
        ("~~~~~~\n", "\n~~~~~~~"),
        ("1. First\n\n   ```html\n   ", "\n   ```\n2. Second"),
        ("\t```html\n", "\n\t```"),
        ("````markdown\n# Page\n```html\n", "\n```\n````"),
        ("```css\np { color: red }\n```\n```html\n", "\n```\n```js\nlet a = '<html>';\n```"),
        ("```html ", "\n```"),
        ("```html\n", "```\nThat was it."),
        ("```html\n", "\n\nI forgot the fence."),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_fenced_document_is_found_exactly(before: str, after: str, newline: str) -> None:
    text = (before + DOCUMENT + after).replace("\n", newline)
    page = only(text)
    assert page.html.strip() == DOCUMENT.replace("\n", newline)
    assert (page.kind, page.complete, page.is_document) == ("fenced", True, True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("\n\n  ", "\n"),
        ("Sure! Here is your page:\n", "\n\nIt uses <b>bold</b> and ```fences```."),
        ("Sure! Here is your page: ", " Enjoy."),
        ("Use `<!DOCTYPE html>` first, the <html> tag comes next.\n", ""),
        ("<think>a <div> or a <table>?</think>\n", ""),
    ],
)
@pytest.mark.parametrize("document", [DOCUMENT, DOCUMENT[16:], DOCUMENT.lower(), DOCUMENT.upper()])
def test_a_bare_document_is_found_exactly(before: str, after: str, document: str) -> None:
    page = only(before + document + after)
    assert page.html == document
    assert (page.start, page.kind, page.complete) == (len(before), "bare", True)


def test_fences_inside_a_bare_document_belong_to_it() -> None:
    text = "<!DOCTYPE html>\n<html><pre>\n```html\n<b>x</b>\n```\n</pre></html>\nDone."
    assert only(text).html == text[: -len("\nDone.")]


def test_shorter_fences_and_the_other_kind_inside_a_fence_belong_to_it() -> None:
    inner = "<html><pre>\n```\ncode\n```\n~~~~\n</pre></html>\n"
    assert only(f"````html\n{inner}````\n").html == inner


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("```html\n<!DOCTYPE html>\n<html><bo", "<!DOCTYPE html>\n<html><bo"),
        ("Text\n<!DOCTYPE html>\n<html><body>", "<!DOCTYPE html>\n<html><body>"),
        ("```html\n<div>\n<p", "<div>\n<p"),
        ("```html\n<div>\n``", "<div>\n"),
        ("````html\n<div>\n```", "<div>\n"),
        ("<div><p>some words", "<div><p>some words"),
        ("<!DOCTYPE html>", "<!DOCTYPE html>"),
    ],
)
def test_an_unfinished_page_is_found_and_called_incomplete(text: str, html: str) -> None:
    page = only(text)
    assert (page.html, page.complete) == (html, False)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("<div>a</div>\n<p>b</p>\n\nThat was it.", "<div>a</div>\n<p>b</p>"),
        ('<body class="x">\n<p>b</p></body>', '<body class="x">\n<p>b</p></body>'),
        (
            "<head><title>t</title></head><body></body></html>\nok",
            "<head><title>t</title></head><body></body></html>",
        ),
        ("\n<meta charset=utf-8>\n<h1>a</h1>", "<meta charset=utf-8>\n<h1>a</h1>"),
        ("<ul><li>a<li>b</ul> and so on", "<ul><li>a<li>b</ul>"),
        ("<style>a > b {}</style><main></main>", "<style>a > b {}</style><main></main>"),
    ],
)
def test_an_answer_that_begins_with_a_tag_is_a_page(text: str, html: str) -> None:
    page = only(text)
    assert (page.html, page.kind, page.complete, page.is_document) == (html, "bare", True, False)


def test_a_fragment_in_an_html_fence_is_a_page() -> None:
    page = only("Change this:\n```html\nJust <b>words</b>\n```\n")
    assert (page.html, page.is_document) == ("Just <b>words</b>\n", False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello, what should the page look like?",
        "```css\n.a { content: '<html><body>' }\n```",
        "```js\nconst page = `\n<!DOCTYPE html>\n<html></html>`;\n```",
        "```\npip install w2c-tui\n```",
        "```xml\n<project><name>x</name></project>\n```",
        "```svg\n<svg></svg>\n```",
        "```html\n```",
        "```html\n\n  \n```",
        "```html",
        "The <html> tag and the <!DOCTYPE html> line are needed.",
        "Write `<html><body>` first.",
        "<think>Should I use <div>?</think> No.",
        "<3 you",
        "a < b and <b>bold</b>",
        "<htmlish>",
        "<divan>",
    ],
)
def test_what_is_no_page_is_not_found(text: str) -> None:
    assert find_pages(text) == []
    assert best_page(text) is None
    assert page_starts_at(text) is None


def test_several_pages_are_found_in_order() -> None:
    text = f"<p>Two:</p>\n```html\n{DOCUMENT}\n```\nand\n{DOCUMENT}\nand\n```html\n<i>x</i>\n```"
    pages = find_pages(text)
    assert [page.kind for page in pages] == ["bare", "fenced", "bare", "fenced"]
    assert [page.html.strip() for page in pages][1:] == [DOCUMENT, DOCUMENT, "<i>x</i>"]
    assert all(a.end <= b.start for a, b in pairwise(pages))


def test_an_unfinished_bare_page_ends_where_a_fenced_document_begins() -> None:
    text = f"<html><body>\nI start again.\n```html\n{DOCUMENT}\n```"
    first, second = find_pages(text)
    assert (first.complete, second.html.strip()) == (False, DOCUMENT)
    first, second = find_pages("<div>I start again.\n\n```html\n" + DOCUMENT + "\n```")
    assert (first.complete, second.html.strip()) == (False, DOCUMENT)


def best(text: str) -> str:
    page = best_page(text)
    assert page is not None
    return page.html


def test_the_best_page_is_the_last_complete_document_else_the_longest_page() -> None:
    other = DOCUMENT.replace("Hi", "Hello")
    fence = "```html\n{}\n```\n".format
    assert best(fence(other) + fence(DOCUMENT) + fence("<b>x</b>")) == fence(DOCUMENT)[8:-4]
    cut = "```html\n<html><body>" + "long " * 100
    assert best(fence(DOCUMENT) + cut) == fence(DOCUMENT)[8:-4]
    assert best(fence("<b>x</b>") + cut) == cut[8:]
    assert best(fence("<p>longer</p>") + fence("<b>x</b>")) == "<p>longer</p>\n"


PIECES = st.sampled_from([
    "```", "````", "~~~", "html", "css", "md", "\n", "\r\n", " ", "<", ">", "</", "`", "=", '"',
    "<!DOCTYPE html>", "<html>", "</html>", "<html", "<div>", "</div>", "<p", "</p>", "<br/>",
    "<svg>", "<!--", "-->", "<script>", "</script>", "<title>", "words", "&amp;", "'", "```html\n",
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=30).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_a_page_start_that_was_announced_stays(text: str) -> None:
    known = None
    for end in range(len(text) + 1):
        start = page_starts_at(text[:end])
        assert known is None or start == known, text[:end]
        known = start


def test_a_fragment_that_ends_within_its_first_tag_is_an_unfinished_page() -> None:
    (page,) = find_pages("<p\n")
    assert (page.html, page.complete) == ("<p\n", False)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_pages_are_slices_in_order(text: str) -> None:
    position = 0
    for page in find_pages(text):
        assert position <= page.start < page.end <= len(text)
        assert page.html == text[page.start : page.end]
        position = page.end


# ── repairing ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<html><body><p>Hi", "<html><body><p>Hi</p></body></html>"),
        ("<div><img src=a><br>text", "<div><img src=a><br>text</div>"),
        ("<ul><li>a<li>b", "<ul><li>a<li>b</li></ul>"),
        ("<style>p { color: re", "<style>p { color: re</style>"),
        ("<script>if (a < b && '</div>'", "<script>if (a < b && '</div>'</script>"),
        ("<title>Sho", "<title>Sho</title>"),
        ("<textarea><p>", "<textarea><p></textarea>"),
        ("<style>p {}</sty", "<style>p {}</style>"),
        ("<DIV><Style>p {}</STYLE", "<DIV><Style>p {}</style></div>"),
        ("<div><p class", "<div></div>"),
        ('<div><a href="http://x', "<div></div>"),
        ("<div><a title='a > b", "<div></div>"),
        ('<div><a href="x" ', "<div></div>"),
        ("<div>text<", "<div>text</div>"),
        ("<div>text</", "<div>text</div>"),
        ("<div>text</di", "<div>text</div>"),
        ("<div><!-- no", "<div><!-- no--></div>"),
        ("<div><!", "<div></div>"),
        ("<!DOCTYPE ht", ""),
        ("<b><i>x</b>", "<b><i>x</b>"),
        ("<p>it's <a title=it's>ok</a>", "<p>it's <a title=it's>ok</a></p>"),
        ("<svg><path d='M0'/><g>", "<svg><path d='M0'/><g></g></svg>"),
    ],
)
def test_what_is_open_is_closed(html: str, expected: str) -> None:
    assert repaired(html) == expected


@pytest.mark.parametrize(
    "html",
    [
        "",
        "words, 1 < 2 > 0",
        DOCUMENT,
        "<ul><li>a<li>b</ul>",
        "<table><tr><td>a<td>b<tr><td>c</table>",
        "<svg viewBox='0 0 1 1'><circle r='1'/></svg>",
        "<a title='1 > 0' data-x=\"<div>\">x</a>",
        "<!-- <div> --><!--><!-- > -->",
        "<script>document.write('<div>')</script>",
        "</div></p>",
        "<input disabled value=>",
        "<p/>",
    ],
)
def test_a_whole_page_is_not_changed(html: str) -> None:
    assert repaired(html) == html


class Balance(HTMLParser):
    """The standard library's reader as a second opinion on what is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_prefix_of_a_page_is_closed_for_another_reader_too() -> None:
    page = (
        "<!DOCTYPE html><html lang='en'><head><meta charset=utf-8><title>A & B</title><style>"
        "p > a { content: '</p>' }</style><script>let a = 1 < 2;</script></head><body><!-- a -->"
        "<div class=\"x y\" data-a='1 > 0'><p>one <b>two</b><br></p><img src=a.png>"
        "<textarea>a c</textarea></div></body></html>"
    )
    for end in range(len(page) + 1):
        reader = Balance()
        reader.feed(repaired(page[:end]))
        reader.close()
        assert reader.open == [], page[:end]
    assert repaired(page) == page


@settings(deadline=None, max_examples=500)
@given(html=TEXTS)
def test_repairing_twice_is_repairing_once(html: str) -> None:
    once = repaired(html)
    assert repaired(once) == once


# ── reading ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("html", "words"),
    [
        ("<p>Hello   <b>W</b>orld</p><p>again</p>", "Hello World again"),
        ("a<br>b<td>c<!-- d -->e", "a b ce"),
        ("<style>x</style><script>y</script><noscript>z</noscript>w", "w"),
        ("<textarea>typed</textarea>", "typed"),
        ("&lt;b&gt; &amp; caf&eacute;&nbsp;&#8364;", "<b> & café €"),
        ("&#" + "9" * 6000 + ";", "\ufffd"),
        ("<script>var a", ""),
        ("<p>one <a href='", "one"),
        ("1 < 2", "1 < 2"),
    ],
)
def test_the_words_of_a_page(html: str, words: str) -> None:
    assert visible_text(html) == words


def test_the_title_is_read_when_asked_for() -> None:
    html = "<head><title>Shop</title></head><body>Buy</body>"
    assert visible_text(html) == "Buy"
    assert visible_text(html, title=True) == "Shop Buy"


# ── hostile texts ─────────────────────────────────────────────────────────────────────────────

HOSTILE = [
    "<", "`", "~", ">", "<a", "<a ", "<a b=", '<a b="', "<a b='", "<div>", "</div>", "<div></span>",
    "<!--", "<!", "<?", "</", "<!-->", "<script>", "<style></style", "<title>", "<html>", "</html>",
    "<html></html>", "<!DOCTYPE html", "<!DOCTYPE html>", "<!DOCTYPE html ", "```\n", "```html\n",
    "```html\n<html>\n", "~~~\n```\n", " ", "\n", "\t", "\n ", "<html> ", "</html ", "&#9", "&",
    "<p>", "<li>", "```md\n", "`\n", "```a`\n", "<!-- -->", "<?xml>", "x ```", "<b><p></b>", "=",
    "<div/>", "\r\n", "</title", "```html\n\n",
]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "<div>", "```html\n"])
@pytest.mark.parametrize("unit", HOSTILE)
def test_time_is_linear_on_hostile_text(prefix: str, unit: str) -> None:
    """A quadratic step takes minutes here, a linear one a small part of a second."""
    read_all(prefix + unit * (200_000 // len(unit)))


@pytest.mark.parametrize("unit", ["<", "`", "<div>", "<div></span>", "<a "])
def test_a_megabyte_of_nothing_useful_is_read_quickly(unit: str) -> None:
    read_all(unit * (1_000_000 // len(unit)))


def read_all(text: str) -> None:
    start = time.process_time()
    find_pages(text)
    best_page(text)
    repaired(text)
    visible_text(text)
    assert time.process_time() - start < 10
