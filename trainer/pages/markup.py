"""Elements, and the two ways in which a composed page is written.

"classes": a style that several elements share is a rule with a name, as Bootstrap would call it,
in the head of the page; all others are inline. "inline": all of them are inline.

Owns the canonical form of the HTML that a model learns to write: short, one element of a row per
line, one way to say a thing. Knows nothing about layouts, colours or words.
"""

from __future__ import annotations

import html
from typing import Literal

import msgspec

Dialect = Literal["inline", "classes"]

_VOID = frozenset(("input", "hr", "br"))
_ON_A_LINE_OF_THEIR_OWN = frozenset(
    [
        "nav",
        "header",
        "main",
        "section",
        "article",
        "aside",
        "footer",
        "form",
        "div",
        "table",
        "tr",
        "ul",
        "ol",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "p",
        "blockquote",
        "pre",
        "label",
        "hr",
        "input",
        "textarea",
    ]
)


class Element(msgspec.Struct, frozen=True):
    """`style` is CSS declarations without spaces; `role` is the class that stands for it."""

    tag: str
    style: str = ""
    children: tuple[Element | str, ...] = ()
    role: str = ""
    attributes: tuple[tuple[str, str], ...] = ()


def page_html(
    body: tuple[Element, ...],
    *,
    title: str,
    language: str,
    body_style: str,
    dialect: Dialect,
) -> str:
    """The whole document. Equal arguments, equal text."""
    rules = _rules(body) if dialect == "classes" else {}
    lines = [line for element in body for line in _lines(element, rules)]
    head = [
        "<!DOCTYPE html>",
        f'<html lang="{language}">',
        f'<head><meta charset="utf-8"><title>{html.escape(title, quote=False)}</title><style>',
        "*{box-sizing:border-box}",
        f"body{{{body_style}}}",
        *(f"{selector}{{{style}}}" for (_, style), (selector, _) in rules.items()),
        "</style></head>",
        "<body>",
    ]
    return "\n".join([*head, *lines, "</body>", "</html>"]) + "\n"


_Rules = dict[tuple[str, str], tuple[str, str]]
"""Role and style: the selector, and what an element carries to be selected."""


def _rules(body: tuple[Element, ...]) -> _Rules:
    """A rule for every style that more than one element has, in the order of the page.

    Styles of one role get numbered names. A tag that always has the same style needs no class.
    """
    count: dict[tuple[str, str], int] = {}
    styles_of_tag: dict[str, set[str]] = {}

    def walk(element: Element) -> None:
        styles_of_tag.setdefault(element.tag, set()).add(element.style)
        if element.role and element.style:
            count[element.role, element.style] = count.get((element.role, element.style), 0) + 1
        for child in element.children:
            if isinstance(child, Element):
                walk(child)

    for element in body:
        walk(element)
    rules: _Rules = {}
    num_of_role: dict[str, int] = {}
    for (role, style), times in count.items():
        if times < 2:
            continue
        if styles_of_tag.get(role) == {style}:
            rules[role, style] = (role, "")
            continue
        num = num_of_role[role] = num_of_role.get(role, 0) + 1
        name = role if num == 1 else f"{role}-{num}"
        rules[role, style] = (f".{name}", f' class="{name}"')
    return rules


def _lines(element: Element, rules: _Rules) -> list[str]:
    opening = _opening(element, rules)
    if element.tag in _VOID:
        return [opening]
    closing = f"</{element.tag}>"
    if not any(isinstance(c, Element) and _is_block(c) for c in element.children):
        inside = "".join(
            html.escape(child, quote=False)
            if isinstance(child, str)
            else "".join(_lines(child, rules))
            for child in element.children
        )
        return [opening + inside + closing]
    inner: list[str] = []
    for child in element.children:
        if isinstance(child, str):
            inner.append(html.escape(child, quote=False))
        else:
            inner += _lines(child, rules)
    if len(inner) == 1:
        return [opening + inner[0] + closing]
    return [opening, *inner, closing]


def _is_block(element: Element) -> bool:
    return element.tag in _ON_A_LINE_OF_THEIR_OWN


def _opening(element: Element, rules: _Rules) -> str:
    text = f"<{element.tag}"
    if (element.role, element.style) in rules:
        text += rules[element.role, element.style][1]
    elif element.style:
        text += f' style="{element.style}"'
    for name, value in element.attributes:
        text += f' {name}="{html.escape(value)}"' if value else f" {name}"
    return text + ">"
