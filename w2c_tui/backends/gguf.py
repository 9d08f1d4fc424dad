"""Models in GGUF files through llama.cpp, on CPU or GPUs.

Owns the incremental context over token ids and image contents, of which a new turn computes only
what differs; the cache of image features; and how a rendered prompt becomes ids of a GGUF
vocabulary. Knows nothing about native calls (`llama` has them), processes or screens.
"""

from __future__ import annotations

import codecs
import gc
import re
import time
import typing
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from w2c_tui.backends.base import Event, ModelInfo, Prefill, Report
from w2c_tui.backends.gguf_header import GGUFHeader
from w2c_tui.backends.image_encoder import ImageEncoder, check_belongs
from w2c_tui.backends.llama import ImageChunk, LanguageModel, RuntimeOptions, Unit, num_tokens
from w2c_tui.backends.llama_library import VERSION, supports_gpus, uses_gpus
from w2c_tui.backends.turn import Candidates, Prompt, Row, answer, prefill, resident_peak
from w2c_tui.core.config import DeviceShare, GenerationParams, LoadSpec, checked, paths
from w2c_tui.core.conversation import Attachment, Hints, Message
from w2c_tui.core.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    ModelNotFoundError,
    OutOfMemoryError,
)
from w2c_tui.core.hub import fetch_gguf
from w2c_tui.core.image import open_image
from w2c_tui.core.locate import display_name, locate
from w2c_tui.core.prompt import (
    TEMPLATES,
    V1,
    AnyTemplate,
    ChatTemplate,
    Segment,
    image_list,
    render,
)
from w2c_tui.machine import main_memory

_MAX_DEFAULT_CONTEXT = 32_768
_CHUNK_TARGET_S = 0.25
_SLOW_STEP_S = 0.1
"""From this on a single token is worth interrupting, and asking costs nothing beside it."""
_MAX_FEATURE_BYTES = 512 * 2**20

_IMAGE_MARKS = (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|IMAGE_PAD|><|vision_end|>",
    "(<image>./</image>)",
    "<start_of_image>",
    "<IMG_CONTEXT>",
    "<image_soft_token>",
    "<|image_pad|>",
    "<|image|>",
    "[IMG]",
    "<image>",
)
"""What chat templates write where an image stands. llama.cpp itself adds the tokens that a model
wants around an image, so what the template writes there is replaced as a whole."""
_OWN_MARK = "<__media__>"


class GGUFBackend:
    """A GGUF model behind the backend protocol."""

    def __init__(self) -> None:
        self._model: LanguageModel | None = None
        self._encoder: ImageEncoder | None = None
        self.candidates: Candidates | None = None
        self._images: OrderedDict[str, list[Unit]] = OrderedDict()
        self._step_s = 1.0

    # --- loading ---------------------------------------------------------------------------------

    def load(self, spec: LoadSpec, report: Report) -> ModelInfo:
        """See `Backend.load`. `spec.name` is a `.gguf` file or a name that leads to one."""
        started = time.perf_counter()
        self.close()
        try:
            return self._load(spec, report, started)
        except BaseException:
            self.close()
            raise

    def _load(self, spec: LoadSpec, report: Report, started: float) -> ModelInfo:
        path = _find_model(spec.name, report)
        header = GGUFHeader(path)
        mmproj = _find_mmproj(header, spec.mmproj)
        if spec.tensor_split and spec.main_gpu is not None:
            raise ConfigError(
                "--tensor-split spreads the model over GPUs, --main-gpu puts it on one.",
                hint="Give one of them.",
            )
        options = RuntimeOptions(
            context=_fitting_context(header, spec),
            threads=spec.threads,
            n_gpu_layers=spec.n_gpu_layers,
            tensor_split=spec.tensor_split,
            main_gpu=spec.main_gpu,
            flash_attn=spec.flash_attn,
            cache_type=spec.cache_type,
            # The parts of an image see each other in these, so it is computed at once.
            batch=2048 if mmproj and _projector(mmproj).startswith("gemma") else 0,
        )
        model = self._model = LanguageModel(path, options, report)
        if mmproj is not None:
            self._encoder = ImageEncoder(mmproj, model, options, report)
        self._template = _pick_template(model, self._encoder)
        self._tokenizer = GGUFTokenizer(model)
        return ModelInfo(
            name=display_name(spec.name),
            backend="gguf",
            family=_family(header),
            template=self._template.name,
            reads_images=self.reads_images,
            context_length=self.context_length,
            num_parameters=model.num_parameters,
            dtype=model.file_type,
            quantization="none",
            devices=("gpu",) if uses_gpus(spec.n_gpu_layers) else ("cpu",),
            incremental=model.can_rewind,
            load_time_s=time.perf_counter() - started,
            image_spec=self._encoder.image_spec if self._encoder else None,
            hints=_card(header).get("hints", "none"),
            note=_note(model, self._encoder),
        )

    def close(self) -> None:
        """See `Backend.close`."""
        self.candidates = None
        self._images.clear()
        if self._model is not None:
            self._model.units.clear()
        gc.collect()
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None
        if self._model is not None:
            self._model.close()
            self._model = None

    # --- the prompt ------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """See `Runtime.encode`."""
        images = (
            [self._image_units(image) for image in image_list(messages)]
            if self.reads_images
            else []
        )
        segments = render(messages, self._template, images=self.reads_images)
        units = self._tokenizer.encode(
            segments, images, restart_after_images=not isinstance(self._template, ChatTemplate)
        )
        ids = [unit for unit in units if isinstance(unit, int)]
        return Prompt(messages, units, ids, num_tokens(units))

    def _image_units(self, attachment: Attachment) -> list[Unit]:
        assert self._encoder is not None
        found = self._images.get(attachment.sha256)
        if found is None:
            found = self._encoder.prepare(open_image(attachment), attachment.sha256)
            self._images[attachment.sha256] = found
        self._images.move_to_end(attachment.sha256)
        return found

    def _forget_images(self, in_use: set[str]) -> None:
        """Bound the memory of features; those of the conversation at hand stay."""
        sizes = {
            sha256: sum(
                unit.features.nbytes
                for unit in units
                if isinstance(unit, ImageChunk) and unit.features is not None
            )
            for sha256, units in self._images.items()
        }
        for sha256 in list(self._images):
            if sum(sizes.values()) <= _MAX_FEATURE_BYTES:
                break
            if sha256 not in in_use:
                del self._images[sha256], sizes[sha256]

    # --- the runtime of a turn -------------------------------------------------------------------

    @property
    def _loaded(self) -> LanguageModel:
        assert self._model is not None
        return self._model

    @property
    def context_length(self) -> int:
        return self._loaded.context_length

    @property
    def reads_images(self) -> bool:
        return self._encoder is not None

    @property
    def can_draft(self) -> bool:
        return self._loaded.can_rewind

    @property
    def end_ids(self) -> frozenset[int]:
        return self._loaded.end_ids

    @property
    def answer_lead(self) -> str:
        return self._template.answer_lead

    def peak_memory(self) -> int:
        """See `Runtime.peak_memory`; main memory only."""
        return resident_peak()

    def text_stream(self, prompt: Prompt) -> ByteStream:
        """See `Runtime.text_stream`."""
        return ByteStream(self._loaded)

    def read(self, prompt: Prompt) -> Iterator[Prefill | Row]:
        """See `Runtime.read`."""
        model, units = self._loaded, prompt.units
        self._forget_images({image.sha256 for image in image_list(prompt.messages)})
        common = 0
        for ours, theirs in zip(model.units, units, strict=False):
            if ours != theirs:
                break
            common += 1
        # At least one position is computed, as its logits are needed.
        common = min(common, len(units) - 1)
        if common < len(model.units):
            common = model.crop(common)
        total = num_tokens(units)
        done = num_tokens(units[:common])
        yield Prefill(done, total)
        model.watch(True)
        for unit in units[common:]:
            if isinstance(unit, ImageChunk) and self._encoder is not None:
                self._encoder.encode(unit)
        # The first chunk is small, as nothing is known of the model's speed yet.
        chunk, at = 64, common
        row: Row | None = None
        while at < len(units):
            began = time.perf_counter()
            part = _next_part(units, at, chunk)
            at += len(part)
            rows = model.run(part, keep=int(at == len(units)))
            done += num_tokens(part)
            if not isinstance(part[0], ImageChunk):
                spent = max(time.perf_counter() - began, 1e-4)
                wanted = min(chunk * _CHUNK_TARGET_S / spent, chunk * 4, model.batch_length)
                chunk = int(max(wanted, chunk / 2, 16))
            row = rows[-1] if len(rows) else None
            yield Prefill(done, total)
        assert row is not None
        self._step_s = 1.0
        yield row

    def extend(self, ids: Sequence[int]) -> Sequence[Row]:
        """See `Runtime.extend`."""
        model = self._loaded
        model.watch(self._step_s > _SLOW_STEP_S)
        began = time.perf_counter()
        rows = model.run(ids, keep=len(ids))
        self._step_s = time.perf_counter() - began
        return rows  # type: ignore[return-value]

    def take_back(self, count: int) -> None:
        """See `Runtime.take_back`."""
        self._loaded.crop(len(self._loaded.units) - count)

    def branch(self, count: int, room: int) -> int:
        """See `Runtime.branch`; they share the cells of the context, which must do for all."""
        model = self._loaded
        if not model.can_rewind:
            return 1
        count = min(count, (self.context_length - num_tokens(model.units)) // room)
        if count > 1:
            model.branch(count)
        return count

    def extend_branches(self, tokens: Sequence[int]) -> Sequence[Row]:
        """See `Runtime.extend_branches`."""
        model = self._loaded
        model.watch(self._step_s > _SLOW_STEP_S)
        began = time.perf_counter()
        rows = model.run_branches(tokens)
        self._step_s = time.perf_counter() - began
        return rows

    def keep_branches(self, kept: Sequence[int]) -> None:
        """See `Runtime.keep_branches`."""
        self._loaded.keep_branches(kept)

    def stream(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        cancelled: Callable[[], bool],
        ahead: int = 0,
        until: str = "",
    ) -> Iterator[Event]:
        """See `Backend.stream`."""
        model = self._model
        if model is None:
            raise EngineError("No model is loaded.", hint="Load one first.")
        params = checked(params)
        model.cancelled = cancelled
        if self._encoder is not None:
            self._encoder.cancelled = cancelled
        try:
            yield from answer(self, messages, params, cancelled, ahead, until)
        finally:
            model.cancelled = _never
            if self._encoder is not None:
                self._encoder.cancelled = _never

    def prefill(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        cancelled: Callable[[], bool],
    ) -> Iterator[Prefill]:
        """See `Backend.prefill`."""
        if self._model is None:
            raise EngineError("No model is loaded.", hint="Load one first.")
        yield from prefill(self, messages, checked(params), cancelled)


class GGUFTokenizer:
    """Segments to units with a GGUF vocabulary: text is only ever text."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        header = model.header
        # What this project's export says beyond llama.cpp's own keys.
        self._marks_once = header.text("w2c.tokenizer.prepend") == "first"
        self._marks_spaces = bool(header.values.get("w2c.tokenizer.marks_spaces", True))
        self._normal_form = header.text("w2c.tokenizer.normalizer")
        self._spelled = _spellings(header)
        # Files from elsewhere follow llama.cpp's rule: BOS stands before everything.
        self._adds_start = [] if header.text("w2c.template") else model.start_ids

    def encode(
        self,
        segments: Sequence[Segment],
        images: Sequence[Sequence[Unit]],
        *,
        restart_after_images: bool = True,
    ) -> list[Unit]:
        """`segments` as units, `images[n]` in place of image n; neighbouring text is one run.

        `restart_after_images`: what follows an image is tokenised as the start of a text.
        """
        model = self._model
        units: list[Unit] = []
        run: list[str] = []
        at_start = True
        strip_left = False

        def close_run(strip_right: bool = False) -> None:
            nonlocal at_start
            if run:
                text = "".join(run)
                text = text.rstrip() if strip_right else text
                text = text.lstrip() if strip_left else text
                units.extend(self.text_ids(text, at_start=at_start))
                run.clear()
            at_start = False

        for segment in segments:
            if segment.kind == "text":
                run.append(segment.text)
            elif segment.kind == "start":
                units.extend(model.start_ids)
            elif segment.kind == "image":
                close_run()
                units.extend(images[segment.image])
                at_start, strip_left = restart_after_images, False
            else:
                ident = model.eos_id
                if segment.kind == "token":
                    ident = model.special_tokens[segment.text]
                close_run(strip_right=ident in model.strips_left)
                units.append(ident)
                strip_left = ident in model.strips_right
        close_run()
        start = self._adds_start
        return units if units[: len(start)] == start else [*start, *units]

    def text_ids(self, text: str, *, at_start: bool = True) -> list[int]:
        """Ids of `text`, none of them a control token, whatever the text says.

        `at_start`: False for text further inside, where some vocabularies put no space in front.
        """
        if not text:
            return []
        model = self._model
        if self._normal_form == "NFC":
            text = unicodedata.normalize("NFC", text)
        marked = at_start or not self._marks_once
        marked = marked and (self._marks_spaces or not text.startswith((" ", "\u2581")))
        ids = model.raw_tokens(text) if marked else self._bare_ids(text)
        if model.special_ids.isdisjoint(ids):
            return ids
        return [part for ident in ids for part in self._as_text(ident)]

    def _as_text(self, ident: int) -> list[int]:
        """`ident`, or for a control token the pieces that its last merge joined.

        llama.cpp joins by score whatever makes a token of the vocabulary, control tokens too. In
        files where those come last, this is what a tokenizer without that merge gives.
        """
        if ident not in self._model.special_ids:
            return [ident]
        if ident not in self._spelled:
            self._spelled[ident] = self._spell(self._model.token_text(ident))
        return self._spelled[ident]

    def _spell(self, text: str) -> list[int]:
        best: list[int] | None = None
        for cut in range(1, len(text)):
            ids = [*self._bare_ids(text[:cut]), *self._bare_ids(text[cut:])]
            if not self._model.special_ids.isdisjoint(ids):
                continue
            if best is None or len(ids) < len(best):
                best = ids
        if best is None:
            raise EngineError(f"This vocabulary cannot write {text!r} without its special token.")
        return best

    def _bare_ids(self, text: str) -> list[int]:
        """Ids of `text` without the space that some vocabularies put in front."""
        if self._model.header.text("tokenizer.ggml.model") != "llama":
            return self._model.raw_tokens(text)
        mark = self._model.raw_tokens(_APART)
        return self._model.raw_tokens(_APART + text)[len(mark) :]


_APART = "\ue0fd"
"""A private character that no piece of a vocabulary holds, so that nothing joins with it."""


def _spellings(header: GGUFHeader) -> dict[int, list[int]]:
    try:
        return msgspec.json.decode(
            header.text("w2c.tokenizer.spelled", "{}"), type=dict[int, list[int]], strict=False
        )
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{header.path.name} describes its tokenizer wrongly: {error}.",
            hint="Export it again.",
        ) from error


class ByteStream:
    """Token ids to text; bytes are held back until they are whole characters."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ident: int) -> str:
        """See `TextStream.push`."""
        return self._decoder.decode(self._model.token_bytes(ident))

    def flush(self) -> str:
        """See `TextStream.flush`."""
        return self._decoder.decode(b"", final=True)


def plan_placement(spec: LoadSpec, report: Report) -> tuple[DeviceShare, ...]:
    """Where `GGUFBackend.load(spec)` would put the model."""
    header = GGUFHeader(_find_model(spec.name, report))
    mmproj = _find_mmproj(header, spec.mmproj)
    encoder = GGUFHeader(mmproj).num_bytes if mmproj else 0
    num_layers = header.number(f"{header.architecture}.block_count")
    on_gpu = 0
    if supports_gpus():
        # Negative is all, and the last ones go first, the output counting as one more.
        on_gpu = num_layers + 1 if spec.n_gpu_layers < 0 else spec.n_gpu_layers
    first = max(num_layers + 1 - on_gpu, 0)
    far = sum(
        tensor.num_bytes
        for name, tensor in header.tensors.items()
        if on_gpu and _layer_of(name, num_layers) >= first
    )
    near = header.num_bytes - far
    if not on_gpu:
        return (DeviceShare(device="cpu", modules=("",), num_bytes=near + encoder),)
    last = "output" if num_layers else ""
    return (
        DeviceShare(device="gpu", modules=(f"blk.{first}", last), num_bytes=far + encoder),
        DeviceShare(device="cpu", modules=("token_embd",), num_bytes=near),
    )


def _layer_of(tensor: str, num_layers: int) -> int:
    if tensor.startswith("blk."):
        return int(tensor.split(".")[1])
    return num_layers if tensor.startswith("output") else -1


def _find_model(name: str, report: Report) -> Path:
    """The model's file for what the user named: a file, a folder with one in it, or a hub name."""
    place = locate(name, paths().models, report)
    path = Path(place)
    if not path.exists():
        return fetch_gguf(place, "", report)
    if path.is_file():
        return path
    found = sorted(file for file in path.glob("*.gguf") if "mmproj" not in file.name.casefold())
    first = [file for file in found if not _LATER_PART.search(file.name)]
    if len(first) == 1:
        return first[0]
    raise ModelNotFoundError(
        f"The folder {path} holds {len(first) or 'no'} GGUF models.",
        hint=f"Name one of them: {', '.join(file.name for file in first[:8])}."
        if first
        else "Name a folder with a .gguf file, or use --backend hf.",
    )


_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def _fitting_context(header: GGUFHeader, spec: LoadSpec) -> int:
    """How many tokens of context to make; llama.cpp reserves the memory for all of them at once.

    Raises OutOfMemoryError if what was asked for is more than there is.
    """
    trained = header.number(f"{header.architecture}.context_length", 4096)
    each = header.cache_bytes(spec.cache_type)
    available = main_memory()[1]
    on_gpu = uses_gpus(spec.n_gpu_layers)
    if spec.context:
        wanted = min(spec.context, trained)
        if not on_gpu and wanted * each > available:
            raise OutOfMemoryError(
                f"A context of {wanted:,} tokens takes {wanted * each / 1e9:.1f} GB for keys and "
                f"values, and {available / 1e9:.1f} GB of memory are available.",
                hint=f"Use --context {int(available / 2 / each)} or less, or --cache-type q8_0.",
            )
        return wanted
    fitting = int(max(available - header.num_bytes, available / 4) / 2 / max(each, 1))
    return min(trained, _MAX_DEFAULT_CONTEXT, trained if on_gpu else max(fitting, 2048))


def _next_part(units: Sequence[Unit], at: int, length: int) -> Sequence[Unit]:
    """The image at `at` alone, or at most `length` tokens up to the next image."""
    if isinstance(units[at], ImageChunk):
        return units[at : at + 1]
    end = at
    while end < len(units) and end < at + length and isinstance(units[end], int):
        end += 1
    return units[at:end]


def _find_mmproj(header: GGUFHeader, named: str | None) -> Path | None:
    """The image encoder's file: the one that was named, or the one beside the model."""
    width = header.number(f"{header.architecture}.embedding_length")
    if named is not None:
        path = Path(named).expanduser()
        check_belongs(GGUFHeader(path), width, header.path.name)
        return path
    for path in sorted(header.path.parent.glob("*mmproj*.gguf")):
        try:
            found = GGUFHeader(path)
            check_belongs(found, width, header.path.name)
        except CheckpointError:
            continue
        # Some are for sounds.
        if found.values.get("clip.has_vision_encoder", True):
            return path
    return None


def _projector(mmproj: Path) -> str:
    return GGUFHeader(mmproj).text("clip.projector_type")


def _family(header: GGUFHeader) -> str:
    """The family of the checkpoint that a file was made from, or else what llama.cpp calls it."""
    return str(_card(header).get("family") or header.architecture)


def _card(header: GGUFHeader) -> dict[str, Any]:
    """The card of the checkpoint that a file was made from; empty for files from elsewhere."""
    try:
        card = msgspec.json.decode(header.text("w2c.card", "{}"), type=dict[str, Any])
    except msgspec.DecodeError:
        return {}
    if card.get("hints") not in typing.get_args(Hints):
        card.pop("hints", None)
    return card


def _pick_template(model: LanguageModel, encoder: ImageEncoder | None) -> AnyTemplate:
    named = model.header.text("w2c.template")
    if named in TEMPLATES:
        return TEMPLATES[named]
    source = model.header.text("tokenizer.chat_template")
    if source:
        return ChatTemplate(
            source=source,
            tokens=tuple(model.special_tokens),
            image_token=next((mark for mark in _IMAGE_MARKS if mark in source), _OWN_MARK)
            if encoder
            else None,
            bos_token=model.token_text(model.bos_id) if model.bos_id is not None else "",
            eos_token=model.token_text(model.eos_id) if model.eos_id >= 0 else "",
        )
    if encoder is not None and encoder.header.text("clip.projector_type") == "mlp":
        # LLaVA 1.5, whose files were made before GGUF had chat templates.
        return V1
    raise CheckpointError(
        f"{model.path.name} has no chat template.",
        hint="Use an instruction-tuned model whose file has one.",
    )


def _note(model: LanguageModel, encoder: ImageEncoder | None) -> str:
    if encoder is None or not encoder.misplaces_class_token(model):
        return ""
    return (
        f"llama-cpp-python {VERSION} computes the pictures of {encoder.path.name} inexactly, as "
        "every llama.cpp of today does with CLIP towers. w2c export-gguf writes files without that."
    )


def _never() -> bool:
    return False
