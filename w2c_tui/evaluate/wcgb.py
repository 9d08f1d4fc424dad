"""The Webpage Code Generation Benchmark of Web2Code (arXiv 2406.20098), with local scores.

Owns its pages, its protocol and its totals: every page counts, one without a picture scores 0.
Knows nothing about terminals or how results are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from w2c_tui.core.config import GenerationParams
from w2c_tui.core.errors import ConfigError
from w2c_tui.evaluate import judge
from w2c_tui.evaluate.statistics import Interval, bootstrap

PUBLISHED_PARAMS = GenerationParams(temperature=0.2, max_new_tokens=10_000, seed=0)
"""As the published `code_generation/README.md`; the seed is ours."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
PAGES = (".html", ".htm")
PARTS = ("block_match", "text", "position", "color", "ssim", "structure")

Outcome = Literal["rendered", "no page", "not rendered", "failed"]


class Page(msgspec.Struct, frozen=True):
    """One page to reproduce: its screenshot, and its HTML where that is known."""

    name: str
    image: Path
    html: Path | None = None


class PageResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one page. Scores are 0..1, `bleu` and `chrf` of the visible text too."""

    name: str
    outcome: Outcome
    score: float = 0.0
    parts: dict[str, float] = {}
    bleu: float | None = None
    chrf: float | None = None
    complete: bool = False
    new_tokens: int = 0
    seconds: float = 0.0
    error: str = ""
    judged: str | None = None
    """The judge's raw reply, if one was asked."""


class WcgbResult(msgspec.Struct, frozen=True, kw_only=True):
    """The benchmark's outcome. `parts` are means over the pages where the part is known."""

    num_pages: int
    num_rendered: int
    score: float
    interval: Interval
    parts: dict[str, float]
    bleu: float | None
    chrf: float | None
    outcomes: dict[str, int]
    judged_published: judge.Judged | None = None
    judged_strict: judge.Judged | None = None

    @property
    def render_rate(self) -> float:
        return self.num_rendered / self.num_pages if self.num_pages else 0.0


def load_pages(images: Path, references: Path | None = None) -> list[Page]:
    """The screenshots of a folder with their HTML, by name: `N.png` and `N.html`.

    Reads Design2Code-like folders (both in one) and Web2Code's image folder, subfolders included.
    Raises ConfigError if there is no screenshot, or if references were named and none fits.
    """
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGES)
    if not found:
        raise ConfigError(
            f"{images} holds no screenshots.", hint=f"Looked for {', '.join(IMAGES)}."
        )
    pages = []
    for path in found:
        name = path.relative_to(images).with_suffix("").as_posix()
        places = [(references or images) / f"{name}{suffix}" for suffix in PAGES]
        html = next((place for place in places if place.is_file()), None)
        pages.append(Page(name, path, html))
    names = Counter(page.name for page in pages)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{images} holds {twice[0]} in two formats.", hint="Keep one of them.")
    if references is not None and not any(page.html for page in pages):
        raise ConfigError(
            f"No page in {references} has the name of a screenshot.",
            hint=f"{pages[0].name}.html would belong to {pages[0].image.name}.",
        )
    return pages


def total(results: Iterable[PageResult], *, judging: bool = False) -> WcgbResult:
    """Scores over all pages, those that failed among them."""
    rows = list(results)
    scores = [row.score for row in rows]
    parts = {
        name: _mean([row.parts[name] for row in rows if name in row.parts] + _failures(rows))
        for name in PARTS
        if any(name in row.parts for row in rows)
    }
    rendered = [row for row in rows if row.outcome == "rendered"]
    replies = [row.judged for row in rows]
    return WcgbResult(
        num_pages=len(rows),
        num_rendered=len(rendered),
        score=_mean(scores),
        interval=bootstrap(scores) if scores else Interval(0.0, 0.0),
        parts=parts,
        bleu=_known_mean([row.bleu for row in rows]),
        chrf=_known_mean([row.chrf for row in rows]),
        outcomes=dict(Counter(row.outcome for row in rows)),
        judged_published=(
            judge.published_scores(reply for reply in replies if reply is not None)
            if judging
            else None
        ),
        judged_strict=judge.strict_scores(replies) if judging else None,
    )


def _failures(rows: Sequence[PageResult]) -> list[float]:
    return [0.0 for row in rows if row.outcome != "rendered"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None
