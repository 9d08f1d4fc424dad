"""The page about security names tests; a name that is gone would prove nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/security.md").read_text("utf-8"))


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_what_the_page_names_exists(path: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE)


def test_every_line_names_a_test() -> None:
    lines = (ROOT / "docs/security.md").read_text("utf-8").splitlines()
    table = [row for row in lines if row.startswith("| ") and not row.startswith("| From")]
    assert len(table) >= 15
    for row in table:
        assert "`tests/" in row, row
