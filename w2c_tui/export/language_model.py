"""Text models as llama.cpp knows them: which architecture, which keys, what each tensor becomes.

Llama, Mistral and Qwen2 have architectures of their own there. CrystalCoder has none, and is
written as `phimoe` with a single expert, which computes exactly the same once the muP scales,
LayerNorm's centring and the biases of the MLP are folded into the weights. All folding is done in
float64, one tensor at a time.

Knows nothing about files, tokenizers or images. Names: the `gguf` package's tensor maps; graphs:
`src/models/{llama,qwen2,phimoe,phi3}.cpp` of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import gguf
import torch

from w2c_tui.core.errors import CheckpointError
from w2c_tui.export.tensors import PlannedTensor, by_rows, exact, matrix, stored
from w2c_tui.models.crystal import CrystalCoderConfig
from w2c_tui.models.weights import StoredTensor, listed

Text = Mapping[str, StoredTensor]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A text model as a GGUF file: llama.cpp's name of the architecture, its keys, its tensors.

    `centred`: every write into the residual stream has mean 0, and image features must have, too;
    `embedding_scale` is what they are multiplied with before.
    """

    arch: str
    write_keys: Callable[[gguf.GGUFWriter], None]
    tensors: list[PlannedTensor]
    embedding_length: int
    vocab_size: int
    embedding_scale: float = 1.0
    centred: bool = False


# By `model_type` of the text model; CrystalCoder is folded into another architecture.
_ARCHITECTURES = {
    "crystalcoder": gguf.MODEL_ARCH.PHIMOE,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
}


def check_family(config: Any, label: str) -> None:
    """Raise CheckpointError unless text models like `config` can be exported."""
    if config.model_type not in _ARCHITECTURES:
        raise CheckpointError(
            f"{label}: text models of type {config.model_type!r} cannot be exported to GGUF.",
            hint=f"Known: {', '.join(_ARCHITECTURES)} (SmolLM2 and Vicuna are llama).",
        )


def plan_language_model(config: Any, text: Text) -> LanguageModel:
    """How the text model with `config` and tensors `text` is written.

    Raises CheckpointError for a variant that llama.cpp would compute differently.
    """
    if isinstance(config, CrystalCoderConfig):
        return _plan_crystal(config, text)
    return _plan_llama(config, text, _ARCHITECTURES[config.model_type])


# --- CrystalCoder ---------------------------------------------------------------------------------

# Norm bias that turns into the MLP's biases, and the constant that an added unit puts out; both
# are powers of two near the size of what stands around them, for quantisation's sake.
_TAU = 0.25
_UNIT = 8.0
_BLOCK = 256


def _plan_crystal(config: CrystalCoderConfig, text: Text) -> LanguageModel:
    width, head_dim = config.n_embd, config.head_dim
    assert config.n_inner is not None
    assert config.rotary_dim is not None
    # Rows are padded to whole blocks of the k-quants, with room for the unit that carries a bias.
    inner = -(-(config.n_inner + 1) // _BLOCK) * _BLOCK

    def write_keys(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(width)
        writer.add_feed_forward_length(inner)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_head_count_kv(config.n_head)
        writer.add_rope_dimension_count(config.rotary_dim or head_dim)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        writer.add_expert_count(1)
        writer.add_expert_used_count(1)
        writer.add_vocab_size(config.vocab_size)

    embeddings = text["model.embed_tokens.weight"]
    head = text.get("lm_head.weight", embeddings)
    tensors = [
        matrix(
            "token_embd.weight",
            embeddings.shape,
            by_rows(embeddings, lambda rows: centred_rows(rows * config.mup_embeddings_scale)),
        ),
        stored("output_norm.weight", text["model.norm.weight"]),
        stored("output_norm.bias", text["model.norm.bias"]),
        matrix("output.weight", head.shape, by_rows(head, lambda rows: rows * config.logit_scale)),
        exact("output.bias", (config.vocab_size,), lambda: torch.zeros(config.vocab_size)),
    ]
    for layer in range(config.n_layer):
        tensors += _crystal_layer(config, text, layer, inner)
    return LanguageModel(
        arch=gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHIMOE],
        write_keys=write_keys,
        tensors=tensors,
        embedding_length=width,
        vocab_size=config.vocab_size,
        embedding_scale=float(config.mup_embeddings_scale),
        centred=True,
    )


def _crystal_layer(
    config: CrystalCoderConfig, text: Text, layer: int, inner: int
) -> Iterator[PlannedTensor]:
    width = config.n_embd
    source, target = f"model.layers.{layer}.", f"blk.{layer}."

    def read(name: str) -> torch.Tensor:
        return text[source + name][...].double()

    def projected(letter: str, kind: str) -> torch.Tensor:
        value = read(f"self_attn.{letter}_proj.{kind}")
        if letter == "q":
            value = value * scale
        return value if letter == "v" else value[order]

    def mixed(linear: str, unit: float) -> torch.Tensor:
        return _biased_rows(
            read(f"mlp.{linear}.weight"),
            read(f"mlp.{linear}.bias"),
            read("post_attention_layernorm.weight"),
            read("post_attention_layernorm.bias"),
            unit,
            inner,
        )[None]

    scale = _query_scale(config, layer)
    order = _halves_first(config)
    yield stored(target + "attn_norm.weight", text[source + "input_layernorm.weight"])
    yield stored(target + "attn_norm.bias", text[source + "input_layernorm.bias"])
    weights, biases = [], []
    for letter in "qkv":
        name = target + f"attn_{letter}."
        weights.append(
            matrix(name + "weight", (width, width), partial(projected, letter, "weight"))
        )
        biases.append(exact(name + "bias", (width,), partial(projected, letter, "bias")))
    yield from weights
    yield from biases
    yield matrix(
        target + "attn_output.weight",
        (width, width),
        lambda: centred_columns(read("self_attn.o_proj.weight")),
    )
    yield exact(
        target + "attn_output.bias", (width,), lambda: centred_rows(read("self_attn.o_proj.bias"))
    )

    yield exact(target + "ffn_norm.weight", (width,), lambda: torch.ones(width))
    yield exact(target + "ffn_norm.bias", (width,), lambda: torch.full((width,), _TAU))
    yield exact(target + "ffn_gate_inp.weight", (1, width), lambda: torch.zeros(1, width))
    # What the added unit computes before its bias: silu(gate) * up == _UNIT.
    gate, up = _UNIT, _UNIT / (_UNIT / (1 + math.exp(-_UNIT)))
    for name, linear, unit in (("gate", "gate_proj", gate), ("up", "up_proj", up)):
        shape = (1, inner, width)
        yield matrix(target + f"ffn_{name}_exps.weight", shape, partial(mixed, linear, unit))

    def down() -> torch.Tensor:
        made = torch.zeros(width, inner, dtype=torch.float64)
        made[:, : config.n_inner] = centred_columns(read("mlp.down_proj.weight"))
        made[:, config.n_inner] = centred_rows(read("mlp.down_proj.bias")) / _UNIT
        return made[None]

    yield matrix(target + "ffn_down_exps.weight", (1, width, inner), down)


def _query_scale(config: CrystalCoderConfig, layer: int) -> float:
    """What turns llama.cpp's division by sqrt(head_dim) into this model's own scaling."""
    scaling = 1.0
    if config.scale_attn_weights:
        scaling = config.head_dim ** (-1.0 if config.mup_scale_qk_dot_by_d else -0.5)
    if config.scale_attn_by_inverse_layer_idx:
        scaling /= layer + 1
    return scaling * math.sqrt(config.head_dim)


def _halves_first(config: CrystalCoderConfig) -> torch.Tensor:
    """Row order that turns rotated pairs (2i, 2i+1) into (i, i + rotary_dim / 2), head by head."""
    head_dim, rotary_dim = config.head_dim, config.rotary_dim
    assert rotary_dim is not None
    head = [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, head_dim)]
    starts = torch.arange(config.n_head) * head_dim
    return (starts[:, None] + torch.tensor(head)[None]).flatten()


def _biased_rows(
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    unit: float,
    inner: int,
) -> torch.Tensor:
    """(inner, width): a linear over LayerNorm, its bias and the norm's weights inside the matrix.

    It reads x + tau, where x is normalised and sums to 0. So any constant c added to a row adds
    c * n * tau to its output, and nothing else.
    """
    rows, width = weight.shape
    wanted = torch.zeros(inner, dtype=torch.float64)
    wanted[:rows] = bias + weight @ norm_bias
    wanted[rows] = unit
    made = torch.zeros(inner, width, dtype=torch.float64)
    made[:rows] = weight * norm_weight
    made += ((wanted - _TAU * made.sum(dim=1)) / (width * _TAU))[:, None]
    return made


def centred_rows(value: torch.Tensor) -> torch.Tensor:
    """`value` minus its mean over the last dimension, which is the residual stream's."""
    return value - value.mean(dim=-1, keepdim=True)


def centred_columns(weight: torch.Tensor) -> torch.Tensor:
    """A linear's weight [out, in] whose outputs sum to 0."""
    return weight - weight.mean(dim=0, keepdim=True)


# --- Llama, Mistral, Qwen2 ------------------------------------------------------------------------


def _plan_llama(config: Any, text: Text, arch: gguf.MODEL_ARCH) -> LanguageModel:
    if config.hidden_act != "silu":
        raise _not_the_same(config, "hidden_act", config.hidden_act, "silu")
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise _not_the_same(config, "rope_type", kind, "default, linear, llama3")
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    # llama.cpp attends to everything here, which is the same while the window is not full.
    context = min(config.max_position_embeddings, window or config.max_position_embeddings)

    def write_keys(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))

    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    permuted = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    tensors = []
    unknown = []
    for key, tensor in text.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            unknown.append(key)
            continue
        module = ".".join(key.split(".")[3:-1])
        if arch == gguf.MODEL_ARCH.LLAMA and module in permuted:
            tensors.append(_interleaved(name, tensor, permuted[module]))
        else:
            tensors.append(stored(name, tensor))
    if unknown:
        raise CheckpointError(
            f"{config.model_type}: llama.cpp has no place for {listed(sorted(unknown))}.",
            hint="This is a variant of the architecture that cannot be exported.",
        )
    if kind == "llama3":
        factors = _llama3_factors(rope, head_dim)
        tensors.append(exact("rope_freqs.weight", factors.shape, lambda: factors))
    return LanguageModel(
        arch=gguf.MODEL_ARCH_NAMES[arch],
        write_keys=write_keys,
        tensors=tensors,
        embedding_length=config.hidden_size,
        vocab_size=config.vocab_size,
    )


def _interleaved(name: str, tensor: StoredTensor, num_heads: int) -> PlannedTensor:
    """Rows reordered from rotated halves, as transformers has them, to pairs, as llama.cpp has."""

    def make() -> torch.Tensor:
        value = tensor[...]
        halves = value.reshape(num_heads, 2, len(value) // num_heads // 2, *value.shape[1:])
        return halves.transpose(1, 2).reshape(value.shape)

    return dataclasses.replace(stored(name, tensor), make=make)


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Divisors of the rotary frequencies; `_compute_llama3_parameters` of transformers."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** exponent
    original = float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factor = float(rope["factor"])
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _not_the_same(config: Any, field: str, value: Any, known: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: {field} is {value!r}; llama.cpp's {config.model_type} computes {known}.",
        hint="This variant cannot be exported exactly.",
    )
