"""Small real GGUF files: exported text models, and image encoders of random weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import msgspec
import numpy as np
from gguf import TokenType

from tests.tiny import byte_level_tokenizer
from w2c_tui.core.config import ExportSpec
from w2c_tui.core.image import ImageSpec
from w2c_tui.export.gguf_export import export
from w2c_tui.export.tokenizer import Vocabulary, read_vocabulary


def save_text_model(folder: Path, out: Path, quant: str = "f32") -> Path:
    """The checkpoint in `folder` as a GGUF file."""
    spec = ExportSpec(quant=quant, verify=False)
    return Path(export(str(folder), out, spec, lambda *_: None).model)


def damaged(path: Path, out: Path) -> Path:
    """The first bytes of `path`."""
    out.write_bytes(Path(path).read_bytes()[:500])
    return out


def save_mmproj(
    path: Path,
    width: int,
    *,
    image_size: int = 56,
    layout: str | None = None,
    spec: ImageSpec | None = None,
    hidden: int = 32,
    layers: int = 2,
) -> Path:
    """A CLIP tower with a two-layer projector to `width`, as LLaVA 1.5 has them.

    `layout` and `spec` are what this project's export writes; without them the file is as others
    write it. "rolled" and "standard" of one seed are the same model.
    """
    patch, feed_forward, heads = 14, 2 * hidden, 4
    rng = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.15).astype(np.float32)

    def ones() -> np.ndarray:
        return (1 + some(hidden)).astype(np.float32)

    mean, std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
    pad_color = (127, 127, 127)
    tensors = {
        "v.class_embd": some(hidden),
        "v.patch_embd.weight": some(hidden, 3, patch, patch),
        "v.position_embd.weight": some((image_size // patch) ** 2 + 1, hidden),
        "v.pre_ln.weight": ones(),
        "v.pre_ln.bias": some(hidden),
        "mm.0.weight": some(width, hidden) * 2,
        "mm.0.bias": some(width),
        "mm.2.weight": some(width, width) * 4,
        "mm.2.bias": some(width),
    }
    for at in range(layers):
        block = f"v.blk.{at}."
        shapes = {
            **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (hidden, hidden)),
            "ffn_up": (feed_forward, hidden),
            "ffn_down": (hidden, feed_forward),
        }
        for name, shape in shapes.items():
            tensors[f"{block}{name}.weight"] = some(*shape)
            tensors[f"{block}{name}.bias"] = some(shape[0])
        for name in ("ln1", "ln2"):
            tensors[f"{block}{name}.weight"] = ones()
            tensors[f"{block}{name}.bias"] = some(hidden)
    if layout == "rolled":
        color = (np.array(pad_color, np.float32) / 255 - mean) / np.array(std)
        blank = np.einsum("hcij,c->h", tensors["v.patch_embd.weight"].astype(np.float64), color)
        positions = tensors["v.position_embd.weight"].copy()
        positions[0] += (tensors["v.class_embd"] - blank).astype(np.float32)
        tensors["v.position_embd.weight"] = positions
        tensors["v.class_embd"] = blank.astype(np.float32)
    if layout == "last":
        rolled = np.roll(tensors["v.position_embd.weight"], -1, axis=0)
        tensors["v.position_embd.weight"] = rolled

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(0)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(width)
    writer.add_vision_image_size(image_size)
    writer.add_vision_patch_size(patch)
    writer.add_vision_embedding_length(hidden)
    writer.add_vision_feed_forward_length(feed_forward)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(heads)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    writer.add_array("clip.vision.feature_layer", [layers])
    if layout is not None:
        spec = spec or ImageSpec(
            size=image_size, aspect="pad", mean=(0.5,) * 3, std=(0.5,) * 3, pad_color=pad_color
        )
        writer.add_string("w2c.clip_layout", layout)
        writer.add_string("w2c.image_spec", msgspec.json.encode(spec).decode())
        writer.add_array("w2c.pad_color", list(pad_color))
    _finish(writer, tensors)
    return path


# --- Files as others publish them -----------------------------------------------------------------

_MARKERS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
]
_TURNS = (
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
    "{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
    "{{% for p in m['content'] %}}"
    "{{% if p['type'] == 'image' %}}{mark}{{% else %}}{{{{ p['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
_TEXT_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Family(msgspec.Struct, frozen=True):
    """A published kind of model: its architecture, projector and what its template writes."""

    architecture: str
    projector: str
    template: str
    image_size: int


FAMILIES = {
    "llava": Family("llama", "mlp", _TEXT_ONLY, 56),
    "smolvlm": Family("llama", "idefics3", _TURNS.format(mark="<image>"), 56),
    "qwen2-vl": Family(
        "qwen2vl",
        "qwen2vl_merger",
        _TURNS.format(mark="<|vision_start|><|image_pad|><|vision_end|>"),
        56,
    ),
    "gemma3": Family("gemma3", "gemma3", _TURNS.format(mark="<start_of_image>"), 112),
}


def save_published(folder: Path, family: str) -> Path:
    """A model and its mmproj of random weights as llama.cpp's own converter writes them."""
    kind = FAMILIES[family]
    save_published_text(folder / f"{family}.gguf", family)
    path = folder / f"mmproj-{family}.gguf"
    if kind.projector == "mlp":
        save_mmproj(path, 64)
    else:
        _save_published_mmproj(path, kind)
    return folder / f"{family}.gguf"


def save_published_text(
    path: Path,
    family: str,
    *,
    context: int = 1024,
    template: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> Path:
    """The language model alone."""
    kind = FAMILIES[family]
    width, feed_forward, layers, heads, head_dim, kv_heads = 64, 128, 2, 4, 16, 2
    rng = np.random.default_rng(1)

    def some(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.15).astype(np.float32)

    vocabulary = vocabulary or _vocabulary()
    writer = gguf.GGUFWriter(path, kind.architecture)
    vocabulary.write(writer)
    if template != "":
        writer.add_chat_template(template or kind.template)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(feed_forward)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head_dim)
    if kind.architecture == "qwen2vl":
        writer.add_rope_dimension_sections([2, 3, 3, 0])
    if kind.architecture == "gemma3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_sliding_window(24)
    tensors = {
        "token_embd.weight": some(len(vocabulary.tokens), width) * 6,
        "output_norm.weight": 1 + some(width),
        "output.weight": some(len(vocabulary.tokens), width) * 6,
    }
    if kind.architecture == "gemma3":
        tensors["token_embd.weight"] /= 8
    for at in range(layers):
        block = f"blk.{at}."
        tensors |= {
            f"{block}attn_norm.weight": 1 + some(width),
            f"{block}attn_q.weight": some(heads * head_dim, width),
            f"{block}attn_k.weight": some(kv_heads * head_dim, width),
            f"{block}attn_v.weight": some(kv_heads * head_dim, width),
            f"{block}attn_output.weight": some(width, heads * head_dim),
            f"{block}ffn_norm.weight": 1 + some(width),
            f"{block}ffn_gate.weight": some(feed_forward, width),
            f"{block}ffn_up.weight": some(feed_forward, width),
            f"{block}ffn_down.weight": some(width, feed_forward),
        }
        if kind.architecture == "gemma3":
            tensors |= {
                f"{block}attn_q_norm.weight": 1 + some(head_dim),
                f"{block}attn_k_norm.weight": 1 + some(head_dim),
                f"{block}post_attention_norm.weight": 1 + some(width),
                f"{block}post_ffw_norm.weight": 1 + some(width),
            }
    _finish(writer, tensors)
    return path


def _vocabulary() -> Vocabulary:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _MARKERS})
    return read_vocabulary(tokenizer, len(tokenizer))


def spelling_vocabulary() -> Vocabulary:
    """SentencePiece BPE as in published Llama files: pieces join to `</s>` before all others."""
    special = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    tokens: dict[str, tuple[TokenType, float]] = {name: (t, 0.0) for name, t in special.items()}
    tokens |= {f"<0x{byte:02X}>": (TokenType.BYTE, 0.0) for byte in range(256)}
    pieces = ["</", "s>", "<s", "old", "ol", "▁o", *"▁abcdefghijklmnopqrstuvwxyz<>/|=."]
    tokens |= {piece: (TokenType.NORMAL, -float(rank)) for rank, piece in enumerate(pieces)}
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[piece.encode() for piece in tokens],
        types=[kind for kind, _ in tokens.values()],
        scores=[score for _, score in tokens.values()],
        merges=[],
        special_ids={"bos": 1, "eos": 2, "unk": 0},
        add_bos=True,
        prepend="always",
        spelled={},
        normalizer="",
        marks_spaces=True,
    )


def _save_published_mmproj(path: Path, kind: Family) -> None:
    hidden, feed_forward, layers, heads, patch, width = 32, 64, 2, 2, 14, 64
    rng = np.random.default_rng(2)

    def some(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.15).astype(np.float32)

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(kind.projector)
    writer.add_vision_projection_dim(width)
    writer.add_vision_image_size(kind.image_size)
    writer.add_vision_patch_size(patch)
    writer.add_vision_embedding_length(hidden)
    writer.add_vision_feed_forward_length(feed_forward)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(heads)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_bool("clip.use_gelu", True)
    count = (kind.image_size // patch) ** 2
    tensors = {
        "v.patch_embd.weight": some(hidden, 3, patch, patch),
        "v.post_ln.weight": 1 + some(hidden),
        "v.post_ln.bias": some(hidden),
    }
    for at in range(layers):
        block = f"v.blk.{at}."
        shapes = {
            **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (hidden, hidden)),
            "ffn_up": (feed_forward, hidden),
            "ffn_down": (hidden, feed_forward),
        }
        for name, shape in shapes.items():
            tensors[f"{block}{name}.weight"] = some(*shape)
            tensors[f"{block}{name}.bias"] = some(shape[0])
        for name in ("ln1", "ln2"):
            tensors[f"{block}{name}.weight"] = 1 + some(hidden)
            tensors[f"{block}{name}.bias"] = some(hidden)
    if kind.projector == "qwen2vl_merger":
        tensors |= {
            "v.patch_embd.weight.1": some(hidden, 3, patch, patch),
            "mm.0.weight": some(4 * hidden, 4 * hidden),
            "mm.0.bias": some(4 * hidden),
            "mm.2.weight": some(width, 4 * hidden) * 4,
            "mm.2.bias": some(width),
        }
    else:
        tensors |= {
            "v.patch_embd.bias": some(hidden),
            "v.position_embd.weight": some(count, hidden),
        }
    if kind.projector == "idefics3":
        writer.add_vision_projector_scale_factor(2)
        writer.add_uint32("clip.vision.preproc_image_size", 4 * kind.image_size)
        tensors["mm.model.fc.weight"] = some(width, 4 * hidden) * 4
    if kind.projector == "gemma3":
        tensors["mm.input_projection.weight"] = some(hidden, width) * 4
        tensors["mm.soft_emb_norm.weight"] = 1 + some(hidden)
    _finish(writer, tensors)


def _finish(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
