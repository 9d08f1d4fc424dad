"""A comparison as one HTML file that needs nothing else.

Knows nothing about how pages are rendered or scored.
"""

from __future__ import annotations

import base64
import io

import jinja2
from PIL import Image

from w2c_tui.web.differences import Difference, difference_picture
from w2c_tui.web.score import PARTS, Comparison
from w2c_tui.web.view import View

_LABELS = {
    "block_match": "Blocks matched",
    "text": "Text",
    "position": "Position",
    "color": "Colour",
    "ssim": "Picture (SSIM)",
    "structure": "Structure (TreeBLEU)",
}
_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ candidate }} against {{ reference }}: {{ "%.3f" % score.score }}</title>
<style>
  :root { color-scheme: light dark }
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem;
    padding: 0 1rem }
  h1 { font-size: 1.3rem; overflow-wrap: anywhere }
  .score { font-size: 2.5rem; font-weight: 700 }
  .parts { display: grid; grid-template-columns: max-content 12rem max-content; gap: .2rem 1rem }
  meter { width: 100% }
  .pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; margin: 2rem 0 }
  figure { margin: 0 } figcaption { font-weight: 600; margin-bottom: .3rem }
  img { width: 100%; border: 1px solid #8884 }
  li { overflow-wrap: anywhere }
  @media (max-width: 60rem) { .pictures { grid-template-columns: 1fr } }
</style>
</head>
<body>
<h1>{{ candidate }} against {{ reference }}</h1>
<p class="score">{{ "%.3f" % score.score }}</p>
{% if failed %}<p>{{ failed }}</p>{% endif %}
<div class="parts">
{% for label, value, counts in parts %}
  <span>{{ label }}{% if not counts %} *{% endif %}</span>
  {% if value is none %}<span>not known</span><span></span>
  {% else %}<meter min="0" max="1" value="{{ value }}"></meter>
  <span>{{ "%.3f" % value }}</span>{% endif %}
{% endfor %}
</div>
<p>The score is the mean of the parts that are known; * counts beside it.</p>
<div class="pictures">
{% for caption, uri in pictures %}
  <figure><figcaption>{{ caption }}</figcaption><img alt="{{ caption }}" src="{{ uri }}"></figure>
{% endfor %}
</div>
{% if differences %}
<h2>What differs, the worst first</h2>
<ol>{% for difference in differences %}<li>{{ difference.message }}</li>{% endfor %}</ol>
{% endif %}
</body>
</html>
"""


def comparison_report(
    reference: View,
    candidate: View | None,
    comparison: Comparison,
    found: list[Difference],
    names: tuple[str, str],
) -> str:
    """The HTML of a report. `names` are those of the reference and the candidate."""
    pictures = [("Original", _data_uri(reference.picture))]
    if candidate is not None:
        pictures.append(("Compared", _data_uri(candidate.picture)))
        pictures.append(("Difference", _data_uri(difference_picture(reference, candidate))))
    score = comparison.score
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        reference=names[0],
        candidate=names[1],
        score=score,
        failed=comparison.failed,
        parts=[(label, getattr(score, name), name in PARTS) for name, label in _LABELS.items()],
        pictures=pictures,
        differences=found[:200],
    )


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
