"""What a GGUF file says about itself, without loading it: metadata and the list of its tensors.

Knows nothing about models, contexts or images.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from w2c_tui.backends.llama_library import forget_errors, ggml, text_of, what_it_said
from w2c_tui.core.errors import CheckpointError

_CACHE_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _gguf(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ggml, name)
    function.restype, function.argtypes = result, arguments
    return function


_ID = ctypes.c_int64
_init_from_file = _gguf("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _InitParams)
_free = _gguf("gguf_free", None, ctypes.c_void_p)
_num_keys = _gguf("gguf_get_n_kv", _ID, ctypes.c_void_p)
_key = _gguf("gguf_get_key", ctypes.c_char_p, ctypes.c_void_p, _ID)
_kind = _gguf("gguf_get_kv_type", ctypes.c_int, ctypes.c_void_p, _ID)
_array_kind = _gguf("gguf_get_arr_type", ctypes.c_int, ctypes.c_void_p, _ID)
_array_length = _gguf("gguf_get_arr_n", ctypes.c_size_t, ctypes.c_void_p, _ID)
_array_data = _gguf("gguf_get_arr_data", ctypes.c_void_p, ctypes.c_void_p, _ID)
_value_data = _gguf("gguf_get_val_data", ctypes.c_void_p, ctypes.c_void_p, _ID)
_value_text = _gguf("gguf_get_val_str", ctypes.c_char_p, ctypes.c_void_p, _ID)
_data_offset = _gguf("gguf_get_data_offset", ctypes.c_size_t, ctypes.c_void_p)
_num_tensors = _gguf("gguf_get_n_tensors", _ID, ctypes.c_void_p)
_tensor_name = _gguf("gguf_get_tensor_name", ctypes.c_char_p, ctypes.c_void_p, _ID)
_tensor_offset = _gguf("gguf_get_tensor_offset", ctypes.c_size_t, ctypes.c_void_p, _ID)
_tensor_bytes = _gguf("gguf_get_tensor_size", ctypes.c_size_t, ctypes.c_void_p, _ID)
_tensor_shape = _gguf("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), ctypes.c_void_p, _ID)
# gguf.h: enum gguf_type; 8 is a string, 9 an array.
_NUMBERS: dict[int, Any] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    6: ctypes.c_float,
    7: ctypes.c_bool,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
    12: ctypes.c_double,
}
_STRING, _ARRAY = 8, 9

Value = str | int | float | bool | list[int] | list[float] | list[bool]


class TensorInfo(msgspec.Struct, frozen=True):
    """A tensor of a file; `shape` as in GGUF, fastest dimension first."""

    shape: tuple[int, ...]
    num_bytes: int


class GGUFHeader:
    """What a GGUF file says about itself: `values` by key (no lists of strings) and `tensors`.

    Read by llama.cpp's own reader, without the tensors' data. Raises CheckpointError for a file
    that is not GGUF, is damaged or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._check_beginning()
        forget_errors()
        handle = _init_from_file(os.fsencode(path), _InitParams(True, None))
        if not handle:
            raise CheckpointError(
                f"{path.name} is damaged or incomplete{what_it_said()}.",
                hint="Download or export it again.",
            )
        try:
            self.values = {
                text_of(_key(handle, at)): value
                for at in range(_num_keys(handle))
                if (value := _value(handle, at)) is not None
            }
            self.tensors: dict[str, TensorInfo] = {}
            end = _data_offset(handle)
            for at in range(_num_tensors(handle)):
                num_bytes = _tensor_bytes(handle, at)
                shape = tuple(_tensor_shape(handle, at)[:4])
                self.tensors[text_of(_tensor_name(handle, at))] = TensorInfo(shape, num_bytes)
                end = max(end, _data_offset(handle) + _tensor_offset(handle, at) + num_bytes)
        finally:
            _free(handle)
        size = path.stat().st_size
        if size < end:
            raise CheckpointError(
                f"{path.name} is incomplete: it has {size:,} of {end:,} bytes.",
                hint="Download or export it again.",
            )

    def _check_beginning(self) -> None:
        try:
            with self.path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror or error}.",
                hint="Check the path and its permissions.",
            ) from error
        if magic != b"GGUF":
            raise CheckpointError(
                f"{self.path.name} is not a GGUF file: it begins with {magic!r}.",
                hint="Name a .gguf file, a folder, or a model's name.",
            )

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key, default)
        return value if isinstance(value, str) else default

    def number(self, key: str, default: int = 0) -> int:
        value = self.values.get(key, default)
        return int(value) if isinstance(value, int | float) else default

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers; a single one counts as a list of one, a missing one as empty."""
        value = self.values.get(key, [])
        if isinstance(value, int | float):
            return (value,)
        return () if isinstance(value, str) else tuple(value)

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(tensor.shape)) for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def cache_bytes(self, cache_type: str = "f16") -> float:
        """Bytes of keys and values for one token of context, if all layers keep every token."""
        arch = self.architecture
        heads = self.numbers(f"{arch}.attention.head_count") or (1,)
        kv_heads = self.numbers(f"{arch}.attention.head_count_kv") or heads
        layers = self.number(f"{arch}.block_count")
        if len(kv_heads) == 1:
            kv_heads *= layers
        head_dim = self.number(f"{arch}.embedding_length") // max(int(max(heads)), 1)
        key = self.number(f"{arch}.attention.key_length", head_dim)
        value = self.number(f"{arch}.attention.value_length", head_dim)
        return sum(kv_heads) * (key + value) * _CACHE_BYTES[cache_type]


def _value(handle: Any, at: int) -> Value | None:
    kind = _kind(handle, at)
    if kind == _STRING:
        return text_of(_value_text(handle, at))
    if kind in _NUMBERS:
        return _NUMBERS[kind].from_address(_value_data(handle, at)).value  # type: ignore[no-any-return]
    if kind == _ARRAY and (number := _NUMBERS.get(_array_kind(handle, at))):
        length = _array_length(handle, at)
        # Longer ones describe the vocabulary, which is asked of the loaded model.
        if 0 < length <= 4096:
            return list((number * length).from_address(_array_data(handle, at)))
    return None
