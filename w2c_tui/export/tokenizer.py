"""A fast tokenizer as llama.cpp knows it: pieces, scores or merges, types, special tokens.

Two kinds are written: BPE with byte fallback over word marks (Llama, CrystalCoder), where the score
of a piece is minus the rank of its merge, and byte-level BPE (GPT-2, Qwen2, Llama 3, SmolLM2),
where llama.cpp knows the splitting rule by name. Knows nothing about models.

llama.cpp's side: `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import gguf
from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from w2c_tui.core.errors import CheckpointError
from w2c_tui.models.tokenize import PromptTokenizer, unlearned

PREPEND_KEY = "w2c.tokenizer.prepend"
NORMALIZER_KEY = "w2c.tokenizer.normalizer"
MARKS_SPACES_KEY = "w2c.tokenizer.marks_spaces"
SPELLED_KEY = "w2c.tokenizer.spelled"

_WORD_MARK = "▁"
# Of pieces that no merge makes, and of special tokens: joined after everything else, if at all.
_LAST = -1e9


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Everything about a tokenizer that goes into a GGUF file.

    `prepend`: where a word mark goes before a run of text: "always", "first" (only at the start of
    a prompt) or "never"; `marks_spaces`: also before text that begins with a space. `spelled`: the
    pieces that a special token's text is made of where it is text; llama.cpp joins them to the
    token, even when told not to read special tokens.
    `normalizer`: "NFC" where text must be brought into that form before, else "".
    """

    model: str
    pre: str
    tokens: list[bytes]
    types: list[TokenType]
    scores: list[float]
    merges: list[str]
    special_ids: dict[str, int]
    add_bos: bool
    prepend: str
    marks_spaces: bool
    spelled: dict[int, list[int]]
    normalizer: str

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, ident in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(ident)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.prepend != "never")
        writer.add_string(PREPEND_KEY, self.prepend)
        writer.add_bool(MARKS_SPACES_KEY, self.marks_spaces)
        writer.add_string(NORMALIZER_KEY, self.normalizer)
        if self.spelled:
            writer.add_string(SPELLED_KEY, json.dumps(self.spelled))


def read_vocabulary(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, image_token: str | None = None
) -> Vocabulary:
    """`tokenizer` for a model with `vocab_size` rows of embeddings.

    Raises CheckpointError for a tokenizer that llama.cpp has no equal of.
    """
    special = PromptTokenizer(tokenizer, image_token).special_ids
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"its model is {model.get('type')}, not BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unknown("it marks parts of words")
    add_bos = _adds_bos(tokenizer)
    pieces: dict[int, str] = {ident: piece for piece, ident in model["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    pieces |= {ident: token["content"] for ident, token in added.items()}
    types = _types(pieces, added, special, model, vocab_size, byte_fallback=_falls_back(model))
    tokens = [pieces.get(ident, f"[PAD{ident}]").encode() for ident in range(vocab_size)]
    # Merges that would spell a special token out of ordinary text are left out, as in training.
    clean = unlearned(model, {pieces[ident] for ident in special})
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in clean["merges"]]
    ids = {
        name: ident
        for name in ("bos", "eos", "unk", "pad")
        if (ident := getattr(tokenizer, f"{name}_token_id")) is not None and ident < vocab_size
    }
    shared: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special_ids": ids,
        "add_bos": add_bos,
    }
    if _falls_back(model):
        prepend, marks_spaces = _prepends(state)
        _check_merges(model)
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        scores = [
            -float(ranks[piece]) if (piece := pieces.get(ident, "")) in ranks else _LAST
            for ident in range(vocab_size)
        ]
        spelled = _spellings(clean, {ident: pieces[ident] for ident in special})
        _check_inside(ranks, [pieces[ident] for ident in spelled])
        return Vocabulary(
            model="llama",
            pre="default",
            scores=scores,
            merges=[],
            prepend=prepend,
            marks_spaces=marks_spaces,
            spelled=spelled,
            normalizer="",
            **shared,
        )
    return Vocabulary(
        model="gpt2",
        pre=_pre_name(state),
        scores=[],
        merges=[" ".join(merge) for merge in merges],
        prepend="never",
        marks_spaces=False,
        spelled={},
        normalizer=_normalizer(state),
        **shared,
    )


def _falls_back(model: dict[str, Any]) -> bool:
    return bool(model.get("byte_fallback"))


def _types(
    pieces: dict[int, str],
    added: dict[int, dict[str, Any]],
    special: set[int],
    model: dict[str, Any],
    vocab_size: int,
    *,
    byte_fallback: bool,
) -> list[TokenType]:
    types = []
    for ident in range(vocab_size):
        piece = pieces.get(ident)
        if piece is None:
            kind = TokenType.UNUSED
        elif piece == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        elif ident in special:
            kind = TokenType.CONTROL
        elif ident in added:
            kind = TokenType.USER_DEFINED
        elif byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece[-1] == ">":
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        types.append(kind)
    return types


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    start = tokenizer.backend_tokenizer.encode("").ids
    if start in ([], [tokenizer.bos_token_id]):
        return bool(start)
    raise _unknown(f"it puts {start} before every text")


# --- BPE with byte fallback -----------------------------------------------------------------------


def _prepends(state: dict[str, Any]) -> tuple[str, bool]:
    """Where this tokenizer puts a word mark, if it otherwise does what llama.cpp does.

    And whether it does so before text that begins with a space: the old normaliser does, the newer
    Metaspace does not.
    """
    steps = _steps(state.get("normalizer")) + _steps(state.get("pre_tokenizer"))
    prepend, marks_spaces = "never", False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == _WORD_MARK:
            prepend, marks_spaces = "always", True
        elif kind == "Metaspace" and step["replacement"] == _WORD_MARK and not step["split"]:
            prepend = step["prepend_scheme"]
        elif kind == "Replace" and step["pattern"] == {"String": " "}:
            pass
        else:
            raise _unknown(f"its step {kind} changes text in a way llama.cpp does not")
    return prepend, marks_spaces


def _check_merges(model: dict[str, Any]) -> None:
    """Raise CheckpointError unless every two pieces that spell a third one are a merge.

    llama.cpp joins them without asking for one. It is so where merges were derived from a
    SentencePiece model, as in all Llama tokenizers, and not where they were learnt.
    """
    merges = {tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]}
    vocab = model["vocab"]
    made = {left + right for left, right in merges}
    for piece in made:
        for at in range(1, len(piece)):
            pair = piece[:at], piece[at:]
            if pair[0] in vocab and pair[1] in vocab and pair not in merges:
                raise _unknown(f"{pair[0]!r} and {pair[1]!r} are no merge, although {piece!r} is")


def _check_inside(made: Iterable[str], special: Sequence[str]) -> None:
    """Raise CheckpointError for a piece with a special token in it, which that would grow into."""
    for piece in made:
        if inside := next((token for token in special if token in piece), None):
            raise _unknown(f"its piece {piece!r} has the special token {inside!r} in it")


def _spellings(model: dict[str, Any], special: dict[int, str]) -> dict[int, list[int]]:
    """For each special token, the pieces of its text, where llama.cpp would join those to it."""
    plain = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    spelled = {}
    for ident, text in special.items():
        ids = plain.encode(text.replace(" ", _WORD_MARK), add_special_tokens=False).ids
        if len(ids) == 2:
            spelled[ident] = ids
    return spelled


# --- Byte-level BPE -------------------------------------------------------------------------------

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


def _pre_name(state: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which text is split into words."""
    steps = _steps(state.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        own_words = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own_words and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_words:
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            whole_words = bool(state["model"].get("ignore_merges"))
            # llama.cpp takes words that are pieces whole exactly where Llama 3 does.
            if name and steps[0]["behavior"] == "Isolated" and whole_words == (name == "llama-bpe"):
                return name
    raise _unknown(
        f"it splits words by {' and '.join(kinds) or 'nothing'} in a way that is not known here; "
        f"known: gpt-2, smollm, {', '.join(_SPLITS.values())}"
    )


def _normalizer(state: dict[str, Any]) -> str:
    steps = [step["type"] for step in _steps(state.get("normalizer"))]
    if steps in ([], ["NFC"]):
        return "".join(steps)
    raise _unknown(f"it normalises text by {' and '.join(steps)}")


# --- Small things ---------------------------------------------------------------------------------


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokeniser, sequences laid flat."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    if part["type"] == "Sequence":
        return [step for each in inner or [] for step in _steps(each)]
    return [part]


def _unknown(reason: str) -> CheckpointError:
    return CheckpointError(
        f"This tokenizer cannot be exported: {reason}.",
        hint="llama.cpp has tokenizers of its own, and none that is equal.",
    )
