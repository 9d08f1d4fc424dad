"""Small real models on disk, made once for the whole run."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    from tests.tiny import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    from tests.tiny import save_llava

    return save_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def page_writer(tmp_path_factory):
    from tests.tiny import save_page_writer

    return save_page_writer(tmp_path_factory.mktemp("models") / "page-writer")


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """Configuration, data and cache in the test's own folder, and no settings from outside."""
    for name in list(os.environ):
        if name.startswith("W2C_"):
            monkeypatch.delenv(name)
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.setenv(f"W2C_{name}_DIR", str(tmp_path / name.lower()))
    return tmp_path
