"""Text becomes the same tokens in the exported file as in the checkpoint."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.export import tokenizers
from tests.tiny import word_mark_tokenizer
from w2c_tui.backends.gguf import GGUFTokenizer
from w2c_tui.backends.llama import LanguageModel, RuntimeOptions
from w2c_tui.core.config import ExportSpec
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import CheckpointError
from w2c_tui.core.prompt import V1, Segment, render
from w2c_tui.export.gguf_export import export
from w2c_tui.export.tokenizer import read_vocabulary
from w2c_tui.models.checkpoint import open_checkpoint
from w2c_tui.models.tokenize import ImageSlot, PromptTokenizer

KINDS = {
    "llama": lambda folder: tokenizers.llama(folder, bos=True, legacy=False),
    "llama-legacy": lambda folder: tokenizers.llama(folder, bos=True, legacy=True),
    "llama-no-bos": lambda folder: tokenizers.llama(folder, bos=False, legacy=True),
    "gpt-2": lambda folder: tokenizers.byte_level("gpt-2"),
    "smollm": lambda folder: tokenizers.byte_level("smollm"),
    "qwen2": lambda folder: tokenizers.byte_level("qwen2"),
    "llama-bpe": lambda folder: tokenizers.byte_level("llama-bpe"),
}
COUNTS = {"llama": 10_000, "llama-legacy": 10_000, "gpt-2": 10_000}


@pytest.fixture(params=KINDS, scope="module")
def both(request, tmp_path_factory):
    """The checkpoint's tokenizer and the exported file's, of one small model."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = KINDS[request.param](folder)
    config = LlamaConfig(
        vocab_size=1700,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spec = ExportSpec(quant="f16", verify=False)
    exported = export(str(folder), folder / "out", spec, lambda *_: None)
    ours = PromptTokenizer(open_checkpoint(folder).tokenizer, "<image>")
    options = RuntimeOptions(context=64, threads=1, n_gpu_layers=0)
    from pathlib import Path

    with LanguageModel(Path(exported.model), options) as model:
        yield request.param, ours, GGUFTokenizer(model)


def ids_of(tokenizer: PromptTokenizer, text: str) -> list[int]:
    return [i for piece in tokenizer.encode([Segment("text", text)]) for i in piece.ids]


def test_every_text_becomes_the_same_tokens(both):
    kind, ours, native = both
    texts = tokenizers.strings(COUNTS.get(kind, 2_000))
    wrong = [text for text in texts if native.text_ids(text) != ids_of(ours, text)]
    assert not wrong, f"{len(wrong)} of {len(texts)}, first {wrong[0]!r}"


def test_whole_prompts_become_the_same_tokens(both):
    _, ours, native = both
    image = Attachment(b"x", "0" * 64, 10, 20)
    for text in tokenizers.strings(300, seed=3):
        messages = [
            Message("user", text, (image,)),
            Message("assistant", text[::-1]),
            Message("user", " " + text),
        ]
        segments = render(messages, V1)
        expected: list[int] = []
        for piece in ours.encode(segments):
            expected += [-1] if isinstance(piece, ImageSlot) else piece.ids
        assert native.encode(segments, images=[[-1]]) == expected


def test_merges_that_were_learnt_are_refused_where_llama_cpp_would_make_others():
    with pytest.raises(CheckpointError, match="no merge"):
        read_vocabulary(word_mark_tokenizer(bos=False), 700)


def test_a_splitting_rule_that_llama_cpp_lacks_is_refused_with_the_known_ones():
    tokenizer = tokenizers.byte_level("gpt-2")
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(CheckpointError, match="gpt-2, smollm, llama-bpe, qwen2"):
        read_vocabulary(tokenizer, 1700)
