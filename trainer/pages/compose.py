"""A web page from a seed: a layout, a theme, words, and the short HTML that shows them.

Owns what composed pages look like. The same seed and index give the same page on every machine that
has the same version of Faker. Knows nothing about browsers, files or models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import msgspec

from trainer.pages.markup import Dialect, Element, page_html
from trainer.pages.palette import Theme, contrast, draw_theme, ink_on
from trainer.pages.words import Words
from w2c_tui.core.colors import COLORS, DARK, VIVID

WIDTHS = (1280, 1024, 1440, 768, 480)
"""Widths of the window in px, the likelier first."""


MAX_CHARACTERS = 1600
"""A page that comes out longer is drawn again: about 600 tokens of SmolLM2."""
_MOST_DRAWS = 8
FREE_SHARE = 0.5
"""Of the parts of pages: those that are composed of any pieces instead of being cut out."""
NARROWEST_PART = 300
"""In px: about a card in a row of four."""
_Layout = Callable[["_Composer"], list[Element]]


class Block(msgspec.Struct, frozen=True):
    """A part of a page, in words. `color` is its background, `first_text` where it begins."""

    kind: str
    color: str
    detail: str
    first_text: str


class ComposedPage(msgspec.Struct, frozen=True):
    """`html` is what is to be learnt; a window of `width` px shows it, at least `height` high."""

    html: str
    dialect: Dialect
    language: str
    width: int
    height: int
    layout: str
    theme: Theme
    blocks: tuple[Block, ...]


def compose(
    seed: int,
    index: int,
    widths: Sequence[int] = WIDTHS,
    inline_share: float = 0.15,
    part_share: float = 0.0,
    stack_share: float = 0.0,
) -> ComposedPage:
    """Page number `index` of the set that `seed` makes.

    `part_share` of the pages are but a part of one, a section or a card, cut off at its edges;
    `stack_share` of the others are many sections in no usual order, some of them in rows alike.
    """
    # Strings seed through SHA-512: the same on every platform, and pages are independent.
    rng = random.Random(f"w2c page {seed} {index}")
    names, weights = zip(*_LAYOUTS, strict=True)
    layout = rng.choices(names, weights)[0]
    # Nothing is drawn for what is not asked for: the pages of a seed stay what they were.
    part = part_share > 0 and rng.random() < part_share
    if part:
        layout = _freely if rng.random() < FREE_SHARE else layout
    elif stack_share > 0 and rng.random() < stack_share:
        layout = _stacked
    drawn = [_draw(layout, rng, widths, inline_share, part)]
    while len(drawn[-1].html) > MAX_CHARACTERS and len(drawn) < _MOST_DRAWS:
        drawn.append(_draw(layout, rng, widths, inline_share, part))
    return min(drawn, key=lambda page: len(page.html))


def _draw(
    layout: _Layout, rng: random.Random, widths: Sequence[int], inline_share: float, part: bool
) -> ComposedPage:
    shares = [1 / (1 + at) for at in range(len(widths))]
    width = rng.choices(widths, shares)[0]
    if part:
        width = rng.randint(min(NARROWEST_PART, width), width)
    theme = draw_theme(rng)
    if part and rng.random() < 0.6:
        inks = _inks(theme.page)
        theme = msgspec.structs.replace(theme, text=rng.choice(inks)) if inks else theme
    words = Words(rng)
    dialect: Dialect = "inline" if rng.random() < inline_share else "classes"
    composer = _Composer(rng, theme, words, width)
    body = tuple(layout(composer))
    blocks = tuple(composer.blocks)
    if part:
        found = [*_parts(body)]
        body = (rng.choice(found),) if found else body
        texts = set(_all_texts(*body))
        blocks = tuple(block for block in blocks if block.first_text in texts)
    body_style = _css(
        f"margin:0;background:{theme.page};color:{theme.text};font-family:{theme.font_family}",
        *_typography(rng),
    )
    html = page_html(
        body, title=words.brand, language=words.language, body_style=body_style, dialect=dialect
    )
    # A part is as high as it is; the window in which a page is seen may be higher than the page.
    height = 0 if part else round(width * rng.choice((0.3, 0.3, 0.4, 0.5, 0.5625, 0.625)))
    return ComposedPage(
        html=html,
        dialect=dialect,
        language=words.language,
        width=width,
        height=height,
        layout=layout.__name__.removeprefix("_"),
        theme=theme,
        blocks=blocks,
    )


def _inks(ground: str) -> list[str]:
    """Colours but white that can be read on `ground` and on white, as a box on it may be."""
    if ink_on(ground) == "white":
        return []
    return [c for c in COLORS if contrast(c, ground) >= 3 and contrast(c, "white") >= 3]


_NO_PART = frozenset(("nav", "tr", "button", "a"))


def _parts(body: Sequence[Element], outermost: bool = True) -> Iterator[Element]:
    """What could be cut out of a page: what spans it, or has a ground of its own, and texts."""
    for element in body:
        if element.tag in _NO_PART:
            continue
        if len(set(_all_texts(element))) > 1 and (outermost or "background:" in element.style):
            yield element
        children = [child for child in element.children if isinstance(child, Element)]
        yield from _parts(children, outermost=False)


def _all_texts(*elements: Element | str) -> Iterator[str]:
    for element in elements:
        if isinstance(element, str):
            yield element
        else:
            yield from _all_texts(*element.children)


def _typography(rng: random.Random) -> Iterator[str]:
    """Size and distance of lines where they are not those of the browser, on most pages."""
    if rng.random() < 0.25:
        yield f"font-size:{rng.choice((14, 15, 17, 18))}px"
    if rng.random() < 0.45:
        yield f"line-height:{rng.choice(('1.4', '1.5', '1.5', '1.6', '1.8'))}"


def _css(*parts: str) -> str:
    return ";".join(part for part in parts if part)


def _first_text(*elements: Element | str) -> str:
    """The text with which `elements` begin; empty if they have none."""
    for element in elements:
        text = element if isinstance(element, str) else _first_text(*element.children)
        if text:
            return text
    return ""


class _Composer:
    """The blocks of one page. Every method draws one and returns its element."""

    def __init__(self, rng: random.Random, theme: Theme, words: Words, width: int) -> None:
        self.rng = rng
        self.theme = theme
        self.words = words
        self.width = width
        self.blocks: list[Block] = []

    # --- parts -----------------------------------------------------------------------------------

    @property
    def narrow(self) -> bool:
        return self.width < 600

    @property
    def rounded(self) -> str:
        return f"border-radius:{self.theme.radius}px" if self.theme.radius else ""

    def note(self, kind: str, color: str, first_text: str, detail: str = "") -> None:
        self.blocks.append(Block(kind, color, detail, first_text))

    def band(self, *others: str) -> str:
        """A background for a part that goes from side to side."""
        return self.rng.choice([self.theme.band, self.theme.accent, self.theme.surface, *others])

    def card_style(self, background: str = "") -> str:
        theme = self.theme
        extra = {
            "flat": "",
            "border": f"border:1px solid {theme.line}",
            "shadow": "box-shadow:0 2px 8px #999",
            "top": f"border-top:4px solid {theme.accent}",
        }[theme.card]
        return _css(
            self.paint(background or theme.surface),
            f"padding:{theme.space}px",
            extra,
            self.rounded,
        )

    def paint(self, background: str, around: str = "") -> str:
        """A background, and a text colour where the text around it could not be read there."""
        inherited = ink_on(around) if around else self.theme.text
        ink = ink_on(background)
        same = (ink == "white") == (inherited == "white")
        return f"background:{background}" if same else f"background:{background};color:{ink}"

    def row(self, *children: Element, style: str = "", tag: str = "div") -> Element:
        direction = "flex-direction:column" if self.narrow and len(children) > 1 else ""
        gap = f"gap:{self.theme.space}px"
        return Element(tag, _css("display:flex", direction, gap, style), children, "row")

    def button(self, text: str, color: str, ground: str) -> Element:
        """A button of `color` on `ground`; another colour where it could not be seen."""
        theme = self.theme
        if contrast(color, ground) < 1.4:
            color = theme.second if contrast(theme.second, ground) >= 1.4 else ink_on(ground)
        radius = "border-radius:24px" if theme.button == "pill" else self.rounded
        if theme.button == "outline":
            color = color if contrast(color, ground) >= 2.5 else ink_on(ground)
            look = _css("background:none", f"color:{color}", f"border:2px solid {color}")
        else:
            look = _css(f"background:{color}", f"color:{ink_on(color)}", "border:0")
        return Element("button", _css(look, "padding:10px 20px", radius), (text,), "btn")

    def picture(self, height: int, extra: str = "", ground: str = "") -> Element:
        theme = self.theme
        colors = (theme.accent, theme.second, theme.second, "#bbb", "#999")
        color = self.rng.choice([c for c in colors if c != (ground or theme.surface)])
        return Element("div", _css(f"height:{height}px", f"background:{color}", extra), (), "img")

    def avatar(self, size: int = 48) -> Element:
        color = self.rng.choice((self.theme.accent, self.theme.second, "#bbb"))
        style = f"width:{size}px;height:{size}px;border-radius:50%;background:{color}"
        return Element("div", style, (), "avatar")

    def heading(self, level: int, text: str, style: str = "") -> Element:
        return Element(f"h{level}", style, (text,), f"h{level}" if style else "")

    def paragraph(self, text: str, style: str = "") -> Element:
        return Element("p", style, (text,), "text" if style else "")

    def section_title(self) -> list[Element]:
        if self.rng.random() < 0.65:
            align = "text-align:center" if self.theme.centered else ""
            text = self.words.label("section") if self.rng.random() < 0.6 else self.words.heading()
            return [self.heading(2, text, align)]
        return []

    def columns(self, fewest: int = 2, most: int = 4) -> int:
        most = min(most, 2 if self.narrow else 3 if self.width < 1000 else 4)
        return self.rng.randint(min(fewest, most), most)

    # --- blocks ----------------------------------------------------------------------------------

    def navigation(self, place: str = "menu") -> Element:
        color = self.rng.choice([self.theme.accent, self.theme.surface, *DARK[1:5], "white"])
        links = self.words.labels(place, self.rng.randint(2, 3 if self.narrow else 6))
        brand = Element("b", self.rng.choice(("", "font-size:20px")), (self.words.brand,), "brand")
        shape = self.rng.choice(("between", "left", "right"))
        anchors = tuple(Element("a", "", (link,)) for link in links)
        self.note("navigation", color, self.words.brand)
        style = _css("align-items:center", f"padding:{self.theme.space}px")
        style = _css("display:flex", f"gap:{self.theme.space}px", style)
        colors = self.paint(color)
        if shape == "left":
            return Element("nav", _css(style, colors), (brand, *anchors), "navbar")
        if shape == "right":
            links_box = Element("a", "margin-left:auto", (links[0],), "first")
            return Element("nav", _css(style, colors), (brand, links_box, *anchors[1:]), "navbar")
        last = (
            self.button(self.words.label("action"), self.theme.second, color)
            if self.rng.random() < 0.5 and not self.narrow
            else Element("a", "", (self.words.label("submit"),))
        )
        style = _css(style, "justify-content:space-between")
        middle = Element("span", f"display:flex;gap:{self.theme.space}px", anchors, "links")
        return Element("nav", _css(style, colors), (brand, middle, last), "navbar")

    def hero(self) -> Element:
        color = self.band(self.theme.page, *DARK[:3], self.theme.second)
        size = self.rng.choice(("", "", "font-size:40px", "font-size:48px"))
        if self.narrow:
            size = ""
        texts: list[Element] = [self.heading(1, self.words.heading(), size)]
        texts.append(self.paragraph(self.words.text(self.rng.choice((1, 1, 2)))))
        kind = self.rng.choice(("center", "left", "picture left", "picture right"))
        if kind != "center" and self.rng.random() < 0.3:
            small = f"color:{self.theme.second}" if self.theme.second != color else ""
            texts.insert(0, Element("small", small, (self.words.title(),), "label"))
        if self.rng.random() < 0.85:
            texts.append(self.button(self.words.label("action"), self.theme.accent, color))
            if self.rng.random() < 0.25:
                texts.append(Element("a", "margin-left:16px", (self.words.label("action"),)))
        space = self.rng.choice((32, 48, 64)) if not self.narrow else 24
        base = _css(f"padding:{space}px", self.paint(color))
        first = _first_text(*texts)
        self.note("hero", color, first, kind)
        if kind == "center":
            return Element("header", _css(base, "text-align:center"), tuple(texts), "hero")
        if kind == "left" or self.narrow:
            return Element("header", base, tuple(texts), "hero")
        picture = self.picture(
            self.rng.choice((200, 240, 320)), _css("flex:1", self.rounded), color
        )
        text = Element("div", "flex:1", tuple(texts), "col")
        pair = (picture, text) if kind == "picture left" else (text, picture)
        style = _css("display:flex", f"gap:{space}px", "align-items:center", base)
        return Element("header", style, pair, "hero")

    def section(self, *children: Element, color: str = "", extra: str = "") -> Element:
        if len(children) == 1 and children[0].role == "row" and not color:
            style = _css(children[0].style, f"padding:{self.theme.space}px", extra)
            return Element("section", style, children[0].children, "row")
        look = self.paint(color) if color else ""
        return Element(
            "section", _css(f"padding:{self.theme.space}px", look, extra), children, "section"
        )

    def cards(self) -> Element:
        pictures = self.rng.random()
        height = self.rng.choice((80, 120, 160))
        buttons = self.rng.random() < 0.3
        look = self.card_style()
        num = self.columns(2, 4)
        made = []
        for _ in range(num):
            inside: list[Element] = []
            if pictures < 0.45:
                inside.append(self.picture(height, self.rounded if pictures < 0.2 else ""))
            elif pictures < 0.6:
                inside.append(self.avatar(40))
            inside.append(self.heading(3, self.words.title()))
            inside.append(self.paragraph(self.words.sentence(3, 8)))
            if buttons:
                inside.append(
                    self.button(self.words.label("action"), self.theme.accent, self.theme.surface)
                )
            made.append(Element("div", _css("flex:1", look), tuple(inside), "card"))
        title = self.section_title()
        first = _first_text(*title, *made)
        self.note("cards", self.theme.surface, first, str(num))
        return self.section(*title, self.row(*made))

    def panels(self) -> Element:
        """Boxes with a head, as Bootstrap's cards have it."""
        theme = self.theme
        num = self.columns(1, 3)
        head = self.rng.choice((theme.page, "whitesmoke", "#eee", theme.accent))
        space = self.rng.choice((8, 12, 16))
        line = f"border:1px solid {theme.line}"
        under = f"padding:{space}px {theme.space}px;border-bottom:1px solid {theme.line}"
        made = []
        for _ in range(num):
            title: Element = Element("div", _css(under, self.paint(head)), (self.words.title(),))
            text = self.words.text(self.rng.randint(1, 3))
            inside = [self.paragraph(text, "margin:0")]
            if self.rng.random() < 0.25:
                inside.append(self.paragraph(self.words.text(1)))
            body = Element("div", f"padding:{theme.space}px", tuple(inside), "body")
            style = _css("flex:1", self.paint(theme.surface), line, self.rounded)
            made.append(Element("div", style, (title, body), "panel"))
        self.note("panels", head, _first_text(*made), str(num))
        if num > 1 and self.rng.random() < 0.35:
            stack = f"display:flex;flex-direction:column;gap:{theme.space}px"
            return self.section(Element("div", stack, tuple(made), "stack"))
        return self.section(self.row(*made))

    def about(self) -> Element:
        """A heading over a longer text, in the middle of the page."""
        color = self.band(self.theme.page, self.theme.page)
        title = self.words.heading()
        size = "" if self.narrow else f"max-width:{self.rng.choice((560, 640, 720))}px"
        place = "margin:16px auto" if size else ""
        parts: list[Element] = [self.heading(self.rng.choice((1, 2)), title)]
        parts.append(self.paragraph(self.words.text(self.rng.randint(2, 4)), _css(size, place)))
        if self.rng.random() < 0.4:
            parts.append(self.button(self.words.label("action"), self.theme.accent, color))
        self.note("about", color, title, "center")
        space = f"padding:{self.rng.choice((24, 48, 64))}px"
        look = _css(self.paint(color), "text-align:center")
        return Element("section", _css(space, look), tuple(parts), "about")

    def tiles(self) -> Element:
        """Numbers, as dashboards show them."""
        num = self.columns(2, 4)
        colored = self.rng.random() < 0.4
        bar = self.rng.random() < 0.25
        metrics = self.words.labels("metric", num)
        made = []
        for at, metric in enumerate(metrics):
            color = (
                (self.theme.accent, self.theme.second)[at % 2] if colored else self.theme.surface
            )
            number = self.heading(2, self.words.number(), "margin:0")
            label = Element("div", "", (metric,))
            parts = [label, number] if self.rng.random() < 0.5 else [number, label]
            if bar and not colored:
                share = self.rng.choice((25, 40, 50, 60, 75, 90))
                style = f"width:{share}%;height:8px;background:{self.theme.accent}"
                parts.append(Element("div", style, (), "bar"))
            made.append(
                Element("div", _css("flex:1", self.card_style(color)), tuple(parts), "tile")
            )
        color = "alternating" if colored else self.theme.surface
        self.note("tiles", color, _first_text(*made), str(len(made)))
        return self.section(self.row(*made))

    def table(self) -> Element:
        columns = self.words.labels("column", self.rng.randint(2, 3 if self.narrow else 5))
        rows = self.rng.randint(2, 5 if len(columns) < 4 else 4)
        head = self.rng.choice([self.theme.accent, self.theme.second, *DARK[1:4], "#ddd"])
        surface = self.theme.surface
        pad = f"padding:{self.rng.choice((6, 8, 12))}px"
        lines = f"border-bottom:1px solid {self.theme.line}" if self.rng.random() < 0.5 else ""
        striped = not lines and self.rng.random() < 0.5
        top = Element(
            "tr",
            f"background:{head};color:{ink_on(head)};text-align:left",
            tuple(Element("th", pad, (name,), "th") for name in columns),
            "head",
        )
        body = []
        for at in range(rows):
            stripe = self.paint(self.theme.page, surface)
            cells = tuple(Element("td", pad, (self.words.cell(name),), "td") for name in columns)
            if not at % 2 or not striped:
                stripe = lines
            body.append(Element("tr", stripe, cells, "stripe" if stripe else ""))
        self.note("table", surface, columns[0], f"head {head}, {len(columns)} columns")
        colors = self.paint(surface)
        table = Element("table", f"width:100%;border-spacing:0;{colors}", (top, *body), "table")
        return self.section(*self.section_title(), table)

    def fields(self, num: int, color: str) -> list[Element]:
        line = f"border:1px solid {self.theme.line}"
        style = _css("width:100%", "padding:10px", line, self.rounded)
        labelled = self.rng.random() < 0.5
        made: list[Element] = []
        for name in self.words.labels("field", num):
            given: tuple[tuple[str, str], ...] = ()
            if labelled:
                made.append(Element("label", "", (name,)))
            else:
                given = (("placeholder", name),)
            if self.rng.random() < 0.12:
                tall = _css(style, "height:80px")
                made.append(Element("textarea", tall, (), "control", given))
            else:
                made.append(Element("input", style, (), "control", given))
        return made

    def form(self, wide: bool = False) -> Element:
        color = self.theme.surface
        title = self.words.label("form") if self.rng.random() < 0.75 else self.words.heading()
        parts: list[Element] = [self.heading(2, title, "margin:0")]
        if self.rng.random() < 0.4:
            parts.append(self.paragraph(self.words.sentence(4, 8), "margin:0"))
        parts += self.fields(self.rng.randint(2, 4), color)
        if self.rng.random() < 0.35:
            box = Element("input", "", (), "", (("type", "checkbox"),))
            parts.append(Element("label", "", (box, self.words.label("remember"))))
        parts.append(self.button(self.words.label("submit"), self.theme.accent, color))
        if self.rng.random() < 0.35:
            parts.append(
                Element(
                    "a", f"color:{self._readable(self.theme.accent)}", (self.words.label("forgot"),)
                )
            )
        size = "" if wide or self.narrow else f"max-width:{self.rng.choice((360, 420, 480, 560))}px"
        margin = "" if wide else f"margin:{self.rng.choice((24, 40, 64))}px auto"
        if self.narrow:
            margin = "" if wide else f"margin:{self.theme.space}px"
        layout = _css("display:flex", "flex-direction:column", "gap:12px")
        self.note("form", color, title, self.theme.accent)
        style = _css("flex:1" if wide else "", size, margin, layout, self.card_style())
        return Element("form", style, tuple(parts), "form")

    def article(self, paragraphs: int = 0) -> Element:
        title = self.words.heading()
        parts: list[Element] = [self.heading(1, title)]
        if self.rng.random() < 0.6:
            byline = f"{self.words.person()}, {self.words.date()}"
            parts.append(self.paragraph(byline, f"color:{self.theme.muted}"))
        if self.rng.random() < 0.4:
            parts.append(self.picture(self.rng.choice((160, 240)), self.rounded, self.theme.page))
        for at in range(paragraphs or self.rng.randint(2, 3)):
            if at and self.rng.random() < 0.3:
                parts.append(self.heading(3, self.words.title()))
            parts.append(self.paragraph(self.words.text(self.rng.randint(1, 3))))
        extra = self.rng.random()
        if extra < 0.2:
            style = f"border-left:4px solid {self.theme.accent};margin:0;padding-left:16px"
            parts.append(Element("blockquote", style, (self.words.sentence(),), "quote"))
        elif extra < 0.4:
            items = tuple(Element("li", "", (self.words.phrase(2, 5),)) for _ in range(3))
            parts.append(Element("ul", "", items))
        size = "" if self.narrow else f"max-width:{self.rng.choice((640, 720, 800))}px"
        place = "margin:auto" if size and self.rng.random() < 0.5 else ""
        self.note("article", self.theme.page, title)
        style = _css(f"padding:{self.theme.space}px", size, place)
        return Element("article", style, tuple(parts), "article")

    def pricing(self) -> Element:
        plans = self.words.labels("plan", self.columns(2, 3))
        best = self.rng.randrange(len(plans))
        filled = self.rng.random() < 0.5
        per = self.words.label("per")
        made = []
        for at, plan in enumerate(plans):
            chosen = at == best
            color = self.theme.accent if chosen and filled else self.theme.surface
            border = f"border:3px solid {self.theme.accent}" if chosen and not filled else ""
            look = self.paint(color)
            parts = [
                self.heading(3, plan),
                self.heading(2, f"{self.words.price()}/{per}"),
                *(self.paragraph(self.words.phrase(2, 3)) for _ in range(self.rng.choice((1, 2)))),
                self.button(self.words.label("action"), self.theme.accent, color),
            ]
            style = _css("flex:1", f"padding:{self.theme.space}px", look, border, self.rounded)
            made.append(Element("div", style, tuple(parts), "plan"))
        title = self.section_title()
        first = _first_text(*title, *made)
        self.note("pricing", self.theme.surface, first, f"{len(plans)}, number {best + 1} marked")
        return self.section(*title, self.row(*made), extra="text-align:center")

    def gallery(self) -> Element:
        num = self.columns(2, 4)
        rows = self.rng.choice((1, 2))
        height = self.rng.choice((80, 120, 160))
        captions = self.rng.random() < 0.4 and num * rows <= 6
        colors = self.rng.sample(VIVID, 3)
        made = []
        for at in range(num * rows):
            color = colors[at % 3]
            text = (self.words.title(),) if captions else ()
            ink = f"color:{ink_on(color)};padding:8px" if captions else ""
            style = _css(f"height:{height}px", f"background:{color}", ink, self.rounded)
            made.append(Element("div", style, text, "photo"))
        grid = f"display:grid;grid-template-columns:repeat({num},1fr);gap:{self.theme.space}px"
        title = self.section_title()
        first = _first_text(*title, *made)
        self.note("gallery", " ".join(colors), first, f"{num} columns, {rows} rows")
        return self.section(*title, Element("div", grid, tuple(made), "grid"))

    def products(self) -> Element:
        num = self.columns(2, 4)
        made = []
        height = self.rng.choice((100, 140, 180))
        for _ in range(num):
            price = Element(
                "b", f"color:{self._readable(self.theme.accent)}", (self.words.price(),)
            )
            parts = [
                self.picture(height),
                self.heading(4, self.words.title(), "margin:8px 0"),
                Element("p", "margin:8px 0", (price,), "price"),
                self.button(self.words.label("action"), self.theme.accent, self.theme.surface),
            ]
            made.append(Element("div", _css("flex:1", self.card_style()), tuple(parts), "product"))
        title = self.section_title()
        first = _first_text(*title, *made)
        self.note("products", self.theme.surface, first, str(num))
        return self.section(*title, self.row(*made))

    def chart(self) -> Element:
        title = self.words.label("metric")
        heights = [
            self.rng.choice((20, 40, 60, 80, 100, 120)) for _ in range(self.rng.randint(5, 8))
        ]
        color = self.rng.choice((self.theme.accent, self.theme.second))
        bars = tuple(
            Element("div", f"flex:1;height:{h}px;background:{color}", (), f"bar-{h}")
            for h in heights
        )
        box = Element("div", "display:flex;gap:8px;align-items:flex-end", bars, "chart")
        self.note("chart", self.theme.surface, title, f"{len(heights)} bars {color}")
        style = _css("flex:1", self.card_style())
        return Element("div", style, (self.heading(3, title, "margin-top:0"), box), "card")

    def progress(self) -> Element:
        title = self.words.label("section")
        parts: list[Element] = [self.heading(3, title, "margin-top:0")]
        for _ in range(self.rng.randint(2, 4)):
            share = self.rng.choice((20, 35, 50, 65, 80, 95))
            fill = f"width:{share}%;height:10px;background:{self.theme.accent}"
            bar = Element("div", fill, (), f"w-{share}")
            parts.append(self.paragraph(self.words.phrase(1, 2), "margin:8px 0"))
            parts.append(Element("div", "background:#ddd", (bar,), "progress"))
        self.note("progress", self.theme.surface, title, self.theme.accent)
        style = _css("flex:1", self.card_style())
        return Element("div", style, tuple(parts), "card")

    def people(self) -> Element:
        """A list of names, as teams, inboxes and reviews have it."""
        title = self.words.label("section")
        rows = []
        line = f"border-bottom:1px solid {self.theme.line}"
        for _ in range(self.rng.randint(2, 4)):
            name = Element("b", "", (self.words.person(),))
            text = self.words.job() if self.rng.random() < 0.6 else self.words.phrase(2, 5)
            about = Element("div", "", (name, Element("div", "", (text,))), "")
            style = f"display:flex;gap:12px;align-items:center;padding:10px 0;{line}"
            rows.append(Element("div", style, (self.avatar(40), about), "item"))
        self.note("list", self.theme.surface, title, str(len(rows)))
        style = _css("flex:1", self.card_style())
        return Element("div", style, (self.heading(3, title, "margin:0"), *rows), "card")

    def team(self) -> Element:
        return self.section(self.people())

    def questions(self) -> Element:
        title = self.words.label("section")
        parts: list[Element] = [self.heading(2, title)]
        for _ in range(self.rng.randint(2, 3)):
            parts.append(self.heading(4, f"{self.words.phrase(3, 6)}?"))
            parts.append(self.paragraph(self.words.sentence()))
        self.note("questions", self.theme.page, title)
        return self.section(*parts)

    def quote(self) -> Element:
        color = self.band()
        text = self.words.sentence(8, 14)
        name = Element("b", "", (self.words.person(),))
        self.note("quote", color, text)
        look = _css(self.paint(color), "text-align:center")
        space = f"padding:{self.rng.choice((24, 32, 48))}px"
        return Element(
            "section",
            _css(look, space),
            (self.paragraph(f"“{text}”", "font-size:20px"), name),
            "quote",
        )

    def call(self) -> Element:
        color = self.band(self.theme.second)
        title = self.words.heading()
        parts: list[Element] = [self.heading(2, title)]
        if self.rng.random() < 0.6:
            parts.append(self.paragraph(self.words.sentence()))
        parts.append(self.button(self.words.label("action"), self.theme.second, color))
        self.note("call", color, title, "center")
        look = _css(self.paint(color), "text-align:center")
        space = f"padding:{self.rng.choice((24, 32, 48))}px"
        return Element("section", _css(space, look), tuple(parts), "banner")

    def steps(self) -> Element:
        num = self.columns(2, 4)
        made = []
        for at in range(num):
            circle = Element(
                "div",
                f"width:40px;height:40px;border-radius:50%;background:{self.theme.accent};"
                f"color:{ink_on(self.theme.accent)};text-align:center;line-height:40px",
                (str(at + 1),),
                "number",
            )
            parts = (
                circle,
                self.heading(3, self.words.title()),
                self.paragraph(self.words.sentence(3, 7)),
            )
            made.append(Element("div", "flex:1", parts, "col"))
        self.note("steps", self.theme.page, _first_text(*made[0].children[1:]), str(num))
        return self.section(*self.section_title(), self.row(*made))

    def notice(self) -> Element:
        color = self.rng.choice(("cornsilk", "mistyrose", "honeydew", "lightcyan"))
        ink = self.rng.choice(("maroon", "navy", "darkgreen", "#333"))
        text = self.words.sentence(4, 9)
        self.note("notice", color, text)
        style = f"background:{color};color:{ink};padding:12px {self.theme.space}px"
        return Element("div", style, (text,), "alert")

    def sidebar(self, place: str = "app") -> Element:
        color = self.rng.choice([self.theme.accent, self.theme.surface, *DARK[:5]])
        width = self.rng.choice((160, 200, 220, 260))
        links = self.words.labels(place, self.rng.randint(3, 6))
        parts: list[Element] = []
        if self.rng.random() < 0.7:
            parts.append(self.heading(3, self.words.brand))
        marked = self.rng.randrange(len(links)) if self.rng.random() < 0.6 else -1
        for at, link in enumerate(links):
            style = ""
            if at == marked:
                other = self.theme.second if self.theme.second != color else self.theme.accent
                style = _css(self.paint(other, color), "padding:8px")
            parts.append(Element("p", style, (link,), "active" if style else ""))
        self.note("sidebar", color, _first_text(*parts), str(len(links)))
        look = self.paint(color)
        size = _css("" if self.narrow else f"width:{width}px", f"padding:{self.theme.space}px")
        return Element("aside", _css(size, look), tuple(parts), "sidebar")

    def footer(self) -> Element:
        color = self.band(*DARK[:4])
        look = _css(self.paint(color), f"padding:{self.theme.space}px")
        kind = self.rng.randrange(3)
        year = self.rng.randint(2019, 2027)
        if kind == 0 and not self.narrow:
            made = []
            for _ in range(self.rng.randint(2, 4)):
                links = tuple(
                    Element("div", "", (label,)) for label in self.words.labels("menu", 3)
                )
                made.append(
                    Element("div", "flex:1", (self.heading(4, self.words.title()), *links), "col")
                )
            self.note("footer", color, _first_text(*made), "columns")
            row = f"display:flex;gap:{self.theme.space}px"
            return Element("footer", _css(row, look), tuple(made), "footer")
        text = f"© {year} {self.words.brand}"
        self.note("footer", color, text)
        if kind == 1 and not self.narrow:
            links = tuple(Element("a", "", (label,)) for label in self.words.labels("legal", 3))
            row = f"display:flex;gap:{self.theme.space}px"
            first = Element("span", "margin-right:auto", (text,), "first")
            return Element("footer", _css(row, look), (first, *links), "footer")
        if self.rng.random() < 0.5:
            text = f"{text}. {self.words.label('note')}"
        align = self.rng.choice(("text-align:center", "", "text-align:center"))
        return Element("footer", _css(look, align), (text,), "footer")

    # --- pieces of no particular block ------------------------------------------------------------

    def piece(self, depth: int, ground: str) -> Callable[[], Element]:
        """Something on `ground`, with others in it up to `depth`; each call has other words."""
        draws = [self._words_piece, self._words_piece, self._words_piece, self._control_piece]
        if depth:
            draws += [self._row_piece, self._row_piece, self._box_piece]
        return self.rng.choice(draws)(depth, ground)

    def _words_piece(self, depth: int, ground: str) -> Callable[[], Element]:
        words, theme, rng = self.words, self.theme, self.rng
        sentences = rng.randint(1, 3)
        tag, draw = rng.choice(
            (
                (f"h{rng.randint(1, 5)}", rng.choice((words.title, words.heading))),
                (f"h{rng.randint(2, 4)}", words.title),
                ("p", words.sentence),
                ("p", lambda: words.text(sentences)),
                ("p", lambda: words.latin(sentences)),
                (rng.choice(("div", "p", "a", "h4", "small")), words.sign),
                (rng.choice(("div", "p", "b", "small", "strong", "a")), words.title),
                (rng.choice(("div", "p")), rng.choice((words.person, words.email, words.date))),
                (rng.choice(("div", "b", "h2")), rng.choice((words.number, words.price))),
            )
        )
        style = f"margin:{rng.randint(0, 32)}px 0 {rng.randint(0, 32)}px"
        style = style if rng.random() < 0.5 else ""
        if rng.random() < 0.3:
            style = _css(style, f"font-size:{rng.randint(11, 24 if self.narrow else 36)}px")
        color = rng.choice((theme.muted, theme.accent, theme.second))
        if rng.random() < 0.35 and contrast(color, ground) >= 2.5:
            style = _css(style, f"color:{color}")
        if rng.random() < 0.15:
            style = _css(style, "text-align:center")
        inline = tag in ("b", "small", "strong", "a")

        def drawn() -> Element:
            if inline:
                return Element("div", style, (Element(tag, "", (draw(),)),))
            return Element(tag, style, (draw(),))

        return drawn

    def _control_piece(self, depth: int, ground: str) -> Callable[[], Element]:
        rng, theme = self.rng, self.theme
        kind = rng.randrange(5)
        if kind == 0:
            style = _css(f"padding:10px;border:1px solid {theme.line}", self.rounded)
            style = _css("width:100%" if rng.random() < 0.7 else "", style)
            return lambda: Element(
                "input", style, (), "control", (("placeholder", self.words.label("field")),)
            )
        if kind == 1:
            size = rng.choice((32, 40, 48, 64))
            return lambda: self.avatar(size)
        if kind == 2:
            height = rng.randint(40, 200)
            return lambda: self.picture(height, self.rounded, ground)
        color = rng.choice((theme.accent, theme.second))
        return lambda: self.button(self.words.label("action"), color, ground)

    def _row_piece(self, depth: int, ground: str) -> Callable[[], Element]:
        """Columns, most of them alike."""
        rng = self.rng
        num = self.columns(2, 4)
        alike = rng.random() < 0.6
        cells = [self._box_or_stack(depth - 1, ground) for _ in range(1 if alike else num)]
        width = "flex:1" if rng.random() < 0.7 else ""
        style = _css("display:flex", f"gap:{rng.randint(4, 40)}px")
        if rng.random() < 0.3:
            style = _css(style, "align-items:center")
        if not width and rng.random() < 0.4:
            style = _css(style, "justify-content:space-between")

        def drawn() -> Element:
            made = [cells[at % len(cells)]() for at in range(num)]
            made = [msgspec.structs.replace(e, style=_css(width, e.style)) for e in made]
            return Element("div", style, tuple(made), "row")

        return drawn

    def _box_or_stack(self, depth: int, ground: str) -> Callable[[], Element]:
        if self.rng.random() < 0.5:
            return self._box_piece(depth, ground)
        inside = [self.piece(depth, ground) for _ in range(self.rng.randint(1, 3))]
        return lambda: Element("div", "", tuple(draw() for draw in inside))

    def _box_piece(self, depth: int, ground: str) -> Callable[[], Element]:
        rng, theme = self.rng, self.theme
        color = rng.choice((theme.surface, theme.surface, theme.band, theme.accent, "white"))
        line = f"border:1px solid {theme.line}" if rng.random() < 0.4 or color == ground else ""
        space = f"padding:{rng.randint(4, 40)}px"
        if rng.random() < 0.3:
            space = f"{space} {rng.randint(4, 48)}px"
        look = self.paint(color, ground)
        inks = _inks(color)
        if inks and ";" not in look and rng.random() < 0.3:
            look = f"{look};color:{rng.choice(inks)}"
        style = _css(look, space, line, self.rounded)
        inside = [self.piece(max(depth - 1, 0), color) for _ in range(rng.randint(1, 4))]
        return lambda: Element("div", style, tuple(draw() for draw in inside))

    def beside(self, side: Element, main: Sequence[Element]) -> Element:
        """A sidebar and what is beside it, to the left or to the right."""
        inner = Element("main", "flex:1", tuple(main), "main")
        if self.narrow:
            return Element("div", "", (side, inner))
        left = self.rng.random() < 0.75
        pair = (side, inner) if left else (inner, side)
        return Element("div", "display:flex", pair, "layout")

    def _readable(self, color: str) -> str:
        """`color`, or an ink where it could hardly be read on a card."""
        surface = self.theme.surface
        return color if contrast(color, surface) >= 2.5 else ink_on(surface)


# --- Layouts --------------------------------------------------------------------------------------

_MIDDLE = (
    # The longer blocks are more often drawn again and so are here more often.
    *("cards", "cards", "cards", "tiles", "table", "pricing", "pricing", "pricing", "gallery"),
    *("products", "products", "quote", "call", "steps", "steps", "questions"),
    *("panels", "panels", "about", "about"),
)


def _some(page: _Composer, names: Sequence[str], fewest: int, most: int) -> list[Element]:
    count = page.rng.randint(fewest, most)
    chosen: list[str] = []
    for name in page.rng.sample(names, len(names)):
        if name not in chosen and len(chosen) < count:
            chosen.append(name)
    return [getattr(page, name)() for name in chosen]


def _maybe(page: _Composer, share: float, draw: Callable[[], Element]) -> list[Element]:
    return [draw()] if page.rng.random() < share else []


def _landing(page: _Composer) -> list[Element]:
    return [
        *_maybe(page, 0.85, page.navigation),
        page.hero(),
        *_some(page, _MIDDLE, 1, page.rng.choice((1, 1, 2))),
        *_maybe(page, 0.7, page.footer),
    ]


def _dashboard(page: _Composer) -> list[Element]:
    def widgets() -> list[Element]:
        made = [*_maybe(page, 0.8, page.tiles)]
        draw = [page.chart, page.progress, page.people]
        if page.rng.random() < 0.7:
            pair = page.rng.sample(draw, 1 if page.narrow else page.rng.choice((1, 2)))
            made.append(page.section(page.row(*(one() for one in pair))))
        return made + _maybe(page, 0.6 if len(made) > 1 else 1.0, page.table)

    if page.rng.random() < 0.65:
        side = page.sidebar()
        title = page.words.label("app")
        head = page.heading(2, title, f"padding:0 {page.theme.space}px")
        return [page.beside(side, [head, *widgets()])]
    return [page.navigation("app"), *widgets(), *_maybe(page, 0.3, page.footer)]


def _article_page(page: _Composer) -> list[Element]:
    top = _maybe(page, 0.8, page.navigation)
    if page.rng.random() < 0.4 and not page.narrow:
        side = page.sidebar("menu")
        middle = [page.beside(side, [page.article()])]
    else:
        middle = [page.article(), *_maybe(page, 0.4, page.cards)]
    return [*top, *middle, *_maybe(page, 0.7, page.footer)]


def _form_page(page: _Composer) -> list[Element]:
    top = _maybe(page, 0.6, page.navigation)
    kind = page.rng.random()
    if kind < 0.3 and not page.narrow:
        color = page.band(page.theme.second)
        title = page.words.heading()
        page.note("panel", color, title)
        style = _css("flex:1", page.paint(color), "padding:48px")
        texts = (page.heading(1, title), page.paragraph(page.words.text(2)))
        panel = Element("div", style, texts, "panel")
        both = [panel, page.form(wide=True)]
        page.rng.shuffle(both)
        middle = [Element("div", "display:flex", tuple(both), "layout")]
    else:
        middle = [page.form()]
    return [*top, *_maybe(page, 0.15, page.notice), *middle, *_maybe(page, 0.6, page.footer)]


def _shop(page: _Composer) -> list[Element]:
    top = [page.navigation(), *_maybe(page, 0.3, page.notice)]
    rows = [page.products() for _ in range(page.rng.choice((1, 1, 2)))]
    if page.rng.random() < 0.35 and not page.narrow:
        rows = [page.beside(page.sidebar("menu"), rows)]
    elif page.rng.random() < 0.4:
        rows.insert(0, page.hero())
    return [*top, *rows, *_maybe(page, 0.7, page.footer)]


def _listing(page: _Composer) -> list[Element]:
    top = _maybe(page, 0.8, page.navigation)
    middle = _some(page, ("table", "team", "gallery", "cards", "questions", "panels"), 1, 2)
    return [*top, *_maybe(page, 0.3, page.notice), *middle, *_maybe(page, 0.6, page.footer)]


def _split(page: _Composer) -> list[Element]:
    """Two halves: a form, a list or a card beside a text."""
    draw = [lambda: page.form(wide=True), page.people, page.progress, page.chart]
    one, two = page.rng.sample(draw, 2)
    top = _maybe(page, 0.75, page.navigation)
    title = [page.heading(1, page.words.heading(), f"padding:0 {page.theme.space}px")]
    return [
        *top,
        *(title if page.rng.random() < 0.5 else []),
        page.section(page.row(one(), two())),
        *_some(page, ("cards", "quote", "call", "tiles"), 0, 1),
        *_maybe(page, 0.7, page.footer),
    ]


def _notice_page(page: _Composer) -> list[Element]:
    color = page.band(page.theme.page)
    title = page.words.label("error")
    page.note("message", color, title)
    space = page.rng.choice((64, 96, 120))
    style = _css(f"padding:{space}px 24px", page.paint(color), "text-align:center")
    parts = [
        page.heading(1, title),
        page.paragraph(page.words.text(1)),
        page.button(page.words.label("action"), page.theme.accent, color),
    ]
    main = Element("main", style, tuple(parts), "message")
    return [*_maybe(page, 0.7, page.navigation), main, *_maybe(page, 0.8, page.footer)]


def _freely(page: _Composer) -> list[Element]:
    """A section with pieces in no usual order, at any distances from each other."""
    color = page.rng.choice((page.theme.page, page.theme.page, page.theme.surface, page.theme.band))
    pieces = [page.piece(2, color) for _ in range(page.rng.randint(2, 5))]
    inside = tuple(draw() for draw in pieces)
    page.note("section", color, _first_text(*inside))
    space = f"padding:{page.rng.randint(0, 64)}px {page.rng.randint(0, 64)}px"
    return [Element("section", _css(space, page.paint(color)), inside, "section")]


def _stacked(page: _Composer) -> list[Element]:
    """Many short sections one below the other; what comes next is not known from the one before."""
    made = _maybe(page, 0.7, page.navigation)
    for _ in range(page.rng.randint(2, 4)):
        kind = page.rng.random()
        if kind < 0.2:
            made += _freely(page)
        elif kind < 0.55:
            made.append(getattr(page, page.rng.choice(_SHORT))())
        else:
            made.append(_alike(page))
    return [*made, *_maybe(page, 0.7, page.footer)]


_SHORT = ("hero", "quote", "call", "steps", "tiles", "about", "notice", "cards", "questions")


def _alike(page: _Composer) -> Element:
    """A piece, or a row of pieces, again and again with other words, in a container."""
    rng = page.rng
    draw = rng.choice((page.piece, page._row_piece, page._row_piece, page._box_piece))(
        1, page.theme.page
    )
    between = f"margin-bottom:{rng.randint(0, 56)}px"
    rows = [Element("div", between, (draw(),)) for _ in range(rng.choice((2, 2, 3, 4)))]
    inside = [*(page.section_title() if rng.random() < 0.4 else []), *rows]
    page.note("section", page.theme.page, _first_text(*inside))
    style = f"padding:{rng.randint(8, 64)}px {rng.randint(8, 64)}px 0"
    if rng.random() < 0.5:
        style = _css(style, f"max-width:{round(page.width * rng.uniform(0.6, 0.95))}px")
        style = _css(style, "margin:0 auto")
    if rng.random() < 0.35:
        style = _css(style, "text-align:center")
    return Element("section", style, tuple(inside), "section")


_LAYOUTS: tuple[tuple[_Layout, float], ...] = (
    (_landing, 32),
    (_dashboard, 18),
    (_article_page, 11),
    (_form_page, 11),
    (_shop, 10),
    (_listing, 9),
    (_split, 7),
    (_notice_page, 3),
)
