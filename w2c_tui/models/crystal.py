"""CrystalCoder, the language model of CrystalChat and of CrystalChat-7B-Web2Code.

Owns the architecture as a transformers model: configuration, decoder and causal LM. Importing this
module registers them with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, because a
`LlavaConfig` can only be read when the `model_type` of its text model is already known.

Knows nothing about images, about prompts, or about how published checkpoints name and lay out
their tensors: the modules here are named and shaped as in Llama, so that quantisation, LoRA targets
and device maps written for Llama work, and `models.checkpoint` converts on reading.

Source of every formula: LLM360/CrystalChat and MBZUAI-LLM/web2code (arXiv 2406.20098). The muP
scales are those of arXiv 2203.03466.
"""

from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import (
    ALL_ATTENTION_FUNCTIONS,
    PreTrainedModel,
    slice_logits_to_keep,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from w2c_tui.core.errors import CheckpointError, ContextOverflowError


@strict
class CrystalCoderConfig(PreTrainedConfig):
    """The fields of the published `config.json`, under their published names.

    `rotary_dim`: leading dimensions of each head that are rotated, None for all of them. `n_inner`:
    None for 4 * `n_embd`.
    `mup_embeddings_scale` multiplies the input embeddings, image features included;
    `mup_output_alpha * mup_width_scale` multiplies the logits; `mup_scale_qk_dot_by_d` divides
    attention scores by the head dimension instead of by its square root.

    Raises CheckpointError for an architecture that shares the `model_type` but not the arithmetic.
    """

    model_type = "crystalcoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    }

    vocab_size: int = 32032
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 32
    n_head: int = 32
    n_inner: int | None = None
    rotary_dim: int | None = 32
    position_embedding_type: str = "rotary"
    activation_function: str = "swiglu"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attn_pdrop: float | int = 0.0
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    mup_embeddings_scale: float | int = 1.0
    mup_output_alpha: float | int = 1.0
    mup_width_scale: float | int = 1.0
    mup_scale_qk_dot_by_d: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        if self.rotary_dim is None:
            self.rotary_dim = self.head_dim
        super().__post_init__(**kwargs)
        for field, known in (
            ("position_embedding_type", "rotary"),
            ("activation_function", "swiglu"),
        ):
            if (value := getattr(self, field)) != known:
                raise CheckpointError(
                    f"config.json: {field} is {value!r}; CrystalCoder models use {known!r}.",
                    hint="This checkpoint is another architecture under the same model_type.",
                )
        if self.n_embd % self.n_head or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise CheckpointError(
                f"config.json: n_embd {self.n_embd}, n_head {self.n_head} and rotary_dim "
                f"{self.rotary_dim} do not fit together.",
                hint="n_head must divide n_embd; rotary_dim is even and at most n_embd / n_head.",
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def logit_scale(self) -> float:
        return self.mup_output_alpha * self.mup_width_scale


def rotary_cos_sin(
    position_ids: torch.Tensor, rotary_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angles, base 10000.

    position_ids: (batch, seq) int64. Returns two (batch, 1, seq, rotary_dim / 2) of `dtype`.
    Computed in float32 from nothing but the positions: there is no buffer to lose when a model is
    built on the meta device or cast to 16 bit.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=position_ids.device, dtype=torch.float32)
    inv_freq = 10000.0 ** (-exponent / rotary_dim)
    angles = position_ids[:, None, :, None].float() * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_interleaved_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i+1) of the first `rotary_dim` dimensions, as GPT-J does.

    x: (batch, heads, seq, head_dim); cos, sin: (batch, 1, seq, rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((pairs.flatten(-2), passed), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the whole score matrix in memory; used when weights have to be looked at.

    query, key, value: (batch, heads, seq, head_dim); attention_mask: additive, broadcastable to
    (batch, heads, query, key). Returns (batch, query, heads, head_dim) and the weights.
    """
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def single_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention of one position on CPU, where torch's fused kernel is 2 to 4 times slower.

    query: (batch, heads, 1, head_dim); key, value: (batch, heads, seq, head_dim), which may be
    views of a larger buffer; attention_mask: True where to look, or additive. Returns (batch, 1,
    heads, head_dim). Multiplying with the keys on the left is what makes it fast.
    """
    scores = (key @ query.transpose(2, 3)).transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


class CrystalCoderAttention(nn.Module):
    def __init__(self, config: CrystalCoderConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.is_causal = True
        self.num_key_value_groups = 1
        self.attention_dropout = config.attn_pdrop
        self.scaling = 1.0
        if config.scale_attn_weights:
            self.scaling = self.head_dim ** (-1.0 if config.mup_scale_qk_dot_by_d else -0.5)
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.q_proj = nn.Linear(config.n_embd, config.n_embd)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        shape = (batch, length, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)

        cos, sin = position_embeddings
        query = apply_interleaved_rotary(query, cos, sin)
        key = apply_interleaved_rotary(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if (
            length == 1
            and query.device.type == "cpu"
            and self.config._attn_implementation == "sdpa"
            and not self.training
        ):
            output = single_query_attention(query, key, value, attention_mask, self.scaling)
            return self.o_proj(output.reshape(batch, length, -1)), None

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights


class CrystalCoderMLP(nn.Module):
    def __init__(self, config: CrystalCoderConfig):
        super().__init__()
        assert config.n_inner is not None
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.gate_proj(hidden_states))
        return self.down_proj(gate * self.up_proj(hidden_states))


class CrystalCoderDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: CrystalCoderConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.self_attn = CrystalCoderAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = CrystalCoderMLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.resid_dropout(attended)
        mixed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.resid_dropout(mixed)


class CrystalCoderPreTrainedModel(PreTrainedModel):
    config: CrystalCoderConfig
    config_class = CrystalCoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrystalCoderDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CrystalCoderDecoderLayer,
        "attentions": CrystalCoderAttention,
    }


class CrystalCoderModel(CrystalCoderPreTrainedModel):
    """Embeddings, blocks and final norm, with both muP scales.

    The scale of the logits is applied here, to the normed hidden states: the head is linear and has
    no bias, and `LlavaForConditionalGeneration` puts its own head directly on this model.
    """

    def __init__(self, config: CrystalCoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(
            CrystalCoderDecoderLayer(config, layer_idx) for layer_idx in range(config.n_layer)
        )
        self.norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last block, normed and scaled for the head.

        input_ids: (batch, seq) int64, or inputs_embeds: (batch, seq, n_embd), **unscaled**.
        attention_mask: (batch, past + seq), 1 for real tokens. position_ids: (batch, seq).
        Raises ContextOverflowError when past + seq exceeds `n_positions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = inputs_embeds.shape[1]
        if past_length + length > self.config.n_positions:
            raise ContextOverflowError(
                f"{int(past_length) + length} tokens do not fit this model's context of "
                f"{self.config.n_positions} tokens.",
                hint="Shorten the conversation, or ask for fewer new tokens.",
            )
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past_length

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.embed_dropout(inputs_embeds * self.config.mup_embeddings_scale)
        rotary_dim = self.config.rotary_dim
        assert rotary_dim is not None
        position_embeddings = rotary_cos_sin(position_ids, rotary_dim, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states) * self.config.logit_scale,
            past_key_values=past_key_values,
        )


class CrystalCoderForCausalLM(CrystalCoderPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CrystalCoderConfig):
        super().__init__(config)
        self.model = CrystalCoderModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, seq, vocab_size) of the last `logits_to_keep` positions (0: of all)."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        assert outputs.last_hidden_state is not None
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def register() -> None:
    """Make the Auto classes know CrystalCoder. Safe to call any number of times."""
    AutoConfig.register(CrystalCoderConfig.model_type, CrystalCoderConfig, exist_ok=True)
    AutoModel.register(CrystalCoderConfig, CrystalCoderModel, exist_ok=True)
    AutoModelForCausalLM.register(CrystalCoderConfig, CrystalCoderForCausalLM, exist_ok=True)


register()
