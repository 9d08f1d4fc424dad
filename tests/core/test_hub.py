"""What is fetched of a model repository, from a hub on this machine, and what is said if not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.core.hub_server import hub, offer
from w2c_tui.core.errors import DownloadError, ModelNotFoundError
from w2c_tui.core.hub import fetch_from_hub, fetch_gguf
from w2c_tui.core.locate import locate

__all__ = ["hub"]


def silent(*_):
    pass


def fetched(name, **options):
    return {path.name for path in fetch_from_hub(name, silent, **options).iterdir()}


CARDS = ["README.md", "config.json", "tokenizer.model", "chat_template.jinja", "theirs.py"]
KEPT = {"config.json", "tokenizer.model", "chat_template.jinja"}


def test_safetensors_are_fetched_and_no_pickles_beside_them(hub):
    offer(hub, *CARDS, "model.safetensors", "pytorch_model.bin", "training_args.bin")
    assert fetched("someone/files") == KEPT | {"model.safetensors"}


def test_pickles_are_fetched_where_there_is_nothing_else(hub):
    offer(hub, *CARDS, "pytorch_model.bin")
    assert fetched("someone/files") == KEPT | {"pytorch_model.bin"}


def test_code_is_fetched_only_when_it_may_run_and_weights_only_when_wanted(hub):
    offer(hub, *CARDS, "model.safetensors")
    assert fetched("someone/files", weights=False) == KEPT
    assert fetched("someone/files", with_code=True) == KEPT | {"model.safetensors", "theirs.py"}


def test_what_was_fetched_is_found_without_a_network(hub, monkeypatch):
    offer(hub, *CARDS, "model.safetensors")
    assert fetched("someone/files") == KEPT | {"model.safetensors"}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert fetched("someone/files") == KEPT | {"model.safetensors"}
    with pytest.raises(DownloadError, match="the model hub cannot be reached"):
        fetch_from_hub("someone/else", silent)


@pytest.mark.parametrize(
    ("status", "code", "error", "said", "hint"),
    [
        (403, "GatedRepo", DownloadError, "accepted its licence", "hf auth login"),
        (401, "RepoNotFound", ModelNotFoundError, "no public model", "hf auth login"),
        (500, "", DownloadError, "Downloading someone/files failed: .*500", "Try again"),
    ],
)
def test_a_refusal_of_the_hub_is_said_in_words(hub, status, code, error, said, hint):
    offer(hub, "config.json")
    (hub / "someone" / "files" / "refusal.json").write_text(json.dumps([status, code]))
    with pytest.raises(error, match=said) as caught:
        fetch_from_hub("someone/files", silent)
    assert hint in caught.value.hint


def test_a_repository_without_gguf_files_says_so(hub, monkeypatch):
    offer(hub, "config.json", "model.safetensors")
    with pytest.raises(ModelNotFoundError, match="no GGUF file") as caught:
        fetch_gguf("someone/files", "", silent)
    assert "--backend hf" in caught.value.hint
    fetch_from_hub("someone/files", silent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="no GGUF file on this machine"):
        fetch_gguf("someone/files", "", silent)


def test_a_gguf_file_of_a_hub_is_fetched_with_its_image_encoder_and_nothing_else(hub, monkeypatch):
    offer(
        hub,
        *("m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-bf16.gguf", "README.md"),
        *("mmproj-m-BF16.gguf", "mmproj-m-f16.gguf", "mmproj-m-Q8_0.gguf"),
    )
    path = Path(locate("someone/files:q8_0", hub, lambda *_: None))
    assert path.read_bytes() == b"GGUFm-Q8_0.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == ["m-Q8_0.gguf", "mmproj-m-f16.gguf"]
    assert fetch_gguf("someone/files", "", lambda *_: None).name == "m-Q4_K_M.gguf"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Path(locate("someone/files:Q8_0", hub, lambda *_: None)) == path
    with pytest.raises(DownloadError, match="Q6_K is not on this machine"):
        locate("someone/files:Q6_K", hub, lambda *_: None)


def test_all_parts_of_a_split_gguf_file_are_fetched(hub):
    offer(hub, *(f"m-Q8_0-0000{at}-of-00003.gguf" for at in (1, 2, 3)), "m-F16.gguf")
    path = Path(locate("someone/files:Q8_0", hub, lambda *_: None))
    assert path.name == "m-Q8_0-00001-of-00003.gguf"
    assert len(list(path.parent.iterdir())) == 3


def test_a_quantisation_that_is_not_there_is_answered_with_those_that_are(hub):
    offer(hub, "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-f16.gguf")
    with pytest.raises(ModelNotFoundError, match="no GGUF file Q2_K") as caught:
        locate("someone/files:Q2_K", hub, lambda *_: None)
    assert "someone/files:Q4_K_M, someone/files:Q8_0" in caught.value.hint
