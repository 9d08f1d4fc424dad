"""Segments to token ids, and token ids back to text while they stream.

The one place where a Hugging Face tokenizer meets a rendered prompt: training takes `supervised`
from here, the HF backend takes the ids. Every run of text between special tokens and images is
tokenised once, as a whole, with special-token parsing off. Knows nothing about models or pixels.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from w2c_tui.core.errors import CheckpointError
from w2c_tui.core.prompt import ChatTemplate, Segment

_MAX_PROMPTS = 16
"""Runs without an answer in them that are remembered: the first ones, such as the system prompt."""


class Tokens(msgspec.Struct, frozen=True):
    """A run of token ids with, for each, whether training takes its loss there."""

    ids: list[int]
    supervised: list[bool]


class ImageSlot(msgspec.Struct, frozen=True):
    """The place of image number `image` of the conversation."""

    image: int


Piece = Tokens | ImageSlot


class PromptTokenizer:
    """A tokenizer seen as this project uses it. Raises CheckpointError if it cannot be used so."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: str | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise CheckpointError(
                f"The tokenizer class {type(tokenizer).__name__} has no fast implementation.",
                hint="Save the checkpoint with a tokenizer.json.",
            )
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                "The tokenizer has no end-of-sequence token.",
                hint="Set eos_token in tokenizer_config.json.",
            )
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        added = backend.get_added_tokens_decoder()
        control = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, image_token}
        self._special = {
            token.content: (ident, token)
            for ident, token in added.items()
            if token.special or token.content in control
        }
        self.special_ids = {ident for ident, _ in self._special.values()}
        # Private copies: here text is only ever text, while the processor's own tokenizer must go
        # on reading special tokens.
        state = json.loads(backend.to_str())
        state["model"] = unlearned(state["model"], set(self._special))
        self._at_start = self._inside = Tokenizer.from_str(json.dumps(state))
        self._start_ids: list[int] = self._at_start.encode("").ids
        self._prompts: dict[tuple[str, bool], list[int]] = {}
        if _patch_prepend_scheme(state):
            self._inside = Tokenizer.from_str(json.dumps(state))
        promoted = [_as_special(token) for _, token in self._special.values() if not token.special]
        for each in (self._at_start, self._inside):
            each.add_special_tokens(promoted)
            each.encode_special_tokens = True
            each.no_padding()
            each.no_truncation()

    def chat_template(self, source: str, image_token: str | None) -> ChatTemplate:
        """The tokenizer's own template `source` as data for the renderer."""
        return ChatTemplate(
            source=source,
            tokens=tuple(self._special),
            image_token=image_token,
            bos_token=self.tokenizer.bos_token or "",
            eos_token=self.tokenizer.eos_token or "",
        )

    def encode(self, segments: Sequence[Segment], *, split_at_images: bool = True) -> list[Piece]:
        """Token runs and image places, in order; neighbouring runs are joined.

        `split_at_images`: what follows an image is tokenised as the start of a text, as LLaVA
        does; processors of transformers, whose images are special tokens in one text, do not.
        """
        pieces: list[Piece] = []
        ids: list[int] = []
        supervised: list[bool] = []
        run: list[Segment] = []
        at_start = True
        strip_left = False

        def close_run(strip_right: bool = False) -> None:
            nonlocal at_start
            if run:
                run_ids, run_supervised = self._encode_run(run, at_start, strip_left, strip_right)
                ids.extend(run_ids)
                supervised.extend(run_supervised)
                run.clear()
            at_start = False

        for segment in segments:
            if segment.kind == "text":
                run.append(segment)
                continue
            if segment.kind == "start":
                ids.extend(self._start_ids)
                supervised.extend([False] * len(self._start_ids))
                continue
            if segment.kind == "image":
                close_run()
                if ids:
                    pieces.append(Tokens(ids, supervised))
                    ids, supervised = [], []
                pieces.append(ImageSlot(segment.image))
                at_start, strip_left = split_at_images, False
                continue
            if segment.kind == "eos":
                ident, token = self.eos_id, None
            else:
                ident, token = self._special[segment.text]
            close_run(strip_right=token is not None and token.lstrip)
            ids.append(ident)
            supervised.append(segment.supervised)
            strip_left = token is not None and token.rstrip
        close_run()
        if ids:
            pieces.append(Tokens(ids, supervised))
        return pieces

    def _encode_run(
        self, run: Sequence[Segment], at_start: bool, strip_left: bool, strip_right: bool
    ) -> tuple[list[int], list[bool]]:
        text = "".join(segment.text for segment in run)
        spans = list(_supervised_spans(run))
        if strip_right:
            text = text.rstrip()
        if strip_left:
            kept = text.lstrip()
            shift = len(text) - len(kept)
            text, spans = kept, [(start - shift, end - shift) for start, end in spans]
        encoder = self._at_start if at_start else self._inside
        if not spans:
            # System prompts are the same for a whole dataset and for every turn.
            if (known := self._prompts.get((text, at_start))) is None:
                known = encoder.encode(text, add_special_tokens=False).ids
                if len(self._prompts) < _MAX_PROMPTS:
                    self._prompts[text, at_start] = known
            return known, [False] * len(known)
        encoding = encoder.encode(text, add_special_tokens=False)
        supervised = [False] * len(encoding)
        for start, end in spans:
            # Offsets are in order, and asking for one is far cheaper than listing them all.
            first = bisect_right(_Ends(encoding), start)
            last = bisect_left(_Starts(encoding), end, lo=first)
            supervised[first:last] = [True] * (last - first)
        return encoding.ids, supervised

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out, as they are no part of an answer."""
        return self._at_start.decode(
            [ident for ident in ids if ident not in self.special_ids], skip_special_tokens=False
        )


class TextStream:
    """Decodes ids one by one into text that never changes afterwards.

    Characters whose bytes are split over tokens are held back until they are whole. `context` are
    the ids just before, so that a leading space of the first word is seen as one.
    """

    def __init__(self, tokenizer: PromptTokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        visible = [ident for ident in context[-16:] if ident not in tokenizer.special_ids]
        for length in range(1, min(len(visible), 8) + 1):
            if "\ufffd" not in tokenizer.decode(visible[-length:]):
                self._ids = visible[-length:]
                break
        # Decoding starts where text was last shown, so never inside a character.
        self._start = 0
        self._shown = len(self._ids)

    def push(self, ident: int) -> str:
        """The text that became certain with this id: often one word, sometimes none."""
        if ident in self._tokenizer.special_ids:
            return ""
        self._ids.append(ident)
        before, now = self._decoded()
        # A replacement character at the end may be the first part of a character.
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        return self._advance(now[len(before) :])

    def flush(self) -> str:
        """What is still held back when nothing more comes."""
        if self._shown == len(self._ids):
            return ""
        before, now = self._decoded()
        return self._advance(now[len(before) :])

    def _decoded(self) -> tuple[str, str]:
        return (
            self._tokenizer.decode(self._ids[self._start : self._shown]),
            self._tokenizer.decode(self._ids[self._start :]),
        )

    def _advance(self, text: str) -> str:
        self._start, self._shown = self._shown, len(self._ids)
        return text


class _Starts:
    """The characters at which the tokens of an encoding start."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, at: int) -> int:
        return self._span(at)[0]

    def _span(self, at: int) -> tuple[int, int]:
        span = self._encoding.token_to_chars(at)
        assert span is not None  # only tokens that a post-processor adds have no characters
        return span


class _Ends(_Starts):
    """The characters before which they end; a token without characters reaches over one."""

    def __getitem__(self, at: int) -> int:
        start, end = self._span(at)
        return max(end, start + 1)


def _supervised_spans(run: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    at = 0
    for segment in run:
        if segment.supervised:
            yield at, at + len(segment.text)
        at += len(segment.text)


def unlearned(model: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """A BPE or Unigram `model` that never spells a special token out of ordinary characters.

    With special-token parsing off, merges that were learnt from (or made for) a vocabulary that
    lists `</s>` still join `</`, `s>` to its id.
    """
    if model.get("type") == "Unigram":
        return model | {
            "vocab": [
                [piece, -1e6 if piece in special else score] for piece, score in model["vocab"]
            ]
        }
    if "merges" not in model:
        return model
    return model | {
        "merges": [
            merge
            for merge in model["merges"]
            if ("".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1))
            not in special
        ]
    }


def _patch_prepend_scheme(state: Any) -> bool:
    """Make every Metaspace that prepends to the first piece only prepend to none."""
    found = False
    if isinstance(state, dict):
        if state.get("type") == "Metaspace" and state.get("prepend_scheme") == "first":
            state["prepend_scheme"] = "never"
            found = True
        # The vocabulary is large and holds no such thing.
        children = [v for k, v in state.items() if k not in ("model", "added_tokens")]
    elif isinstance(state, list):
        children = state
    else:
        children = []
    # Every child is visited, whatever the first ones say.
    return sum([_patch_prepend_scheme(child) for child in children]) + found > 0


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=True,
    )
