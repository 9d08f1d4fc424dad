"""Small checkpoints of the families that can be exported, as they are published."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from tests.models import tiny
from w2c_tui.core.image import HALF, ImageSpec
from w2c_tui.models.checkpoint import CheckpointCard, write_card
from w2c_tui.models.llava import llava_config, processor_for

VOCABULARY = 416


def save_crystal(folder: Path, *, head: bool = True, **overrides) -> Path:
    """CrystalCoder in its published layout, with a tokenizer of fewer pieces than rows."""
    config = tiny.crystal_config(vocab_size=VOCABULARY, **overrides)
    tensors = tiny.published_crystal(config)
    if not head:
        del tensors["lm_head.weight"]
    tiny.write_safetensors(folder, tensors)
    tiny.write_json(folder / "config.json", config.to_dict())
    tiny.write_tokenizer(folder, bos=False)
    return folder


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**_SIZES),
    "llama-tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": LlamaConfig(**_SIZES, head_dim=32),
    "llama-linear-rope": LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama3-rope": LlamaConfig(**_SIZES, rope_parameters=_LLAMA3),
    "mistral": MistralConfig(**_SIZES, sliding_window=128),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen2-tied": Qwen2Config(**_SIZES, tie_word_embeddings=True),
}


def save_family(folder: Path, config) -> Path:
    """A model of random weights, all of which matter, with a Llama-like tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.2 * noise
        elif parameter.dim() == 1:
            parameter.data = 0.3 * noise
        elif "embed" in name or "lm_head" in name:
            parameter.data = noise
        else:
            parameter.data = noise * 0.15
    if config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder, bos=True)
    return folder


# --- Models that see ------------------------------------------------------------------------------

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
# 44 px are three patches and a rest that no patch covers, as 384 px are for the published tower.
SIGLIP = CLIP | {
    "model_type": "siglip_vision_model",
    "image_size": 44,
    "hidden_act": "gelu_pytorch_tanh",
}
# Positions of a 6 x 6 grid, pictures of 4 x 4 patches.
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 84,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
}
IMAGES = {
    "clip_vision_model": ImageSpec(size=56, aspect="pad"),
    "siglip_vision_model": ImageSpec(size=44, aspect="stretch", mean=HALF, std=HALF),
    "dinov2": ImageSpec(
        size=56,
        aspect="pad",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        pad_color=(255, 255, 255),
    ),
}


def save_llava(
    folder: Path,
    vision: dict,
    text: str = "llama",
    *,
    num_layers: int = 2,
    seed: int = 2,
    template: str = "v1",
    feature_layer: int | list[int] | None = None,
    image: ImageSpec | None = None,
) -> Path:
    """A LLaVA of random weights in the standard layout, over a tower as `vision` says.

    `text`: "llama", or "crystalcoder" with its published muP scales.
    """
    vision_config = AutoConfig.for_model(**vision)
    if text == "crystalcoder":
        text_config = tiny.crystal_config(
            vocab_size=VOCABULARY, n_positions=512, n_layer=num_layers
        )
    else:
        text_config = LlamaConfig(**(_SIZES | {"num_hidden_layers": num_layers}))
    image = image or IMAGES[vision["model_type"]]
    tiny.write_tokenizer(folder, bos=text == "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = llava_config(
        text_config,
        vision_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_size=image.size,
        feature_layer=feature_layer,
        projector_hidden_act="gelu_pytorch_tanh",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = _spread(name, parameter, crystal=text == "crystalcoder") * noise
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
        elif "lambda1" in name:
            parameter.data += 0.5
    model.save_pretrained(folder)
    processor_for(config, tokenizer, image).save_pretrained(folder)
    write_card(folder, CheckpointCard(family=f"llava_{text}", template=template, image=image))
    return folder


def _spread(name: str, parameter: torch.Tensor, *, crystal: bool) -> float:
    """Of random weights, so that everything matters and nothing overflows."""
    if "class_embedding" in name or "cls_token" in name:
        return 1.0
    if "position" in name:
        return 0.5
    if parameter.dim() == 1:
        return 0.1
    if parameter.dim() == 4:
        return 0.05
    if "lm_head" in name:
        return 1.0
    if "embed_tokens" in name:
        return 0.1 if crystal else 1.0
    # What goes into the residual stream of a CrystalCoder is multiplied by 14.6 there.
    small = crystal and "linear_2" in name
    return (0.1 if small else 1.0) * parameter.shape[-1] ** -0.5
