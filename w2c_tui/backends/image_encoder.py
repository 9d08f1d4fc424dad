"""An mmproj file at work: pictures into features, beside the language model it belongs to.

Owns the native encoder's life, how pictures are put before it, and what a release of llama.cpp
computes otherwise than the model was trained with. Knows nothing about contexts or conversations.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from w2c_tui.backends.gguf_header import GGUFHeader
from w2c_tui.backends.llama import ImageChunk, LanguageModel, RuntimeOptions, Unit
from w2c_tui.backends.llama_library import (
    FLASH_ATTENTION,
    Closing,
    Report,
    forget_errors,
    lib,
    mtmd,
    never,
    reporting,
    what_it_said,
)
from w2c_tui.backends.turn import Interrupted
from w2c_tui.core.errors import CheckpointError, EngineError, ImageError
from w2c_tui.core.image import ImageSpec
from w2c_tui.core.image import prepare as prepare_picture

_NODES_PER_QUESTION = 8
"""After this many operations of the image encoder it is asked whether to go on."""

Layout = Literal["rolled", "last", "standard"]

# Where the width of what a projector writes can be read without loading it: (tensor, dimension).
_OUTPUTS = {
    **dict.fromkeys(("mlp", "qwen2vl_merger", "qwen2.5vl_merger"), ("mm.2.weight", 1)),
    "idefics3": ("mm.model.fc.weight", 1),
    "gemma3": ("mm.input_projection.weight", 0),
}


class ImageEncoder(Closing):
    """An mmproj file loaded beside the language model it belongs to.

    Files that this project exported say how pictures are prepared (`image_spec`) and where the
    class token lies (`layout`); others are prepared by llama.cpp.
    """

    def __init__(
        self,
        path: Path,
        model: LanguageModel,
        runtime: RuntimeOptions,
        report: Report = lambda *_: None,
    ) -> None:
        """Raises CheckpointError if the file is no image encoder or not the one of `model`."""
        self.path = path
        self.cancelled: Callable[[], bool] = never
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
        params.use_gpu = runtime.n_gpu_layers != 0
        params.print_timings = False
        params.warmup = False
        params.n_threads = model.threads
        params.flash_attn_type = FLASH_ATTENTION[runtime.flash_attn]
        params.cb_eval = self._question
        with reporting(report, f"Loading {path.name}", path.stat().st_size) as callback:
            params.progress_callback = mtmd.mtmd_progress_callback(callback)
            forget_errors()
            self._native = mtmd.mtmd_init_from_file(os.fsencode(path), model.native_model, params)
        if not self._native:
            raise CheckpointError(
                f"llama.cpp cannot load {path.name} for {model.path.name}{what_it_said()}.",
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
            forget_errors()
            if mtmd.mtmd_tokenize(self._native, chunks, ctypes.byref(text), bitmaps, 1):
                raise ImageError(
                    f"llama.cpp cannot prepare a picture of {picture.width} x {picture.height} px"
                    f"{what_it_said()}.",
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
            forget_errors()
            status = mtmd.mtmd_encode_chunk(self._native, chunk.native)
            if self.cancelled():
                raise Interrupted
            if status:
                raise EngineError(f"llama.cpp cannot encode the picture{what_it_said()}.")
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
