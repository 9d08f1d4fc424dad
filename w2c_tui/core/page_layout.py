"""The layout of a screenshot as an outline in the prompt: what lies on what, beside what, how far.

From lines of text and areas of one colour a tree is made: an area holds what lies on it, and what
it holds stands in rows and columns. The numbers are those that CSS wants, margins, paddings, gaps
and sizes instead of places on the page, so that a small model can copy them.
Owns the tree and its written form, in training and in use alike. Knows nothing about how lines and
areas are found, about tokens or about templates.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from w2c_tui.core.colors import distance, name_of, rgb
from w2c_tui.core.conversation import TextLine
from w2c_tui.core.page_text import TextBlock, format_page_text, paragraphs

HEADER = "Layout of the page in px (left top text; box left top width height ground ink):"
"""The first line; `left` and `top` are margins."""

MIDDLE = "mid"
"""Stands for `left` where something is in the middle of what it lies on."""

FULL = "full"
"""Stands for the width of what reaches to the right end of what it lies on."""

_Box = tuple[int, int, int, int]


class Node(msgspec.Struct):
    """`kind` text: `block` and `em`, the size of its letters in px. box: an area, or the page.
    row: what stands side by side. col: what stands one above the other within a row.

    What follows `radius` is how CSS says where it is, in px: margins at the left and at the top
    beside the `padding` (top, left) of what it lies on and the `gap` of its row; `width` and
    `height` where they must be said, else 0; `line`, the height of a line of several. `middle`: in
    the middle of what it lies on. `level`: what a row holds is in the middle of its height.
    """

    kind: str
    box: _Box
    children: list[Node] = []
    block: TextBlock | None = None
    em: int = 0
    ground: str = ""
    ink: str = ""
    outline: str = ""
    radius: int = 0
    left: int = 0
    top: int = 0
    padding: tuple[int, int] = (0, 0)
    gap: int = 0
    width: int = 0
    height: int = 0
    line: int = 0
    middle: bool = False
    level: bool = False


def described(lines: Sequence[TextLine], image_size: tuple[int, int]) -> str:
    """The block for a prompt: the layout where areas were looked for, else the lines of text."""
    if any(not line.text for line in lines):
        return format_layout(lines, image_size)
    return format_page_text(lines, image_size)


def format_layout(lines: Sequence[TextLine], image_size: tuple[int, int]) -> str:
    """`HEADER`, then the outline, one space deeper for what lies in something.

    `page WIDTH HEIGHT GROUND INK`; `box LEFT TOP WIDTH HEIGHT GROUND INK`; `row LEFT TOP`;
    `col LEFT TOP WIDTH`; else text: `LEFT TOP TEXT`. LEFT and TOP are margins. INK is that of most
    of the text, where it differs from the ink around. Then, where there is such a thing:
    `line COLOR`, a border; `round RADIUS`; `pad TOP LEFT`; `gap PX` and `level` of rows; before
    texts `sSIZE`, if it is not the usual one of the page, `wWIDTH`, `/LINE`, the height of one of
    several lines, and `=COLOR`, if it differs from the ink around it. A box with one line of text
    and nothing else has it in its own line, after a colon.
    """
    return "\n".join([HEADER, *_written(layout_of(lines, image_size))])


def layout_of(lines: Sequence[TextLine], image_size: tuple[int, int]) -> Node:
    """The page as a tree. `image_size` is (width, height)."""
    page = _areas([line for line in lines if not line.text], image_size)
    for block in paragraphs(lines, large_px=_LARGE, most_apart=_MOST_APART):
        em = max(round(block.size / LINE_HEIGHT), 1)
        ink = name_of(block.first.ink) if block.first.ink else ""
        _innermost(page, block.box).children.append(
            Node("text", block.box, [], block=block, em=em, ink=ink)
        )
    _arrange(page)
    page.em = _usual_size(page)
    page.width, page.height = image_size
    _set(page)
    return page


def _usual_size(page: Node) -> int:
    """The size of most letters of the page."""
    letters: Counter[int] = Counter()
    for node in _all(page):
        if node.block is not None:
            letters[node.em] += len(node.block.text)
    return round(statistics.median(letters.elements())) if letters else 0


def _all(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _all(child)


# --- Lines ----------------------------------------------------------------------------------------

_LARGE = 26
"""Lines of headings, which continue each other however short they are."""
_MOST_APART = 0.6
"""Between the lines of a paragraph, in heights of a line, which is more than usual as lines have
here the height of their letters."""
LINE_HEIGHT = 1.2
"""Height of the box of a line of text, in em."""


# --- What lies on what ----------------------------------------------------------------------------


def _areas(areas: Sequence[TextLine], image_size: tuple[int, int]) -> Node:
    """The page with all areas that differ from what they lie on."""
    whole = (0, 0, *image_size)
    page = Node("box", whole, [], ground="white")
    if areas and areas[0].box == whole and areas[0].ground:
        page.ground = name_of(areas[0].ground)
    for area in sorted(areas, key=lambda area: -_size(area.box)):
        around = _innermost(page, area.box)
        ground = name_of(area.ground) if area.ground else around.ground
        if area.ink or ground != around.ground:
            outline = name_of(area.ink) if area.ink else ""
            outline = "" if outline == ground != around.ground else outline
            around.children.append(
                Node("box", area.box, [], ground=ground, outline=outline, radius=area.radius)
            )
    return page


def _innermost(node: Node, box: _Box) -> Node:
    """The smallest area that has the middle of `box` and is larger."""
    while True:
        inner = next(
            (c for c in reversed(node.children) if c.kind == "box" and _holds(c, box)), None
        )
        if inner is None:
            return node
        node = inner


def _holds(node: Node, box: _Box) -> bool:
    left, top, right, bottom = node.box
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    slack = 0.25 * (box[3] - box[1])
    return (
        left < x < right
        and top < y < bottom
        and _size(node.box) > 0.9 * _size(box)
        and box[0] >= left - slack
        and box[2] <= right + slack
        and box[1] >= top - slack
        and box[3] <= bottom + slack
    )


def _size(box: _Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


# --- What stands beside what ----------------------------------------------------------------------


def _arrange(node: Node) -> None:
    for child in node.children:
        if child.kind == "box":
            _arrange(child)
    texts = [child.ink for child in node.children if child.kind == "text" and child.ink]
    node.ink = statistics.mode(texts) if texts else ""
    for child in node.children:
        # Thin letters look a little paler than thick ones of the same colour.
        if child.kind == "text" and child.ink and _near(child.ink, node.ink):
            child.ink = node.ink
    node.children = _stacked(node.children)


_SAME = 12
"""Difference (CIE 1976) up to which two inks are one."""


def _near(one: str, other: str) -> bool:
    return distance(rgb(one), rgb(other)) <= _SAME


def _stacked(items: list[Node]) -> list[Node]:
    """`items` from top to bottom, those side by side as rows."""
    rows = [_columns(group) for group in _cut(items, 1)]
    arranged: list[Node] = []
    while rows:
        if beside := _beside(rows):
            arranged.append(_row(_cut([i for row in rows[:beside] for c in row for i in c], 0)))
            rows = rows[beside:]
            continue
        alike = 1
        while alike < len(rows) and _continue_columns(rows[alike - 1], rows[alike]):
            alike += 1
        if len(rows[0]) == 1:
            arranged += sorted(rows.pop(0)[0], key=lambda item: item.box[1])
            continue
        if alike == 1 or _is_table(rows[:alike]):
            arranged += [_row(row) for row in rows[:alike]]
        else:
            merged = [
                [item for row in rows[:alike] for item in row[at]] for at in range(len(rows[0]))
            ]
            arranged.append(_row(merged))
        rows = rows[alike:]
    return arranged


_Columns = list[list[Node]]


def _cut(items: list[Node], axis: int) -> list[list[Node]]:
    """Groups of `items` between which a line along the other axis crosses nothing."""
    groups: list[list[Node]] = []
    end = 0.0
    for item in sorted(items, key=lambda item: (item.box[axis], item.box[1 - axis])):
        slack = min(0.25 * item.em, 4) if axis else 0
        if groups and item.box[axis] < end - slack:
            groups[-1].append(item)
        else:
            groups.append([item])
        end = max(end, item.box[axis + 2]) if len(groups[-1]) > 1 else item.box[axis + 2]
    return groups


def _columns(group: list[Node]) -> _Columns:
    return _cut(group, 0) if len(group) > 1 else [group]


_LEAST_GAP, _SAME_TOP, _MOST_ROWS = 16, 30, 40


def _beside(rows: Sequence[_Columns]) -> int:
    """How many rows are better seen as two parts side by side, as a menu beside a page.

    Their lines stand at different heights, so that rows mix both. 0 where rows are rows.
    """
    items: list[Node] = []
    most = 0
    for number, row in enumerate(rows[:_MOST_ROWS], start=1):
        items += [item for column in row for item in column]
        parts = _cut(items, 0)
        if number > 1 and len(parts) < 2:
            break
        if len(parts) != 2 or min(map(len, parts)) < 2:
            continue
        left, right = _around(parts[0]), _around(parts[1])
        if right[0] - left[2] >= _LEAST_GAP and abs(left[1] - right[1]) <= _SAME_TOP:
            most = number
    uneven = any(len(row) == 1 for row in rows[:most])
    return most if uneven else 0


_ALIGNED = 8


def _continue_columns(above: _Columns, below: _Columns) -> bool:
    """Whether the columns of one row go on in the next."""
    if len(above) != len(below) or len(above) < 2:
        return False
    kinds = [{item.kind for column in row for item in column} for row in (above, below)]
    if any(len(kind) > 1 for kind in kinds) or kinds == [{"box"}, {"box"}]:
        return False  # Entries of a list with pictures; rows of cards.
    for one, other in zip(above, below, strict=True):
        first, second = _around(one), _around(other)
        left, middle = first[0] - second[0], (first[0] + first[2] - second[0] - second[2]) / 2
        if min(abs(left), abs(middle)) > _ALIGNED:
            return False
    return True


_SAME_SIZE, _SAME_STEP = 1.12, 1.3


def _is_table(rows: Sequence[_Columns]) -> bool:
    """Whether rows of texts are those of a table: all alike and at one distance."""
    items = [item for row in rows for column in row for item in column]
    if len(items) != sum(len(row) for row in rows):
        return False
    if any(item.kind != "text" for item in items):
        return False
    sizes = [item.em for item in items]
    tops = [min(item.box[1] for column in row for item in column) for row in rows]
    steps = [after - before for before, after in itertools.pairwise(tops)]
    return max(sizes) <= _SAME_SIZE * min(sizes) and max(steps) <= _SAME_STEP * min(steps)


def _row(columns: _Columns) -> Node:
    children = []
    for column in columns:
        arranged = _stacked(column) if len(column) > 1 else column
        box = _around(column)
        children.append(arranged[0] if len(arranged) == 1 else Node("col", box, arranged))
    return Node("row", _around(children), children)


def _around(nodes: Sequence[Node]) -> _Box:
    lefts, tops, rights, bottoms = zip(*(node.box for node in nodes), strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


# --- Where CSS has it -----------------------------------------------------------------------------

_LEAST_BESIDE = 40
_SAME_GAP = 2
_LEVEL = 2


def _set(node: Node) -> None:
    """Margins and sizes of all that is in `node`."""
    if node.kind == "row":
        _set_across(node)
    else:
        _set_down(node)
    for child in node.children:
        if child.children:
            _set(child)


def _set_down(node: Node) -> None:
    border = 1 if node.outline else 0
    left, bottom = node.box[0] + border, node.box[1] + border
    alone = node.kind == "box" and len(node.children) == 1
    for child in node.children:
        child.middle = _in_the_middle(node, child, 5 if alone or node.kind == "col" else None)
    sides = [0 if child.middle else child.box[0] - left for child in node.children]
    padding = max(min(sides, default=0), 0)
    for number, (child, side) in enumerate(zip(node.children, sides, strict=True)):
        box = _with_leading(child)
        above, bottom = box[1] - bottom, box[3]
        if not number:
            node.padding = (max(above, 0), padding)
            above = 0
        child.top = above
        child.left = 0 if child.middle else _margin(side - padding)
        if child.kind == "box":
            child.width = child.box[2] - child.box[0]
            child.height = child.box[3] - child.box[1]
            if child.box[2] >= node.box[2] - 1 and not child.middle:
                child.width = 0
        elif child.line:
            child.width = _width_of_lines(child)


def _set_across(row: Node) -> None:
    boxes = [_with_leading(child) for child in row.children]
    upper, lower = min(box[1] for box in boxes), max(box[3] for box in boxes)
    off = [(box[1] + box[3] - upper - lower) / 2 for box in boxes]
    row.level = max(map(abs, off)) <= _LEVEL < lower - upper - min(b[3] - b[1] for b in boxes)
    gaps = [after[0] - before[2] for before, after in itertools.pairwise(boxes)]
    row.gap = _usual_gap(gaps)
    for child, box in zip(row.children, boxes, strict=True):
        child.top = 0 if row.level else _margin(box[1] - upper)
        if child.kind == "box":
            child.height = box[3] - box[1]
        if child.kind in ("box", "col"):
            child.width = box[2] - box[0]
        elif child.line:
            child.width = _width_of_lines(child)
    for before, after, gap in zip(row.children, row.children[1:], gaps, strict=False):
        more = gap - row.gap
        if abs(more) <= _SAME_GAP:
            continue
        if before.kind in ("text", "col") and more > 0 and not before.line:
            # What follows then has its place whatever the letters' font.
            before.width = before.box[2] - before.box[0] + more
        else:
            after.left = more


def _margin(px: int) -> int:
    """Without what is only where letters have their ink."""
    return 0 if abs(px) <= _INK else px


_INK = 2


def _usual_gap(gaps: Sequence[int]) -> int:
    """What all are, or several of them; else 0."""
    best = max(gaps, key=lambda gap: (sum(abs(gap - other) <= 1 for other in gaps), -gap))
    alike = [gap for gap in gaps if abs(gap - best) <= _SAME_GAP]
    if len(alike) == len(gaps) and (len(gaps) > 1 or best <= _LARGE_GAP):
        return max(round(statistics.mean(alike)), 0)
    return max(best, 0) if len(alike) > 1 else 0


_LARGE_GAP = 64


def _width_of_lines(text: Node) -> int:
    """As much wider than the longest line as it may be a little longer elsewhere."""
    return text.box[2] - text.box[0] + round(_SLACK_EM * text.em)


_SLACK_EM = 0.4


def _with_leading(node: Node) -> _Box:
    """The box of `node`; of several lines, with what their height adds above and below."""
    left, top, right, bottom = node.box
    if node.block is None or node.block.num_lines < 2:
        return node.box
    block = node.block
    pitch = (block.last.box[3] - block.first.box[3]) / (block.num_lines - 1)
    node.line = round(pitch)
    leading = round((pitch - LINE_HEIGHT * node.em) / 2)
    return left, top - leading, right, bottom + leading


def _in_the_middle(node: Node, child: Node, least: int | None) -> bool:
    left, right = child.box[0] - node.box[0], node.box[2] - child.box[2]
    return abs(left - right) <= 4 and left >= (_LEAST_BESIDE if least is None else least)


def only_text(node: Node) -> Node | None:
    """The line of text of a box that has nothing else."""
    if node.kind == "box" and len(node.children) == 1 and node.children[0].kind == "text":
        return None if node.children[0].line else node.children[0]
    return None


def is_usual(em: int, usual: int) -> bool:
    """Whether letters of `em` px are of the `usual` size of a page."""
    return usual <= _USUAL * em <= _USUAL**2 * usual


_USUAL = 1.13
"""Letters up to so many times larger or smaller are of the usual size."""


# --- Writing --------------------------------------------------------------------------------------


def _written(page: Node) -> Iterator[str]:
    words = ["page", str(page.width), str(page.height), page.ground]
    words += [page.ink] if page.ink else []
    words += _padding(page)
    words += [f"s{page.em}"] if page.em and page.em != 16 else []
    yield " ".join(words)
    yield from _inside(page, page.ink, page.em, 1)


def _inside(node: Node, ink: str, usual: int, depth: int) -> Iterator[str]:
    for child in node.children:
        around = ink
        words = [] if child.kind == "text" else [child.kind]
        words += [MIDDLE if child.middle else str(child.left), str(child.top)]
        if child.kind == "box":
            words += [str(child.width or FULL), str(child.height), child.ground]
            if child.ink and child.ink != ink:
                words.append(child.ink)
                around = child.ink
            words += ["line", child.outline] if child.outline else []
            words += ["round", str(child.radius)] if child.radius else []
        elif child.kind == "col":
            words += [str(child.width)]
        elif child.kind == "row":
            words += ["gap", str(child.gap)] if child.gap else []
            words += ["level"] if child.level else []
        text = only_text(child)
        if child.kind == "text":
            words += _text(child, ink, usual)
        elif text is not None:
            words += [MIDDLE, str(child.padding[0])] if text.middle else _padding(child)
            words[-1] += ":"
            words += _text(text, around, usual)
        else:
            words += _padding(child)
        yield " " * depth + " ".join(words)
        if text is None:
            yield from _inside(child, around, usual, depth + 1)


def _padding(node: Node) -> list[str]:
    return ["pad", *map(str, node.padding)] if any(node.padding) else []


def _text(node: Node, ink: str, usual: int) -> list[str]:
    assert node.block is not None
    words = [] if is_usual(node.em, usual) else [f"s{node.em}"]
    if node.width or node.line:
        words.append(f"w{node.width}" + (f"/{node.line}" if node.line else ""))
    if node.ink and node.ink != ink:
        words.append(f"={node.ink}")
    return [*words, node.block.text]
