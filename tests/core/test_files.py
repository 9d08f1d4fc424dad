"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from w2c_tui.core.errors import W2CError
from w2c_tui.core.files import write_atomically


def test_a_file_is_replaced_whole_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    for content in ("<p>größer</p>\r\n", b"\x00\xff"):
        write_atomically(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(path.parent) == ["page.html"]


def test_what_cannot_be_written_leaves_the_old_content_and_no_scratch_file(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.mkdir()
    with pytest.raises(W2CError, match=r"page\.html cannot be written") as caught:
        write_atomically(path, "new")
    assert "another place" in caught.value.hint
    assert os.listdir(tmp_path) == ["page.html"]
    (tmp_path / "file").write_text("old")
    with pytest.raises(W2CError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "below.html", "new")
    assert (tmp_path / "file").read_text() == "old"
