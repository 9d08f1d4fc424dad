"""Tensors of a GGUF file to be: what each is called, how it is made, and writing them one by one.

Owns the stream from a checkpoint's files into a GGUF file: a tensor is read, computed and written
before the next one is touched, so that memory holds one at a time whatever the size of the model.
Knows nothing about architectures; `language_model` and `vision` say what is computed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as StorageType
from numpy.typing import NDArray

from w2c_tui.core.errors import CheckpointError
from w2c_tui.models.checkpoint import Checkpoint, Report
from w2c_tui.models.weights import StoredTensor, listed

FLOAT16_MAX = 65504.0
_CHUNK_ELEMENTS = 1 << 24


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be.

    `shape` is in numpy's order (rows first; GGUF lists it the other way round). `make` reads and
    computes it, in any floating type. `storage` is what it is stored as whatever the file's type;
    None for the matrices, which have the file's.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    storage: StorageType | None = None

    def storage_in(self, storage: StorageType) -> StorageType:
        """What this one is stored as in a file whose matrices are stored as `storage`."""
        return storage if self.storage is None else self.storage

    def num_bytes(self, storage: StorageType) -> int:
        """Bytes in such a file."""
        return math.prod(self.shape) * _WIDTH[self.storage_in(storage)]


_WIDTH = {StorageType.F32: 4, StorageType.F16: 2, StorageType.BF16: 2}
_TORCH = {
    StorageType.F32: torch.float32,
    StorageType.F16: torch.float16,
    StorageType.BF16: torch.bfloat16,
}


def matrix(name: str, shape: Sequence[int], make: Callable[[], torch.Tensor]) -> PlannedTensor:
    """A tensor of the file's own type."""
    return PlannedTensor(name, tuple(shape), make)


def exact(name: str, shape: Sequence[int], make: Callable[[], torch.Tensor]) -> PlannedTensor:
    """A small tensor that is kept in 32 bit in every file."""
    return PlannedTensor(name, tuple(shape), make, StorageType.F32)


def stored(name: str, tensor: StoredTensor) -> PlannedTensor:
    """`tensor` as it is: matrices in the file's type, vectors in 32 bit."""
    plan = matrix if len(tensor.shape) > 1 else exact
    return plan(name, tensor.shape, lambda: tensor[...])


def by_rows(
    tensor: StoredTensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """A maker that changes a large tensor's rows in float64, some at a time; float32 comes out."""

    def make() -> torch.Tensor:
        source = tensor[...]
        rows = max(1, _CHUNK_ELEMENTS // math.prod(tensor.shape[1:]))
        made = torch.empty(tensor.shape, dtype=torch.float32)
        for start in range(0, len(source), rows):
            made[start : start + rows] = change(source[start : start + rows].double())
        return made

    return make


def write_gguf(
    path: Path,
    arch: str,
    write_keys: Callable[[gguf.GGUFWriter], None],
    tensors: Sequence[PlannedTensor],
    storage: StorageType,
    report: Report,
    phase: str,
) -> None:
    """Write a whole GGUF file. Raises CheckpointError for numbers that its type cannot hold.

    `report(phase, done, total)` in bytes, after each tensor; what it raises ends the writing.
    """
    writer = gguf.GGUFWriter(path, arch)
    try:
        write_keys(writer)
        for tensor in tensors:
            kind = tensor.storage_in(storage)
            writer.add_tensor_info(
                tensor.name, tensor.shape, _numpy_type(kind), tensor.num_bytes(storage), kind
            )
        total = sum(tensor.num_bytes(storage) for tensor in tensors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        report(phase, done, total)
        for tensor in tensors:
            writer.write_tensor_data(_as_stored(tensor, tensor.storage_in(storage)))
            done += tensor.num_bytes(storage)
            report(phase, done, total)
    finally:
        writer.close()


def _numpy_type(kind: StorageType) -> np.dtype:
    return np.dtype(np.float32 if kind == StorageType.F32 else np.float16)


def _as_stored(tensor: PlannedTensor, kind: StorageType) -> NDArray:
    value = tensor.make()
    assert tuple(value.shape) == tensor.shape, f"{tensor.name}: {tuple(value.shape)}"
    cast = value.to(_TORCH[kind]).contiguous()
    if not bool(torch.isfinite(cast).all()):
        largest = float(value.abs().max())
        if not math.isfinite(largest):
            raise CheckpointError(
                f"{tensor.name} holds numbers that are not finite.",
                hint="The checkpoint is damaged; nothing sensible can be made of it.",
            )
        raise CheckpointError(
            f"{tensor.name} holds numbers up to {largest:.3g}, and 16-bit floats end at "
            f"{FLOAT16_MAX:.0f}.",
            hint="Export with --quant bf16 or --quant f32.",
        )
    if kind == StorageType.BF16:
        return cast.view(torch.int16).numpy()
    return cast.numpy()


# --- The parts of a checkpoint --------------------------------------------------------------------

_TEXT = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|model\.)((?:embed_tokens|layers|norm)\..+)"
)
_HEAD = re.compile(r"(?:language_model\.)?(lm_head\..+)")
_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)")
_PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.(.+)")
# Constants.
_IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")


_DINOV2_NAMES = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """A checkpoint's tensors by what they belong to, each under the shortest usual names.

    `text`: `model.layers.0...`, `lm_head.weight`; `tower`: `encoder.layers.0...`; `projector`:
    `linear_1.weight`. The last two are empty for models that read text only.
    """

    text: dict[str, StoredTensor]
    tower: dict[str, StoredTensor]
    projector: dict[str, StoredTensor]


def parts_of(checkpoint: Checkpoint) -> Parts:
    """The parts of `checkpoint`, complete and of the right shapes.

    Raises CheckpointError for weights that are missing, of another size, quantised already, or not
    known here.
    """
    if checkpoint.tensors is None:
        raise CheckpointError(
            f"{checkpoint.label} is quantised already, or runs code of its own.",
            hint="Export the original weights.",
        )
    parts = Parts({}, {}, {})
    unknown = _sort(checkpoint.tensors, parts)
    with torch.device("meta"):
        model = checkpoint.model_class(checkpoint.config)
    wanted = Parts({}, {}, {})
    _sort(dict(model.named_parameters(remove_duplicate=False)), wanted)
    problems = [f"unexpected: {listed(sorted(unknown))}"] if unknown else []
    for part in ("text", "tower", "projector"):
        have, want = getattr(parts, part), getattr(wanted, part)
        if checkpoint.config.get_text_config().tie_word_embeddings:
            want.pop("lm_head.weight", None)
        if missing := sorted(set(want) - set(have)):
            problems.append(f"missing: {listed(missing)}")
        if surplus := sorted(set(have) - set(want) - {"lm_head.weight"}):
            problems.append(f"unexpected: {listed(surplus)}")
        problems += [
            f"{name} is {have[name].shape}, not {tuple(want[name].shape)}"
            for name in sorted(set(have) & set(want))
            if have[name].shape != tuple(want[name].shape)
        ]
    if problems:
        raise CheckpointError(
            f"The weights of {checkpoint.label} do not fit its config.json. " + "; ".join(problems),
            hint="The files belong to different models, or the download is incomplete.",
        )
    return parts


def _as_modules(name: str) -> str:
    """DINOv2's names in files as its modules are called."""
    for inside, outside in _DINOV2_NAMES.items():
        name = name.replace(inside, outside)
    return name


def _sort(tensors: Mapping[str, StoredTensor], parts: Parts) -> list[str]:
    """Put each tensor into its part; the names that have none are returned."""
    unknown = []
    for name, tensor in tensors.items():
        if _IGNORED.search(name):
            continue
        if match := _TOWER.fullmatch(name):
            parts.tower[_as_modules(match[1])] = tensor
        elif match := _PROJECTOR.fullmatch(name):
            parts.projector[match[1]] = tensor
        elif match := _TEXT.fullmatch(name):
            parts.text["model." + match[1]] = tensor
        elif match := _HEAD.fullmatch(name):
            parts.text[match[1]] = tensor
        else:
            unknown.append(name)
    return unknown
