"""What a preview or a render shows of a page, and what was changed for it.

Owns the second, separate text that stands in for a page before a browser: what the end left open
is closed, and each image that the page refers to becomes a data URI: a file that exists, a cut-out
of the screenshot where the model gave a box, else a placeholder of its size. The page on disk is
never this text. Knows nothing about browsers, files or versions; the caller says which images
exist. Takes linear time on any text.
"""

from __future__ import annotations

import base64
import functools
import html as entities
import io
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from w2c_tui.core.artifact import Opened, Tag, tags
from w2c_tui.core.conversation import Attachment
from w2c_tui.core.errors import ImageError
from w2c_tui.core.image import DEFAULT_LIMITS, ImageLimits, media_type, open_image

if TYPE_CHECKING:
    from PIL import Image

Find = Callable[[str], bytes | None]
"""The bytes of the image that a relative reference means, None when there is none."""

LARGEST_PAGE = 2_000_000
"""Characters from which on a page is shown as it is; reading it would take seconds."""

_MOST_CARRIED_BYTES = 50_000_000
"""Of images in one page, however often it shows them."""
SIZE_WITHOUT_ONE = (320, 180)
"""Of an image that does not exist and of which nothing says how large it is."""


_attribute = re.compile(
    r"""(?P<name>[^\s"'<>/=]++)(?:\s*+=\s*+(?P<value>"[^"]*+"|'[^']*+'|[^\s"'>]++))?"""
).finditer
_css_url = re.compile(r"""url\(\s*+(?:"([^"()]*+)"|'([^'()]*+)'|([^\s"'()]*+))\s*+\)""", re.I).sub
_length = re.compile(r"\s*+(\d{1,5})(?:\.\d{0,4})?\s*+(?:px)?\s*+\Z").match
_style_size = re.compile(
    r"(?<![\w-])(width|height)\s*+:\s*+(\d{1,5})(?:\.\d{0,4})?px", re.I
).finditer
_is_style_sheet = re.compile(r"""\brel\s*+=\s*+["']?stylesheet\b""", re.I).search
_no_image = re.compile(r"\.(?:css|eot|otf|ttf|woff2?)(?:[?#]|\Z)", re.I).search
_has_scheme = re.compile(r"\s*+(?:[a-z][a-z0-9+.-]*+:|//)", re.I).match

# The attributes that name an image, and those that would choose another one over it.
_SOURCES = {
    "img": ("src",),
    "input": ("src",),
    "video": ("poster",),
    "image": ("href", "xlink:href"),
}
_DROPPED = {"img": ("srcset", "sizes"), "source": ("srcset",)}
_WITH_IMAGES = _SOURCES.keys() | _DROPPED.keys()
_mention = re.compile(r"url\(|\bbackground\s*+=", re.I).search


class StandIn(msgspec.Struct, frozen=True):
    """`html` for a browser, and how it differs from the page."""

    html: str
    closed: bool = False
    num_placeholders: int = 0
    num_cut_out: int = 0
    too_large: bool = False
    num_scripts: int = 0
    num_style_sheets: int = 0
    """Those that the page names by their address. They and the scripts are only counted."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to tell whoever looks at it: one sentence for each difference."""
        images = (
            f"{self.num_placeholders} images do" if self.num_placeholders > 1 else "1 image does"
        )
        placeholders = "placeholders" if self.num_placeholders > 1 else "a placeholder"
        cut = f"{self.num_cut_out} images are" if self.num_cut_out > 1 else "1 image is"
        said = {
            "The page ends early; its open tags are closed here.": self.closed,
            f"{images} not exist, shown as {placeholders}.": self.num_placeholders,
            f"{cut} cut out of the screenshot.": self.num_cut_out,
            "The page is too large to be prepared and is shown as it is.": self.too_large,
        }
        return tuple(sentence for sentence, holds in said.items() if holds)


def stand_in(
    html: str,
    *,
    find: Find = lambda reference: None,
    screenshot: Attachment | None = None,
    close: bool = True,
    labels: bool = True,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> StandIn:
    """`html` as a browser without a network can show it.

    `close` False leaves open what is open: a page that is being written is not at its end.

    `labels` writes an image's alternative text on its placeholder. What is compared has none: the
    words would count as part of the picture.

    `screenshot` allows cut-outs: an `<img>` with `data-bbox="left top right bottom"`, in pixels of
    the screenshot or as fractions of its sides, shows that part of it. That is how some models
    (Qwen2.5-VL's HTML) say where an image was; without a box there is nothing to go by, and the
    image stays a placeholder.
    """
    if len(html) > LARGEST_PAGE:
        return StandIn(html, too_large=True)
    images = _Images(find, screenshot, labels, limits)
    opened = Opened()
    parts: list[str] = []
    position, in_style, cut = 0, False, False
    num_scripts = num_style_sheets = 0
    mentions = _mention(html) is not None
    for tag in tags(html):
        if close:
            opened.take(tag)
        if in_style:
            parts.append(images.in_css(html[position : tag.start]))
            position = tag.start
        in_style = tag.kind == "open" and tag.name == "style"
        if tag.kind == "cut" and close:
            parts.append(html[position : tag.start])
            position, cut = len(html), True
            break
        if in_style:
            parts.append(html[position : tag.end])
            position = tag.end
        elif tag.kind in ("open", "other") and (
            tag.name in _WITH_IMAGES or (mentions and _mention(html, tag.start, tag.end))
        ):
            parts += html[position : tag.start], images.in_tag(tag, html[tag.start : tag.end])
            position = tag.end
        elif tag.name == "script":
            num_scripts += tag.kind == "open"
        elif tag.name == "link":
            num_style_sheets += _is_style_sheet(html, tag.start, tag.end) is not None
    rest = html[position:]
    parts.append(images.in_css(rest) if in_style else rest)
    shown = "".join(parts)
    # As `artifact.repaired` does it.
    closing = opened.closing()
    return StandIn(
        (shown.rstrip("<") if cut else shown) + closing,
        closed=cut or closing != "",
        num_placeholders=images.num_placeholders,
        num_cut_out=images.num_cut_out,
        num_scripts=num_scripts,
        num_style_sheets=num_style_sheets,
    )


def sizes(html: str) -> dict[str, tuple[int, int]]:
    """How large the tags of a page say that its images are, by reference: as large as `stand_in`
    makes their placeholders. Of several sizes for one reference it is the first."""
    found: dict[str, tuple[int, int]] = {}
    if len(html) > LARGEST_PAGE:
        return found
    for tag in tags(html):
        if tag.name not in _SOURCES or tag.kind not in ("open", "other"):
            continue
        values = _values(_attribute(html[tag.start : tag.end], 1 + len(tag.name)))
        for name in _SOURCES[tag.name]:
            if reference := values.get(name, "").strip():
                found.setdefault(reference, _size(values))
    return found


class _Images:
    """Where the images of one page come from, and how many came from nowhere."""

    def __init__(
        self, find: Find, screenshot: Attachment | None, labels: bool, limits: ImageLimits
    ) -> None:
        self.num_placeholders = 0
        self.num_cut_out = 0
        self._find = find
        self._screenshot = screenshot
        self._labels = labels
        self._limits = limits
        self._carried_bytes = 0
        self._opened: Image.Image | None = None

    def in_tag(self, tag: Tag, source: str) -> str:
        """The tag with its image references replaced."""
        wanted, dropped = _SOURCES.get(tag.name, ()), _DROPPED.get(tag.name, ())
        found = list(_attribute(source, 1 + len(tag.name)))
        values = _values(found)
        parts, position = [], 0
        for match in found:
            name, value = match["name"].lower(), _unquoted(match["value"])
            replacement = None
            if name in dropped and (tag.name == "source" or values.get("src")):
                replacement = ""
            elif name in wanted and value.strip():
                replacement = self._image(value, values)
            elif name == "background" and value.strip():
                replacement = self._resolved(value) or self._placeholder("", 8, 8)
            elif name == "style" and "url(" in value.lower():
                replacement = self.in_css(value)
            if replacement is None or replacement == value:
                continue
            parts.append(source[position : match.start()])
            if replacement:
                parts.append(f'{match["name"]}="{entities.escape(replacement)}"')
            position = match.end()
        return "".join([*parts, source[position:]])

    def in_css(self, css: str) -> str:
        """The style sheet with its image references replaced."""

        def image(match: re.Match[str]) -> str:
            value = match[1] or match[2] or match[3] or ""
            if not value or value.startswith("#") or _no_image(value):
                return match[0]
            return f'url("{self._resolved(value) or self._placeholder("", 8, 8)}")'

        return _css_url(image, css) if "url(" in css.lower() else css

    def _image(self, reference: str, attributes: dict[str, str]) -> str:
        cut = self._cut_out(attributes.get("data-bbox", ""))
        if cut is not None:
            return cut
        resolved = self._resolved(reference)
        if resolved is not None:
            return resolved
        width, height = _size(attributes)
        return self._placeholder(attributes.get("alt", ""), width, height)

    def _resolved(self, reference: str) -> str | None:
        """The reference as it is when it carries its image, a data URI when there is one."""
        if reference.lstrip()[:5].lower() == "data:":
            return reference
        if _has_scheme(reference):
            return None
        data = self._find(reference.strip())
        if data is None:
            return None
        kind = media_type(data)
        return self._carried(kind, data) if kind.startswith("image/") else None

    def _carried(self, kind: str, data: bytes) -> str | None:
        self._carried_bytes += len(data)
        if self._carried_bytes > _MOST_CARRIED_BYTES:
            return None
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def _cut_out(self, box: str) -> str | None:
        if not box or self._screenshot is None or self._carried_bytes > _MOST_CARRIED_BYTES:
            return None
        try:
            left, top, right, bottom = map(float, re.split(r"[\s,]+", box.strip(" []()")))
        except ValueError:
            return None
        size = self._screenshot.width, self._screenshot.height
        if max(left, top, right, bottom) <= 1:
            left, right, top, bottom = (
                left * size[0],
                right * size[0],
                top * size[1],
                bottom * size[1],
            )
        if not (0 <= left < right <= size[0] + 1 and 0 <= top < bottom <= size[1] + 1):
            return None
        try:
            self._opened = self._opened or open_image(self._screenshot, self._limits)
        except ImageError:
            return None
        corner = round(left), round(top)
        piece = self._opened.crop(
            (*corner, max(round(right), corner[0] + 1), max(round(bottom), corner[1] + 1))
        )
        buffer = io.BytesIO()
        piece.save(buffer, "PNG", compress_level=1)
        uri = self._carried("image/png", buffer.getvalue())
        self.num_cut_out += uri is not None
        return uri

    def _placeholder(self, words: str, width: int, height: int) -> str:
        self.num_placeholders += 1
        label = " ".join(words.split())[: width // 8] if self._labels and height >= 20 else ""
        return _placeholder(label, width, height)


def placeholder(label: str = "", size: tuple[int, int] = SIZE_WITHOUT_ONE) -> str:
    """A quiet picture, as SVG, that says that there is none."""
    width, height = size
    text = (
        f'<text x="50%" y="50%" fill="#6b7280" font-family="sans-serif" font-size="13"'
        f' text-anchor="middle" dominant-baseline="middle">{entities.escape(label)}</text>'
        if label
        else ""
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="#e5e7eb"/>{text}</svg>'
    )


@functools.lru_cache(256)
def _placeholder(label: str, width: int, height: int) -> str:
    return "data:image/svg+xml," + quote(placeholder(label, (width, height)), safe=" =:/")


def _values(found: Iterable[re.Match[str]]) -> dict[str, str]:
    """Attributes by name; of equal ones the first counts."""
    values: dict[str, str] = {}
    for match in found:
        values.setdefault(match["name"].lower(), _unquoted(match["value"]))
    return values


def _size(attributes: dict[str, str]) -> tuple[int, int]:
    """Width and height in pixels, as far as the tag itself says them."""
    known: dict[str, int] = {}
    for name in ("width", "height"):
        if given := _length(attributes.get(name, "")):
            known[name] = int(given[1])
    for given in _style_size(attributes.get("style", "")):
        known[given[1].lower()] = int(given[2])
    width, height = known.get("width"), known.get("height")
    if width is None and height is None:
        return SIZE_WITHOUT_ONE
    ratio = SIZE_WITHOUT_ONE[0] / SIZE_WITHOUT_ONE[1]
    return width or round((height or 1) * ratio), height or max(1, round((width or 1) / ratio))


def _unquoted(value: str | None) -> str:
    if value is None:
        return ""
    bare = value[1:-1] if value[:1] in "\"'" and len(value) > 1 else value
    try:
        return entities.unescape(bare)
    except ValueError:
        # A character number of thousands of digits.
        return bare
