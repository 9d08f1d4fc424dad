"""From a conversation to what training feeds a model: token ids and the labels beside them.

Owns the one step between `core.prompt.render` and a batch: which positions hold an image, which
carry loss, and where a sample that is too long ends. The dataset's lengths, the dry run and the
training itself all call `encode`. Knows nothing about files, pixels or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from w2c_tui.core.conversation import Message
from w2c_tui.core.prompt import AnyTemplate, ChatTemplate, render
from w2c_tui.models.tokenize import ImageSlot, PromptTokenizer

IGNORE_INDEX = -100


class Encoded(msgspec.Struct, frozen=True):
    """One sample as the model sees it.

    `input_ids`: (n,) int32, every feature of an image as one image token. `labels`: (n,) int32, the
    id that position takes its loss for, or IGNORE_INDEX; not shifted, and never set at position 0,
    which nothing predicts. `images`: the first position of each image that is (wholly) inside.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    images: tuple[int, ...]
    truncated: bool = False

    @property
    def num_supervised(self) -> int:
        """Positions that carry loss; 0 is a sample from which nothing is learnt."""
        return int((self.labels != IGNORE_INDEX).sum())


def encode(
    messages: Sequence[Message],
    template: AnyTemplate,
    tokenizer: PromptTokenizer,
    *,
    image_token_id: int,
    tokens_per_image: int,
    max_length: int | None = None,
    for_answer: bool = False,
) -> Encoded:
    """`messages` rendered, tokenised and labelled, with expanded images counted once.

    `tokens_per_image`: features that an image becomes. `max_length`: most positions to keep, None
    for all; what is cut off is the end, and never the middle of an image. `for_answer`: end where
    the model goes on. Raises PromptError for messages that the template cannot express.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    images: list[int] = []
    segments = render(messages, template, for_answer=for_answer)
    split = not isinstance(template, ChatTemplate)
    for piece in tokenizer.encode(segments, split_at_images=split):
        if isinstance(piece, ImageSlot):
            images.append(len(ids))
            ids += [image_token_id] * tokens_per_image
            supervised += [False] * tokens_per_image
        else:
            ids += piece.ids
            supervised += piece.supervised
    length = len(ids)
    if max_length is not None and length > max_length:
        length = max_length
        while images and images[-1] + tokens_per_image > length:
            length = min(length, images.pop())
    input_ids = np.array(ids[:length], dtype=np.int32)
    labels = np.where(np.array(supervised[:length], dtype=bool), input_ids, IGNORE_INDEX)
    labels[:1] = IGNORE_INDEX
    return Encoded(input_ids, labels.astype(np.int32), tuple(images), length < len(ids))


class Counts(msgspec.Struct, frozen=True):
    """What `encode` would give, without giving it.

    `num_tokens`: before truncation, images expanded. `num_supervised`: positions that carry loss
    before truncation, `num_kept_supervised` after it.
    """

    num_tokens: int
    num_supervised: int
    num_kept_supervised: int


def count(
    messages: Sequence[Message],
    template: AnyTemplate,
    tokenizer: PromptTokenizer,
    *,
    tokens_per_image: int,
    max_length: int,
) -> Counts:
    """The lengths of `encode`, for when a million samples are measured. Raises PromptError."""
    num_tokens = num_supervised = num_kept = 0
    segments = render(messages, template, for_answer=False)
    split = not isinstance(template, ChatTemplate)
    for piece in tokenizer.encode(segments, split_at_images=split):
        if isinstance(piece, ImageSlot):
            num_tokens += tokens_per_image
            continue
        # Nothing predicts position 0.
        first = 0 if num_tokens else 1
        num_supervised += sum(piece.supervised[first:])
        num_kept += sum(piece.supervised[first : max(first, max_length - num_tokens)])
        num_tokens += len(piece.ids)
    return Counts(num_tokens, num_supervised, num_kept)
