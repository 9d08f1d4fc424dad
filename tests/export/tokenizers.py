"""Tokenizers of every kind that can be exported, trained on a little text, and hostile strings."""

from __future__ import annotations

import functools
import io
import random

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = """
the quick brown fox jumps over lazy dog Prices Shop Contact About width height color background
margin padding border display flex grid function return const let import def class self None true
false null naïve café Straße Ελλάδα Россия 日本語 テキスト 한국어 中文 עברית العربية हिन्दी
don't I'LL we've they're it's 12 345 6789 3.14 0x1F
""".split()  # noqa: SIM905
_MARKUP = (
    "<div class='page'>",
    "</div>",
    '<p style="color:#336699">',
    "</p>",
    "<br/>",
    "<!DOCTYPE html>",
    "<html lang=en>",
    "&nbsp;",
    "<!-- note -->",
    "<s>",
    "</s>",
    "<ul><li>",
    "{",
    "};",
    "=>",
    "==",
    "// x",
    "/* y */",
    # Pieces that special tokens can be put together from.
    "</tabs>",
    "<tabs>",
    "<until>",
    "task>",
    "<s",
    "</s",
    "s>",
)
_SPECIAL = ("<s>", "</s>", "<unk>", "<image>", "<pad>", "<|im_start|>", "<|im_end|>", "<0x41>")
_SPACES = (" ", "  ", "    ", "\t", "\n", "\n\n", "\n\n\n", "\r\n", " \n", "\t\t", "\xa0", "\u3000")
_ODD = (
    *("🎉", "👩\u200d👩\u200d👧", "🇩🇪", "é", "e\u0301", "ﬁ", "\u200d", "\ufeff", "▁", "▁▁"),
    *("\x00", "\x07", "𝕏", "½", "Å"),
)


@functools.cache
def strings(count: int, seed: int = 0) -> tuple[str, ...]:
    """Texts of 1 to 24 parts: words, markup, special tokens as text, white space, oddities."""
    rng = random.Random(seed)
    pools = (_WORDS, _WORDS, _MARKUP, _SPACES, _SPACES, _SPECIAL, _ODD)
    made = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 24)):
            parts.append(rng.choice(rng.choice(pools)))
            if rng.random() < 0.5:
                parts.append(" ")
        made.append("".join(parts))
    return tuple(made)


@functools.cache
def _corpus() -> tuple[str, ...]:
    """Texts to train on, of which special tokens are no part."""
    texts = []
    for text in strings(1000, seed=1):
        for mark in (*_SPECIAL, "\x00", "\x07", "\n"):
            text = text.replace(mark, " ")
        texts.append(text)
    return tuple(texts)


@functools.cache
def _sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        vocab_size=1600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        # So that letters and brackets join, as far as `</` and `s>` do.
        split_by_unicode_script=False,
        # Where they stand for tokens, published models never saw them as text.
        control_symbols=["<pad>"],
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def llama(folder, *, bos: bool, legacy: bool) -> PreTrainedTokenizerFast:
    """A Llama tokenizer as it is published; `legacy` marks words as the first Llama's does."""
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model())
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy, add_bos_token=bos)
    backend = tokenizer.backend_tokenizer
    if legacy:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


def byte_level(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits words as GPT-2, SmolLM2, Qwen2 or Llama 3 do."""
    whole = kind == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    own = pre.ByteLevel(add_prefix_space=False)
    bare = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = {
        "gpt-2": own,
        "smollm": pre.Sequence([pre.Digits(individual_digits=True), own]),
        "qwen2": pre.Sequence([pre.Split(Regex(QWEN2), "isolated"), bare]),
        "llama-bpe": pre.Sequence([pre.Split(Regex(LLAMA3), "isolated"), bare]),
    }[kind]
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
