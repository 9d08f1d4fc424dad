"""What preparing found, for people (`report.html`) and for programs (`report.json`).

Owns the figures and the page. The page is one file that needs no network. Knows nothing about how
the figures came about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import msgspec
import numpy as np

from trainer.dataset import Measured
from trainer.records import REASONS, REPAIRS
from w2c_tui.core.files import write_atomically

NUM_BINS = 40


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Sequence lengths in tokens, images expanded.

    `num_truncated`: rows longer than `max_length`; `num_lost_tokens`: what is cut off them;
    `num_masked_out`: rows of which nothing under the loss is left then. `bins`: rows per bin of
    `bin_width` tokens, the last one open.
    """

    num_rows: int
    num_text_only: int
    num_images: int
    num_tokens: int
    num_kept_tokens: int
    num_supervised: int
    num_truncated: int
    num_lost_tokens: int
    num_masked_out: int
    mean: float
    median: int
    p95: int
    longest: int
    bin_width: int
    bins: list[int]

    @property
    def truncated_share(self) -> float:
        return self.num_truncated / max(1, self.num_rows)


class SourceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One source: what was read, what was left out and put right, and what it is like.

    `num_kept` records became `num_rows` rows by `weight`. `formats`: "FORMAT in .suffix" of images.
    """

    name: str
    files: list[str]
    missing_files: list[str]
    images: str
    num_read: int
    num_kept: int
    weight: float
    num_rows: int
    dropped: dict[str, int]
    repaired: dict[str, int]
    formats: dict[str, int]
    lengths: Lengths


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`. `missing`: records without their image by "source: folder"."""

    sources: list[SourceReport]
    total: Lengths
    measured: Measured
    images_checked: str
    fingerprint: str
    missing: dict[str, dict[str, Any]]


def summarise(rows: np.ndarray, max_length: int) -> Lengths:
    """Figures of `rows`, which has the fields of `trainer.preparation.ROW`."""
    lengths = rows["length"].astype(np.int64)
    kept = np.minimum(lengths, max_length)
    # A sixteenth of the limit is a round number of tokens for every usual limit.
    width = max(1, max_length // 16)
    bins = np.bincount(np.minimum(lengths // width, NUM_BINS - 1), minlength=1)
    return Lengths(
        num_rows=len(rows),
        num_text_only=int((rows["num_images"] == 0).sum()),
        num_images=int(rows["num_images"].astype(np.int64).sum()),
        num_tokens=int(lengths.sum()),
        num_kept_tokens=int(kept.sum()),
        num_supervised=int(rows["num_kept_supervised"].astype(np.int64).sum()),
        num_truncated=int((lengths > max_length).sum()),
        num_lost_tokens=int((lengths - kept).sum()),
        num_masked_out=int((rows["num_kept_supervised"] == 0).sum()),
        mean=float(lengths.mean()) if len(rows) else 0.0,
        median=int(np.median(lengths)) if len(rows) else 0,
        p95=int(np.quantile(lengths, 0.95)) if len(rows) else 0,
        longest=int(lengths.max(initial=0)),
        bin_width=width,
        bins=bins.tolist(),
    )


def write_report(folder: Path, report: Report) -> None:
    """Write `report.json` and `report.html` into `folder`."""
    data = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    write_atomically(folder / "report.json", data + "\n")
    write_atomically(folder / "report.html", as_page(report))


def as_page(report: Report) -> str:
    """The report as one HTML page."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["share"] = lambda value: f"{100 * value:.2f} %"
    return environment.from_string(_PAGE).render(
        report=report,
        reasons=REASONS,
        repairs=REPAIRS,
        bars=_bars(report),
        named_lengths=[
            *((source.name, source.lengths) for source in report.sources),
            ("all", report.total),
        ],
        largest=max((source.num_rows for source in report.sources), default=1) or 1,
    )


def _bars(report: Report) -> list[dict[str, Any]]:
    """The histogram: for each bin, its place and its stack of sources, in the drawing's units."""
    total = report.total
    height, width = 200.0, 760.0 / max(1, len(total.bins))
    top = max(total.bins, default=1) or 1
    bars = []
    for at, num in enumerate(total.bins):
        stack, y = [], height
        for number, source in enumerate(report.sources):
            part = source.lengths.bins[at] if at < len(source.lengths.bins) else 0
            if part:
                y -= part / top * height
                stack.append({"source": number, "y": y, "height": part / top * height})
        begin = at * total.bin_width
        last = at == NUM_BINS - 1
        label = f"{begin:,} or more" if last else f"{begin:,} to {begin + total.bin_width - 1:,}"
        bars.append(
            {
                "x": at * width,
                "width": max(1.0, width - 1.5),
                "stack": stack,
                "begin": begin,
                "title": f"{label} tokens: {num:,} rows",
            }
        )
    return bars


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Prepared data</title>
<style>
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --faint: #667085;
  --line: #d9dee6; --c0: #3566c9; --c1: #d97a1f; --c2: #2f9462; --c3: #a34fb8; --c4: #b83a4b;
  --c5: #4b8f9e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e9f0; --paper: #14181f; --faint: #98a2b3; --line: #2d3542; --c0: #7ba4f4; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.faint { color: var(--faint); } code { font-size: .9em; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; padding: 0; list-style: none; }
.facts b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 11px; }
.warn { border-left: 4px solid var(--c1); padding-left: .8rem; }
</style>
</head>
<body>
{% set total = report.total %}
<h1>Prepared data</h1>
<ul class="facts">
<li><b>{{ total.num_rows | count }}</b> rows</li>
<li><b>{{ total.num_images | count }}</b> images</li>
<li><b>{{ total.num_text_only | count }}</b> text only</li>
<li><b>{{ total.num_kept_tokens | count }}</b> tokens kept</li>
<li><b>{{ total.num_supervised | count }}</b> under the loss</li>
<li><b>{{ total.truncated_share | share }}</b> truncated</li>
<li><b>{{ total.num_masked_out | count }}</b> masked out</li>
</ul>
<p class="faint">Lengths count image tokens expanded ({{ report.measured.image_seq_length }} per
image), template {{ report.measured.template }}, tokenizer of
<code>{{ report.measured.tokenizer_name }}</code>. Images were
{{ {"full": "opened from end to end", "header": "opened, not decoded",
"none": "not looked at"}[report.images_checked] }}.<br>Fingerprint
<code>{{ report.fingerprint }}</code></p>
{% if total.num_masked_out %}
<p class="warn">{{ total.num_masked_out | count }} rows have nothing under the loss within
{{ report.measured.max_length | count }} tokens: nothing is learnt from them.</p>
{% endif %}

<h2>Sources</h2>
<table>
<tr><th>source</th><th class="n">read</th><th class="n">left out</th><th class="n">put right</th>
<th class="n">weight</th><th class="n">rows</th><th style="width:30%"></th></tr>
{% for source in report.sources %}
<tr><td>{{ source.name }}{% for file in source.missing_files %}
<br><span class="faint">{{ file }} is not there</span>{% endfor %}</td>
<td class="n">{{ source.num_read | count }}</td>
<td class="n">{{ (source.num_read - source.num_kept) | count }}</td>
<td class="n">{{ source.repaired.values() | sum | count }}</td>
<td class="n">{{ source.weight }}</td><td class="n">{{ source.num_rows | count }}</td>
<td><svg viewBox="0 0 100 8" preserveAspectRatio="none" style="height:.8rem">
<rect width="{{ 100 * source.num_rows / largest }}" height="8"
 style="fill:var(--c{{ loop.index0 % 6 }})"/></svg></td></tr>
{% endfor %}
</table>

<h2>Lengths</h2>
<p>{% for source in report.sources %}<span class="key"
 style="background:var(--c{{ loop.index0 % 6 }})"></span> {{ source.name }}&emsp;{% endfor %}</p>
<svg viewBox="0 0 760 224" role="img" aria-label="Rows by length in tokens">
{% for bar in bars %}<g><title>{{ bar.title }}</title>
<rect x="{{ bar.x }}" y="0" width="{{ bar.width }}" height="200" fill="transparent"/>
{% for part in bar.stack %}<rect x="{{ bar.x }}" y="{{ part.y }}" width="{{ bar.width }}"
 height="{{ part.height }}" style="fill:var(--c{{ part.source % 6 }})"/>{% endfor %}</g>
{% if loop.index0 % 8 == 0 %}<text x="{{ bar.x }}" y="216">{{ bar.begin | count }}</text>{% endif %}
{% endfor %}
{% if bars | length > 16 %}<line x1="{{ bars[16].x - 0.75 }}" x2="{{ bars[16].x - 0.75 }}" y1="0"
 y2="204" style="stroke:var(--c4)" stroke-dasharray="4 3"/>
<text x="{{ bars[16].x + 4 }}" y="12">limit {{ report.measured.max_length | count }}</text>
{% endif %}
<line x1="0" x2="760" y1="200" y2="200" style="stroke:var(--line)"/>
</svg>
<table>
<tr><th>source</th><th class="n">mean</th><th class="n">median</th><th class="n">95 %</th>
<th class="n">longest</th><th class="n">truncated</th><th class="n">tokens lost</th>
<th class="n">masked out</th></tr>
{% for name, lengths in named_lengths %}
<tr><td>{{ name }}</td><td class="n">{{ "{:,.0f}".format(lengths.mean) }}</td>
<td class="n">{{ lengths.median | count }}</td><td class="n">{{ lengths.p95 | count }}</td>
<td class="n">{{ lengths.longest | count }}</td>
<td class="n">{{ lengths.truncated_share | share }}</td>
<td class="n">{{ lengths.num_lost_tokens | count }}</td>
<td class="n">{{ lengths.num_masked_out | count }}</td></tr>
{% endfor %}
</table>

{% for title, field, words in [("Left out", "dropped", reasons), ("Put right", "repaired", repairs)]
 %}
<h2>{{ title }}</h2>
{% set found = report.sources | selectattr(field) | list %}
{% if found %}
<table><tr><th>source</th><th>what</th><th class="n">records</th></tr>
{% for source in found %}{% for key, num in source[field] | dictsort(by="value", reverse=true) %}
<tr><td>{{ source.name }}</td><td>{{ words[key] }} <code class="faint">{{ key }}</code></td>
<td class="n">{{ num | count }}</td></tr>
{% endfor %}{% endfor %}
</table>
{% if field == "dropped" %}<p class="faint">Each with its line in <code>drops.jsonl</code>.</p>
{% endif %}
{% else %}<p>Nothing.</p>{% endif %}
{% endfor %}

{% if report.missing %}
<h2>Missing images</h2>
<table><tr><th>folder</th><th class="n">records</th><th>where to fetch them</th></tr>
{% for folder, entry in report.missing | dictsort %}
<tr><td>{{ folder }}</td><td class="n">{{ entry.num_records | count }}</td>
<td>{{ entry.fetch or "unknown" }}</td></tr>
{% endfor %}
</table>
{% endif %}

{% set found = report.sources | selectattr("formats") | list %}
{% if found %}
<h2>Image formats</h2>
<table><tr><th>source</th><th>content and suffix</th><th class="n">images</th></tr>
{% for source in found %}{% for key, num in source.formats | dictsort(by="value", reverse=true) %}
<tr><td>{{ source.name }}</td><td>{{ key }}</td><td class="n">{{ num | count }}</td></tr>
{% endfor %}{% endfor %}
</table>
{% endif %}
</body>
</html>
"""
