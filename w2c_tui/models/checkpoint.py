"""Model folders: what one is, loading it, and writing the standard one.

Owns what is known of checkpoint layouts: what the model calls each tensor of a file, and that every
one is accounted for before a byte of weights is read. Three layouts are read: Hugging Face folders
of any model that transformers supports, LLaVA folders (`mm_projector`, `vision_tower.vision_tower`)
over CrystalCoder or Llama, and CrystalCoder as published (GPT-2 names, fused Conv1D). GGUF files of
text models are converted once and then read as folders.

Tensors are handed to transformers' own loader one by one as it asks for them, so placement,
quantisation and offload are its work, and no more than the tensor at hand is held twice. What a
folder is, is read from its `config.json`, never from its path. Code that comes with a model runs
only if the caller says so.

Knows nothing about prompts, pixels or the terminal. Layouts: haotian-liu/LLaVA and
LLM360/CrystalChat.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

import w2c_tui
from w2c_tui.core.conversation import Hints
from w2c_tui.core.errors import (
    CheckpointError,
    MissingPackageError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsafeCheckpointError,
    W2CError,
)
from w2c_tui.core.hub import fetch_from_hub
from w2c_tui.core.image import ImageSpec
from w2c_tui.models import crystal, llava
from w2c_tui.models.weights import (
    StoredTensor,
    brief,
    forget_scratch,
    linear,
    listed,
    read_bin,
    read_json,
    read_safetensors,
    split_rows,
    stored_tensors,
    with_rows,
)

crystal.register()

Report = Callable[[str, int, int], None]
Quantization = Literal["none", "4bit", "8bit"]
IMAGE_TOKEN = "<image>"
CARD_NAME = "w2c.json"
CARD_VERSION = 1

# LLaVA's model types and the text models under them.
_LLAVA_TEXT = {
    "llava_crystal": "crystalcoder",
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
}
# Constants that old checkpoints store beside their weights.
_KNOWN_BUFFERS = re.compile(
    r"(^|\.)(attn\.bias|attn\.masked_bias|position_ids|rotary_emb\.inv_freq)$"
)


def _silent(phase: str, done: int, total: int) -> None:
    """A `report` for callers that show nothing."""


# --- What is beside the weights -------------------------------------------------------------------


class CheckpointCard(msgspec.Struct, frozen=True, kw_only=True):
    """`w2c.json`, the facts about a checkpoint that Hugging Face's files have no place for.

    `family`: what the weights are, e.g. "llava_crystal". `template`: "plain", "v1" or "chat" (the
    tokenizer's own). `image`: how pixels are prepared. `recipe`, `data_fingerprint`: how it was
    trained. `code_version`: of this package, when it was written. `hints`: what it was trained to
    be told about a picture beside seeing it: the text that recognition finds, also with colours.
    """

    family: str
    template: str
    image: ImageSpec | None = None
    hints: Hints = "none"
    recipe: dict[str, Any] = {}
    data_fingerprint: str = ""
    code_version: str = w2c_tui.__version__
    format_version: int = CARD_VERSION


def read_card(folder: Path) -> CheckpointCard | None:
    """The card in `folder`, or None. Raises CheckpointError if it cannot be used."""
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    raw = read_json(path)
    version = raw.get("format_version")
    if not isinstance(version, int) or version > CARD_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version!r}; this version of w2c-tui reads up to "
            f"{CARD_VERSION}.",
            hint="Update w2c-tui.",
        )
    try:
        return msgspec.convert(raw, CheckpointCard)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}.", hint="Write the card again.") from error


def write_card(folder: Path, card: CheckpointCard) -> None:
    """Write `card` into `folder`."""
    data = msgspec.json.format(msgspec.json.encode(card), indent=2)
    (folder / CARD_NAME).write_bytes(data + b"\n")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with everything needed to talk to it.

    `template`: "plain", "v1" or "chat". `image_spec`: how this project prepares pixels; None where
    `processor` does, or where the model reads text only. `image_seq_length`: features per image
    where `image_spec` is given, else 0.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    processor: ProcessorMixin | None
    template: str
    image_spec: ImageSpec | None
    family: str
    context_length: int
    source_label: str
    image_seq_length: int = 0
    hints: Hints = "none"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder that was looked at: everything about the model except its weights.

    `tensors`: what will be loaded, by the names of the standard folder; None where transformers
    must read the folder itself (code of its own, or weights that are already quantised).
    """

    folder: Path
    label: str
    config: PreTrainedConfig
    model_class: Any
    tensors: dict[str, StoredTensor] | None
    tokenizer: PreTrainedTokenizerFast
    processor: ProcessorMixin | None
    card: CheckpointCard
    trust_remote_code: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of weights as they are stored."""
        return sum(tensor.num_bytes for tensor in (self.tensors or {}).values())


# --- Layouts --------------------------------------------------------------------------------------


_CRYSTAL_NAMES = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_fc2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_CRYSTAL_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)")


def _crystal_tensors(key: str, tensor: StoredTensor) -> dict[str, StoredTensor] | None:
    """A published CrystalCoder tensor under the names of `CrystalCoderForCausalLM`, or None."""
    whole = {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "transformer.ln_f.bias": "model.norm.bias",
        "lm_head.weight": "lm_head.weight",
    }
    if key in whole:
        return {whole[key]: tensor}
    match = _CRYSTAL_BLOCK.fullmatch(key)
    if match is None:
        return None
    layer, name, kind = match.groups()
    prefix = f"model.layers.{layer}"
    if name == "attn.c_attn":
        projections = ("q_proj", "k_proj", "v_proj")
        parts = split_rows(linear(tensor), 3)
        return {
            f"{prefix}.self_attn.{projection}.{kind}": part
            for projection, part in zip(projections, parts, strict=True)
        }
    if name not in _CRYSTAL_NAMES:
        return None
    return {f"{prefix}.{_CRYSTAL_NAMES[name]}.{kind}": linear(tensor)}


def _llama_tensors(key: str, tensor: StoredTensor) -> dict[str, StoredTensor] | None:
    known = key.startswith(("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."))
    return {key: tensor} if known else None


_TEXT_LAYOUTS = {
    "crystalcoder": _crystal_tensors,
    "llama": _llama_tensors,
    "mistral": _llama_tensors,
}
_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.(\d+)\.(weight|bias)")
_TOWER = re.compile(r"(?:.*\.)?vision_tower\.vision_tower\.(vision_model\..+)")


def _standard_names(
    tensors: Mapping[str, StoredTensor], text_type: str, *, multimodal: bool
) -> tuple[dict[str, StoredTensor], list[StoredTensor]]:
    """Published tensors under the names of a standard folder, and those that have none there.

    The standard names are those that `LlavaForConditionalGeneration` and the text model's causal
    LM write themselves.
    """
    layout = _TEXT_LAYOUTS[text_type]
    prefix = "language_model." if multimodal else ""
    named: dict[str, StoredTensor] = {}
    unknown: list[StoredTensor] = []
    for key, tensor in tensors.items():
        if _KNOWN_BUFFERS.search(key):
            continue
        if multimodal and (match := _PROJECTOR.fullmatch(key)) and match[1] in ("0", "2"):
            linear = {"0": "linear_1", "2": "linear_2"}[match[1]]
            named[f"multi_modal_projector.{linear}.{match[2]}"] = tensor
        elif multimodal and (match := _TOWER.fullmatch(key)):
            named[f"vision_tower.{match[1]}"] = tensor
        elif (text := layout(key, tensor)) is not None:
            named |= {prefix + name: part for name, part in text.items()}
        else:
            unknown.append(tensor)
    return named, unknown


def _standard_name(name: str) -> str:
    """What the standard folder calls the parameter that the model calls `name`."""
    for inside, outside in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(inside):
            return outside + name.removeprefix(inside)
    return name


def _account(
    label: str,
    model_class: Any,
    config: PreTrainedConfig,
    tensors: Mapping[str, StoredTensor],
    unknown: list[StoredTensor],
) -> None:
    """Raise CheckpointError unless `tensors` are exactly the parameters of the model."""
    model = _empty_model(model_class, config)
    multimodal = isinstance(config, LlavaConfig)
    wanted = {
        _standard_name(name) if multimodal else name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    problems = []
    if missing := sorted(set(wanted) - set(tensors)):
        problems.append(f"missing: {listed(missing)}")
    surplus = [tensors[name] for name in tensors if name not in wanted]
    if strange := [f"{t.key} ({t.path.name})" for t in (*unknown, *surplus)]:
        problems.append(f"unexpected: {listed(sorted(set(strange)))}")
    if wrong := [
        f"{t.key} ({t.path.name}) is {_times(t.shape)}, {name} needs {_times(wanted[name])}"
        for name, t in tensors.items()
        if name in wanted and wanted[name] != t.shape
    ]:
        problems.append(f"of another size: {listed(wrong)}")
    if problems:
        raise CheckpointError(
            f"The weights of {label} do not fit its config.json. " + "; ".join(problems),
            hint="The files belong to different models, or the download is incomplete.",
        )


def _empty_model(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config)


# --- Looking at a source --------------------------------------------------------------------------


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
    report: Report = _silent,
    cache_dir: Path | None = None,
) -> Checkpoint:
    """Find out what `source` is: a folder, a `.gguf` file, or a hub name `owner/name`.

    No weights are read except to convert a GGUF file, which is done once, into `cache_dir`
    (default: the application's cache). Without `weights` a Hugging Face folder need not have any,
    and none are fetched from the hub: enough for a dry run. Raises ModelNotFoundError,
    DownloadError, CheckpointError or UnsafeCheckpointError.
    """
    folder = _resolve(os.fspath(source), report, cache_dir, trust_remote_code, weights)
    label = os.fspath(source)
    with _damage_in(folder):
        raw = _read_config(folder)
        if _is_llava_layout(raw):
            return _open_llava_layout(folder, label, raw, report, cache_dir)
        return _open_huggingface(folder, label, raw, trust_remote_code, weights)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if path.is_file():
        return read_json(path)
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder} is a LoRA adapter (adapter_config.json) without its base model"
            + (f" {base}." if base else "."),
            hint="Merge the adapter into its base model and load the merged folder.",
        )
    raise CheckpointError(
        f"{folder} has no config.json, so it is no model folder.",
        hint="Name the folder that holds config.json and the weights.",
    )


def _is_llava_layout(raw: Mapping[str, Any]) -> bool:
    """LLaVA's own format shares `model_type: llava` with Hugging Face's, but not its fields."""
    return raw.get("model_type") in _LLAVA_TEXT and "text_config" not in raw


def _open_huggingface(
    folder: Path, label: str, raw: dict[str, Any], trust_remote_code: bool, weights: bool = True
) -> Checkpoint:
    config = _known_config(folder, raw, trust_remote_code)
    model_class = _model_class(config)
    remote = model_class is None
    if remote:
        if not trust_remote_code:
            raise UnsafeCheckpointError(
                f"{label}: models of type {raw.get('model_type')!r} need the Python code that "
                "comes with them.",
                hint="Add --trust-remote-code to run it, if you trust whoever wrote it.",
            )
        model_class = AutoModelForCausalLM
    tensors: dict[str, StoredTensor] | None = None
    if not remote and getattr(config, "quantization_config", None) is None:
        tensors = stored_tensors(folder)
        if not tensors and weights:
            raise _no_weights(folder)
        tensors = tensors or None
    published_crystal = config.model_type == "crystalcoder" and "transformer.wte.weight" in (
        tensors or ()
    )
    if tensors is not None and published_crystal:
        tensors, unknown = _standard_names(tensors, "crystalcoder", multimodal=False)
        config.tie_word_embeddings = "lm_head.weight" not in tensors
        _account(label, model_class, config, tensors, unknown)
    images = model_class in AutoModelForImageTextToText._model_mapping.values()
    processor = _load_processor(folder, trust_remote_code) if images else None
    tokenizer = getattr(processor, "tokenizer", None) or _load_tokenizer(folder, config)
    card = read_card(folder) or _card_of(folder, config, tokenizer, processor)
    if card.image is not None:
        processor = None
    return Checkpoint(
        folder, label, config, model_class, tensors, tokenizer, processor, card, trust_remote_code
    )


def _known_config(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> PreTrainedConfig:
    model_type = str(raw.get("model_type"))
    if model_type in transformers.CONFIG_MAPPING:
        fields = {key: value for key, value in raw.items() if key != "auto_map"}
        return transformers.CONFIG_MAPPING[model_type].from_dict(fields)
    if "auto_map" not in raw:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {model_type!r}, which nothing here can run.",
            hint="Take a model that transformers supports, a LLaVA folder, or a .gguf file.",
        )
    if not trust_remote_code:
        raise UnsafeCheckpointError(
            f"{folder / 'config.json'}: model_type {model_type!r} needs the Python code that "
            "comes with the model.",
            hint="Add --trust-remote-code to run it, if you trust whoever wrote it.",
        )
    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


def _model_class(config: PreTrainedConfig) -> Any:
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    if type(config) in transformers.CONFIG_MAPPING.values():
        raise CheckpointError(
            f"A model of type {config.model_type!r} does not write text.",
            hint="Take a language model or an image-text-to-text model.",
        )
    return None


def _card_of(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    processor: ProcessorMixin | None,
) -> CheckpointCard:
    """What a folder without w2c.json says about itself."""
    chat = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if not isinstance(config, LlavaConfig):
        return CheckpointCard(family=config.model_type, template="chat")
    vision_config: Any = config.vision_config
    text_config: Any = config.text_config
    image = None
    if llava.is_known_tower(vision_config):
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).is_file():
                # What the spec cannot express is left to the folder's own processor.
                with contextlib.suppress(CheckpointError):
                    image = ImageSpec.from_processor_config(read_json(folder / name))
                break
    return CheckpointCard(
        family=_llava_family(text_config.model_type),
        template="chat" if chat else "v1",
        image=image,
    )


def _llava_family(text_type: str) -> str:
    names = {text: family for family, text in _LLAVA_TEXT.items() if family != "llava"}
    return names.get(text_type, f"llava_{text_type}")


# --- LLaVA's own layout ---------------------------------------------------------------------------


def _open_llava_layout(
    folder: Path, label: str, raw: dict[str, Any], report: Report, cache_dir: Path | None
) -> Checkpoint:
    text_type = _LLAVA_TEXT[raw["model_type"]]
    for field, known in (
        ("mm_projector_type", ("mlp2x_gelu",)),
        ("mm_patch_merge_type", (None, "flat")),
        ("mm_use_im_start_end", (None, False)),
        ("mm_vision_select_feature", (None, "patch", "cls_patch")),
        ("image_aspect_ratio", (None, "pad", "square")),
    ):
        if raw.get(field) not in known:
            raise CheckpointError(
                f"{folder / 'config.json'}: {field} is {raw.get(field)!r}; "
                f"supported: {', '.join(repr(value) for value in known)}.",
                hint="Only LLaVA-1.5 style checkpoints are read in this layout.",
            )
    stored = stored_tensors(folder)
    stage_1 = folder / "mm_projector.bin"
    only_projector = not stored and stage_1.is_file()
    base = None
    if only_projector:
        base = _stage_1_base(folder, raw, report, cache_dir)
        stored = stored_tensors(base)
    if stage_1.is_file():
        stored |= read_bin(stage_1)
    if not stored:
        raise _no_weights(folder)
    tensors, unknown = _standard_names(stored, text_type, multimodal=True)

    vision_config, tower_image, tower_folder = _tower_of(folder, raw, report, cache_dir)
    if not any(name.startswith("vision_tower.") for name in tensors):
        tower_folder = tower_folder or _resolve(raw["mm_vision_tower"], report, cache_dir, False)
        tensors |= {
            f"vision_tower.{key}": tensor
            for key, tensor in stored_tensors(tower_folder).items()
            if key.startswith("vision_model.") and not _KNOWN_BUFFERS.search(key)
        }
    text_class = transformers.CONFIG_MAPPING[text_type]
    fields = {field.name for field in dataclasses.fields(text_class)} | {"rope_theta"}
    text_config = text_class.from_dict(
        {key: raw[key] for key in raw if key in fields - {"architectures", "auto_map"}}
    )
    tokenizer = _load_tokenizer(folder if _has_tokenizer(folder) else base or folder, text_config)
    image_token_id = _add_image_token(tokenizer)
    text_config.tie_word_embeddings = "language_model.lm_head.weight" not in tensors
    if image_token_id >= text_config.vocab_size:
        text_config.vocab_size = -(-(image_token_id + 1) // 64) * 64
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            if name in tensors:
                tensors[name] = with_rows(tensors[name], text_config.vocab_size)
    keeps_cls = raw.get("mm_vision_select_feature") == "cls_patch"
    has_cls = llava.has_cls_token(vision_config)
    config = llava.llava_config(
        text_config,
        vision_config,
        image_token_id=image_token_id,
        select_strategy="full" if keeps_cls or not has_cls else "default",
        feature_layer=raw.get("mm_vision_select_layer", -2),
    )
    _account(label, LlavaForConditionalGeneration, config, tensors, unknown)
    card = CheckpointCard(
        family=_llava_family(text_type),
        template="plain" if only_projector else "v1",
        image=msgspec.structs.replace(tower_image, aspect="pad", shortest_edge=None)
        if raw.get("image_aspect_ratio") == "pad"
        else tower_image,
    )
    return Checkpoint(
        folder, label, config, LlavaForConditionalGeneration, tensors, tokenizer, None, card
    )


def _stage_1_base(
    folder: Path, raw: Mapping[str, Any], report: Report, cache_dir: Path | None
) -> Path:
    """The language model that the projector of a stage-1 folder was trained for."""
    base = raw.get("_name_or_path")
    if not base:
        raise CheckpointError(
            f"{folder} holds only a projector (mm_projector.bin), and its config.json does not "
            "name the base model (_name_or_path).",
            hint="Put the base model's weights into the same folder.",
        )
    resolved = _resolve(str(base), report, cache_dir, False)
    if not stored_tensors(resolved):
        raise _no_weights(resolved)
    return resolved


def _tower_of(
    folder: Path, raw: Mapping[str, Any], report: Report, cache_dir: Path | None
) -> tuple[PreTrainedConfig, ImageSpec, Path | None]:
    """Configuration and pixels of the vision tower, and its own folder if that was looked into.

    From `vision_config` in config.json, from the built-in table, or from the tower's own folder.
    """
    name = raw.get("mm_vision_tower")
    if not name:
        raise CheckpointError(
            f"{folder / 'config.json'} does not name its vision tower (mm_vision_tower).",
            hint="Add the field, for example openai/clip-vit-large-patch14-336.",
        )
    known = llava.TOWERS.get(name)
    described = raw.get("vision_config")
    own = None
    if known is None and (described is None or not (folder / "preprocessor_config.json").is_file()):
        own = _resolve(str(name), report, cache_dir, False)
    if described is not None:
        vision_config = AutoConfig.for_model(**{"model_type": "clip_vision_model", **described})
    elif known is not None:
        vision_config = known.vision_config()
    else:
        assert own is not None
        vision_config = AutoConfig.from_pretrained(own)
        vision_config = getattr(vision_config, "vision_config", vision_config)
    for place in (folder, own):
        if place is not None and (place / "preprocessor_config.json").is_file():
            raw_image = read_json(place / "preprocessor_config.json")
            return vision_config, ImageSpec.from_processor_config(raw_image), own
    if known is None:
        raise CheckpointError(
            f"The vision tower {name} has no preprocessor_config.json.",
            hint="Without it nobody knows which pixels it expects.",
        )
    size = vision_config.image_size if described is not None else known.image.size
    return vision_config, msgspec.structs.replace(known.image, size=size), own


# --- Tokenizers and processors --------------------------------------------------------------------


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return any((folder / name).is_file() for name in names)


def _load_tokenizer(folder: Path, config: PreTrainedConfig) -> Any:
    if not _has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has no tokenizer (tokenizer.json or tokenizer.model).",
            hint="Copy the tokenizer files of the base model into the folder.",
        )
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
    name = settings.get("tokenizer_class")
    try:
        if not settings.get("auto_map") and (name is None or hasattr(transformers, str(name))):
            return AutoTokenizer.from_pretrained(folder, config=config)
        # CrystalChat's tokenizer class is code of its own around a Llama tokenizer, and what that
        # code does beyond its files is to put its two flags in place of the stored processor.
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = LlamaTokenizer.from_pretrained(folder)
        ends = [
            (tokenizer.bos_token, settings.get("add_bos_token", False), "{} $A"),
            (tokenizer.eos_token, settings.get("add_eos_token", False), "$A {}"),
        ]
        single, special = "$A", []
        for token, wanted, where in ends:
            if wanted:
                single = where.format(token).replace("$A", single)
                special.append((token, tokenizer.convert_tokens_to_ids(token)))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=special
        )
        return tokenizer
    except (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError) as error:
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read: {brief(error)}",
            hint="Save it again as a fast tokenizer (tokenizer.json).",
        ) from error


def _load_processor(folder: Path, trust_remote_code: bool) -> ProcessorMixin | None:
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise MissingPackageError(
            f"The processor of {folder} needs a package that is not installed: {brief(error)}",
            hint="Install it with pip.",
        ) from error
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise CheckpointError(
            f"The processor in {folder} cannot be read: {brief(error)}",
            hint="Download the folder again, with preprocessor_config.json.",
        ) from error


def _add_image_token(tokenizer: Any) -> int:
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


# --- Where a source is ----------------------------------------------------------------------------


def _resolve(
    source: str,
    report: Report,
    cache_dir: Path | None,
    trust_remote_code: bool,
    weights: bool = True,
) -> Path:
    """The folder that `source` means, downloaded or converted if it has to be."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _whole(path, cache_dir, report)
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return _converted_gguf(path, cache_dir, report)
        raise ModelNotFoundError(
            f"{path} is a file, but not a GGUF model.",
            hint="Name the folder that holds config.json and the weights.",
        )
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", source) and not path.parent.is_dir():
        return fetch_from_hub(source, report, with_code=trust_remote_code, weights=weights)
    raise ModelNotFoundError(
        f"There is no model {source}.",
        hint="Give a folder, a .gguf file, or a hub name like LLM360/CrystalChat-7B-Web2Code.",
    )


def _whole(folder: Path, cache_dir: Path | None, report: Report) -> Path:
    """`folder`, or if it is only the trained part of a model, the whole one, made on first use."""
    from w2c_tui.core.config import paths
    from w2c_tui.models.bundled import assemble, is_bundled

    return assemble(folder, cache_dir or paths().models, report) if is_bundled(folder) else folder


def _converted_gguf(path: Path, cache_dir: Path | None, report: Report) -> Path:
    """The standard folder of a GGUF text model, made on first use.

    transformers reads such files slowly and keeps the weights packed, so that every step would
    unpack them again.
    """
    from transformers.utils.quantization_config import GgufConfig

    if cache_dir is None:
        from w2c_tui.core.config import paths

        cache_dir = paths().models
    found = path.stat()
    name = f"{path.resolve()}|{found.st_size}|{found.st_mtime_ns}|{CARD_VERSION}"
    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    out = cache_dir / "gguf" / f"{path.stem}-{key}"
    if (out / "config.json").is_file():
        return out
    report("Converting", 0, 0)
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            # The readers of untrusted binary data fail in every possible way.
            raise CheckpointError(
                f"{path} cannot be read as a text model: {brief(error)}",
                hint="The file is damaged, or its architecture is unknown to transformers; the "
                "gguf backend may run it.",
            ) from error
        report("Converting", 1, 2)
        # Matrices were 16 bit or less in the file; the few vectors are kept exactly.
        state = {
            key: value.half() if value.ndim > 1 and value.abs().max() < 65504 else value
            for key, value in model.state_dict().items()
        }
        with new_folder(out, or_existing=True) as scratch:
            model.save_pretrained(scratch, state_dict=state)
            tokenizer.save_pretrained(scratch)
            write_card(scratch, CheckpointCard(family=model.config.model_type, template="chat"))
    report("Converting", 2, 2)
    return out


@contextlib.contextmanager
def new_folder(out: Path, *, or_existing: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes `out` in one step, or leaves no trace.

    `or_existing`: another process may have made the same folder meanwhile; then that one counts.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
        try:
            scratch.rename(out)
        except OSError:
            if not (or_existing and out.is_dir()):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- Loading --------------------------------------------------------------------------------------


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    quantization: Quantization = "none",
    attn: str | None = None,
    trust_remote_code: bool = False,
    report: Report = _silent,
    cache_dir: Path | None = None,
) -> LoadedModel:
    """Load whatever `source` is (see `open_checkpoint`) for inference.

    `device_map`: a device, a map by module, or one of transformers' words ("auto", "balanced", ...)
    within `max_memory`; blocks, vision tower and projector are kept whole, the latter two on the
    first device. `offload_folder`: for what fits nowhere. `quantization` acts on the language
    model's blocks; tower, projector and head stay in `dtype`. `attn`: "sdpa", "eager",
    "flash_attention_2" or None for the model's default. `report(phase, done, total)`: phases are
    "Downloading", "Converting" and "Loading weights", counted in bytes.

    Raises a W2CError, and then holds nothing.
    """
    checkpoint = open_checkpoint(
        source, trust_remote_code=trust_remote_code, report=report, cache_dir=cache_dir
    )
    return load_checkpoint(
        checkpoint,
        dtype=dtype,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
        quantization=quantization,
        attn=attn,
        report=report,
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    quantization: Quantization = "none",
    attn: str | None = None,
    report: Report = _silent,
) -> LoadedModel:
    """The second half of `load_model`: read the weights."""
    if quantization == "4bit":
        checkpoint = _padded_for_4bit(checkpoint)
    config = checkpoint.config
    arguments: dict[str, Any] = {"dtype": dtype}
    if attn is not None:
        arguments["attn_implementation"] = attn
    if quantization != "none":
        if getattr(config, "quantization_config", None) is not None:
            raise CheckpointError(
                f"{checkpoint.label} is quantised already.",
                hint="Leave out --load-4bit and --load-8bit.",
            )
        arguments["quantization_config"] = _quantization_config(checkpoint, quantization)
    if device_map is not None:
        arguments |= {"device_map": device_map, "max_memory": max_memory}
        if isinstance(device_map, str) and device_map in _PLANNED and checkpoint.tensors:
            plan = device_plan(
                checkpoint,
                dtype=dtype,
                device_map=device_map,
                max_memory=max_memory,
                quantization=quantization,
            )
            _check_plan(checkpoint, plan, quantization, offload_folder)
            arguments["device_map"] = plan
        arguments["offload_folder"] = offload_folder
    try:
        with _quiet(), _damage_in(checkpoint.folder):
            model, info = _from_pretrained(checkpoint, arguments, report)
    finally:
        forget_scratch()
    problems = [
        f"{kind.replace('_', ' ')}: {listed(sorted(map(str, info[kind])))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(kind)
    ]
    if problems:
        raise CheckpointError(
            f"The weights of {checkpoint.label} do not fit its config.json. " + "; ".join(problems),
            hint="The files belong to different models, or the download is incomplete.",
        )
    if quantization == "4bit":
        _avoid_the_packed_kernel(model)
    if checkpoint.tensors is not None and (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    text_config = config.get_text_config()
    length = getattr(text_config, "max_position_embeddings", None)
    image = checkpoint.card.image
    return LoadedModel(
        model=model.eval(),
        tokenizer=checkpoint.tokenizer,
        processor=checkpoint.processor,
        template=checkpoint.card.template,
        image_spec=image,
        family=checkpoint.card.family,
        context_length=length or 2048,
        source_label=checkpoint.label,
        hints=checkpoint.card.hints,
        image_seq_length=0
        if image is None
        else llava.num_image_tokens(
            config.vision_config, image.size, config.vision_feature_select_strategy
        ),
    )


def _check_plan(
    checkpoint: Checkpoint, plan: dict[str, Any], quantization: Quantization, offload_folder: Any
) -> None:
    devices = set(plan.values())
    if "disk" in devices and offload_folder is None:
        raise OutOfMemoryError(
            f"{checkpoint.label} does not fit the memory it may use; "
            f"{sum(device == 'disk' for device in plan.values())} modules would go to disk.",
            hint="Name an --offload-folder, raise --max-memory, or use --load-4bit.",
        )
    # bitsandbytes runs its modules where they were quantised.
    if quantization != "none" and len(devices) > 1 and devices & {"cpu", "disk"}:
        raise OutOfMemoryError(
            f"{checkpoint.label} in {quantization} does not fit the GPU memory it may use.",
            hint="Raise --max-memory, or use a smaller model.",
        )


_PLANNED = ("auto", "balanced", "balanced_low_0", "sequential")


def _from_pretrained(
    checkpoint: Checkpoint, arguments: dict[str, Any], report: Report
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        if checkpoint.tensors is None:
            report("Loading weights", 0, 0)
            return checkpoint.model_class.from_pretrained(
                checkpoint.folder,
                trust_remote_code=checkpoint.trust_remote_code,
                output_loading_info=True,
                **arguments,
            )
        return checkpoint.model_class.from_pretrained(
            None,
            config=checkpoint.config,
            state_dict=_reporting(checkpoint.tensors, report),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments,
        )
    except ImportError as error:
        raise MissingPackageError(
            f"{checkpoint.label} cannot be loaded like this: {brief(error)}",
            hint="Install the package that is named, or choose another --attn or quantisation.",
        ) from error


def _reporting(tensors: Mapping[str, StoredTensor], report: Report) -> dict[str, StoredTensor]:
    total = sum(tensor.num_bytes for tensor in tensors.values())
    done = 0
    lock = threading.Lock()

    def watched(tensor: StoredTensor) -> torch.Tensor:
        nonlocal done
        value = tensor.read()
        with lock:
            done += tensor.num_bytes
            report("Loading weights", done, total)
        return value

    return {
        name: dataclasses.replace(tensor, read=functools.partial(watched, tensor), borrow=None)
        for name, tensor in tensors.items()
    }


def _quantization_config(checkpoint: Checkpoint, quantization: Quantization) -> BitsAndBytesConfig:
    # transformers wants full paths here; last parts of names silently match nothing.
    skip = _outside_the_blocks(_empty_model(checkpoint.model_class, checkpoint.config))
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )


_BLOCK_4BIT = 64


def _padded_for_4bit(checkpoint: Checkpoint) -> Checkpoint:
    """A CrystalCoder whose MLPs are as wide as bitsandbytes' fast CPU kernel needs.

    That kernel takes widths of whole blocks only, and 10922 is none. The added units have zero
    weights everywhere, so that they put out silu(0) * 0 = 0 and change nothing.
    """
    config = copy.deepcopy(checkpoint.config)
    text_config = config.get_text_config()
    if checkpoint.tensors is None or text_config.model_type != "crystalcoder":
        return checkpoint
    inner = text_config.n_inner
    text_config.n_inner = width = -(-inner // _BLOCK_4BIT) * _BLOCK_4BIT
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        if part in ("gate_proj", "up_proj") or (part == "down_proj" and len(tensor.shape) == 2):
            axis = 1 if part == "down_proj" else 0
            shape = tuple(width if at == axis else n for at, n in enumerate(tensor.shape))
            padding = (0, width - inner) if axis else (*(0, 0) * (len(shape) - 1), 0, width - inner)
            tensors[name] = tensor.changed(
                shape, functools.partial(torch.nn.functional.pad, pad=padding)
            )
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def _avoid_the_packed_kernel(model: PreTrainedModel) -> None:
    """Keep layers that bitsandbytes' fast CPU kernel cannot take on its ordinary one."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and (
            module.out_features % 32 or module.in_features % _BLOCK_4BIT
        ):
            module.support_avx512bf16_for_cpu = False


def _outside_the_blocks(model: PreTrainedModel) -> list[str]:
    """Full names of everything that is not in the language model: tower, projector, head."""
    decoder = model.get_decoder()
    inside = next(name for name, module in model.named_modules() if module is decoder)
    outside = []
    prefix = ""
    module: torch.nn.Module = model
    for step in inside.split("."):
        outside += [prefix + name for name, _ in module.named_children() if name != step]
        module = getattr(module, step)
        prefix += f"{step}."
    return outside


def device_plan(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device_map: str = "auto",
    max_memory: dict[int | str, int | str] | None = None,
    quantization: Quantization = "none",
) -> dict[str, Any]:
    """Which device each module would be put on: {module: 0, 1, ..., "cpu" or "disk"}.

    `max_memory` may name devices that this machine lacks. Nothing is loaded. An empty plan says
    that only transformers can make one: for code of the model's own, or weights quantised already.
    """
    from transformers.integrations.accelerate import (
        get_balanced_memory,
        get_max_memory,
        infer_auto_device_map,
    )
    from transformers.quantizers.auto import AutoHfQuantizer

    config = checkpoint.config
    if checkpoint.tensors is None:
        return {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = _empty_model(checkpoint.model_class, config)
    finally:
        torch.set_default_dtype(before)
    quantizer = None
    whole = set(model._no_split_modules or ())
    for name in ("vision_tower", "multi_modal_projector"):
        if (part := getattr(model.base_model, name, None)) is not None:
            whole.add(type(part).__name__)
    with _quiet():
        if quantization != "none":
            quantizer = AutoHfQuantizer.from_config(_quantization_config(checkpoint, quantization))
            quantizer.preprocess_model(
                model=model, dtype=dtype, device_map=None, checkpoint_files=None, use_kernels=False
            )
        model.tie_weights()
        memory = dict(max_memory) if max_memory else None
        if device_map == "sequential":
            memory = get_max_memory(memory)
        else:
            memory = get_balanced_memory(
                model,
                max_memory=memory,
                no_split_module_classes=whole,
                hf_quantizer=quantizer,
                low_zero=device_map == "balanced_low_0",
            )
        if quantizer is not None:
            memory = quantizer.adjust_max_memory(memory)
        return dict(
            infer_auto_device_map(
                model,
                max_memory=memory,
                no_split_module_classes=whole,
                hf_quantizer=quantizer,
            )
        )


# --- Writing --------------------------------------------------------------------------------------


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    report: Report = _silent,
    *,
    cache_dir: Path | None = None,
    max_shard_bytes: int = 2 * 1000**3,
) -> Path:
    """Write `source` as a standard folder: Hugging Face layout, safetensors, w2c.json.

    Weights keep the type they are stored in. One file of weights is in memory at a time. `out`
    must not exist, and appears complete or not at all. Raises CheckpointError.
    """
    from safetensors.torch import save_file

    out = Path(out).expanduser()
    if out.exists():
        raise CheckpointError(f"{out} exists already.", hint="Name a folder that does not exist.")
    checkpoint = open_checkpoint(source, report=report, cache_dir=cache_dir)
    if checkpoint.tensors is None:
        raise CheckpointError(
            f"{checkpoint.label} is quantised already and cannot be converted.",
            hint="Convert the original weights.",
        )
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, tensor in checkpoint.tensors.items():
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.num_bytes
    total, done = checkpoint.num_bytes, 0
    weight_map: dict[str, str] = {}
    with new_folder(out) as scratch, _damage_in(checkpoint.folder):
        for at, names in enumerate(shards):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
            part = {}
            for name in names:
                part[name] = checkpoint.tensors[name][...]
                done += checkpoint.tensors[name].num_bytes
                report("Converting", done, total)
            save_file(part, scratch / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            path = scratch / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config = checkpoint.config
        config.architectures = [checkpoint.model_class.__name__]
        config.dtype = next(iter(checkpoint.tensors.values())).dtype
        card = checkpoint.card
        _write_beside(scratch, config, card, checkpoint.tokenizer, checkpoint.processor)
        if (checkpoint.folder / "generation_config.json").is_file():
            shutil.copyfile(
                checkpoint.folder / "generation_config.json", scratch / "generation_config.json"
            )
    return out


def write_model(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerFast,
    card: CheckpointCard,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_bytes: int = 2 * 1000**3,
) -> Path:
    """Write `model` as a standard folder: Hugging Face layout, safetensors, w2c.json.

    `state_dict`: its weights, if they are not in the model itself. `out` must not exist, and
    appears complete or not at all. Raises CheckpointError.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise CheckpointError(f"{out} exists already.", hint="Name a folder that does not exist.")
    try:
        with new_folder(out) as scratch:
            write_parts(
                scratch,
                model,
                state_dict,
                tokenizer=tokenizer,
                card=card,
                max_shard_bytes=max_shard_bytes,
            )
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror or error}.",
            hint="Free some space, or name another folder.",
        ) from error
    return out


def write_parts(
    folder: Path,
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor] | None,
    *,
    tokenizer: PreTrainedTokenizerFast,
    card: CheckpointCard,
    max_shard_bytes: int = 2 * 1000**3,
) -> None:
    """Everything of a standard folder, into the empty `folder`."""
    with _quiet():
        model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_bytes)
        _write_beside(folder, model.config, card, tokenizer, None)


def _write_beside(
    folder: Path,
    config: PreTrainedConfig,
    card: CheckpointCard,
    tokenizer: Any,
    processor: ProcessorMixin | None,
) -> None:
    """Everything of a standard folder except the weights and how to sample."""
    from w2c_tui.core.prompt import TEMPLATES, as_jinja

    config.save_pretrained(folder)
    if card.template in TEMPLATES:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = as_jinja(TEMPLATES[card.template])
    if processor is None and card.image is not None and isinstance(config, LlavaConfig):
        processor = llava.processor_for(config, tokenizer, card.image)
    (processor or tokenizer).save_pretrained(folder)
    write_card(folder, card)


# --- The parts of a multimodal model --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TowerSource:
    """A vision tower that was looked at: its configuration and pixels, and where its weights are.

    `folder`: None for one of the built-in table that is not on this machine yet.
    """

    name: str
    config: PreTrainedConfig
    image: ImageSpec
    folder: Path | None

    def load(self, dtype: torch.dtype, report: Report = _silent) -> PreTrainedModel:
        """Read the weights, fetching them if need be. Raises CheckpointError or DownloadError."""
        folder = self.folder or _resolve(self.name, report, None, False)
        model_class: Any = transformers.MODEL_MAPPING[type(self.config)]
        with _quiet(), _damage_in(folder):
            model, info = model_class.from_pretrained(
                folder, config=self.config, dtype=dtype, output_loading_info=True
            )
        lost = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
        if lost:
            raise CheckpointError(
                f"The vision tower in {folder} lacks weights: {listed(sorted(lost))}",
                hint="Download the folder again.",
            )
        return model


def open_tower(source: str | os.PathLike[str], *, report: Report = _silent) -> TowerSource:
    """Find out what tower `source` is: a folder or a hub name. Reads no weights.

    Raises ModelNotFoundError, DownloadError or CheckpointError.
    """
    name = os.fspath(source)
    known = llava.TOWERS.get(name)
    if known is not None and not Path(name).is_dir():
        return TowerSource(name, known.vision_config(), known.image, None)
    folder = _resolve(name, report, None, False)
    with _damage_in(folder):
        config = AutoConfig.from_pretrained(folder)
        config = getattr(config, "vision_config", config)
        llava.has_cls_token(config)
        image = ImageSpec.from_processor_config(read_json(folder / "preprocessor_config.json"))
    return TowerSource(name, config, image, folder)


PROJECTOR_NAME = "projector.safetensors"


def read_projector(source: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The weights of a two-layer projector by the names of `LlavaMultiModalProjector`.

    `source`: a file that `write_projector` wrote, an `mm_projector.bin` as LLaVA publishes it, or a
    folder that holds one of the two. Raises CheckpointError or UnsafeCheckpointError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        names = (PROJECTOR_NAME, "mm_projector.bin")
        path = next((path / name for name in names if (path / name).is_file()), path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} holds no projector.", hint=f"Name a {PROJECTOR_NAME} or an mm_projector.bin."
        )
    stored = read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
    weights = {}
    for key, tensor in stored.items():
        match = _PROJECTOR.fullmatch(key)
        name = (
            f"linear_{int(match[1]) // 2 + 1}.{match[2]}" if match else key.split("projector.")[-1]
        )
        weights[name] = tensor[...]
    if set(weights) != {f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}:
        raise CheckpointError(
            f"{path} is no two-layer projector; it holds {listed(sorted(stored))}.",
            hint="Only mlp2x_gelu projectors are read.",
        )
    return weights


def write_projector(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a projector alone, by the names of `LlavaMultiModalProjector`."""
    from safetensors.torch import save_file

    scratch = path.with_name(f".{path.name}.partial")
    save_file(
        {f"multi_modal_projector.{name}": tensor for name, tensor in weights.items()},
        scratch,
        metadata={"format": "pt"},
    )
    scratch.replace(path)


# --- Small things ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and reports off the terminal; what matters comes as an error."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    others = [logging.getLogger(name) for name in ("bitsandbytes", "accelerate")]
    levels = [other.level for other in others]
    log.set_verbosity_error()
    log.disable_progress_bar()
    for other in others:
        other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def _damage_in(folder: Path) -> Iterator[None]:
    """The seam where reading a folder fails: ours pass, the libraries' become CheckpointError."""
    try:
        yield
    except (W2CError, MemoryError, torch.OutOfMemoryError):
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError),
        StrictDataclassError,
    ) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {type(error).__name__}: {brief(error)}",
            hint="Check config.json and the files beside it, or download the folder again.",
        ) from error


def _no_weights(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds no weights (model.safetensors or pytorch_model.bin, whole or in shards).",
        hint="Download the weights into the folder.",
    )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
