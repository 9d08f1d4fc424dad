"""From prepared samples to batches: which samples make a step, and how they lie side by side.

Owns the order of samples (a function of lengths and seed alone, so that a resumed run and one on
other devices see the same steps) and the layout of a batch. Knows nothing about models or the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from trainer.dataset import Dataset as Prepared
from trainer.dataset import Sample
from trainer.features import Features
from trainer.objective import PACKED_ATTENTION
from trainer.recipes import Recipe
from trainer.samples import IGNORE_INDEX, Encoded, encode
from w2c_tui.core.conversation import Message
from w2c_tui.core.image import ImageSpec, normalised
from w2c_tui.core.prompt import AnyTemplate
from w2c_tui.models.tokenize import PromptTokenizer

if TYPE_CHECKING:
    from trainer.model import Parts


class Example(msgspec.Struct, frozen=True):
    """One sample ready to be laid into a batch; `pixels`: (3, S, S) float32 per image.

    `features`: (tokens, width) per image where the tower's work is done already, else none.
    """

    record: str
    encoded: Encoded
    pixels: list[NDArray[np.float32]]
    features: list[torch.Tensor] = []


class TrainingSet(Dataset[Example]):
    """The prepared records as examples; every picture is opened when its turn comes."""

    def __init__(
        self,
        prepared: Prepared,
        *,
        tokenizer: PromptTokenizer,
        template: AnyTemplate,
        image: ImageSpec,
        image_token_id: int,
        tokens_per_image: int,
        max_length: int,
    ) -> None:
        self.prepared = prepared
        self._tokenizer = tokenizer
        self._template = template
        self._image = image
        self._image_token_id = image_token_id
        self._tokens_per_image = tokens_per_image
        self._max_length = max_length
        self.features: Features | None = None
        """What the tower makes of the images, where it need not be asked."""

    def __len__(self) -> int:
        return len(self.prepared)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample as it is trained on, truncated ones at the limit."""
        return np.minimum(self.prepared.lengths, self._max_length)

    def __getitem__(self, index: int) -> Example:
        sample = self.prepared.record(index)
        return self._example(index, sample, sample.messages)

    def prompt(self, index: int) -> Example:
        """The sample without its last answer, as inference would be given it."""
        sample = self.prepared.record(index)
        return self._example(index, sample, sample.messages[:-1], for_answer=True)

    def _example(
        self, index: int, sample: Sample, messages: Sequence[Message], *, for_answer: bool = False
    ) -> Example:
        encoded = encode(
            messages,
            self._template,
            self._tokenizer,
            image_token_id=self._image_token_id,
            tokens_per_image=self._tokens_per_image,
            max_length=self._max_length,
            for_answer=for_answer,
        )
        record = f"{sample.source}/{sample.id}"
        if self.features is not None and not for_answer:
            count = len(encoded.images)
            return Example(record, encoded, [], self.features.of(index, count))
        pictures = self.prepared.pictures(index, self._image) if encoded.images else []
        pixels = [normalised(each, self._image) for each in pictures[: len(encoded.images)]]
        return Example(record, encoded, pixels)


def examples_of(prepared: Prepared, parts: Parts, recipe: Recipe) -> TrainingSet:
    """The examples that a run of `recipe` sees."""
    return TrainingSet(
        prepared,
        tokenizer=parts.tokenizer,
        template=parts.template,
        image=parts.image,
        image_token_id=parts.image_token_id,
        tokens_per_image=parts.tokens_per_image,
        max_length=recipe.max_length,
    )


# --- The order of samples -------------------------------------------------------------------------

_STEPS_GROUPED = 50


class StepSampler(Sampler[int]):
    """All steps of a run, one global batch after the other.

    Within a global batch the samples come in the order in which micro-batches and devices take
    them: the first of device 0, of device 1, ..., then the second ones. Packed micro-batches are
    balanced by tokens, padded ones hold samples of like length. Which samples form a global batch
    depends on lengths, seed and recipe only, not on the number of devices.
    """

    def __init__(
        self, lengths: NDArray[np.int32], recipe: Recipe, *, num_micro_batches: int
    ) -> None:
        self._lengths = lengths
        self._recipe = recipe
        self._num_micro_batches = num_micro_batches
        self._num_steps = recipe.steps(len(lengths))

    def __len__(self) -> int:
        return self._num_steps * self._recipe.global_batch

    def __iter__(self) -> Iterator[int]:
        done = 0
        for epoch in range(self._recipe.epochs):
            for batch in self._epoch(epoch):
                if done == self._num_steps:
                    return
                yield from self._dealt(batch)
                done += 1

    def _epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The global batches of one pass; the last one is filled up from the first ones."""
        size = self._recipe.global_batch
        random = np.random.default_rng((self._recipe.seed, epoch))
        order = random.permutation(len(self._lengths))
        order = np.resize(order, -(-len(order) // size) * size)
        if self._recipe.length_grouped:
            chunk = size * _STEPS_GROUPED
            parts = [order[at : at + chunk] for at in range(0, len(order), chunk)]
            order = np.concatenate(
                [part[np.argsort(-self._lengths[part], kind="stable")] for part in parts]
            )
        batches = list(order.reshape(-1, size))
        if self._recipe.length_grouped:
            batches = [batches[at] for at in random.permutation(len(batches))]
        return batches

    def _dealt(self, batch: NDArray[np.int64]) -> list[int]:
        count = self._num_micro_batches
        by_length = batch[np.argsort(-self._lengths[batch], kind="stable")]
        if self._recipe.batching == "padded":
            return by_length.tolist()
        # Dealt out forth and back, so that every micro-batch gets about as many tokens.
        rounds = by_length.reshape(-1, count).copy()
        rounds[1::2] = rounds[1::2, ::-1]
        return rounds.T.reshape(-1).tolist()


# --- The layout of a batch ------------------------------------------------------------------------


class Collator:
    """Examples side by side as the inputs of `trainer.objective.Objective`, plus `records`."""

    def __init__(
        self,
        image: ImageSpec,
        tokens_per_image: int,
        *,
        packed: bool,
        attention: str,
        features: Features | None = None,
    ) -> None:
        self._features = features
        self._image_size = image.size
        self._tokens_per_image = tokens_per_image
        self._packed = packed
        self._attention = attention

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        lengths = [len(example.encoded.input_ids) for example in examples]
        # Where each sample starts in the flattened rows.
        width = sum(lengths) if self._packed else max(lengths)
        starts = (
            np.concatenate(([0], np.cumsum(lengths)[:-1]))
            if self._packed
            else np.arange(len(lengths)) * width
        )
        rows = 1 if self._packed else len(lengths)
        input_ids = np.zeros(rows * width, dtype=np.int64)
        position_ids = np.zeros(rows * width, dtype=np.int64)
        real = np.zeros(rows * width, dtype=np.int64)
        places: list[NDArray[np.int64]] = []
        target_positions: list[NDArray[np.int64]] = []
        targets: list[NDArray[np.int64]] = []
        for example, start, length in zip(examples, starts, lengths, strict=True):
            encoded = example.encoded
            input_ids[start : start + length] = encoded.input_ids
            position_ids[start : start + length] = np.arange(length)
            real[start : start + length] = 1
            places += [
                start + first + np.arange(self._tokens_per_image) for first in encoded.images
            ]
            # Position t predicts token t + 1 of the same sample.
            supervised = np.flatnonzero(encoded.labels[1:] != IGNORE_INDEX)
            target_positions.append(start + supervised)
            targets.append(encoded.labels[1:][supervised].astype(np.int64))
        pixels = [each for example in examples for each in example.pixels]
        features = [each for example in examples for each in example.features]
        size = self._image_size
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids).view(rows, width),
            "position_ids": torch.from_numpy(position_ids).view(rows, width),
            "image_positions": torch.from_numpy(
                np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
            ),
            "target_positions": torch.from_numpy(np.concatenate(target_positions)),
            "targets": torch.from_numpy(np.concatenate(targets)),
            "records": [example.record for example in examples],
            "lengths": lengths,
            "num_images": len(pixels) or len(features),
        }
        if self._features is not None:
            batch["image_features"] = torch.stack(features) if features else self._features.empty()
        else:
            batch["pixel_values"] = (
                torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(1, 3, size, size)
            )
        if not self._packed:
            batch["attention_mask"] = torch.from_numpy(real).view(rows, width)
            return batch
        # Other implementations find the samples by their positions.
        if self._attention == PACKED_ATTENTION:
            batch["sample_lengths"] = tuple(lengths)
        elif self._attention == "flash_attention_2":
            ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
            batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch
