"""Names from outside become names of files: none of them leads out of its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.core.pictures import encoded, picture
from w2c_tui.cli.generate import stem_of
from w2c_tui.cli.watch import Arrivals
from w2c_tui.core.config import Settings
from w2c_tui.core.errors import StoreError
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.store import Store
from w2c_tui.core.versions import Versions, versions_of
from w2c_tui.tui.export import export, file_name
from w2c_tui.web.render import file_of

NAMES = [
    "../../etc/passwd",
    "..",
    ".",
    "/etc/passwd",
    "..\\..\\windows\\system.ini",
    "C:\\evil",
    ".ssh/authorized_keys",
    "~/.bashrc",
    "a/../../b",
    "nul\0byte",
    "-rf",
    "con\x1b[2J\nnewline",
    "\u202egnp.exe",
    "x" * 400,
    "",
]


@pytest.mark.parametrize("title", NAMES)
def test_the_title_of_a_session_is_no_way_out_of_a_folder(own_folders: Path, title: str) -> None:
    folder = own_folders / "exports"
    folder.mkdir()
    with Store.open(own_folders / "s.sqlite") as store:
        session = store.create_session(title)
        for suffix in (".md", ".html", ".json"):
            path = folder / f"{file_name(session)}{suffix}"
            assert path.parent == folder
            assert not path.name.startswith((".", "-"))
            assert path.name.isprintable()
            path.write_text(export(store, session.id, suffix))
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_address_of_a_picture_is_no_way_out_of_a_folder(name: str) -> None:
    for address in (
        f"https://example.org/{name}",
        f"https://example.org/{name.replace('/', '%2F')}",
    ):
        page = Path("pages") / f"{stem_of(address)}.html"
        assert page.parent == Path("pages")
        assert page.name == page.name.strip("/\\\0\n")
        assert "\\" not in page.name


def test_a_picture_in_a_watched_folder_gets_its_page_beside_it(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path, Settings(), {})
    for name in ("..\\..\\up.png", "...png", "a:b.png", "\x1b[2J\n.png"):
        page = tmp_path / arrivals.page_name(tmp_path / name)
        assert page.parent == tmp_path
        assert page.name.isprintable() or "\x1b" not in page.name


def test_the_name_of_a_picture_is_not_that_of_its_copy(tmp_path: Path) -> None:
    for name in NAMES:
        shot = attachment_from_bytes(encoded(picture()), name)
        version = Versions(tmp_path / "session").add("<html></html>", original=shot)
        assert version.original_path == version.folder / "original.png"
    assert {p.name for p in tmp_path.iterdir()} == {"session"}


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_beside_a_page_leads_it_nowhere(tmp_path: Path, link: str) -> None:
    """An archive that was unpacked may hold links."""
    from w2c_tui.web.preview import _beside

    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.png").write_bytes(encoded(picture()))
    site = tmp_path / "site"
    site.mkdir()
    (site / "own.png").write_bytes(encoded(picture()))
    if link == "file":
        os.symlink(secret / "key.png", site / "key.png")
        reference = "key.png"
    else:
        os.symlink(secret, site / "img")
        reference = "img/key.png"
    for find in (_beside(site), lambda reference: file_of(site, reference)):
        assert find("own.png")
        for way in (reference, f"./{reference}", f"x/../{reference}", "../secret/key.png"):
            assert find(way) is None, way
        assert find(str(secret / "key.png")) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_id_of_a_session_is_no_way_out_of_a_folder(own_folders: Path, name: str) -> None:
    with pytest.raises(StoreError, match="which is no name"):
        versions_of(own_folders, name)
    with Store.open(own_folders / "s.sqlite") as store:
        session = store.create_session("mine")
        assert versions_of(own_folders, session.id).all() == []
