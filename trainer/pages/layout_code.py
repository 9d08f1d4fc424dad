"""The answer for a page whose layout is told: its HTML, with the layout's own numbers.

Owns what CSS the parts of a `core.page_layout` tree are, and which elements they are by the HTML
that the page was rendered from. Pages are written the way in which they can be read off the
picture: what nobody can see there, as whether a distance is a margin, is always written alike.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

from w2c_tui.core.page_layout import Node, is_usual, only_text
from w2c_tui.core.page_text import TextBlock

Element = Callable[[Node], str]
"""The name of the element that a part of the page is."""

MAX_TITLE = 60

_SHEET = """\
*{{margin:0;padding:0;box-sizing:border-box}}
body{{{body}}}
body *{{display:block;flex-shrink:0}}
p{{white-space:normal}}
.row{{display:flex}}
"""


def page_of(page: Node, element: Element, *, language: str, font: str) -> str:
    """The HTML of a page that looks as `page` says, in the font family `font`."""
    first = next(_blocks(page), None)
    title = _title(first.text) if first else "Page"
    body = [
        *_padding(page),
        f"background:{page.ground}",
        *([f"color:{page.ink}"] if page.ink else []),
    ]
    body += [f"font:{page.em or 16}px/1.2 {font}", "white-space:nowrap"]
    sheet = _SHEET.format(body=";".join(body))
    inside = "\n".join(_inside(page, page.ink, page.em, element, ""))
    return (
        f'<!DOCTYPE html>\n<html lang="{language}">\n<head><meta charset="utf-8">'
        f"<title>{html.escape(title, quote=False)}</title><style>\n{sheet}</style></head>\n<body>\n"
        f"{inside}\n</body>\n</html>"
    )


def _title(text: str) -> str:
    """The first words: a cut within one could not be known from what follows."""
    if len(text) <= MAX_TITLE:
        return text
    return text[: MAX_TITLE + 1].rpartition(" ")[0] or text[:MAX_TITLE]


def _inside(node: Node, ink: str, usual: int, element: Element, outer: str) -> Iterator[str]:
    for child in node.children:
        name = element(child)
        if name == outer:
            name = "div"
        around = child.ink if child.kind == "box" and child.ink else ink
        text = child if child.kind == "text" else only_text(child)
        style = _place(child)
        if child.kind == "box":
            style += [f"background:{child.ground}"]
            style += [f"color:{child.ink}"] if around != ink else []
            style += [f"border:1px solid {child.outline}"] if child.outline else []
            style += [f"border-radius:{child.radius}px"] if child.radius else []
        if child.kind == "row":
            style += [f"gap:{child.gap}px"] if child.gap else []
            style += ["align-items:center"] if child.level else []
        if text is None:
            style += _padding(child)
        else:
            style += _around_text(child, name, text) if child is not text else []
            assert text.block is not None
            style += _letters(text, name, around, usual)
            words = html.escape(text.block.text, quote=False)
            if name == "input":
                placeholder = html.escape(text.block.text)
                yield f'<input{_styled(style)} placeholder="{placeholder}">'
            else:
                yield f"<{name}{_styled(style)}>{words}</{name}>"
            continue
        kind = ' class="row"' if child.kind == "row" else ""
        inside = outer if name == "div" else name
        parts = list(_inside(child, around, usual, element, inside))
        if name == "input":
            yield f"<input{_styled(style)}>"
        elif parts:
            yield f"<{name}{kind}{_styled(style)}>"
            yield from parts
            yield f"</{name}>"
        else:
            yield f"<{name}{kind}{_styled(style)}></{name}>"


def _blocks(node: Node) -> Iterator[TextBlock]:
    if node.block is not None:
        yield node.block
    for child in node.children:
        yield from _blocks(child)


def _styled(style: list[str]) -> str:
    return f' style="{";".join(style)}"' if style else ""


def _place(node: Node) -> list[str]:
    style = []
    if node.middle and node.kind != "row" and node.width:
        style.append(f"margin:{node.top}px auto 0" if node.top else "margin:0 auto")
    else:
        style += [f"margin-top:{node.top}px"] if node.top else []
        style += [f"margin-left:{node.left}px"] if node.left else []
    style += [f"width:{node.width}px"] if node.width else []
    style += [f"height:{node.height}px"] if node.height else []
    if node.middle and node.kind == "row":
        style.append("justify-content:center")
    return style


def _padding(node: Node, *, middle: bool = False) -> list[str]:
    """Begins alike whether or not there is a left one: a model reads the numbers one by one.

    Without the left one where the text is in the `middle`, which a left one would move.
    """
    top, left = node.padding
    left = 0 if middle else left
    if not (top or left):
        return []
    return [f"padding:{top}px 0 0" + (f" {left}px" if left else "")]


def _around_text(box: Node, name: str, text: Node) -> list[str]:
    """Buttons and fields have their text in the middle, or in the middle of their height."""
    if name == "input":
        return [f"padding-left:{box.padding[1]}px"]
    if text.middle:
        return [] if name == "button" else _padding(box, middle=True)
    return _padding(box)


def _letters(node: Node, name: str, ink: str, usual: int) -> list[str]:
    style = []
    if node.middle and name != "button":
        style.append("text-align:center")
    if not is_usual(node.em, usual):
        style.append(f"font-size:{node.em}px")
    if node.line:
        style.append(f"line-height:{node.line}px")
        if name != "p":
            style.append("white-space:normal")
    if node.ink and node.ink != ink:
        style.append(f"color:{node.ink}")
    return style


# --- Which element --------------------------------------------------------------------------------


def plain_element(node: Node) -> str:
    """Without knowing the page: paragraphs and blocks."""
    return "p" if node.kind == "text" and node.line else "div"


_TEXTS = frozenset(
    [
        *("h1", "h2", "h3", "h4", "h5", "h6"),
        *("p", "a", "b", "strong", "em", "small", "label", "code"),
    ]
)
_BLOCKS = frozenset(["nav", "header", "footer", "form", "aside", "article", "main"])


class Elements:
    """Names of elements by the HTML that a page was rendered from."""

    def __init__(self, source: str) -> None:
        reader = _Reader()
        reader.feed(source)
        reader.close()
        self._has_fields = any(
            name == "input" and not "".join(words) for name, words in reader.found
        )
        self._found = [(name, "".join("".join(words).split())) for name, words in reader.found]

    def __call__(self, node: Node) -> str:
        texts = list(_texts(node))
        text = only_text(node)
        if node.kind == "text" or text is not None:
            name = self._of(texts[0])
            if node.kind == "box":
                return name if name in _CONTROLS | _BLOCKS | {"a"} else "div"
            if name in _TEXTS and not (node.line and name in ("a", "b", "label")):
                return name
            return "p" if node.line else "div"
        if not texts:
            return "input" if self._has_fields and _is_field(node) else "div"
        return self._around(texts)

    def _of(self, text: str) -> str:
        """The smallest element with that text; of equals the outer, as `<b>` in `<td>`."""
        holding = [
            (len(words), at, name) for at, (name, words) in enumerate(self._found) if text in words
        ]
        if not holding:
            return ""
        least = min(holding)[0]
        names = [name for length, _, name in holding if length == least]
        return next((name for name in reversed(names) if name in _TEXTS | _CONTROLS), names[-1])

    def _around(self, texts: list[str]) -> str:
        whole = sum(map(len, texts))
        best: tuple[int, str] | None = None
        for name, words in self._found:
            if name not in _BLOCKS or len(words) > min(1.2 * whole, best[0] if best else 1e9):
                continue
            if all(text in words for text in texts):
                best = (len(words), name)
        return best[1] if best else "div"


def _is_field(box: Node) -> bool:
    return box.kind == "box" and 24 <= box.height <= 60 and box.box[2] - box.box[0] > 3 * box.height


_CONTROLS = frozenset(("button", "input"))
_EMPTY = frozenset(["input", "br", "img", "hr", "meta", "link"])


def _texts(node: Node) -> Iterator[str]:
    """Without spaces, which recognition and line ends change."""
    return ("".join(block.text.split()) for block in _blocks(node))


class _Reader(HTMLParser):
    """All elements in their order with the words within."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        entry: tuple[str, list[str]] = (tag, [])
        self.found.append(entry)
        shown = dict(attrs).get("placeholder") or ""
        for _, words in [*self._open, entry]:
            words.append(shown)
        if tag not in _EMPTY:
            self._open.append(entry)

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        for _, words in self._open:
            words.append(data)
