"""The prepared dataset: what lies in its folder, and reading it record by record.

Owns the format. `dataset.json` says what the folder is; `records.bin` holds the records one after
the other; `*.npy` hold one number per row and are memory-mapped, so a dataset of any size opens at
once and DataLoader workers share its pages. Knows nothing about where records come from
(`trainer.preparation` does), about what tokenizers do, or about how they are batched.

file                   dtype    per row
---------------------  -------  ------------------------------------------------------------------
`starts.npy`           int64    where the record begins in `records.bin`
`sizes.npy`            int32    its bytes
`lengths.npy`          int32    tokens with image tokens expanded, before any truncation
`num_supervised.npy`   int32    those of them under the loss
`num_images.npy`       uint8    images, 0 for text only
`source_index.npy`     uint8    which of `sources`
`copies.npy`           uint16   how many earlier rows of the source have the same id
`pixel_starts.npy`     int64    where its images begin in `pixels.bin`, if that is there

`pixels.bin` holds every image as the vision tower sees it, losslessly, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from w2c_tui.core.conversation import Attachment, Message, Role
from w2c_tui.core.errors import ConfigError, W2CError
from w2c_tui.core.image import DEFAULT_LIMITS, ImageLimits, ImageSpec, open_image, prepare
from w2c_tui.core.reference import read_reference

if TYPE_CHECKING:
    from PIL import Image

    from w2c_tui.models.tokenize import PromptTokenizer

META_NAME = "dataset.json"
BLOB_NAME = "records.bin"
PIXELS_NAME = "pixels.bin"
FORMAT_VERSION = 1
COLUMNS: dict[str, type[np.generic]] = {
    "starts": np.int64,
    "sizes": np.int32,
    "lengths": np.int32,
    "num_supervised": np.int32,
    "num_images": np.uint8,
    "source_index": np.uint8,
    "copies": np.uint16,
    "pixel_starts": np.int64,
}


class StoredImage(msgspec.Struct, frozen=True, array_like=True):
    """An image of message number `message`; `width` and `height` are 0 if it was not opened.

    `pixel_bytes`: its share of `pixels.bin`.
    """

    message: int
    path: str
    width: int = 0
    height: int = 0
    pixel_bytes: int = 0


class StoredRecord(msgspec.Struct, frozen=True, array_like=True):
    """One record as msgpack in `records.bin`; paths are relative to the source's image folder."""

    id: str
    turns: list[tuple[Role, str]]
    images: list[StoredImage] = []


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One source: its name, the folder that its image paths start from, its rows."""

    name: str
    images: str
    num_rows: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What `lengths` were counted with.

    `tokenizer`: a hash of the tokenizer's content, `tokenizer_name` is where it was found.
    `image_seq_length`: tokens that one image becomes. `max_length`: that of the report.
    """

    tokenizer: str
    tokenizer_name: str
    template: str
    image_seq_length: int
    max_length: int


def tokenizer_hash(tokenizer: PromptTokenizer) -> str:
    """The content of a tokenizer, whatever tokens were added for images."""
    state = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    kept = {
        key: state.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "model")
    }
    text = json.dumps([kept, tokenizer.eos_id], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class DatasetMeta(msgspec.Struct, frozen=True, kw_only=True):
    """`dataset.json`. `pixels`: how the images in `pixels.bin` were prepared, None without it."""

    sources: list[Source]
    measured: Measured
    num_rows: Annotated[int, Meta(ge=0)]
    blob_bytes: Annotated[int, Meta(ge=0)]
    images_opened: bool
    fingerprint: str
    pixels: ImageSpec | None = None
    pixel_bytes: int = 0
    format_version: int = FORMAT_VERSION


class Sample(msgspec.Struct, frozen=True):
    """One record. `id` is unique within `source`.

    The attachments of `messages` are unread: `data` is empty and `source` is the image's path;
    `read_image` opens it. Sizes are 0 if preparing did not open images.
    """

    id: str
    source: str
    messages: list[Message]

    @property
    def images(self) -> list[Attachment]:
        return [image for message in self.messages for image in message.attachments]


def sample_messages(record: StoredRecord, images: str) -> list[Message]:
    """The conversation of `record` with unread attachments, whose paths start from `images`."""
    attachments: dict[int, list[Attachment]] = {}
    for image in record.images:
        path = os.path.join(images, image.path)
        attachments.setdefault(image.message, []).append(
            Attachment(b"", "", image.width, image.height, name=image.path, source=path)
        )
    return [
        Message(role, text, tuple(attachments.get(at, ())))
        for at, (role, text) in enumerate(record.turns)
    ]


class Dataset:
    """A prepared dataset, opened by `open_dataset`. Pickles as its path."""

    lengths: np.ndarray
    num_supervised: np.ndarray
    num_images: np.ndarray
    source_index: np.ndarray

    def __init__(self, path: Path, meta: DatasetMeta, image_roots: Mapping[str, Path]) -> None:
        self.path = path
        self.meta = meta
        self._image_roots = dict(image_roots)
        self._roots = [
            os.fspath(image_roots.get(source.name, Path(source.images))) for source in meta.sources
        ]
        for name in COLUMNS:
            setattr(self, name, _column(path, name, meta.num_rows))
        self._blob = _mapped(path / BLOB_NAME, meta.blob_bytes)
        self._pixels = _mapped(path / PIXELS_NAME, meta.pixel_bytes) if meta.pixels else b""

    def __reduce__(self) -> tuple[Any, ...]:
        return open_dataset, (self.path, self._image_roots)

    def __len__(self) -> int:
        return self.meta.num_rows

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, as `source_index` counts them."""
        return tuple(source.name for source in self.meta.sources)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that training sees of the data except the pixels."""
        return self.meta.fingerprint

    @property
    def measured(self) -> Measured:
        return self.meta.measured

    @property
    def modality(self) -> np.ndarray:
        """bool (num_rows,): whether the row has images."""
        return self.num_images > 0

    def record(self, index: int) -> Sample:
        """Row `index`. Raises IndexError outside the dataset, ConfigError if it is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset with {len(self)} rows")
        stored = self._stored(index)
        columns: Any = self
        source = int(self.source_index[index])
        copy = int(columns.copies[index])
        return Sample(
            id=f"{stored.id}#{copy + 1}" if copy else stored.id,
            source=self.meta.sources[source].name,
            messages=sample_messages(stored, self._roots[source]),
        )

    def _stored(self, index: int) -> StoredRecord:
        columns: Any = self
        start, size = int(columns.starts[index]), int(columns.sizes[index])
        try:
            return _decode(self._blob[start : start + size])
        except msgspec.DecodeError as error:
            raise _damaged(self.path, f"row {index} cannot be read") from error

    def pictures(self, index: int, spec: ImageSpec) -> list[Image.Image]:
        """The images of row `index` as `core.image.prepare` makes them for `spec`.

        Those stored with the dataset if they were made for the same `spec`, else the files are
        opened. Raises ImageError.
        """
        if spec != self.meta.pixels:
            return [prepare(read_image(image), spec) for image in self.record(index).images]
        columns: Any = self
        start = int(columns.pixel_starts[index])
        pictures = []
        for image in self._stored(index).images:
            end = start + image.pixel_bytes
            pictures.append(open_image(self._pixels[start:end]))
            start = end
        return pictures

    def check_measured(self, tokenizer: str, template: str, image_seq_length: int) -> None:
        """Raises ConfigError unless `lengths` hold for this tokenizer hash, template and model."""
        stored = self.meta.measured
        for what, ours, theirs in (
            ("the tokenizer", stored.tokenizer, tokenizer),
            ("the template", stored.template, template),
            ("the number of tokens per image", stored.image_seq_length, image_seq_length),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"{self.path} was measured for other training: {what} was {ours!r}, "
                    f"is {theirs!r}.",
                    hint="Run `python -m trainer.prepare` again for this model and stage.",
                )


def open_dataset(
    path: str | os.PathLike[str], image_roots: Mapping[str, Path] | None = None
) -> Dataset:
    """The dataset in folder `path`.

    `image_roots`: other places of images, by source name, for data that was moved. Raises
    ConfigError if the folder holds no dataset, an unfinished or a damaged one.
    """
    folder = Path(path).absolute()
    try:
        raw = (folder / META_NAME).read_bytes()
    except FileNotFoundError:
        unfinished = (folder / BLOB_NAME).exists()
        raise ConfigError(
            f"{folder} holds {'an unfinished' if unfinished else 'no'} dataset.",
            hint="Run the same `python -m trainer.prepare` again: it goes on where it stopped."
            if unfinished
            else "Write it with `python -m trainer.prepare`.",
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}.") from error
    try:
        version = msgspec.json.decode(raw).get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{folder} is a dataset of format {version!r}; format {FORMAT_VERSION} is read.",
                hint="Prepare it again with this version.",
            )
        meta = msgspec.json.decode(raw, type=DatasetMeta)
    except (msgspec.DecodeError, AttributeError) as error:
        raise _damaged(folder, f"{META_NAME}: {error}") from error
    roots = image_roots or {}
    if unknown := sorted(roots.keys() - {source.name for source in meta.sources}):
        raise ConfigError(
            f"{folder} has no source {unknown[0]!r}.",
            hint=f"Its sources: {', '.join(source.name for source in meta.sources)}.",
        )
    return Dataset(folder, meta, roots)


def read_image(attachment: Attachment, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The upright RGB picture of an unread attachment. Raises ImageError naming its path."""
    data = read_reference(attachment.source, limits)
    named = msgspec.structs.replace(attachment, data=data, name=attachment.source)
    return open_image(named, limits)


_decode = msgspec.msgpack.Decoder(StoredRecord).decode


def _column(folder: Path, name: str, num_rows: int) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        # Nothing can be mapped of a file without rows.
        column = np.load(path, mmap_mode="r" if num_rows else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{path.name} cannot be read") from error
    if column.shape != (num_rows,) or column.dtype != COLUMNS[name]:
        raise _damaged(folder, f"{path.name} has {column.shape} entries of {column.dtype}")
    return column


def _mapped(path: Path, num_bytes: int) -> mmap.mmap | bytes:
    try:
        size = path.stat().st_size
        if size < num_bytes:
            raise _damaged(path.parent, f"{path.name} has {size:,} of {num_bytes:,} bytes")
        if not num_bytes:
            return b""
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _damaged(path.parent, f"{path.name} cannot be read") from error


def _damaged(folder: Path, problem: str) -> W2CError:
    return ConfigError(
        f"The dataset in {folder} is damaged: {problem}.",
        hint="Prepare it again with `python -m trainer.prepare --overwrite`.",
    )
