"""Reports that people look at: HTML files beside the results of a run.

Knows nothing about how rows came to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

import jinja2

from w2c_tui.core.files import write_atomically
from w2c_tui.evaluate.compare import Paired
from w2c_tui.evaluate.journal import Run
from w2c_tui.evaluate.wcgb import PARTS, PageResult, WcgbResult

PUBLISHED = (
    ("CrystalCoder-7B, DWCG", 7.81, 7.90, 8.14, 8.11, 7.990),
    ("CrystalCoder-7B, DWCG + DWU", 8.01, 8.10, 8.27, 8.12, 8.126),
    ("CrystalChat-7B, no Web2Code data", 4.71, 4.57, 4.87, 5.15, 4.825),
    ("CrystalChat-7B, DWCG + DWU", 7.90, 8.00, 8.20, 8.22, 8.080),
    ("CrystalChat-7B, all", 8.38, 8.29, 8.42, 8.49, 8.394),
    ("LLaMA3-8B, all", 8.52, 8.56, 8.42, 8.61, 8.530),
)
"""VSA, CAD, TCC, UII and their mean, judged by GPT-4V (arXiv 2406.20098, tables 4 and 5)."""
_KINDS = ("original", "page", "difference")
_NUM_BINS = 20


def write_report(folder: Path, run: Run, result: WcgbResult, rows: Sequence[PageResult]) -> Path:
    """`report.html` in `folder`, with the pictures that are there; the worst pages first."""
    shown = [
        {
            "row": row,
            "pictures": [
                (kind, "pictures/" + quote(f"{row.name}.{kind}.jpg"))
                for kind in _KINDS
                if (folder / "pictures" / f"{row.name}.{kind}.jpg").exists()
            ],
            "page": "pages/" + quote(f"{row.name}.html")
            if (folder / "pages" / f"{row.name}.html").exists()
            else "",
        }
        for row in sorted(rows, key=lambda row: row.score)
    ]
    path = folder / "report.html"
    text = (
        _templates()
        .get_template("run")
        .render(
            run=run,
            result=result,
            shown=shown,
            parts=[part for part in PARTS if part in result.parts],
            bins=_histogram([row.score for row in rows]),
            published=PUBLISHED,
        )
    )
    write_atomically(path, text)
    return path


def write_comparison(path: Path, paired: Paired, folders: tuple[Path, Path]) -> None:
    """Both runs side by side, the pages that lost most first, as one file beside their folders."""

    def pictures(name: str) -> list[tuple[str, str]]:
        found = []
        for folder, model in zip(folders, paired.models, strict=True):
            for kind in ("original", "page") if folder is folders[0] else ("page",):
                picture = folder / "pictures" / f"{name}.{kind}.jpg"
                if picture.exists():
                    where = Path.resolve(picture).as_uri()
                    found.append((kind if kind == "original" else model, where))
        return found

    worse = [change for change in paired.changes if change.difference < 0]
    better = [change for change in reversed(paired.changes) if change.difference > 0]
    text = (
        _templates()
        .get_template("comparison")
        .render(
            paired=paired,
            lists=[
                (title, [(change, pictures(change.name)) for change in changes[:50]], len(changes))
                for title, changes in (("Worse", worse), ("Better", better))
            ],
            bins=_histogram([change.difference for change in paired.changes], low=-1.0),
        )
    )
    write_atomically(path, text)


def _histogram(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> list[tuple]:
    """(from, to, count, share of the fullest bin) of `_NUM_BINS` bins."""
    width = (high - low) / _NUM_BINS
    counts = [0] * _NUM_BINS
    for value in values:
        counts[min(max(int((value - low) / width), 0), _NUM_BINS - 1)] += 1
    most = max(counts, default=0) or 1
    return [
        (low + at * width, low + (at + 1) * width, count, count / most)
        for at, count in enumerate(counts)
    ]


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.DictLoader({"run": _HEAD + _RUN, "comparison": _HEAD + _COMPARISON}),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


_HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline';
  script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  :root { color-scheme: light dark; --line: #8883; --ink: #3b6fd4 }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 88rem;
    padding: 0 1.5rem }
  h1 { font-size: 1.4rem; margin-bottom: 0; overflow-wrap: anywhere }
  .quiet { opacity: .7 }
  .score { font-size: 2.8rem; font-weight: 700; margin: .5rem 0 0; line-height: 1.1 }
  table { border-collapse: collapse; margin: 1rem 0 }
  th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line);
    vertical-align: top }
  td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
  th button { all: unset; cursor: pointer; font-weight: 600 }
  th button:focus-visible { outline: 2px solid var(--ink) }
  .bars { display: flex; align-items: flex-end; gap: 2px; height: 7rem; width: min(34rem, 90vw) }
  .bars div { flex: 1; background: var(--ink); min-height: 1px }
  .axis { display: flex; justify-content: space-between; width: min(34rem, 90vw) }
  .pictures { display: flex; gap: .6rem }
  figure { margin: 0 } figcaption { font-size: .8rem; opacity: .7 }
  .pictures img { width: 12rem; max-height: 14rem; object-fit: cover; object-position: top;
    border: 1px solid var(--line) }
  .name { overflow-wrap: anywhere; max-width: 16rem }
  .columns { display: flex; flex-wrap: wrap; gap: 0 4rem }
</style>
"""
_RUN = """\
<title>{{ run.model }}: {{ "%.3f" % result.score }}</title>
</head>
<body>
<h1>{{ run.model }}</h1>
<p class="quiet">Webpage Code Generation Benchmark, {{ result.num_pages }} pages,
backend {{ run.backend }}</p>
<p class="score">{{ "%.3f" % result.score }}</p>
<p class="quiet">visual score, 95% interval {{ "%.3f" % result.interval.low }} to
{{ "%.3f" % result.interval.high }}; {{ result.num_rendered }} of {{ result.num_pages }}
({{ "%.1f" % (100 * result.render_rate) }}%) rendered, the others count 0</p>
<div class="columns">
<table>
<tr><th>Part</th><th class="number">Mean</th></tr>
{% for part in parts %}
<tr><td>{{ part.replace("_", " ") }}</td>
<td class="number">{{ "%.3f" % result.parts[part] }}</td></tr>
{% endfor %}
{% if result.bleu is not none %}
<tr><td>text BLEU</td><td class="number">{{ "%.3f" % result.bleu }}</td></tr>
<tr><td>text chrF</td><td class="number">{{ "%.3f" % result.chrf }}</td></tr>
{% endif %}
{% for outcome, count in result.outcomes.items() %}
<tr><td>{{ outcome }}</td><td class="number">{{ count }}</td></tr>
{% endfor %}
</table>
<div>
<h2>Scores</h2>
<div class="bars" role="img" aria-label="Histogram of scores">
{% for low, high, count, share in bins %}
<div style="height: {{ "%.1f" % (100 * share) }}%"
 title="{{ "%.2f" % low }} to {{ "%.2f" % high }}: {{ count }}"></div>
{% endfor %}
</div>
<div class="axis quiet"><span>0</span><span>0.5</span><span>1</span></div>
</div>
</div>
<h2>Beside the published results</h2>
<table>
<tr><th>Model</th><th class="number">VSA</th><th class="number">CAD</th><th class="number">TCC</th>
<th class="number">UII</th><th class="number">Mean</th></tr>
{% if result.judged_strict %}
{% for label, judged in (("strict", result.judged_strict),
    ("as published", result.judged_published)) %}
<tr><td><b>{{ run.model }}</b>, {{ label }}, {{ judged.num_pages }} of
{{ judged.num_asked }} judged</td>
{% for name in ("VSA", "CAD", "TCC", "UII") %}
<td class="number">{{ "%.2f" % judged.scores[name] }}</td>
{% endfor %}
<td class="number"><b>{{ "%.3f" % judged.overall }}</b></td></tr>
{% endfor %}
{% else %}
<tr><td><b>{{ run.model }}</b></td><td colspan="5">not judged (--judge-url asks a judge)</td></tr>
{% endif %}
{% for row in published %}
<tr><td>{{ row[0] }}</td>
{% for value in row[1:5] %}<td class="number">{{ "%.2f" % value }}</td>{% endfor %}
<td class="number">{{ "%.3f" % row[5] }}</td></tr>
{% endfor %}
</table>
<p class="quiet">Published: 0 to 10, judged by GPT-4V (arXiv 2406.20098). The visual score is
computed here and is another measure.</p>
<h2>Pages</h2>
<table id="pages">
<thead><tr>
<th><button data-key="0">Page</button></th>
<th class="number"><button data-key="1">Score</button></th>
{% for part in parts %}
<th class="number">
<button data-key="{{ loop.index + 1 }}">{{ part.replace("_", " ") }}</button></th>
{% endfor %}
<th>Original, page, difference</th></tr></thead>
<tbody>
{% for entry in shown %}
<tr><td class="name">{% if entry.page %}<a href="{{ entry.page }}">{{ entry.row.name }}</a>
{% else %}{{ entry.row.name }}{% endif %}
{% if entry.row.outcome != "rendered" or entry.row.error %}
<div class="quiet">{{ entry.row.outcome }}. {{ entry.row.error }}</div>{% endif %}</td>
<td class="number" data-value="{{ entry.row.score }}">{{ "%.3f" % entry.row.score }}</td>
{% for part in parts %}
<td class="number" data-value="{{ entry.row.parts.get(part, -1) }}">
{{ "%.3f" % entry.row.parts[part] if part in entry.row.parts else "" }}</td>
{% endfor %}
<td><div class="pictures">
{% for kind, link in entry.pictures %}
<a href="{{ link }}"><img loading="lazy" alt="{{ kind }} of {{ entry.row.name }}"
 src="{{ link }}"></a>
{% endfor %}
</div></td></tr>
{% endfor %}
</tbody>
</table>
<script>
  const body = document.querySelector('#pages tbody')
  let last = [-1, 1]
  for (const button of document.querySelectorAll('#pages button')) {
    button.addEventListener('click', () => {
      const key = Number(button.dataset.key)
      last = [key, last[0] === key ? -last[1] : 1]
      const value = row => row.cells[key].dataset.value ?? row.cells[key].innerText
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)]
        return last[1] * (key ? x - y : x.localeCompare(y, undefined, {numeric: true}))
      })
      body.append(...rows)
    })
  }
</script>
</body>
</html>
"""
_COMPARISON = """\
<title>{{ paired.models[1] }} against {{ paired.models[0] }}</title>
</head>
<body>
<h1>{{ paired.models[1] }} against {{ paired.models[0] }}</h1>
<p class="score">{{ "%+.3f" % paired.difference }}</p>
<p class="quiet">mean difference over {{ paired.changes | length }} rows, 95% interval
{{ "%+.3f" % paired.interval.low }} to {{ "%+.3f" % paired.interval.high }}
({{ "clear" if paired.is_clear else "may be chance" }}); means {{ "%.3f" % paired.means[0] }} and
{{ "%.3f" % paired.means[1] }}</p>
<div class="bars" role="img" aria-label="Histogram of differences">
{% for low, high, count, share in bins %}
<div style="height: {{ "%.1f" % (100 * share) }}%"
 title="{{ "%+.2f" % low }} to {{ "%+.2f" % high }}: {{ count }}"></div>
{% endfor %}
</div>
<div class="axis quiet"><span>-1</span><span>0</span><span>+1</span></div>
{% for title, changes, count in lists %}
<h2>{{ title }}: {{ count }}</h2>
<table>
{% for change, pictures in changes %}
<tr><td class="name">{{ change.name }}</td>
<td class="number">{{ "%.3f" % change.first }}</td>
<td class="number">{{ "%.3f" % change.second }}</td>
<td class="number">{{ "%+.3f" % change.difference }}</td>
<td><div class="pictures">
{% for label, link in pictures %}
<figure><img loading="lazy" alt="{{ label }}" src="{{ link }}">
<figcaption>{{ label }}</figcaption></figure>
{% endfor %}
</div></td></tr>
{% endfor %}
</table>
{% endfor %}
</body>
</html>
"""
