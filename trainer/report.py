"""`report.html` of a run: its curves, its settings and pages written along the way.

One file that needs no network; what a model wrote stands in it as text. Knows nothing about where
the figures come from.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _POINTS = 560, 150, 400
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr));
  gap: 1rem; }
figure { margin: 0; } figcaption { display: flex; justify-content: space-between; }
svg { width: 100%; height: auto; background: color-mix(in srgb, currentColor 5%, transparent); }
polyline { fill: none; stroke: #3b82f6; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
small { opacity: .7; } pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem;
  overflow: auto; padding: .75rem; background: color-mix(in srgb, currentColor 5%, transparent); }
table { border-collapse: collapse; } td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
"""

Line = Mapping[str, Any]
_CURVES: tuple[tuple[str, str, Callable[[Line], float | None]], ...] = (
    ("Loss", "{:.4g}", lambda line: line["loss"]),
    ("Learning rate", "{:.3g}", lambda line: line["learning_rate"]),
    ("Gradient norm before clipping", "{:.3g}", lambda line: line["grad_norm"]),
    ("Tokens per second", "{:,.0f}", lambda line: line["tokens"] / line["step_s"]),
    ("Waiting for data, share of the step", "{:.2%}", lambda line: _share_waited(line)),
    ("Tokens per sample", "{:,.0f}", lambda line: line["tokens"] / line["samples"]),
    ("Supervised tokens per step", "{:,.0f}", lambda line: line["supervised"]),
    ("Memory of the first device, GiB", "{:.2f}", lambda line: line["memory_bytes"] / 2**30),
)


def _share_waited(line: Line) -> float:
    return float(line["data_wait_s"] / line["step_s"])


def report(recipe: Mapping[str, Any], steps: Sequence[Line], samples: Sequence[Line]) -> str:
    """The page. `steps`: lines of `metrics.jsonl`; `samples`: those of `samples.jsonl`."""
    title = f"{recipe['name']}: {recipe['stage']}"
    charts = "".join(_chart(name, form, steps, value) for name, form, value in _CURVES)
    written = "".join(
        f"<h3>Step {line['step']}, {_text(line['record'])}</h3><pre>{_text(line['text'])}</pre>"
        for line in reversed(samples)
    )
    rows = "".join(
        f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in recipe.items()
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(title)}</h1><p>{_summary(steps)}</p>"
        f'<div class="charts">{charts}</div>'
        + (f"<h2>Written along the way</h2>{written}" if written else "")
        + f"<h2>Recipe</h2><table>{rows}</table></body></html>\n"
    )


def _summary(steps: Sequence[Line]) -> str:
    if not steps:
        return "No step is done yet."
    seconds = sum(line["step_s"] for line in steps)
    tokens = sum(line["tokens"] for line in steps)
    return (
        f"{len(steps):,} steps, {sum(line['samples'] for line in steps):,} samples, "
        f"{tokens:,} tokens in {seconds / 3600:.2f} h ({tokens / seconds:,.0f} tokens/s); "
        f"loss {steps[0]['loss']:.4f} at first, {steps[-1]['loss']:.4f} at last."
    )


def _chart(
    name: str, form: str, steps: Sequence[Line], value: Callable[[Line], float | None]
) -> str:
    """A curve as SVG; of many steps the mean of as many as fall on one point."""
    points = [(line["step"], found) for line in steps if (found := value(line)) is not None]
    if not points:
        return ""
    size = -(-len(points) // _POINTS)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    means = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    low, high = min(y for _, y in means), max(y for _, y in means)
    first, last = means[0][0], means[-1][0]
    path = " ".join(
        f"{_WIDTH * (x - first) / max(last - first, 1):.1f},"
        f"{_HEIGHT - 5 - (_HEIGHT - 10) * (y - low) / ((high - low) or 1):.1f}"
        for x, y in means
    )
    return (
        f"<figure><figcaption><b>{_text(name)}</b>"
        f"<small>{form.format(low)} to {form.format(high)}</small></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(name)}">'
        f'<polyline points="{path}"/></svg>'
        f"<figcaption><small>step {first}</small><small>step {last}</small></figcaption></figure>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
