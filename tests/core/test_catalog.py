"""The catalogue is consistent, and its memory estimates follow from its numbers."""

from __future__ import annotations

import msgspec
import pytest

from w2c_tui.core.catalog import (
    DEFAULT,
    ENTRIES,
    WORKING_BYTES,
    BundledModel,
    CatalogEntry,
    PackagedFile,
    find,
    fits,
    memory_needed,
)
from w2c_tui.core.config import LoadSpec
from w2c_tui.core.prompt import TEMPLATES


def entry(name: str) -> CatalogEntry:
    found = find(name)
    assert found is not None
    return found


@pytest.mark.parametrize("model", ENTRIES, ids=lambda model: model.id)
def test_entry_is_complete_and_consistent(model: CatalogEntry) -> None:
    assert 0 < model.parameters_16bit < model.parameters
    assert model.weights_bytes(16) == 2 * model.parameters
    assert model.weights_bytes(16) > model.weights_bytes(8) > model.weights_bytes(4)
    assert model.template == "chat" or model.template in TEMPLATES
    assert set(model.backends) <= {"hf", "gguf"}
    assert model.licence
    assert model.title
    if model.hub_name:
        assert model.hub_name.count("/") == 1
    for name in (model.id, *model.aliases, *filter(None, [model.hub_name])):
        assert find(name) is model
    assert msgspec.json.decode(msgspec.json.encode(model), type=CatalogEntry) == model


def test_names_are_found_in_any_case_and_unknown_ones_are_not() -> None:
    assert entry("llm360/crystalchat-7b-WEB2CODE ").id == "crystalchat-7b-web2code"
    assert find("no-such-model") is None
    assert find("") is None


def test_default_comes_with_the_package_and_needs_no_hub() -> None:
    bundled = entry(DEFAULT).source
    assert isinstance(bundled, BundledModel)
    assert LoadSpec().name == DEFAULT
    assert sum(file.stat().st_size for file in bundled.path.iterdir()) < 90_000_000
    source = entry(bundled.language_model).source
    assert isinstance(source, PackagedFile)
    assert source.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(source.sha256) == 64


def test_memory_is_weights_and_cache_and_working_memory() -> None:
    model = entry("llava-1.5-7b")
    per_token = 2 * 32 * 4096 * 2
    assert memory_needed(model, 16, 1000) == 2 * model.parameters + 1000 * per_token + WORKING_BYTES
    assert memory_needed(model, 16, 10**9) == memory_needed(model, 16, model.context)
    # A 7B model of 4 bit with a 16-bit tower, head and embeddings, as people run it on 8 GB cards.
    assert 5e9 < memory_needed(model, 4, 2048) < 8e9


def test_fits_lists_the_bits_that_fit_finest_first() -> None:
    model = entry("qwen2.5-vl-7b")
    assert fits(model, 24_000_000_000) == (16, 8, 4)
    assert fits(model, 12_000_000_000) == (8, 4)
    assert fits(model, memory_needed(model, 4) - 1) == ()
