"""llama.cpp as this project uses it: GGUF headers, one model with one context, one image encoder.

Owns every native call through llama-cpp-python's low-level interface, the native objects' lives,
the positions of what is in the context and where native log lines go (the logger "llama.cpp").
Knows nothing about conversations, templates or how a token is chosen.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import itertools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from w2c_tui.backends.free_cores import FreeCores
from w2c_tui.backends.turn import MAX_BRANCHES, Interrupted
from w2c_tui.core.config import CacheType, FlashAttention
from w2c_tui.core.errors import (
    CheckpointError,
    EngineError,
    ImageError,
    MissingPackageError,
    OutOfMemoryError,
    W2CError,
)
from w2c_tui.core.image import ImageSpec
from w2c_tui.core.image import prepare as prepare_picture

VERSION = "0.3.36"
"""The release of llama-cpp-python whose low-level structures these are; they change between
releases."""

try:
    import llama_cpp
    import llama_cpp.llama_cpp as lib
    from llama_cpp import mtmd_cpp as mtmd
    from llama_cpp._ctypes_extensions import load_shared_library

    _ggml = lib._lib
    # On Windows a library does not answer for those that it uses. Elsewhere it must be asked: the
    # package has several copies of ggml, and only the one that it uses knows where to log.
    if not hasattr(_ggml, "gguf_init_from_file"):
        _ggml = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
except (ImportError, OSError, RuntimeError) as error:
    raise MissingPackageError(
        f"GGUF models need llama-cpp-python, which cannot be used: {error}",
        hint=f"Run: pip install llama-cpp-python=={VERSION}  (it compiles llama.cpp for some "
        "minutes and needs a C++ compiler), or choose --backend hf.",
    ) from error
if llama_cpp.__version__ != VERSION:
    raise MissingPackageError(
        f"llama-cpp-python {llama_cpp.__version__} is installed, and {VERSION} is needed.",
        hint=f"Run: pip install llama-cpp-python=={VERSION}  or choose --backend hf.",
    )

Report = Callable[[str, int, int], None]

# ggml.h: enum ggml_type.
CACHE_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
}
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
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_NODES_PER_QUESTION = 8
"""After this many operations of the image encoder it is asked whether to go on."""


class RuntimeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to load and run a model.

    `context` 0 is the length the model was trained for, `threads` 0 is one per core,
    `n_gpu_layers` -1 is all. `tensor_split` are the shares of several GPUs; `main_gpu` puts
    everything on one of them. `batch` is how many tokens are computed at once, which must be all of
    an image where its parts see each other.
    """

    context: int = 0
    threads: int = 0
    n_gpu_layers: int = -1
    tensor_split: tuple[float, ...] = ()
    main_gpu: int | None = None
    flash_attn: FlashAttention = "auto"
    cache_type: CacheType = "f16"
    batch: int = 512


# --- log -----------------------------------------------------------------------------------------

_logger = logging.getLogger("llama.cpp")
# Without this, Python itself would print warnings to the terminal where nobody set up logging.
_logger.addHandler(logging.NullHandler())
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_errors: collections.deque[str] = collections.deque(maxlen=8)
_line: list[str] = []
_level = logging.INFO


def _take_log(level: int, text: bytes | None, _: Any) -> None:
    global _level
    _level = _LEVELS.get(level, _level)
    _line.append((text or b"").decode("utf-8", "replace"))
    if not _line[-1].endswith("\n"):
        return
    line = "".join(_line).rstrip()
    _line.clear()
    if _level >= logging.ERROR:
        _errors.append(line)
    _logger.log(_level, "%s", line)


_log_callback = lib.llama_log_callback(_take_log)
lib.llama_log_set(_log_callback, None)
# This one sets mtmd's own as well.
mtmd.mtmd_helper_log_set(_log_callback, None)
mtmd.mtmd_log_set(_log_callback, None)


lib.llama_backend_init()


def _what_it_said() -> str:
    """The error that llama.cpp logged first since `_errors` was cleared, as the end of a message.

    Later ones only say that something failed.
    """
    said = next((line for line in _errors if line.strip()), "")
    _errors.clear()
    # Without the names of the functions that it went through.
    said = re.sub(r"^([\w:]+: )+(error loading model: )?", "", said).strip().rstrip(".")
    return f": {said}" if said else ""


# --- files ---------------------------------------------------------------------------------------


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _gguf(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_ggml, name)
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
        _errors.clear()
        handle = _init_from_file(os.fsencode(path), _InitParams(True, None))
        if not handle:
            raise CheckpointError(
                f"{path.name} is damaged or incomplete{_what_it_said()}.",
                hint="Download or export it again.",
            )
        try:
            self.values = {
                _text(_key(handle, at)): value
                for at in range(_num_keys(handle))
                if (value := _value(handle, at)) is not None
            }
            self.tensors: dict[str, TensorInfo] = {}
            end = _data_offset(handle)
            for at in range(_num_tensors(handle)):
                num_bytes = _tensor_bytes(handle, at)
                shape = tuple(_tensor_shape(handle, at)[:4])
                self.tensors[_text(_tensor_name(handle, at))] = TensorInfo(shape, num_bytes)
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


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def _value(handle: Any, at: int) -> Value | None:
    kind = _kind(handle, at)
    if kind == _STRING:
        return _text(_value_text(handle, at))
    if kind in _NUMBERS:
        return _NUMBERS[kind].from_address(_value_data(handle, at)).value  # type: ignore[no-any-return]
    if kind == _ARRAY and (number := _NUMBERS.get(_array_kind(handle, at))):
        length = _array_length(handle, at)
        # Longer ones describe the vocabulary, which is asked of the loaded model.
        if 0 < length <= 4096:
            return list((number * length).from_address(_array_data(handle, at)))
    return None


def supports_gpus() -> bool:
    """Whether this build of llama.cpp can put layers on GPUs."""
    return bool(lib.llama_supports_gpu_offload())


# --- the language model --------------------------------------------------------------------------


class ImageChunk:
    """A part of an image that stands in the context as one: its place, and its features once made.

    `key` names the content: two chunks of one key are the same to a context. `num_tokens` is what
    it takes of the context's length, `num_positions` how far it moves the position (they differ
    where rows and columns have positions of their own). `features`: (num_tokens, E) float32.
    """

    def __init__(self, key: str, encoder: ImageEncoder, native: Any) -> None:
        self.key = key
        self.encoder = encoder
        self._native = native
        self.num_tokens: int = mtmd.mtmd_input_chunk_get_n_tokens(native)
        self.num_positions: int = mtmd.mtmd_input_chunk_get_n_pos(native)
        self.features: NDArray[np.float32] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageChunk) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def native(self) -> Any:
        return self._native

    def forget_pixels(self) -> None:
        """Keep only what decoding needs, once there are features."""
        small = mtmd.mtmd_input_chunk_get_placeholder(self._native)
        if small:
            mtmd.mtmd_input_chunk_free(self._native)
            self._native = small

    def __del__(self) -> None:
        # At the interpreter's end the module may be gone already.
        if getattr(self, "_native", None) and mtmd is not None:
            mtmd.mtmd_input_chunk_free(self._native)
            self._native = None


Unit = int | ImageChunk
"""What follows another in the context: a token id, or (a part of) an image."""


def num_tokens(units: Sequence[Unit]) -> int:
    """The context length that `units` take."""
    return sum(1 if isinstance(unit, int) else unit.num_tokens for unit in units)


class LanguageModel:
    """A loaded model with an empty context.

    `units` is what the context holds: sequence 0. While there are branches, each of them is a
    sequence that shares the cells of those and has its own for what follows. `cancelled` is asked
    often during native work, from the thread that runs it; when it says yes, `Interrupted` is
    raised and the context is as before.
    """

    def __init__(
        self, path: Path, options: RuntimeOptions, report: Report = lambda *_: None
    ) -> None:
        """Raises CheckpointError for a file that cannot be run, OutOfMemoryError, EngineError."""
        self.path = path
        self.header = GGUFHeader(path)
        self.units: list[Unit] = []
        self.cancelled: Callable[[], bool] = _never
        self._ends: list[int] = []
        self._branches: list[int] = []
        self._branch_end = 0
        self._watched = False
        self._free_cores: FreeCores | None = None
        self._model = self._context = self._batch = self._step = None
        # The most likely to be short of memory last; nothing is held if one of them fails.
        try:
            self._load(options, report)
            self._open_context(options)
        except BaseException:
            self.close()
            raise

    def _load(self, options: RuntimeOptions, report: Report) -> None:
        params: Any = lib.llama_model_default_params()
        params.n_gpu_layers = options.n_gpu_layers
        shares = (ctypes.c_float * max(lib.llama_max_devices(), 1))(*options.tensor_split)
        if options.tensor_split:
            params.tensor_split = shares
        if options.main_gpu is not None:
            params.main_gpu, params.split_mode = options.main_gpu, 0
        with _reporting(report, f"Loading {self.path.name}", self.path.stat().st_size) as callback:
            params.progress_callback = lib.llama_progress_callback(callback)
            _errors.clear()
            self._model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise self._load_failure()
        self._vocab: Any = lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = lib.llama_vocab_n_tokens(self._vocab)
        self.embedding_length: int = lib.llama_model_n_embd_inp(self._model)
        self.trained_context: int = lib.llama_model_n_ctx_train(self._model)
        self.num_parameters: int = lib.llama_model_n_params(self._model)
        self.file_type: str = _text(lib.llama_ftype_name(lib.llama_model_ftype(self._model)))
        self.can_rewind: bool = not (
            lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        )
        if lib.llama_model_has_encoder(self._model) or not lib.llama_model_has_decoder(self._model):
            raise CheckpointError(
                f"{self.path.name} holds a {self.header.architecture!r} model, which does not "
                "go on writing a text.",
                hint="Use a chat model.",
            )
        self._read_vocabulary()

    def _load_failure(self) -> W2CError:
        said = _what_it_said()
        if "unknown model architecture" in said:
            return CheckpointError(
                f"{self.path.name} holds a {self.header.architecture!r} model, which "
                f"llama-cpp-python {VERSION} does not know.",
                hint="A newer release may; or use the model's own checkpoint with --backend hf.",
            )
        if "alloc" in said or "memory" in said:
            return OutOfMemoryError(
                f"Not enough memory for {self.path.name} "
                f"({self.header.num_bytes / 1e9:.1f} GB){said}",
                hint="Use a smaller quantisation, fewer --n-gpu-layers or another model.",
            )
        return CheckpointError(
            f"llama.cpp cannot load {self.path.name}{said}.",
            hint="Download or export it again, or use the model's own checkpoint.",
        )

    def _open_context(self, options: RuntimeOptions) -> None:
        params: Any = lib.llama_context_default_params()
        params.n_ctx = min(options.context or self.trained_context, self.trained_context)
        params.n_batch = params.n_ubatch = min(options.batch, params.n_ctx)
        # In other models every sequence would have the memory of its whole state.
        params.n_seq_max = 1 + MAX_BRANCHES if self.can_rewind else 1
        params.kv_unified = True
        threads = options.threads or _num_cores()
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attn]
        params.type_k = params.type_v = CACHE_TYPES[options.cache_type]
        # Whatever is in the context can be taken back to any place, also in models of which some
        # layers see only a window.
        params.swa_full = True
        params.no_perf = True
        self.threads = threads
        # Who asks for a number gets it. Flash attention adds up in an order that goes by the number
        # of threads, and the same seed must give the same page whatever else is running.
        if not options.threads and options.flash_attn == "off":
            self._free_cores = FreeCores(threads)
        self._abort = lib.ggml_abort_callback(lambda _: self.cancelled())
        _errors.clear()
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            said = _what_it_said()
            size = self.header.cache_bytes(options.cache_type) * params.n_ctx
            if "flash_attn" in said:
                raise EngineError(
                    f"A {options.cache_type} cache needs flash attention{said}.",
                    hint="Use --flash-attn on, or --cache-type f16.",
                )
            raise OutOfMemoryError(
                f"A context of {params.n_ctx:,} tokens could not be made "
                f"(its cache takes {size / 1e9:.1f} GB){said}.",
                hint="Use a smaller --context, or --cache-type q8_0.",
            )
        # llama.cpp rounds up.
        self.context_length: int = params.n_ctx
        self.batch_length: int = lib.llama_n_batch(self._context)
        self._memory: Any = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(self.batch_length, 0, 1)
        for at in range(self.batch_length):
            self._batch.n_seq_id[at] = 1
            self._batch.seq_id[at][0] = 0
        self._step = lib.llama_batch_init(MAX_BRANCHES, 0, 1)

    def _use_free_cores(self) -> None:
        """Compute with as many threads as other processes leave cores for."""
        if self._free_cores is not None:
            threads = self._free_cores.threads()
            if threads != self.threads:
                self.threads = threads
                lib.llama_set_n_threads(self._context, threads, threads)

    def close(self) -> None:
        """Give everything back. What it was used for must be closed before."""
        for batch in (self._batch, self._step):
            if batch is not None:
                lib.llama_batch_free(batch)
        self._batch = self._step = None
        if self._context:
            lib.llama_free(self._context)
            self._context = None
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def native_model(self) -> Any:
        return self._model

    # Vocabulary

    def _read_vocabulary(self) -> None:
        attributes = np.fromiter(
            (lib.llama_vocab_get_attr(self._vocab, ident) for ident in range(self.vocab_size)),
            dtype=np.int32,
            count=self.vocab_size,
        )
        control = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        named = {
            int(ident): _text(lib.llama_vocab_get_text(self._vocab, int(ident)))
            for ident in np.flatnonzero(attributes & control)
        }
        self.special_tokens: dict[str, int] = {text: ident for ident, text in named.items()}
        self.special_ids = frozenset(named)
        self.strips_left = frozenset(
            i for i in named if attributes[i] & lib.LLAMA_TOKEN_ATTR_LSTRIP
        )
        self.strips_right = frozenset(
            i for i in named if attributes[i] & lib.LLAMA_TOKEN_ATTR_RSTRIP
        )
        self.eos_id: int = lib.llama_vocab_eos(self._vocab)
        bos: int = lib.llama_vocab_bos(self._vocab)
        self.bos_id = bos if bos >= 0 else None
        self.start_ids = [bos] if bos >= 0 and lib.llama_vocab_get_add_bos(self._vocab) else []
        self.end_ids = frozenset(
            i for i in {*named, self.eos_id} if i >= 0 and lib.llama_vocab_is_eog(self._vocab, i)
        ) | ({self.eos_id} if self.eos_id >= 0 else set())

    def token_text(self, ident: int) -> str:
        """How the vocabulary spells token `ident`."""
        return _text(lib.llama_vocab_get_text(self._vocab, ident))

    def raw_tokens(self, text: str) -> list[int]:
        """Ids of `text` by llama.cpp's own rules, without BOS and special-token parsing.

        Some vocabularies spell control tokens out of ordinary characters; who must not see that
        looks for `special_ids` in the result.
        """
        # Half a surrogate pair is no text in UTF-8.
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            count = lib.llama_tokenize(self._vocab, data, len(data), ids, room, False, False)
            if count >= 0:
                return ids[:count]
            if -count <= room:
                raise EngineError(f"llama.cpp cannot tokenise {len(data):,} bytes of text.")
            room = -count

    def token_bytes(self, ident: int) -> bytes:
        """What `ident` adds to a text; nothing for control tokens."""
        buffer = ctypes.create_string_buffer(64)
        length = lib.llama_token_to_piece(self._vocab, ident, buffer, len(buffer), 0, False)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = lib.llama_token_to_piece(self._vocab, ident, buffer, len(buffer), 0, False)
        return buffer.raw[: max(length, 0)]

    # The context

    def run(self, units: Sequence[Unit], keep: int = 1) -> NDArray[np.float32]:
        """Append `units` and return the logits after each of the last `keep`: (keep, V).

        Those must be tokens, or the last of them an image alone. Chunks of images need their
        features. Raises Interrupted, EngineError.
        """
        assert 0 <= keep <= len(units)
        self._use_free_cores()
        before = len(self.units)
        rows: list[NDArray[np.float32]] = []
        _errors.clear()
        try:
            at = 0
            while at < len(units):
                unit = units[at]
                if isinstance(unit, ImageChunk):
                    at += 1
                    if at == len(units) and keep:
                        rows.append(self._decode_last_image(unit))
                    else:
                        assert at <= len(units) - keep, "an image inside has no logits"
                        self._decode_image(unit)
                    continue
                tokens = list(
                    itertools.takewhile(
                        lambda u: isinstance(u, int), units[at : at + self.batch_length]
                    )
                )
                wanted = range(max(len(units) - keep - at, 0), len(tokens))
                rows += self._decode_tokens(tokens, wanted)
                at += len(tokens)
        except BaseException:
            self.crop(before)
            raise
        return np.stack(rows) if rows else np.empty((0, self.vocab_size), np.float32)

    def _decode_tokens(self, tokens: Sequence[Any], wanted: range) -> list[NDArray[np.float32]]:
        batch: Any = self._batch
        batch.n_tokens = len(tokens)
        position = self._ends[-1] if self._ends else 0
        for at, token in enumerate(tokens):
            batch.token[at] = token
            batch.pos[at] = position + at
            batch.logits[at] = at in wanted
        self._check(lib.llama_decode(self._context, batch))
        self.units += tokens
        self._ends += range(position + 1, position + len(tokens) + 1)
        return [self._row(at) for at in wanted]

    def _row(self, at: int) -> NDArray[np.float32]:
        """The logits of place `at` of the last batch."""
        logits = lib.llama_get_logits_ith(self._context, at)
        return np.ctypeslib.as_array(logits, (self.vocab_size,)).copy()

    def _decode_image(self, chunk: ImageChunk) -> None:
        assert chunk.features is not None, "features first"
        position = self._ends[-1] if self._ends else 0
        after = lib.llama_pos(position)
        features = np.ascontiguousarray(chunk.features, dtype=np.float32)
        self._check(
            mtmd.mtmd_helper_decode_image_chunk(
                chunk.encoder.native,
                self._context,
                chunk.native,
                features.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                lib.llama_pos(position),
                lib.llama_seq_id(0),
                self.batch_length,
                ctypes.byref(after),
                mtmd.mtmd_helper_post_decode_callback(),
                None,
            )
        )
        self.units.append(chunk)
        self._ends.append(after.value)

    def _decode_last_image(self, chunk: ImageChunk) -> NDArray[np.float32]:
        """As `_decode_image`, with the logits at the image's end, which mtmd does not ask for."""
        assert chunk.features is not None, "features first"
        in_a_row = chunk.num_positions == chunk.num_tokens
        if not in_a_row or mtmd.mtmd_decode_use_non_causal(chunk.encoder.native, chunk.native):
            raise EngineError(
                "This model cannot go on right after an image.",
                hint="Write something about the image.",
            )
        batch: Any = self._batch
        position = self._ends[-1] if self._ends else 0
        for start in range(0, chunk.num_tokens, self.batch_length):
            rows = np.ascontiguousarray(chunk.features[start : start + self.batch_length])
            for at in range(len(rows)):
                batch.pos[at] = position + start + at
                batch.logits[at] = start + at == chunk.num_tokens - 1
            embeddings = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            part: Any = lib.llama_batch(
                len(rows), None, embeddings, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits
            )
            self._check(lib.llama_decode(self._context, part))
        self.units.append(chunk)
        self._ends.append(position + chunk.num_positions)
        row = lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (self.vocab_size,)).copy()

    def _check(self, status: int) -> None:
        if status == 0:
            return
        if status == 2:
            raise Interrupted
        if status == 1:
            raise EngineError(
                f"The context of {self.context_length:,} tokens is full.",
                hint="Use a larger --context or start a new conversation.",
            )
        raise EngineError(f"llama.cpp failed while running the model ({status}){_what_it_said()}.")

    def watch(self, on: bool) -> None:
        """Whether `cancelled` is asked during native work.

        That costs about a microsecond for each operation of the graph, which short steps of small
        models would feel.
        """
        if on != self._watched:
            callback = self._abort if on else lib.ggml_abort_callback()
            lib.llama_set_abort_callback(self._context, callback, None)
            self._watched = on

    def crop(self, length: int) -> int:
        """Take everything after the first `length` units out of the context again.

        Returns how many are left, which is none where the model's memory cannot be taken back.
        """
        position = self._ends[length - 1] if length else 0
        if not lib.llama_memory_seq_rm(self._memory, 0, position, -1):
            lib.llama_memory_clear(self._memory, True)
            length = 0
        del self.units[length:]
        del self._ends[length:]
        return length

    # Branches

    def branch(self, count: int) -> None:
        """Split the context into `count` branches; it stays as it is itself."""
        assert self.can_rewind
        assert not self._branches
        assert 0 < count <= MAX_BRANCHES
        self._branches = list(range(1, count + 1))
        self._branch_end = self._ends[-1]
        for sequence in self._branches:
            lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def run_branches(self, tokens: Sequence[int]) -> list[NDArray[np.float32]]:
        """Append one token to each branch; the logits after them, (V,) each.

        Raises Interrupted, EngineError, with the branches as they were.
        """
        self._use_free_cores()
        batch: Any = self._step
        batch.n_tokens = len(tokens)
        for at, (token, sequence) in enumerate(zip(tokens, self._branches, strict=True)):
            batch.token[at] = token
            batch.pos[at] = self._branch_end
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = sequence
            batch.logits[at] = True
        _errors.clear()
        try:
            self._check(lib.llama_decode(self._context, batch))
        except BaseException:
            for sequence in self._branches:
                lib.llama_memory_seq_rm(self._memory, sequence, self._branch_end, -1)
            raise
        self._branch_end += 1
        return [self._row(at) for at in range(len(tokens))]

    def keep_branches(self, kept: Sequence[int]) -> None:
        """Give up all branches but those at these places."""
        remaining = [self._branches[at] for at in kept]
        for sequence in set(self._branches).difference(remaining):
            lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        self._branches = remaining


# --- the image encoder ---------------------------------------------------------------------------

Layout = Literal["rolled", "last", "standard"]

# Where the width of what a projector writes can be read without loading it: (tensor, dimension).
_OUTPUTS = {
    **dict.fromkeys(("mlp", "qwen2vl_merger", "qwen2.5vl_merger"), ("mm.2.weight", 1)),
    "idefics3": ("mm.model.fc.weight", 1),
    "gemma3": ("mm.input_projection.weight", 0),
}


class ImageEncoder:
    """An mmproj file loaded beside the language model it belongs to.

    Files that this project exported say how pictures are prepared (`image_spec`) and where the
    class token lies (`layout`); others are prepared by llama.cpp.
    """

    def __init__(
        self,
        path: Path,
        model: LanguageModel,
        options: RuntimeOptions,
        report: Report = lambda *_: None,
    ) -> None:
        """Raises CheckpointError if the file is no image encoder or not the one of `model`."""
        self.path = path
        self.cancelled: Callable[[], bool] = _never
        self.embedding_length = model.embedding_length
        self._native = None
        header = self.header = GGUFHeader(path)
        check_belongs(header, model.embedding_length, model.path.name)
        self.image_spec = _image_spec(header)
        self._threads = model.threads
        self._rolls = self._must_roll(model)
        self._asked = 0
        self._question = lib.ggml_backend_sched_eval_callback(self._go_on)
        params: Any = mtmd.mtmd_context_params_default()
        params.use_gpu = options.n_gpu_layers != 0
        params.print_timings = False
        params.warmup = False
        params.n_threads = model.threads
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attn]
        params.cb_eval = self._question
        with _reporting(report, f"Loading {path.name}", path.stat().st_size) as callback:
            params.progress_callback = mtmd.mtmd_progress_callback(callback)
            _errors.clear()
            self._native = mtmd.mtmd_init_from_file(os.fsencode(path), model.native_model, params)
        if not self._native:
            raise CheckpointError(
                f"llama.cpp cannot load {path.name} for {model.path.name}{_what_it_said()}.",
                hint="Name the mmproj file that was made for this model, with --mmproj.",
            )
        if not mtmd.mtmd_support_vision(self._native):
            self.close()
            raise CheckpointError(
                f"{path.name} has no image encoder.", hint="Name one for images with --mmproj."
            )

    @property
    def native(self) -> Any:
        return self._native

    def close(self) -> None:
        if self._native:
            mtmd.mtmd_free(self._native)
            self._native = None

    def __enter__(self) -> ImageEncoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _must_roll(self, model: LanguageModel) -> bool:
        layout = self.header.text("w2c.clip_layout")
        if not layout or "v.class_embd" not in self.header.tensors:
            return False
        first = class_token_is_first(model)
        if layout == "rolled":
            return not first
        if (layout == "standard") != first:
            where = "before" if first else "behind"
            raise CheckpointError(
                f"{self.path.name} has the layout {layout!r}, and this llama.cpp puts the class "
                f"token {where} the patches.",
                hint="Export it again with --clip-layout rolled, which is right for both.",
            )
        return False

    def misplaces_class_token(self, model: LanguageModel) -> bool:
        """Whether this is a CLIP tower from elsewhere, which this llama.cpp computes inexactly."""
        if self.header.text("w2c.clip_layout") or "v.class_embd" not in self.header.tensors:
            return False
        # Only this graph of llama.cpp's has the defect.
        projector = self.header.text("clip.projector_type")
        return projector in ("mlp", "mlp_norm", "ldp", "ldpv2") and not class_token_is_first(model)

    def prepare(self, picture: Image.Image, key: str) -> list[Unit]:
        """What stands in the context for `picture`, RGB, known as `key`; without features yet.

        Raises ImageError.
        """
        if self.image_spec is not None:
            picture = prepare_picture(picture, self.image_spec)
            if self._rolls:
                picture = self._rolled(picture)
        marker = mtmd.mtmd_default_marker()
        text: Any = mtmd.mtmd_input_text()
        text.text, text.text_len = marker, len(marker)
        text.add_special, text.parse_special = False, True
        pixels = np.ascontiguousarray(picture.convert("RGB"), dtype=np.uint8)
        bitmap = mtmd.mtmd_bitmap_init(
            picture.width, picture.height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            _errors.clear()
            if mtmd.mtmd_tokenize(self._native, chunks, ctypes.byref(text), bitmaps, 1):
                raise ImageError(
                    f"llama.cpp cannot prepare a picture of {picture.width} x {picture.height} px"
                    f"{_what_it_said()}.",
                    hint="Crop the picture to the part that matters.",
                )
            return list(self._units(chunks, key))
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _units(self, chunks: Any, key: str) -> Iterator[Unit]:
        for at in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk: Any = mtmd.mtmd_input_chunks_get(chunks, at)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                tokens: Any = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                yield from tokens[: count.value]
            else:
                yield ImageChunk(f"{key}/{at}", self, mtmd.mtmd_input_chunk_copy(chunk))

    def _rolled(self, picture: Image.Image) -> Image.Image:
        """`picture` moved on by one patch, with a patch of the pad colour in front."""
        patch = self.header.number("clip.vision.patch_size")
        color = [int(value) for value in self.header.numbers("w2c.pad_color")]
        pixels = np.asarray(picture)
        count = picture.width // patch
        patches = pixels.reshape(count, patch, count, patch, 3).swapaxes(1, 2)
        patches = patches.reshape(count * count, patch, patch, 3)
        front = np.full((1, patch, patch, 3), color, np.uint8)
        moved = np.concatenate([front, patches[:-1]])
        moved = moved.reshape(count, count, patch, patch, 3).swapaxes(1, 2)
        return Image.fromarray(moved.reshape(pixels.shape))

    def encode(self, chunk: ImageChunk) -> NDArray[np.float32]:
        """The features of `chunk`, (num_tokens, E) float32; computed once.

        Raises Interrupted when `cancelled` says yes meanwhile.
        """
        if chunk.features is None:
            _errors.clear()
            status = mtmd.mtmd_encode_chunk(self._native, chunk.native)
            if self.cancelled():
                raise Interrupted
            if status:
                raise EngineError(f"llama.cpp cannot encode the picture{_what_it_said()}.")
            output: Any = mtmd.mtmd_get_output_embd(self._native)
            shape = (chunk.num_tokens, self.embedding_length)
            chunk.features = np.ctypeslib.as_array(output, shape).copy()
            chunk.forget_pixels()
        return chunk.features

    def _go_on(self, tensor: Any, asks: bool, _: Any) -> bool:
        """llama.cpp asks first whether a result is wanted, and with it whether to go on."""
        if asks:
            self._asked += 1
            return self._asked % _NODES_PER_QUESTION == 0
        return not self.cancelled()


def check_belongs(header: GGUFHeader, embedding_length: int, model_name: str) -> None:
    """Raise CheckpointError unless `header` is of an mmproj file for embeddings of that length."""
    name = header.path.name
    if header.architecture != "clip":
        raise CheckpointError(
            f"{name} is no mmproj file: its architecture is {header.architecture!r}.",
            hint="The image encoder's file usually has mmproj in its name.",
        )
    tensor, dimension = _OUTPUTS.get(header.text("clip.projector_type"), ("", 0))
    found = header.tensors.get(tensor)
    if found is not None and found.shape[dimension] != embedding_length:
        raise CheckpointError(
            f"{name} does not belong to {model_name}: it gives embeddings of "
            f"{found.shape[dimension]}, and the model takes {embedding_length}.",
            hint="Name the mmproj file that was made for this model, with --mmproj.",
        )


def _image_spec(header: GGUFHeader) -> ImageSpec | None:
    text = header.text("w2c.image_spec")
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=ImageSpec)
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{header.path.name} describes its picture preparation wrongly: {error}.",
            hint="Export it again.",
        ) from error


def class_token_is_first(model: LanguageModel) -> bool:
    """Whether this llama.cpp puts a CLIP tower's class token before the patches, as CLIP does.

    Releases up to this one put it last, against their own positions
    (github.com/ggml-org/llama.cpp/issues/25814). Found out by running a tower of four patches
    whose blocks do nothing: a change of the last patch moves the row where that patch lies.
    """
    global _class_token_is_first
    if _class_token_is_first is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.gguf"
            _write_probe(path, model.embedding_length)
            with ImageEncoder(path, model, RuntimeOptions(n_gpu_layers=0)) as probe:
                rows = []
                for shade in (0, 255):
                    picture = Image.new("RGB", (28, 28))
                    picture.paste((shade,) * 3, (14, 14, 28, 28))
                    (chunk,) = probe.prepare(picture, f"probe {shade}")
                    assert isinstance(chunk, ImageChunk)
                    rows.append(probe.encode(chunk))
        moved = np.abs(rows[0] - rows[1]).max(axis=1)
        _class_token_is_first = int(moved.argmax()) == 3
    return _class_token_is_first


_class_token_is_first: bool | None = None


def _write_probe(path: Path, width: int) -> None:
    """A CLIP tower of 2 x 2 patches and one block of zeros, with a projector to `width`."""
    import gguf

    size, ones = 16, np.ones(16, np.float32)
    rng = np.random.default_rng(0)

    def some(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    tensors = {
        "v.class_embd": some(size),
        "v.patch_embd.weight": some(size, 3, 14, 14),
        "v.position_embd.weight": np.zeros((5, size), np.float32),
        "mm.0.weight": some(size, size),
        "mm.0.bias": 0 * ones,
        "mm.2.weight": some(width, size),
        "mm.2.bias": np.zeros(width, np.float32),
        "v.pre_ln.weight": ones,
        "v.pre_ln.bias": 0 * ones,
    }
    for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
        tensors[f"v.blk.0.{name}.weight"] = np.zeros((size, size), np.float32)
        tensors[f"v.blk.0.{name}.bias"] = 0 * ones
    for name in ("ln1", "ln2"):
        tensors[f"v.blk.0.{name}.weight"] = ones
        tensors[f"v.blk.0.{name}.bias"] = 0 * ones
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(width)
    writer.add_vision_image_size(28)
    writer.add_vision_patch_size(14)
    writer.add_vision_embedding_length(size)
    writer.add_vision_feed_forward_length(size)
    writer.add_vision_block_count(1)
    writer.add_vision_head_count(2)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_array("clip.vision.feature_layer", [1])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def _reporting(report: Report, phase: str, total: int) -> Iterator[Any]:
    """A native progress callback that calls `report`; what that raises comes out at the end."""
    raised: list[BaseException] = []

    def progress(done: float, _: Any) -> bool:
        try:
            report(phase, int(done * total), total)
        except BaseException as error:  # noqa: BLE001 - must not travel through native code
            raised.append(error)
        return not raised

    yield progress
    if raised:
        raise raised[0]


def _num_cores() -> int:
    """Physical cores that this process may use."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if sys.platform == "linux":
        cores = min(cores, len(os.sched_getaffinity(0)))
    return cores


def _never() -> bool:
    return False
