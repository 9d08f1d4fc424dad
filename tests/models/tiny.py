"""Builders of small random models, checkpoints and tokenizers for the tests of `w2c_tui.models`.

Knows how published CrystalCoder and LLaVA checkpoints name and lay out their tensors, from
their descriptions alone; shares no code with the package.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from w2c_tui.models.crystal import CrystalCoderConfig, CrystalCoderForCausalLM

MUP = {
    "mup_embeddings_scale": 14.6,
    "mup_output_alpha": 2.22,
    "mup_width_scale": 0.0625,
    "mup_scale_qk_dot_by_d": True,
}


def crystal_config(**overrides) -> CrystalCoderConfig:
    """Three layers, four heads of 16 dimensions of which 8 rotate, published muP scales."""
    fields = {
        "vocab_size": 320,
        "n_positions": 256,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 172,
        "rotary_dim": 8,
        **MUP,
    }
    return CrystalCoderConfig(**(fields | overrides))


def published_crystal(config: CrystalCoderConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names: Conv1D [in, out], fused c_attn, no zero bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float, around: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale + around

    width, inner = config.n_embd, config.n_inner
    tensors = {"transformer.wte.weight": normal(config.vocab_size, width, scale=0.1)}
    norms = ["transformer.ln_f"]
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}"
        norms += [f"{prefix}.ln_1", f"{prefix}.ln_2"]
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_fc2", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            tensors[f"{prefix}.{name}.weight"] = normal(rows, columns, scale=rows**-0.5)
            tensors[f"{prefix}.{name}.bias"] = normal(columns, scale=0.2)
    for norm in norms:
        tensors[f"{norm}.weight"] = normal(width, scale=0.1, around=1.0)
        tensors[f"{norm}.bias"] = normal(width, scale=0.1)
    tensors["lm_head.weight"] = normal(config.vocab_size, width, scale=1.0)
    return tensors


def crystal_state_dict(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names and in the layout of `CrystalCoderForCausalLM`."""
    names = {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "transformer.h.": "model.layers.",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc2.": "mlp.gate_proj.",
        "mlp.c_fc.": "mlp.up_proj.",
        "mlp.c_proj": "mlp.down_proj",
    }
    state = {}
    for name, tensor in published.items():
        if ".c_" in name and name.endswith("weight"):
            tensor = tensor.T
        for old, new in names.items():
            name = name.replace(old, new)
        if "attn.c_attn" in name:
            for part, chunk in zip("qkv", tensor.chunk(3, dim=0), strict=True):
                state[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = chunk.contiguous()
        else:
            state[name] = tensor.contiguous()
    return state


def crystal_model(
    config: CrystalCoderConfig, published: dict[str, torch.Tensor], **kwargs
) -> CrystalCoderForCausalLM:
    model = CrystalCoderForCausalLM._from_config(config, **kwargs)
    model.load_state_dict(crystal_state_dict(published), strict=True)
    return model.eval()


# --- Checkpoints as they are published ------------------------------------------------------------

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
LLAVA = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 32,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": 2048,
    "use_mm_proj": True,
    "auto_map": {"AutoConfig": "configuration_crystalcoder.CrystalCoderConfig"},
    "vision_config": VISION,
}
VOCABULARY = 400
_CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
    "Please generate html code for the given image",
    "<html><head><title>Shop</title></head><body><div class='a'>Hello world</div></body></html>",
    "<p>price</p> the quick brown fox jumps over the lazy dog color: red; margin: 0 auto;",
]


@functools.cache
def _sentencepiece() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 20),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, *, bos: bool) -> None:
    """A Llama-style BPE with byte fallback as it is published: tokenizer.model and its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sentencepiece())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": bos,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": False,
        },
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_bin(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    _write(folder, tensors, shards, "pytorch_model", "bin", torch.save)


def write_safetensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    _write(folder, tensors, shards, "model", "safetensors", save_file)


def _write(folder, tensors, shards, stem, suffix, save) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return
    names = list(tensors)
    weight_map = {}
    for at in range(shards):
        file = f"{stem}-{at + 1:05}-of-{shards:05}.{suffix}"
        part = {name: tensors[name] for name in names[at::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    write_json(folder / f"{stem}.{suffix}.index.json", index)


def published_clip(seed: int = 0) -> dict[str, torch.Tensor]:
    """A random tower under the names of CLIP's own checkpoint, with its constant."""
    config = CLIPVisionConfig(**VISION)
    torch.manual_seed(seed)
    tensors = {
        f"vision_model.{name}": torch.randn_like(tensor) * 0.1
        for name, tensor in CLIPVisionModel(config).state_dict().items()
    }
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return tensors


def published_projector(width: int, prefix: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (width, 32), "0.bias": (width,), "2.weight": (width, width)}
    shapes["2.bias"] = (width,)
    return {
        f"{prefix}mm_projector.{name}": torch.randn(*shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }


def published_llava_crystal(
    *, tower: bool = True, head: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and tensors in the layout of LLM360/CrystalChat-7B-Web2Code."""
    config = crystal_config(vocab_size=416)
    tensors = published_crystal(config)
    tensors |= published_projector(config.n_embd, "transformer.")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    if tower:
        prefix = "transformer.vision_tower.vision_tower."
        tensors |= {prefix + name: tensor for name, tensor in published_clip().items()}
    if not head:
        del tensors["lm_head.weight"]
    raw = config.to_dict() | LLAVA
    for field in ("dtype", "transformers_version", "tie_word_embeddings", "_name_or_path"):
        raw.pop(field, None)
    raw |= {
        "model_type": "llava_crystal",
        "architectures": ["LlavaCrystalForCausalLM"],
        "torch_dtype": "float16",
    }
    return raw, {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def published_llava_llama(
    *, dtype: torch.dtype = torch.float32
) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and tensors in the layout of liuhaotian/llava-v1.5-7b: no tower inside."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_theta=10000.0,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    tensors = {name: torch.randn_like(t) * 0.2 for name, t in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors |= published_projector(64, "model.")
    raw = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("rope_parameters", "dtype", "transformers_version", "layer_types")
    }
    raw |= {key: value for key, value in LLAVA.items() if key != "auto_map"}
    raw |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    raw |= {"rope_scaling": None, "rope_theta": 10000.0}
    return raw, {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_tower(folder: Path) -> None:
    """A folder of the tower alone, text half included, as CLIP is published."""
    tensors = published_clip() | {"text_model.embeddings.token_embedding.weight": torch.ones(4, 4)}
    tensors |= {"logit_scale": torch.tensor(1.0), "visual_projection.weight": torch.ones(4, 32)}
    write_safetensors(folder, tensors)
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": VISION})
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def llava_state_dict(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA-layout tensors under the names of `LlavaForConditionalGeneration`."""
    state, text = {}, {}
    for name, tensor in published.items():
        if name.endswith((".bias", "inv_freq", "masked_bias", "position_ids")) and (
            ".attn.bias" in name or "masked" in name or "inv_freq" in name or "_ids" in name
        ):
            continue
        if "mm_projector" in name:
            number, kind = name.split(".")[-2:]
            linear = {"0": "linear_1", "2": "linear_2"}[number]
            state[f"model.multi_modal_projector.{linear}.{kind}"] = tensor
        elif "vision_model." in name:
            state["model.vision_tower." + name.split("vision_model.")[1]] = tensor
        else:
            text[name] = tensor
    for name, tensor in crystal_state_dict(text).items():
        inside = name.removeprefix("model.")
        state[name if name == "lm_head.weight" else f"model.language_model.{inside}"] = tensor
    return state
