"""Which place a model's name leads to: a path, the catalogue, a hub, or a hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from w2c_tui.core.catalog import BUNDLED_NAME, ENTRIES, BundledModel, PackagedFile
from w2c_tui.core.errors import DownloadError, ModelNotFoundError
from w2c_tui.core.locate import bundled_folder, display_name, locate, names_gguf


def found(name: str | Path, models: Path) -> str:
    return locate(str(name), models, lambda *_: None)


PACKAGED = next(entry for entry in ENTRIES if isinstance(entry.source, PackagedFile))
BUNDLED = [entry for entry in ENTRIES if isinstance(entry.source, BundledModel)]
HUB = next(entry for entry in ENTRIES if isinstance(entry.source, str))


def test_a_path_wins_over_a_catalogue_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / PACKAGED.id).mkdir()
    assert found(PACKAGED.id, tmp_path) == PACKAGED.id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found(f"~/{PACKAGED.id}", tmp_path) == str(tmp_path / PACKAGED.id)


def test_a_catalogue_name_leads_to_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(HUB.id, tmp_path) == HUB.source
    for entry in BUNDLED:
        assert found(entry.id, tmp_path) == str(entry.source.path)
    # Nothing can be fetched from here; it is asked for all the same.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(DownloadError, match=PACKAGED.source.package):
        found(PACKAGED.id, tmp_path / "models")


def test_a_hub_name_is_passed_on(tmp_path: Path) -> None:
    assert found("someone/some.model-7B", tmp_path) == "someone/some.model-7B"


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        (f"{HUB.id}x", "no model called", f"Did you mean {HUB.id}?"),
        ("zzzzqqqq", "no model called zzzzqqqq", "w2c models list"),
        ("./someone/model", "no file or folder", ""),
        ("~/model", "no file or folder", ""),
        ("/no/such/model", "no file or folder", ""),
        ("someone/model.gguf", "no file or folder", ""),
        ("a\\b", "no file or folder", ""),
        ("a/b/c", "no model called", ""),
    ],
)
def test_a_name_that_leads_nowhere_has_a_hint(
    tmp_path: Path, name: str, said: str, hint: str
) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        found(name, tmp_path)
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_names_of_gguf_files_are_told_from_others(tmp_path: Path) -> None:
    for folder, file in (("gguf", "a.gguf"), ("hf", "config.json"), ("part", BUNDLED_NAME)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "hf" / "a.gguf").write_text("")
    for name, expected in {
        "a/b.gguf": True,
        "A.GGUF": True,
        "someone/model:Q8_0": True,
        "someone/model": False,
        tmp_path / "gguf": True,
        tmp_path / "hf": False,
        tmp_path / "part": True,
        HUB.id: False,
        "nothing": False,
    }.items():
        assert names_gguf(str(name)) is expected, name
    assert bundled_folder(str(tmp_path / "part")) == tmp_path / "part"
    assert bundled_folder(str(tmp_path / "hf")) is None
    assert bundled_folder("nothing") is None


def test_a_model_is_shown_by_its_title_or_the_end_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert display_name(HUB.id) == HUB.title
    assert display_name(f"{tmp_path}/my-model/") == "my-model"
    assert display_name("someone/model") == "someone/model"
