"""llama.cpp as this project uses it: one language model with one context.

Owns the native objects' lives and the positions of what is in the context. Knows nothing about
conversations, templates, how pictures become features or how a token is chosen.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from w2c_tui.backends.free_cores import FreeCores
from w2c_tui.backends.gguf_header import GGUFHeader
from w2c_tui.backends.llama_library import (
    FLASH_ATTENTION,
    VERSION,
    Closing,
    Report,
    forget_errors,
    lib,
    mtmd,
    never,
    reporting,
    text_of,
    uses_gpus,
    what_it_said,
)
from w2c_tui.backends.turn import MAX_BRANCHES, Interrupted
from w2c_tui.core.config import CacheType, FlashAttention
from w2c_tui.core.errors import (
    CheckpointError,
    EngineError,
    OutOfMemoryError,
    W2CError,
)

if TYPE_CHECKING:
    from w2c_tui.backends.image_encoder import ImageEncoder

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


class RuntimeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to load and run a model.

    `context` 0 is the length the model was trained for, `threads` 0 is one per core,
    `n_gpu_layers` -1 is all. `tensor_split` are the shares of several GPUs; `main_gpu` puts
    everything on one of them. `flash_attn` "auto" is off on a CPU, but for image encoders. `batch`
    is how many tokens are computed at once at most, which must be all of an image where its parts
    see each other; 0 is what is fast on the device.
    """

    context: int = 0
    threads: int = 0
    n_gpu_layers: int = -1
    tensor_split: tuple[float, ...] = ()
    main_gpu: int | None = None
    flash_attn: FlashAttention = "auto"
    cache_type: CacheType = "f16"
    batch: int = 0


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


class LanguageModel(Closing):
    """A loaded model with an empty context.

    `units` is what the context holds: sequence 0. While there are branches, each of them is a
    sequence that shares the cells of those and has its own for what follows. `cancelled` is asked
    often during native work, from the thread that runs it; when it says yes, `Interrupted` is
    raised and the context is as before.
    """

    def __init__(
        self, path: Path, runtime: RuntimeOptions, report: Report = lambda *_: None
    ) -> None:
        """Raises CheckpointError for a file that cannot be run, OutOfMemoryError, EngineError."""
        self.path = path
        self.header = GGUFHeader(path)
        self.units: list[Unit] = []
        self.cancelled: Callable[[], bool] = never
        self._ends: list[int] = []
        self._branches: list[int] = []
        self._branch_end = 0
        self._watched = False
        self._free_cores: FreeCores | None = None
        self._model = self._context = self._batch = self._step = None
        # The most likely to be short of memory last; nothing is held if one of them fails.
        try:
            self._load(runtime, report)
            self._open_context(runtime)
        except BaseException:
            self.close()
            raise

    def _load(self, runtime: RuntimeOptions, report: Report) -> None:
        params: Any = lib.llama_model_default_params()
        params.n_gpu_layers = runtime.n_gpu_layers
        # Its matrix products for AMX crash, as threads do not set up their tiles
        # (github.com/ggml-org/llama.cpp/pull/26954). They are an extra type of buffer.
        params.use_extra_bufts = "AMX_INT8 = 1" not in text_of(lib.llama_print_system_info())
        shares = (ctypes.c_float * max(lib.llama_max_devices(), 1))(*runtime.tensor_split)
        if runtime.tensor_split:
            params.tensor_split = shares
        if runtime.main_gpu is not None:
            params.main_gpu, params.split_mode = runtime.main_gpu, 0
        with reporting(report, f"Loading {self.path.name}", self.path.stat().st_size) as callback:
            params.progress_callback = lib.llama_progress_callback(callback)
            forget_errors()
            self._model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise self._load_failure()
        self._vocab: Any = lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = lib.llama_vocab_n_tokens(self._vocab)
        self.embedding_length: int = lib.llama_model_n_embd_inp(self._model)
        self.trained_context: int = lib.llama_model_n_ctx_train(self._model)
        self.num_parameters: int = lib.llama_model_n_params(self._model)
        self.file_type: str = text_of(lib.llama_ftype_name(lib.llama_model_ftype(self._model)))
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
        said = what_it_said()
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

    def _open_context(self, runtime: RuntimeOptions) -> None:
        params: Any = lib.llama_context_default_params()
        params.n_ctx = min(runtime.context or self.trained_context, self.trained_context)
        attention = _flash_attention(runtime)
        plain_on_cpu = attention == "off" and not uses_gpus(runtime.n_gpu_layers)
        params.n_batch = min(runtime.batch or 512, params.n_ctx)
        # On a CPU the scores of more tokens do not fit a core's cache.
        params.n_ubatch = min(runtime.batch or (128 if plain_on_cpu else 512), params.n_ctx)
        # In other models every sequence would have the memory of its whole state.
        params.n_seq_max = 1 + MAX_BRANCHES if self.can_rewind else 1
        params.kv_unified = True
        threads = runtime.threads or _num_cores()
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH_ATTENTION[attention]
        params.type_k = params.type_v = CACHE_TYPES[runtime.cache_type]
        # Whatever is in the context can be taken back to any place, also in models of which some
        # layers see only a window.
        params.swa_full = True
        params.no_perf = True
        self.threads = threads
        # Who asks for a number gets it. Flash attention adds up in an order that goes by the number
        # of threads, and the same seed must give the same page whatever else is running.
        if not runtime.threads and attention == "off":
            self._free_cores = FreeCores(threads)
        self._abort = lib.ggml_abort_callback(lambda _: self.cancelled())
        forget_errors()
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            said = what_it_said()
            size = self.header.cache_bytes(runtime.cache_type) * params.n_ctx
            if "flash_attn" in said:
                raise EngineError(
                    f"A {runtime.cache_type} cache needs flash attention{said}.",
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
            int(ident): text_of(lib.llama_vocab_get_text(self._vocab, int(ident)))
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
        return text_of(lib.llama_vocab_get_text(self._vocab, ident))

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
        forget_errors()
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
        raise EngineError(f"llama.cpp failed while running the model ({status}){what_it_said()}.")

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
        forget_errors()
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


def _flash_attention(runtime: RuntimeOptions) -> FlashAttention:
    """What "auto" is. On a CPU it is off, unless the cache is packed, which needs it.

    There llama.cpp computes fewer than 64 tokens at once with it, as in writing, far slower than
    without: SmolLM2-135M writes at 2,400 tokens of context half as fast. Models of 7B, with as many
    heads for keys as for queries, write as fast either way.
    """
    if runtime.flash_attn != "auto" or uses_gpus(runtime.n_gpu_layers):
        return runtime.flash_attn
    return "off" if runtime.cache_type in ("f32", "f16", "bf16") else "auto"


def _num_cores() -> int:
    """Physical cores that this process may use."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if sys.platform == "linux":
        cores = min(cores, len(os.sched_getaffinity(0)))
    return cores
