"""Small pages for tests of rendering and scoring."""

from __future__ import annotations

CARDS = (
    ("Fresh layouts", "Every screen begins with an empty grid of twelve columns."),
    ("Honest prices", "Pay for what you use and nothing else, month by month."),
    ("Quick answers", "Our people write back within an hour on working days."),
    ("Open formats", "Take all of your data with you whenever you want to leave."),
)
STYLE = """
body { margin: 0; font-family: sans-serif; color: #222; background: #fff }
header { background: #1a4d8f; color: #fff; padding: 20px 40px; font-size: 22px }
h1 { font-size: 40px; margin: 40px } .lead { margin: 0 40px 40px; font-size: 18px; width: 700px }
.cards { display: flex; gap: 20px; padding: 0 40px } .card { width: 250px; background: #eef2f7;
  padding: 16px; border-radius: 8px } .card h2 { font-size: 20px; margin: 0 0 8px }
footer { margin-top: 700px; padding: 30px 40px; background: #222; color: #ddd }
"""


def shop(
    *,
    style: str = "",
    title: str = "Build pages that people like",
    cards: tuple[tuple[str, str], ...] = CARDS,
    footer: str = "<footer>Made with care in a small town</footer>",
) -> str:
    """A landing page of about 1100 px at a width of 1280."""
    boxes = "".join(f'<div class="card"><h2>{h}</h2><p>{p}</p></div>' for h, p in cards)
    return (
        f"<!DOCTYPE html><html><head><title>Shop</title><style>{STYLE}{style}</style></head><body>"
        f"<header>Northwind</header><h1>{title}</h1>"
        '<p class="lead">We have been drawing and building web sites for twenty years.</p>'
        f'<div class="cards">{boxes}</div>{footer}</body></html>'
    )
