"""Models through transformers, on CPU or GPUs, whole or in 4 and 8 bit.

Owns the incremental context: token ids and image features whose keys and values are in the cache,
of which a new turn computes only what differs. Where a model's own forward does more than
attention over spliced embeddings (`_SPLICED` lists the families that do just that), every turn is
computed afresh by the model's own preparation. Knows nothing about processes or screens.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import torch
from transformers import Cache, DynamicCache

from w2c_tui.backends import cpu
from w2c_tui.backends.base import Event, ModelInfo, Prefill, Report
from w2c_tui.backends.kv_cache import GrowingLayer, growing_cache
from w2c_tui.backends.turn import (
    Candidates,
    Interrupted,
    Prompt,
    Row,
    answer,
    prefill,
    resident_peak,
)
from w2c_tui.core.config import DeviceShare, GenerationParams, LoadSpec, checked, paths
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import (
    CheckpointError,
    EngineError,
    OutOfMemoryError,
    W2CError,
)
from w2c_tui.core.image import open_image, pixel_values
from w2c_tui.core.locate import display_name, locate
from w2c_tui.core.prompt import (
    TEMPLATES,
    AnyTemplate,
    ChatTemplate,
    Segment,
    image_list,
    render,
)
from w2c_tui.machine import main_memory
from w2c_tui.models.checkpoint import LoadedModel, load_model, open_checkpoint
from w2c_tui.models.placement import device_shares
from w2c_tui.models.tokenize import ImageSlot, PromptTokenizer, TextStream

# Families whose language model sees nothing of an image but its features in place of tokens,
# with plain positions and a causal mask.
_SPLICED = {"llava", "idefics3", "smolvlm", "internvl", "mistral3", "aya_vision"}
# What processors call the mask of image tokens; it is made for the whole prompt here.
_TYPE_IDS = ("token_type_ids", "mm_token_type_ids")
# How often progress is told. A piece can be stopped between any two layers.
_CHUNK_TARGET_S = 1.0
_MAX_CACHED_IMAGES = 16
_DEFAULT_THREADS = torch.get_num_threads()


class _EncodedImage(msgspec.Struct):
    """One image as a model takes it: what stands in its place, and its features once computed.

    `stands_as`: numbers of features, with the text and tokens that the processor puts around and
    between them. `inputs` are the encoder's inputs.
    """

    sha256: str
    stands_as: list[Segment | int]
    inputs: dict[str, torch.Tensor]
    features: torch.Tensor | None = None

    @property
    def num_features(self) -> int:
        return sum(part for part in self.stands_as if isinstance(part, int))


Unit = int | tuple[str, int]
"""One position of the context: a token id, or (image hash, which of its features)."""


class HFBackend:
    """A transformers model behind the backend protocol."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self.candidates: Candidates | None = None
        self._cancelled: Callable[[], bool] = _never

    # --- loading ---------------------------------------------------------------------------------

    def load(self, spec: LoadSpec, report: Report) -> ModelInfo:
        """See `Backend.load`. `spec.name` is a folder, a `.gguf` text model or a hub name."""
        started = time.perf_counter()
        self.close()
        torch.set_num_threads(spec.threads or _DEFAULT_THREADS)
        try:
            with _library_errors():
                return self._load(spec, report, started)
        except BaseException:
            self.close()
            raise

    def _load(self, spec: LoadSpec, report: Report, started: float) -> ModelInfo:
        dtype = choose_dtype(spec.dtype)
        loaded = self._loaded = load_model(
            locate(spec.name, paths().models, report),
            dtype=dtype,
            device_map=spec.device_map,
            max_memory=_memory_limits(spec.max_memory),
            offload_folder=spec.offload_folder,
            quantization=spec.quantization,
            attn=spec.attn,
            trust_remote_code=spec.trust_remote_code,
            report=report,
            cache_dir=paths().models,
        )
        model = loaded.model
        num_parameters = model.num_parameters()
        self._model: Any = model
        self._text_config = model.config.get_text_config()
        self._reads_images = loaded.image_spec is not None or loaded.processor is not None
        image_token = _image_token(loaded) if self._reads_images else None
        self._tokenizer = PromptTokenizer(loaded.tokenizer, image_token)
        self._template = self._pick_template(loaded, image_token)
        self._context_length = loaded.context_length
        if spec.context:
            self._context_length = min(spec.context, loaded.context_length)
        self._eos_ids = _eos_ids(model, self._tokenizer)
        self._incremental = _is_incremental(model, self._reads_images)
        self._branches: list[GrowingLayer] = []
        self._images: OrderedDict[str, _EncodedImage] = OrderedDict()
        self._reset_context()
        devices = {str(d) for d in getattr(model, "hf_device_map", {"": model.device}).values()}
        if devices == {"cpu"}:
            cpu.prepare(model, report)
        for layer in _layers(model):
            layer.register_forward_pre_hook(self._check_cancelled)
        return ModelInfo(
            name=display_name(spec.name),
            backend="hf",
            family=loaded.family,
            template=self._template.name,
            reads_images=self._reads_images,
            context_length=self._context_length,
            num_parameters=num_parameters,
            dtype=str(dtype).removeprefix("torch."),
            quantization=spec.quantization,
            devices=tuple(sorted(devices)),
            incremental=self._incremental,
            load_time_s=time.perf_counter() - started,
            image_spec=loaded.image_spec,
            hints=loaded.hints,
        )

    def close(self) -> None:
        """See `Backend.close`."""
        if self._loaded is None:
            return
        self._loaded = self.candidates = None
        for name in ("_model", "_cache", "_branches", "_images"):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _pick_template(self, loaded: LoadedModel, image_token: str | None) -> AnyTemplate:
        if loaded.template in TEMPLATES:
            return TEMPLATES[loaded.template]
        source = getattr(loaded.processor, "chat_template", None) or loaded.tokenizer.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if not source:
            raise CheckpointError(
                f"{loaded.source_label} has no chat template.",
                hint="Put a chat_template.jinja beside its tokenizer, or use an instruction-tuned "
                "model.",
            )
        return self._tokenizer.chat_template(source, image_token)

    # --- the prompt ------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """See `Runtime.encode`; features count as image tokens among the ids."""
        images = (
            [self._encoded_image(image) for image in image_list(messages)]
            if self._reads_images
            else []
        )
        segments: list[Segment] = []
        runs: list[tuple[str, range]] = []
        for segment in render(messages, self._template, images=self._reads_images):
            if segment.kind != "image":
                segments.append(segment)
                continue
            encoded, first = images[segment.image], 0
            for part in encoded.stands_as:
                if isinstance(part, int):
                    segments.append(segment)
                    runs.append((encoded.sha256, range(first, first + part)))
                    first += part
                else:
                    segments.append(part)
        split = not isinstance(self._template, ChatTemplate)
        image_id = getattr(self._model.config, "image_token_id", 0) or 0
        units: list[Unit] = []
        ids: list[int] = []
        features = iter(runs)
        for piece in self._tokenizer.encode(segments, split_at_images=split):
            if isinstance(piece, ImageSlot):
                sha256, rows = next(features)
                units += [(sha256, row) for row in rows]
                ids += [image_id] * len(rows)
            else:
                units += piece.ids
                ids += piece.ids
        return Prompt(messages, units, ids, len(units))

    def _encoded_image(self, attachment: Attachment) -> _EncodedImage:
        found = self._images.get(attachment.sha256)
        if found is None:
            found = self._prepare_image(attachment)
            self._images[attachment.sha256] = found
        self._images.move_to_end(attachment.sha256)
        return found

    def _prepare_image(self, attachment: Attachment) -> _EncodedImage:
        assert self._loaded is not None
        picture = open_image(attachment)
        if self._loaded.image_spec is not None:
            pixels = torch.from_numpy(pixel_values(picture, self._loaded.image_spec))
            return _EncodedImage(
                attachment.sha256,
                [self._loaded.image_seq_length],
                {"pixel_values": pixels[None]},
            )
        processor = self._loaded.processor
        assert processor is not None
        inputs = dict(
            processor(
                text=[_image_token(self._loaded)],
                images=[picture],
                return_tensors="pt",
                add_special_tokens=False,
            )
        )
        inputs.pop("attention_mask", None)
        ids = inputs.pop("input_ids")[0].tolist()
        image_id = self._model.config.image_token_id
        stands_as: list[Segment | int] = []
        for kind, run in itertools.groupby(ids, lambda i: -1 if i == image_id else i):
            count = len(list(run))
            if kind == -1:
                stands_as.append(count)
            elif kind in self._tokenizer.special_ids:
                token = str(self._loaded.tokenizer.convert_ids_to_tokens(kind))
                stands_as += [Segment("token", token)] * count
            else:
                stands_as += [Segment("text", self._tokenizer.decode([kind]))] * count
        return _EncodedImage(attachment.sha256, stands_as, inputs)

    @torch.inference_mode()
    def _features(self, encoded: _EncodedImage) -> torch.Tensor:
        """(num_features, hidden): what stands in the context in place of the image."""
        if encoded.features is None:
            inputs = {
                name: value.to(self._model.device, self._model.dtype)
                if value.is_floating_point()
                else value.to(self._model.device)
                for name, value in encoded.inputs.items()
                if isinstance(value, torch.Tensor)
            }
            output = self._model.get_image_features(**inputs)
            features = getattr(output, "pooler_output", output)
            if isinstance(features, list | tuple):
                features = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
            features = features.reshape(-1, features.shape[-1])
            if len(features) != encoded.num_features:
                raise CheckpointError(
                    f"The vision tower gives {len(features)} features where the prompt has "
                    f"places for {encoded.num_features}.",
                    hint="The processor and the model of this checkpoint do not belong together.",
                )
            encoded.features = features
            encoded.inputs = {}
        return encoded.features

    # --- the context -----------------------------------------------------------------------------

    def _reset_context(self) -> None:
        self._units: list[Unit] = []
        self._cache: Cache
        if self._incremental:
            self._cache = growing_cache(self._text_config.num_hidden_layers)
        else:
            self._cache = DynamicCache(config=self._text_config)

    def _crop(self, length: int) -> None:
        for layer in self._growing_layers():
            layer.crop_to(length)
        del self._units[length:]

    def _growing_layers(self) -> list[GrowingLayer]:
        return [layer for layer in self._cache.layers if isinstance(layer, GrowingLayer)]

    def _settle(self) -> None:
        """Bring cache and units to one length after a forward pass was left half-way."""
        if not self._incremental:
            self._reset_context()
            return
        lengths = [layer.get_seq_length() for layer in self._growing_layers()]
        self._crop(min(*lengths, len(self._units)))

    def _check_cancelled(self, *_: Any) -> None:
        if self._cancelled():
            raise Interrupted

    @torch.inference_mode()
    def _run(self, units: Sequence[Unit], keep: int) -> torch.Tensor:
        """Compute `units` after what is in the cache; the last `keep` rows of logits (keep, V)."""
        device = self._model.device
        image_id = getattr(self._model.config, "image_token_id", 0) or 0
        ids = torch.tensor(
            [[unit if isinstance(unit, int) else image_id for unit in units]], device=device
        )
        rows = [at for at, unit in enumerate(units) if not isinstance(unit, int)]
        inputs: dict[str, Any] = {"input_ids": ids}
        if rows:
            embeds = self._model.get_input_embeddings()(ids)
            wanted = [units[at] for at in rows]
            features = torch.stack(
                [self._features(self._images[u[0]])[u[1]] for u in wanted if isinstance(u, tuple)]
            )
            embeds[0, rows] = features.to(embeds.device, embeds.dtype)
            inputs = {"inputs_embeds": embeds}
        output = self._model(
            **inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=keep
        )
        self._units += units
        return output.logits[0]  # type: ignore[no-any-return]

    def _prefill(self, units: Sequence[Unit]) -> Iterator[Prefill | Row]:
        """Bring the cache to `units` in chunks; the logits row comes last."""
        common = 0
        for ours, theirs in zip(self._units, units, strict=False):
            if ours != theirs:
                break
            common += 1
        # At least one position is computed, as its logits are needed.
        common = min(common, len(units) - 1)
        self._crop(common)
        yield Prefill(common, len(units))
        done = common
        for sha256 in dict.fromkeys(unit[0] for unit in units[done:] if isinstance(unit, tuple)):
            self._features(self._images[sha256])
        # The first chunk is small, as nothing is known of the model's speed yet.
        chunk = 64
        logits: torch.Tensor | None = None
        while done < len(units):
            if self._cancelled():
                raise Interrupted
            began = time.perf_counter()
            part = units[done : done + chunk]
            logits = self._run(part, keep=1)
            done += len(part)
            spent = max(time.perf_counter() - began, 1e-4)
            chunk = int(min(max(chunk * _CHUNK_TARGET_S / spent, chunk / 2, 16), chunk * 4, 2048))
            yield Prefill(done, len(units))
        assert logits is not None
        yield _on_host(logits[-1])

    def _prefill_whole(
        self, messages: Sequence[Message], ids: Sequence[int]
    ) -> Iterator[Prefill | Row]:
        """As `_prefill`, for models that must prepare the whole prompt themselves."""
        self._reset_context()
        yield Prefill(0, len(ids))
        device = self._model.device
        extra: dict[str, Any] = {}
        if self._reads_images:
            encoded = [self._images[image.sha256] for image in image_list(messages)]
            for name in dict.fromkeys(key for one in encoded for key in one.inputs):
                values = [one.inputs[name] for one in encoded]
                if name in _TYPE_IDS:
                    continue
                extra[name] = torch.cat(values).to(device)
                if extra[name].is_floating_point():
                    extra[name] = extra[name].to(self._model.dtype)
            image_id = self._model.config.image_token_id
            for name in _TYPE_IDS:
                if any(name in one.inputs for one in encoded):
                    types = [[int(ident == image_id) for ident in ids]]
                    extra[name] = torch.tensor(types, device=device)
        self._whole_ids = torch.tensor([list(ids)], device=device)
        self._whole_kwargs = {
            "past_key_values": self._cache,
            "attention_mask": torch.ones_like(self._whole_ids),
            "use_cache": True,
            **extra,
        }
        logits = self._step_whole(first=True)
        self._units = list(ids)
        yield Prefill(len(ids), len(ids))
        yield _on_host(logits)

    @torch.inference_mode()
    def _step_whole(self, first: bool = False) -> torch.Tensor:
        inputs = self._model.prepare_inputs_for_generation(
            self._whole_ids,
            next_sequence_length=None if first else 1,
            is_first_iteration=first,
            **self._whole_kwargs,
        )
        output = self._model(**inputs, logits_to_keep=1, return_dict=True)
        self._whole_kwargs = self._model._update_model_kwargs_for_generation(
            output, self._whole_kwargs
        )
        return output.logits[0, -1]  # type: ignore[no-any-return]

    # --- answering -------------------------------------------------------------------------------

    def stream(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        cancelled: Callable[[], bool],
        ahead: int = 0,
        until: str = "",
    ) -> Iterator[Event]:
        """See `Backend.stream`."""
        if self._loaded is None:
            raise EngineError("No model is loaded.", hint="Load one first.")
        params = checked(params)
        self._cancelled = cancelled
        try:
            with _library_errors():
                yield from answer(self, messages, params, cancelled, ahead, until)
        finally:
            self._cancelled = _never
            self._settle()

    def prefill(
        self,
        messages: Sequence[Message],
        params: GenerationParams,
        cancelled: Callable[[], bool],
    ) -> Iterator[Prefill]:
        """See `Backend.prefill`."""
        if self._loaded is None:
            raise EngineError("No model is loaded.", hint="Load one first.")
        try:
            with _library_errors():
                yield from prefill(self, messages, checked(params), cancelled)
        finally:
            self._settle()

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def reads_images(self) -> bool:
        return self._reads_images

    @property
    def can_draft(self) -> bool:
        return self._incremental

    @property
    def end_ids(self) -> set[int]:
        return self._eos_ids

    @property
    def answer_lead(self) -> str:
        return self._template.answer_lead

    def text_stream(self, prompt: Prompt) -> TextStream:
        """See `Runtime.text_stream`."""
        return TextStream(self._tokenizer, prompt.ids)

    def peak_memory(self) -> int:
        """See `Runtime.peak_memory`; with that of the GPUs."""
        cards = range(torch.cuda.device_count())
        return resident_peak() + sum(torch.cuda.max_memory_allocated(card) for card in cards)

    def read(self, prompt: Prompt) -> Iterator[Prefill | Row]:
        """See `Runtime.read`."""
        in_use = {image.sha256 for image in image_list(prompt.messages)}
        while len(self._images) > max(_MAX_CACHED_IMAGES, len(in_use)):
            self._images.popitem(last=False)
        if self._incremental:
            yield from self._prefill(prompt.units)
        else:
            yield from self._prefill_whole(prompt.messages, prompt.ids)

    def extend(self, ids: Sequence[int]) -> Sequence[Row]:
        """See `Runtime.extend`."""
        if self._incremental:
            return list(_on_host(self._run(ids, keep=len(ids))))
        (token,) = ids
        self._whole_ids = torch.cat([self._whole_ids, self._whole_ids.new_tensor([[token]])], dim=1)
        return [_on_host(self._step_whole())]

    def take_back(self, count: int) -> None:
        """See `Runtime.take_back`."""
        self._crop(len(self._units) - count)

    # --- branches: the context several times, in a cache of its own ------------------------------

    def branch(self, count: int, room: int) -> int:
        """See `Runtime.branch`."""
        if not self._incremental:
            return 1
        count = min(count, self._fitting_branches(room))
        if count > 1:
            self._branches = [layer.branched(count) for layer in self._growing_layers()]
        return count

    @torch.inference_mode()
    def extend_branches(self, tokens: Sequence[int]) -> Sequence[Row]:
        """See `Runtime.extend_branches`; as they are equally long, nothing is padded."""
        length = self._branches[0].get_seq_length()
        ids = torch.tensor(tokens, device=self._model.device)[:, None]
        try:
            output = self._model(
                input_ids=ids,
                past_key_values=Cache(layers=list(self._branches)),
                use_cache=True,
                logits_to_keep=1,
            )
        except BaseException:
            for layer in self._branches:
                layer.crop_to(length)
            raise
        return list(_on_host(output.logits[:, -1]))

    def keep_branches(self, kept: Sequence[int]) -> None:
        """See `Runtime.keep_branches`."""
        if kept:
            for layer in self._branches:
                layer.select(kept)
        else:
            self._branches = []

    def _fitting_branches(self, room: int) -> int:
        """How many branches of `room` more tokens half of the free memory holds."""
        needed: dict[torch.device, int] = {}
        for layer in self._growing_layers():
            size = layer.position_bytes * (layer.get_seq_length() + room)
            needed[layer.device] = needed.get(layer.device, 0) + size
        return min(_free_bytes(device) // 2 // size for device, size in needed.items())


def plan_placement(spec: LoadSpec, report: Report) -> tuple[DeviceShare, ...]:
    """Where `HFBackend.load(spec)` would put the model; see `placement.device_shares`."""
    with _library_errors():
        source = locate(spec.name, paths().models, report)
        checkpoint = open_checkpoint(
            source,
            trust_remote_code=spec.trust_remote_code,
            report=report,
            cache_dir=paths().models,
        )
        return device_shares(
            checkpoint,
            dtype=choose_dtype(spec.dtype),
            device_map=spec.device_map,
            max_memory=_memory_limits(spec.max_memory),
            quantization=spec.quantization,
        )


def choose_dtype(name: str) -> torch.dtype:
    """The dtype called `name`; "auto" is what this machine computes fastest in."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if torch.backends.mps.is_available():
        return torch.float16
    return torch.bfloat16 if cpu.bf16_is_faster() else torch.float32


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return main_memory()[1]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _on_host(logits: torch.Tensor) -> Row:
    row: Row = logits.float().cpu().numpy()
    return row


def _never() -> bool:
    return False


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Every block of the language model and the vision tower: the places to stop at."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            yield from module


def _is_incremental(model: Any, reads_images: bool) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"} or getattr(model, "_is_stateful", False):
        return False
    if getattr(config, "num_kv_shared_layers", 0) or not hasattr(config, "num_hidden_layers"):
        return False
    return not reads_images or model.config.model_type in _SPLICED


def _image_token(loaded: LoadedModel) -> str:
    """The string that marks an image in this model's chat template."""
    source = getattr(loaded.processor, "chat_template", None) or loaded.tokenizer.chat_template
    candidates = [
        # Gemma's templates write the token that begins an image, others the image's own.
        getattr(loaded.processor, "boi_token", None),
        getattr(loaded.processor, "image_token", None),
        getattr(loaded.tokenizer, "image_token", None),
        "<image>",
    ]
    found: list[str] = [token for token in candidates if token]
    return next((token for token in found if token in str(source)), found[-1])


def _eos_ids(model: Any, tokenizer: PromptTokenizer) -> set[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_id, *(i for i in ids if i is not None)}


def _memory_limits(limits: dict[str, str] | None) -> dict[int | str, int | str] | None:
    if limits is None:
        return None
    return {int(key) if key.isdigit() else key: value for key, value in limits.items()}


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """The seam where torch's and transformers' errors become ours."""
    try:
        yield
    except (W2CError, Interrupted, GeneratorExit, KeyboardInterrupt):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise _out_of_memory(error) from error
        raise EngineError(f"The model failed while running: {error}") from error
    except Exception as error:
        raise EngineError(f"{type(error).__name__}: {error}") from error


def _out_of_memory(error: BaseException) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"Not enough memory: {str(error).splitlines()[0] if str(error) else 'allocation failed'}",
        hint="Use --load-4bit or --load-8bit, a smaller --context, a smaller model, "
        "or --max-memory to spread it over more devices.",
    )
