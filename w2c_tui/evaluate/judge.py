"""The ten-criteria judge of the Webpage Code Generation Benchmark (arXiv 2406.20098, section 4).

Owns what the judge is asked, how its reply is read and how the ratings are added up. The words of
the request are ours, after the criteria of the paper. Knows nothing about who judges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from w2c_tui.core.conversation import Attachment, Message

CRITERIA = (
    ("layout consistency", "headers, footers, sidebars and sections stand in the same places"),
    ("element alignment", "pictures, buttons and text are lined up in the same way"),
    ("proportional accuracy", "elements have the same sizes and aspect ratios"),
    ("visual harmony", "both pages are equally balanced"),
    ("colour scheme", "background and text colours match in hue and saturation"),
    ("aesthetic resemblance", "both pages have the same style"),
    ("font characteristics", "typefaces, sizes, weights and slants match"),
    ("textual content", "the words and sentences are the same"),
    ("numeric and special characters", "numbers, dates and symbols are the same"),
    ("user-interface consistency", "menus, buttons and forms look and work alike"),
)
GROUPS = {"VSA": slice(0, 4), "CAD": slice(4, 6), "TCC": slice(6, 9), "UII": slice(9, 10)}
"""The paper's four scores, each the mean of these criteria."""


class Judged(msgspec.Struct, frozen=True):
    """The four scores and their mean, 0..10, over `num_pages` of `num_asked` pages."""

    scores: dict[str, float]
    overall: float
    num_pages: int
    num_asked: int


def request(original: Attachment, render: Attachment) -> list[Message]:
    """What is put before the judge: both pictures and the ten criteria."""
    lines = [f"{at}. {name}: {text}" for at, (name, text) in enumerate(CRITERIA, 1)]
    text = (
        "The first picture is a web page, the second one a reproduction of it. Rate how well the "
        "reproduction matches in each of these ten respects, from 0 (not at all) to 10 "
        "(identical); give 10 only where you can see no difference.\n"
        + "\n".join(lines)
        + "\nReply with the ten whole numbers in this order, separated by commas, and nothing else."
    )
    return [Message("user", text, (original, render))]


def published_ratings(reply: str) -> tuple[int, ...] | None:
    """The published reading: ten comma-separated whole numbers; None where it drops the reply.

    Newlines count as commas and outer commas and spaces are taken off; anything that is not a
    whole number, an empty place among them, drops the reply. Ratings above 10 pass.
    """
    try:
        ratings = tuple(map(int, reply.replace("\n", ",").strip(", ").split(",")))
    except ValueError:
        return None
    return ratings if len(ratings) == len(CRITERIA) else None


def strict_ratings(reply: str) -> tuple[float, ...] | None:
    """Ten numbers of 0..10, however they are set apart; None if there are not exactly ten."""
    found = tuple(map(float, re.findall(r"-?\d+(?:\.\d+)?", reply)))
    return found if len(found) == len(CRITERIA) and all(0 <= n <= 10 for n in found) else None


def published_scores(replies: Iterable[str]) -> Judged:
    """The published aggregate: replies that cannot be read are left out of the mean."""
    replies = list(replies)
    ratings = [rating for reply in replies if (rating := published_ratings(reply)) is not None]
    return _aggregate(ratings, len(ratings), len(replies))


def strict_scores(replies: Iterable[str | None]) -> Judged:
    """Every page counts: one that was not rendered (None) or has no readable reply counts 0."""
    replies = list(replies)
    ratings = [rating for reply in replies if reply and (rating := strict_ratings(reply))]
    return _aggregate(ratings, len(replies), len(replies))


def _aggregate(ratings: Sequence[Sequence[float]], divisor: int, num_asked: int) -> Judged:
    scores = {
        name: sum(sum(rating[part]) / len(rating[part]) for rating in ratings) / max(divisor, 1)
        for name, part in GROUPS.items()
    }
    return Judged(scores, sum(scores.values()) / len(scores), len(ratings), num_asked)
