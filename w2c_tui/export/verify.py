"""Is the exported file the same model? The same prompt and picture through both, compared.

The checkpoint runs in 32 bit by transformers, the files by llama.cpp as the application runs them.
Where memory is short, a model of a few of the layers is put together from each side: from the
checkpoint's own tensors, and from the bytes of the exported file. Knows nothing about how files
are written.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from transformers import LlavaConfig

from w2c_tui.backends.gguf import GGUFTokenizer
from w2c_tui.backends.gguf_header import GGUFHeader
from w2c_tui.backends.image_encoder import ImageEncoder, class_token_is_first
from w2c_tui.backends.llama import ImageChunk, LanguageModel, RuntimeOptions, Unit
from w2c_tui.core.config import ExportSpec
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import CheckpointError
from w2c_tui.core.image import pixel_values
from w2c_tui.core.prompt import PAGE_PROMPT, PLAIN, TEMPLATES, Segment, render
from w2c_tui.export.language_model import centred_rows
from w2c_tui.export.outcome import Verification
from w2c_tui.export.vision import LAYOUT_KEY
from w2c_tui.models.checkpoint import Checkpoint, LoadedModel, Report, load_checkpoint
from w2c_tui.models.crystal import CrystalCoderConfig
from w2c_tui.models.tokenize import ImageSlot, PromptTokenizer

# Mean KL divergence in nats up to which a file passes; what small random models, which exaggerate
# rounding, stay well below.
KL_LIMITS = {
    "f32": 1e-6,
    "f16": 1e-3,
    "bf16": 1e-2,
    "q8_0": 2e-2,
    "q6_k": 5e-2,
    **dict.fromkeys(("q5_k_m", "q5_k_s", "q5_1", "q5_0"), 0.1),
    **dict.fromkeys(("q4_k_m", "q4_k_s", "q4_1", "q4_0"), 0.3),
    **dict.fromkeys(("q3_k_l", "q3_k_m", "q3_k_s"), 1.0),
    "q2_k": 3.0,
}
FEATURE_LIMIT = 2e-3
EXACT_GELU_LIMIT = 2e-2
"""For towers that compute GELU exactly, which llama.cpp does not."""

FEATURE_KL = 1e-4
"""What image features, which llama.cpp computes in 16 bit here and there, may add to that."""

_MAX_CONTEXT = 2048
_SAMPLED_LAYERS = 2
# Of what is free, for two models and what they compute.
_MEMORY_SHARE = 0.6
_ANSWER = (
    '<!DOCTYPE html>\n<html>\n<head><title>Shop</title></head>\n<body class="page">\n'
    "  <h1>Prices</h1>\n  <p>Now <s>old price</s> 19.99</p>\n</body>\n</html>"
)
_TEXTS = (
    PAGE_PROMPT,
    _ANSWER,
    "<s>struck</s> out </s> <unk> <image> <pad>",
    "naïve café — 日本語, emoji 🎉🚀, ﬁ\tligature, é",
    "  leading and trailing  \n\n\n  lines  \r\n\t\tdef f(x):\n        return x + 1234567890\n",
    "'s 't I'LL we've {{ braces }} {% raw %} <|im_start|>user <|endoftext|>",
    "",
)


def verify(
    checkpoint: Checkpoint, path: Path, mmproj: Path | None, spec: ExportSpec, report: Report
) -> Verification:
    """Compare `path` (and `mmproj`) with `checkpoint`, on a picture and a page.

    Raises CheckpointError where they differ by more than `spec`'s types explain, or where text
    becomes other tokens.
    """
    needed = 4 * _num_parameters(checkpoint) + path.stat().st_size
    whole = needed < _MEMORY_SHARE * psutil.virtual_memory().available
    subject = "the whole model"
    with contextlib.ExitStack() as stack:
        if not whole:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent))
            layers = _sample(checkpoint.config.get_text_config())
            sampled = Path(folder) / path.name
            copy_layers(path, sampled, layers)
            checkpoint, path = with_layers(checkpoint, layers), sampled
            subject = f"layers {' and '.join(map(str, layers))} (memory is short for all)"
        report("Verifying", 0, 3)
        options = RuntimeOptions(
            context=min(_MAX_CONTEXT, checkpoint.config.get_text_config().max_position_embeddings),
            cache_type="f32",
            n_gpu_layers=0,
            threads=torch.get_num_threads(),
            flash_attn="off",
        )
        model = stack.enter_context(LanguageModel(path, options, report))
        encoder = None
        if mmproj is not None and _can_see(mmproj, model):
            encoder = stack.enter_context(ImageEncoder(mmproj, model, options, report))
        elif mmproj is not None:
            subject += ", without its pictures, which need a repaired llama.cpp"
        report("Verifying", 1, 3)
        source = load_checkpoint(checkpoint, dtype=torch.float32, report=report)
        report("Verifying", 2, 3)
        result = _compare(source, model, encoder, spec, subject)
        report("Verifying", 3, 3)
    _check_limits(result)
    return result


def _can_see(mmproj: Path, model: LanguageModel) -> bool:
    """Whether this llama.cpp reads the file's layout."""
    header = GGUFHeader(mmproj)
    layout = header.text(LAYOUT_KEY)
    if layout == "rolled" or "v.class_embd" not in header.tensors:
        return True
    return (layout == "standard") == class_token_is_first(model)


def _compare(
    source: LoadedModel,
    model: LanguageModel,
    encoder: ImageEncoder | None,
    spec: ExportSpec,
    subject: str,
) -> Verification:
    config: Any = source.model.config
    image_token = None
    if encoder is not None:
        image_token = str(source.tokenizer.convert_ids_to_tokens(config.image_token_id))
    tokenizer = PromptTokenizer(source.tokenizer, image_token)
    _check_tokens(tokenizer, model)
    ids: list[int] = []
    for piece in tokenizer.encode(_segments(source, tokenizer, image_token)):
        if isinstance(piece, ImageSlot):
            ids += [config.image_token_id] * source.image_seq_length
        else:
            ids += piece.ids
    ids = ids[: model.context_length]
    picture = _picture() if encoder else None
    layout = encoder.header.text(LAYOUT_KEY) if encoder else ""
    expected, features = _by_transformers(source, ids, picture, layout)
    units: list[Unit] = list(ids)
    keep = len(ids)
    feature_error = None
    if encoder is not None and picture is not None and features is not None:
        chunks = encoder.prepare(picture, "verify")
        (chunk,) = (unit for unit in chunks if isinstance(unit, ImageChunk))
        feature_error = _relative_error(encoder.encode(chunk), features)
        start = ids.index(config.image_token_id)
        after = ids[start + len(features) :]
        units, keep = [*ids[:start], *chunks, *after], len(after)
    rows = model.run(units, keep=keep)
    model.crop(0)
    expected = expected[-keep:]
    return Verification(
        subject=subject,
        num_positions=keep,
        max_logit_error=float(np.abs(rows - expected).max()),
        kl=_kl(expected, rows),
        kl_limit=max(KL_LIMITS[spec.quant], FEATURE_KL if encoder else 0.0),
        num_agreeing=int((rows.argmax(axis=1) == expected.argmax(axis=1)).sum()),
        feature_error=feature_error,
        feature_limit=_feature_limit(config) if encoder else 0.0,
    )


def _check_limits(result: Verification) -> None:
    problems = []
    if not result.kl <= result.kl_limit:
        problems.append(f"a mean KL divergence of {result.kl:.2g}, at most {result.kl_limit:g}")
    if result.feature_error is not None and not result.feature_error <= result.feature_limit:
        problems.append(
            f"image features that differ by {result.feature_error:.2g}, at most "
            f"{result.feature_limit:g}"
        )
    if problems:
        raise CheckpointError(
            "The exported file is not the same model as its checkpoint: "
            + "; ".join(problems)
            + " is expected of this type.",
            hint="Nothing was kept. Export a larger type; --no-verify keeps the files as they are.",
        )


def _feature_limit(config: LlavaConfig) -> float:
    vision: Any = config.vision_config
    return EXACT_GELU_LIMIT if vision.hidden_act == "gelu" else FEATURE_LIMIT


# --- The prompt -----------------------------------------------------------------------------------


def _segments(
    source: LoadedModel, tokenizer: PromptTokenizer, image_token: str | None
) -> list[Segment]:
    """A question about a picture and its answer, in the model's own words where it has a chat."""
    image = Attachment(b"", "verify", 1280, 720)
    messages = [
        Message("user", PAGE_PROMPT, (image,) if image_token else ()),
        Message("assistant", _ANSWER),
    ]
    template: Any = TEMPLATES.get(source.template)
    if template is None:
        chat = getattr(source.processor, "chat_template", None) or source.tokenizer.chat_template
        template = tokenizer.chat_template(chat, image_token) if chat else PLAIN
    return render(messages, template, images=image_token is not None)


def _picture() -> Image.Image:
    """A wide page with areas, lines and a little noise."""
    noise = np.random.default_rng(0).integers(0, 24, (360, 640, 3), dtype=np.uint8)
    page = Image.fromarray(255 - noise)
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, 640, 60), fill=(40, 80, 160))
    for column, color in enumerate(((200, 60, 40), (60, 160, 90), (240, 200, 60))):
        draw.rectangle((20 + 200 * column, 100, 200 + 200 * column, 240), fill=color)
    for line in range(260, 350, 12):
        draw.line((20, line, 620 - line, line), fill=(30, 30, 30), width=3)
    return page


# --- Both sides -----------------------------------------------------------------------------------


def _by_transformers(
    source: LoadedModel, ids: list[int], picture: Image.Image | None, layout: str
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Logits after each of `ids`, and the features of `picture` that the language model was given.

    What a layout is known to lose is taken from the model as well: `rolled` the bottom right patch,
    `last` the first one, in place of which CLS comes behind the others.
    """
    model: Any = source.model
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        if picture is None:
            return model(input_ids=tokens).logits[0].numpy(), None
        spec = source.image_spec
        assert spec is not None
        pixels = torch.from_numpy(pixel_values(picture, spec))[None]
        if layout == "rolled":
            patch = model.config.vision_config.patch_size
            end = spec.size // patch * patch
            color = torch.tensor(spec.background) * spec.rescale_factor
            color = (color - torch.tensor(spec.mean)) / torch.tensor(spec.std)
            pixels[0, :, end - patch : end, end - patch : end] = color[:, None, None]
        arguments = {"vision_feature_select_strategy": "full"} if layout == "last" else {}
        features = model.get_image_features(pixel_values=pixels, **arguments).pooler_output[0]
        if layout == "last":
            features = torch.cat((features[2:], features[:1]))
        embeddings = model.get_input_embeddings()(tokens)
        embeddings[tokens == model.config.image_token_id] = features
        logits = model(inputs_embeds=embeddings).logits[0]
    return logits.numpy(), _as_exported(features, model.config.get_text_config()).numpy()


def _as_exported(features: torch.Tensor, text_config: Any) -> torch.Tensor:
    """`features` as the residual stream of the exported model holds them."""
    if isinstance(text_config, CrystalCoderConfig):
        return centred_rows(features * text_config.mup_embeddings_scale)
    return features


def _check_tokens(tokenizer: PromptTokenizer, model: LanguageModel) -> None:
    """Raise CheckpointError if llama.cpp reads text as other tokens than the checkpoint does."""
    native = GGUFTokenizer(model)
    for text in _TEXTS:
        pieces = tokenizer.encode([Segment("text", text)]) if text else []
        expected = [ident for piece in pieces for ident in getattr(piece, "ids", ())]
        if (found := native.text_ids(text)) != expected:
            raise CheckpointError(
                f"llama.cpp reads {text[:40]!r} as other tokens than the checkpoint's tokenizer: "
                f"{found[:12]}, not {expected[:12]}.",
                hint="This tokenizer has no equal in llama.cpp; --no-verify exports it anyway.",
            )


# --- Numbers --------------------------------------------------------------------------------------


def _relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _kl(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean of KL(expected || found) over positions, of the softmax of each row, in nats."""
    p, q = (torch.from_numpy(rows).double().log_softmax(dim=-1) for rows in (expected, found))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


# --- Some of the layers ---------------------------------------------------------------------------

_TEXT_LAYER = re.compile(
    r"(?P<before>(?:model\.language_model\.|language_model\.model\.|model\.)layers\.)"
    r"(?P<layer>\d+)(?P<after>\..+)"
)
_GGUF_LAYER = re.compile(r"(?P<before>blk\.)(?P<layer>\d+)(?P<after>\..+)")


def _num_parameters(checkpoint: Checkpoint) -> int:
    return sum(int(np.prod(t.shape)) for t in (checkpoint.tensors or {}).values())


def _sample(text_config: Any) -> list[int]:
    """Layers from all over the model, or its first ones where their number matters."""
    count = text_config.num_hidden_layers
    if getattr(text_config, "scale_attn_by_inverse_layer_idx", False):
        return list(range(min(_SAMPLED_LAYERS, count)))
    return sorted({round(at) for at in np.linspace(0, count - 1, _SAMPLED_LAYERS)})


def _renumbered(name: str, pattern: re.Pattern[str], layers: list[int]) -> str | None:
    """`name` in a model of only `layers`; None if it is of another layer."""
    match = pattern.fullmatch(name)
    if match is None:
        return name
    layer = int(match["layer"])
    if layer not in layers:
        return None
    return f"{match['before']}{layers.index(layer)}{match['after']}"


def with_layers(checkpoint: Checkpoint, layers: list[int]) -> Checkpoint:
    """`checkpoint` with only `layers` of its language model."""
    config = copy.deepcopy(checkpoint.config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = len(layers)
    if (kinds := getattr(text_config, "layer_types", None)) is not None:
        text_config.layer_types = [kinds[layer] for layer in layers]
    tensors = {
        new: tensor
        for name, tensor in (checkpoint.tensors or {}).items()
        if (new := _renumbered(name, _TEXT_LAYER, layers)) is not None
    }
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def copy_layers(source: Path, out: Path, layers: list[int]) -> None:
    """Write the GGUF file `source` with only `layers` to `out`, byte for byte."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(out, arch)
    try:
        for field in reader.fields.values():
            if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            value = field.contents()
            if field.name == gguf.Keys.LLM.BLOCK_COUNT.format(arch=arch):
                value = len(layers)
            writer.add_key_value(field.name, value, kind, sub_type=inner)
        kept = [
            (name, tensor)
            for tensor in reader.tensors
            if (name := _renumbered(tensor.name, _GGUF_LAYER, layers)) is not None
        ]
        for name, tensor in kept:
            data = tensor.data
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in kept:
            writer.write_tensor_data(tensor.data)
    finally:
        writer.close()
