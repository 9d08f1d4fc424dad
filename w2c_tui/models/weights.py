"""Reading the files of a model folder: JSON, safetensors and torch pickles.

Owns `StoredTensor`, a tensor that stays in its file until it is asked for, and the changes of shape
that a published layout needs on the way. Every damaged file is an error that names it; pickles are
only ever read by torch's weights-only loader. Knows nothing about models or what tensors are for.

Formats: the README of huggingface/safetensors; torch's zip archives, of which only the table of
contents is unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from w2c_tui.core.errors import CheckpointError, UnsafeCheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet; `tensor[...]` reads it, into memory of its own.

    Reading copies instead of mapping the file: a mapped tensor that has to be transposed, cast or
    quantised is held twice, and a file that is replaced while the model runs takes the process
    down with it.
    """

    key: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    borrow: Callable[[], torch.Tensor] | None = None
    """As `read`, but into memory that the thread's next `borrow` overwrites."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def changed(
        self, shape: tuple[int, ...], change: Callable[[torch.Tensor], torch.Tensor]
    ) -> StoredTensor:
        """The tensor that `change` makes; it must not return a view of what it is given."""
        source = self.borrow or self.read
        return dataclasses.replace(self, shape=shape, read=lambda: change(source()), borrow=None)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model weights in `folder`: safetensors if there, else pickled shards.

    Raises CheckpointError naming the file that is missing, cut off or inconsistent, and
    UnsafeCheckpointError for a pickle that holds more than tensors. An empty dict means no weights.
    """
    for stem, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return _sharded(index, read)
        if (folder / stem).is_file():
            return read(folder / stem)
    return {}


def _sharded(
    index: Path, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map.", hint="Download the file again.")
    shards = sorted(set(map(str, weight_map.values())))
    # The index is part of what was downloaded: it may not name files from elsewhere.
    outside = [shard for shard in shards if Path(shard).name != shard or "\\" in shard]
    if outside:
        raise CheckpointError(
            f"{index} names files outside of its folder: {listed(outside)}",
            hint="Do not use this checkpoint, or take it from its own source again.",
        )
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(shards)} files of weights are missing in {index.parent}: "
            f"{listed(absent)}",
            hint="Download them again.",
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        tensors |= read(index.parent / shard)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(
            f"{index} promises {len(lost)} tensors that its files do not hold: {listed(lost)}",
            hint="The files do not belong together; download them again.",
        )
    return tensors


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file: length, JSON header, then raw bytes (its README)."""

    def damaged(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: {problem}.", hint="Download the file again.")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise damaged("this is not a safetensors file, or it is cut off in its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [
                (key, _DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                for key, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(f"its header cannot be read ({error!r})") from error
    data = 8 + length
    tensors = {}
    for key, dtype, shape, start, end in entries:
        if end - start != math.prod(shape) * dtype.itemsize:
            raise damaged(f"{key} has {end - start} bytes, which do not fit its shape {shape}")
        if data + end > size:
            raise damaged(f"cut off after {size:,} bytes, {key} ends at {data + end:,}")
        tensors[key] = _in_file(key, path, data + start, dtype, shape, shape, _contiguous(shape))
    return tensors


def read_bin(path: Path) -> dict[str, StoredTensor]:
    """A torch pickle, by the weights-only loader; of a zip only the table of contents is read."""
    zipped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="meta" if zipped else "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported [^\n]+?(?= was not|\.? ?\n|$)", str(error))
        raise UnsafeCheckpointError(
            f"{path} holds more than tensors: {reason[0] if reason else 'it is no plain pickle'}.",
            hint="Opening it in full could run its code. Take a safetensors version instead.",
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {brief(error)}",
            hint="The file is damaged or cut off; download it again.",
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name.")
    tensors = {}
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, not a tensor.")
        shape = tuple(value.shape)
        offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if not zipped:
            tensors[key] = StoredTensor(key, path, shape, value.dtype, value.detach().clone)
            continue
        assert offset is not None, "torch tells where in the zip each storage lies"
        start = offset + value.storage_offset() * value.dtype.itemsize
        extent = (1 + sum((n - 1) * s for n, s in zip(shape, value.stride(), strict=True)),)
        if 0 in shape:
            extent = (0,)
        tensors[key] = _in_file(key, path, start, value.dtype, shape, extent, value.stride())
    return tensors


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def _in_file(
    key: str,
    path: Path,
    start: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    extent: tuple[int, ...],
    stride: tuple[int, ...],
) -> StoredTensor:
    """A tensor whose `extent` elements lie in `path` from byte `start` on."""
    count = math.prod(extent)

    def fill(flat: torch.Tensor) -> torch.Tensor:
        view: Any = flat.view(torch.uint8).numpy() if count else b""
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            rest = memoryview(view)
            while rest:
                # Linux reads at most 2 GiB at a time.
                num_read = file.readinto(rest[: 1 << 30])
                if not num_read:
                    raise CheckpointError(
                        f"{path} ends inside {key}.",
                        hint="The file changed while it was read; download it again.",
                    )
                rest = rest[num_read:]
        return flat.as_strided(shape, stride)

    def read() -> torch.Tensor:
        return fill(torch.empty(count, dtype=dtype)).contiguous()

    def borrow() -> torch.Tensor:
        return fill(_scratch(count * dtype.itemsize).view(dtype))

    return StoredTensor(key, path, shape, dtype, read, borrow)


_held = threading.local()


def _scratch(num_bytes: int) -> torch.Tensor:
    """Bytes that this thread uses again and again: touching new memory costs more than reading."""
    buffer = getattr(_held, "buffer", None)
    if buffer is None or len(buffer) < num_bytes:
        buffer = _held.buffer = torch.empty(num_bytes, dtype=torch.uint8)
    return buffer[:num_bytes]


def forget_scratch() -> None:
    """Give this thread's bytes back; other threads' go with them."""
    _held.__dict__.pop("buffer", None)


def linear(tensor: StoredTensor) -> StoredTensor:
    """A Conv1D weight [in, out] as a Linear one; a bias is what it was."""
    if len(tensor.shape) == 1:
        return tensor
    return tensor.changed(tensor.shape[::-1], lambda weight: weight.t().contiguous())


def split_rows(tensor: StoredTensor, parts: int) -> list[StoredTensor]:
    """`tensor` in equal parts by rows, read once for all of them.

    The parts share a storage, as they are asked for one after another and all are kept.
    """
    lock = threading.Lock()
    whole: list[torch.Tensor] = []
    served: set[int] = set()
    rows = tensor.shape[0] // parts

    def part(at: int) -> torch.Tensor:
        with lock:
            if not whole:
                whole.append(tensor.read())
            piece = whole[0][at * rows : (at + 1) * rows]
            served.add(at)
            if len(served) == parts:
                whole.clear()
                served.clear()
        return piece

    shape = (rows, *tensor.shape[1:])
    return [
        dataclasses.replace(tensor, shape=shape, read=functools.partial(part, at), borrow=None)
        for at in range(parts)
    ]


def with_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """`tensor` with rows added at its end, each the mean of all.

    As a row of the head, the mean gives a logit no higher than the best one, so that a token that
    was never trained is never the likeliest.
    """
    if tensor.shape[0] >= rows:
        return tensor

    def grow(weight: torch.Tensor) -> torch.Tensor:
        mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
        return torch.cat((weight, mean.expand(rows - len(weight), -1)))

    return tensor.changed((rows, *tensor.shape[1:]), grow)


# --- Small things ---------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}.", hint="Download the file again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.", hint="Download the file again.")
    return content


def listed(names: list[str], limit: int = 20) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
