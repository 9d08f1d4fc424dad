"""The pages in an answer: where they are, which one is meant, and what a preview shows of it.

Owns finding HTML in the raw text of an answer, closing what a cut-off page left open, and reading
the words off a page. Knows nothing about models, files, browsers or versions. A page is always the
slice of the text that the model wrote; `repaired` makes a second, separate text.

All of it takes linear time on any text. That is why tags are read here and not by html.parser,
which on Python 3.11 needs quadratic time for input such as a long run of unfinished tags.
"""

from __future__ import annotations

import html as entities
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

_DOCUMENT = r"<(?:!doctype\s+)?html(?=[\s>])"
# What a fragment may begin with. Not every element: `<think>` and `<b>Note:</b>` begin answers too.
_FRAGMENT = (
    r"<(?:address|article|aside|blockquote|body|button|center|dialog|div|dl|figure|footer|form|"
    r"h[1-6]|head|header|img|input|link|main|meta|nav|ol|p|pre|script|section|select|style|table|"
    r"title|ul)(?=[\s>/])"
)
_PROLOG = r"\s*+(?>(?:<\?xml[^>]*+>|<!--.*?-->)\s*+)*+"
_is_document = re.compile(_PROLOG + _DOCUMENT, re.I | re.S).match
_is_html = re.compile(f"{_PROLOG}(?:{_DOCUMENT}|{_FRAGMENT})", re.I | re.S).match
_fragment_start = re.compile(rf"\s*+(?={_FRAGMENT})", re.I).match

_FENCE = r"(?P<fence>`{3,}+|~{3,}+)"
# A document begins a line, or its next tag follows at once: prose mentions <html>, too.
_next_start = re.compile(
    rf"^[ \t]*+{_FENCE}(?P<info>[^`\n]*+)(?P<newline>\n|\Z)"
    rf"|^[ \t]*+(?={_DOCUMENT})|(?<!`)(?={_DOCUMENT}[^<>]{{0,300}}+>\s*+<)",
    re.I | re.M,
).search
_fence_ends = re.compile(
    r"^[ \t]*+(?P<fence>`++|~++)[ \t\r]*+$|(?<=</html>)[ \t]*+(?P<glued>`++|~++)", re.I | re.M
).finditer
_end_tags = re.compile(r"</html\s*+>", re.I).finditer
_RESTART = rf"^[ \t]*+(?:`{{3,}}+|~{{3,}}+)[ \t]*+html?\b[^\n]*+\n\s*+{_DOCUMENT}"
_next_end = re.compile(rf"(?P<tag></html\s*+>)|{_RESTART}", re.I | re.M).search
_restart = re.compile(_RESTART, re.I | re.M).search


class Page(msgspec.Struct, frozen=True):
    """One page: `html` is `text[start:end]` of the answer, byte for byte.

    `complete` says that its closing fence or its last closing tag was seen. A fragment without
    `<html>` counts as 'bare' when the answer begins with it.
    """

    html: str
    start: int
    end: int
    kind: Literal["fenced", "bare"]
    complete: bool

    @property
    def is_document(self) -> bool:
        """Whether it begins with a doctype or `<html>`, and is not a fragment."""
        return _is_document(self.html) is not None


def find_pages(text: str) -> list[Page]:
    """Every page of an answer, in order.

    Fences follow CommonMark, at any indentation. A fence is a page when it says html, or says
    nothing or xml and holds what looks like HTML; one that says markdown is looked into. Outside
    of fences a page goes from `<!DOCTYPE html>` or `<html>` to `</html>`.
    """
    return list(_pages(text))


def best_page(text: str) -> Page | None:
    """The page that the answer is about: the last complete document, since models correct
    themselves further down; without one the longest page, since the others are excerpts."""
    pages = find_pages(text)
    documents = [page for page in pages if page.complete and page.is_document]
    return documents[-1] if documents else max(pages, key=lambda p: len(p.html), default=None)


def page_starts_at(text: str) -> int | None:
    """Where the first page begins, or None. Text that is added later does not change the offset,
    so a view may switch as soon as it is known."""
    return next((page.start for page in _pages(text)), None)


def _pages(text: str) -> Iterator[Page]:
    position = 0
    if begin := _fragment_start(text):
        end, complete = _fragment_end(text, begin.end())
        if not complete and (restart := _restart(text, begin.end())):
            end = restart.start()
        yield Page(text[begin.end() : end], begin.end(), end, "bare", complete)
        position = end
    while found := _next_start(text, position):
        if found["fence"] is None:
            start, last = found.end(), _next_end(text, found.end())
            end = len(text) if last is None else last.start() if last["tag"] is None else last.end()
            complete = last is not None and last["tag"] is not None
            yield Page(text[start:end], start, end, "bare", complete)
            position = end
            continue
        if not found["newline"]:
            return
        label, _, html = found["info"].partition("<")
        language = re.sub(r"^\W*(\w*).*", r"\1", label.strip(), flags=re.S).lower()
        if language in ("markdown", "md"):
            position = found.end()
            continue
        # Some models write the first tag on the fence's own line.
        start = found.start("info") + len(label) if html else found.end()
        end, position, complete = _fence_end(text, found.end(), found["fence"])
        html = text[start:end]
        named = language in ("html", "htm", "html5", "xhtml")
        if html.strip() and (named or (language in ("", "xml", "text") and _is_html(html))):
            yield Page(html, start, end, "fenced", complete)


def _fence_end(text: str, start: int, fence: str) -> tuple[int, int, bool]:
    """Where the content ends, where to go on, and whether an end was seen."""
    for line in _fence_ends(text, start):
        closing = line["fence"] or line["glued"]
        if closing[0] == fence[0] and len(closing) >= len(fence):
            return line.start(), line.end(), True
        if closing[0] == fence[0] and line.end() == len(text):
            # The first half of the closing fence, while the answer is written.
            return line.start(), len(text), line["glued"] is not None
    end = max((tag.end() for tag in _end_tags(text, start)), default=None)
    return end or len(text), len(text), end is not None


def _fragment_end(text: str, start: int) -> tuple[int, bool]:
    """Where nothing is open any more and words or the end of the text follow."""
    opened = Opened()
    end = start
    for tag in tags(text, start):
        if tag.kind == "cut" or (not opened.names and text[end : tag.start].strip()):
            break
        opened.take(tag)
        end = tag.end
    # Nothing was closed yet either when the text ends within its first tag.
    return (len(text), False) if opened.names or end == start else (end, True)


# ── tags ──────────────────────────────────────────────────────────────────────────────────────


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


_VOID = _names("area base br col embed hr img input link meta param source track wbr")
_RAW = _names("iframe noembed noframes noscript script style textarea title xmp")
_UNSEEN = _RAW - {"textarea", "title", "xmp"}
_CLOSED_BY_THE_NEXT = _names("dd dt li option p td th tr")
_INLINE = _names(
    "a abbr b bdi bdo cite code data del dfn em font i ins kbd label mark q s samp small span"
    " strong sub sup time tt u var wbr"
)
_markup = re.compile(r"<(?:(?P<slash>/?)(?P<name>[a-zA-Z][^\s/>]*+)|!--|[!?/]|\Z)").search
_attributes = re.compile(r"""(?:[^=>]++|=\s*+(?:"[^"]*+"|'[^']*+'|(?!["'])[^\s>]*+))*+>""").match
_raw_ends = {name: re.compile(rf"</{name}(?=[\s/>])", re.I).search for name in _RAW}


class Tag(NamedTuple):
    """`kind` 'cut' is markup that the end of the text interrupts; 'other' needs no closing."""

    kind: Literal["open", "close", "other", "comment", "cut"]
    name: str
    start: int
    end: int


class Opened:
    """The elements that are open, as a browser would see it (roughly: no table rules)."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._in_comment = False
        self._count: Counter[str] = Counter()

    def take(self, tag: Tag) -> None:
        if tag.kind == "open":
            if tag.name in _CLOSED_BY_THE_NEXT and self.names[-1:] == [tag.name]:
                self._pop()
            self.names.append(tag.name)
            self._count[tag.name] += 1
        elif tag.kind == "close" and self._count[tag.name]:
            while self._pop() != tag.name:
                pass
        elif tag.kind == "comment":
            self._in_comment = True

    def closing(self) -> str:
        """What closes all of it."""
        comment = "-->" if self._in_comment else ""
        return comment + "".join(f"</{name}>" for name in reversed(self.names))

    def _pop(self) -> str:
        name = self.names.pop()
        self._count[name] -= 1
        return name


def tags(html: str, position: int = 0) -> Iterator[Tag]:
    """Tags and comments in order; the text is what lies between them."""
    while found := _markup(html, position):
        start, name = found.start(), (found["name"] or "").lower()
        kind: Literal["open", "close", "other", "comment", "cut"] = "other"
        if found[0] == "<!--":
            # From the second hyphen on: `<!-->` is an empty comment.
            position = html.find("-->", start + 2) + 3
            if position < 3:
                yield Tag("comment", "", start, len(html))
                return
        elif not name:
            position = html.find(">", start) + 1
        else:
            last = _attributes(html, found.end())
            position = last.end() if last else 0
            if found["slash"]:
                kind = "close"
            elif name in _RAW or not (name in _VOID or html.startswith("/>", position - 2)):
                kind = "open"
        if not position:
            yield Tag("cut", "", start, len(html))
            return
        yield Tag(kind, name, start, position)
        if kind == "open" and name in _RAW:
            ending = _raw_ends[name](html, position)
            if ending is None:
                tail = html[-len(name) - 2 :].lower()
                for length in range(len(tail), 0, -1):
                    if tail.endswith(f"</{name}"[:length]):
                        yield Tag("cut", "", len(html) - length, len(html))
                        break
                return
            position = ending.start()


def repaired(html: str) -> str:
    """`html` with everything closed that its end left open, for a preview; unchanged when nothing
    is. A tag that was cut off in the middle is dropped, as a browser would."""
    opened = Opened()
    body = html
    for tag in tags(html):
        if tag.kind == "cut":
            body = html[: tag.start].rstrip("<")
        opened.take(tag)
    return body + opened.closing()


def visible_text(html: str, *, title: bool = False) -> str:
    """The words of the page, separated by single spaces, as far as they can be told without a
    style sheet. Scripts and styles are left out, and the `<title>` unless asked for."""
    unseen = _UNSEEN if title else _UNSEEN | {"title"}
    parts: list[str] = []
    position, seen = 0, True
    for tag in tags(html):
        parts.append(html[position : tag.start] if seen else "")
        if tag.name and tag.name not in _INLINE:
            parts.append(" ")
        seen = not (tag.kind == "open" and tag.name in unseen)
        position = tag.end
    parts.append(html[position:] if seen else "")
    # Numbers too long for a character: html.unescape fails on thousands of digits.
    text = re.sub(r"&#(?:\d{8,}|[xX][0-9a-fA-F]{7,});?", "\ufffd", "".join(parts))
    return " ".join(entities.unescape(text).split())
