"""The one multimodal assembly: a vision tower, a two-layer projector and a language model.

Owns which towers are known, what each needs (pixels, CLS token, feature layer), and how a
`LlavaForConditionalGeneration` is described and put together over any registered text model. The
app and the trainer both build with this. Knows nothing about files, tokenizers or prompts.

Papers: LLaVA-1.5 (arXiv 2310.03744), CLIP (2103.00020), SigLIP (2303.15343), DINOv2 (2304.07193).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import torch
from PIL.Image import Resampling
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from w2c_tui.core.errors import CheckpointError
from w2c_tui.core.image import CLIP_MEAN, CLIP_STD, HALF, ImageSpec
from w2c_tui.models import crystal

crystal.register()

SelectStrategy = Literal["default", "full"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Whether the first of a tower's features is a summary of the image (CLS) and no patch.
_HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False, "dinov2": True}
# Which hidden state holds the features: LLaVA takes the last but one of towers that were trained
# on captions, and DINOv2's last one, before its final norm.
_FEATURE_LAYER = {"clip_vision_model": -2, "siglip_vision_model": -2, "dinov2": -1}


class Tower(msgspec.Struct, frozen=True, kw_only=True):
    """A published vision tower: its name on the hub, its configuration, the pixels it expects."""

    name: str
    config: dict[str, Any]
    image: ImageSpec

    def vision_config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(**self.config)


def _clip(name: str, size: int) -> Tower:
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": size,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    image = ImageSpec(size=size, aspect="crop", mean=CLIP_MEAN, std=CLIP_STD)
    return Tower(name=name, config=config, image=image)


def _dinov2(name: str, hidden_size: int, num_heads: int) -> Tower:
    config = {
        "model_type": "dinov2",
        "hidden_size": hidden_size,
        "num_hidden_layers": 12,
        "num_attention_heads": num_heads,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    image = ImageSpec(
        size=224, aspect="crop", mean=_IMAGENET_MEAN, std=_IMAGENET_STD, shortest_edge=256
    )
    return Tower(name=name, config=config, image=image)


_SIGLIP = Tower(
    name="google/siglip-so400m-patch14-384",
    config={
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    image=ImageSpec(size=384, aspect="stretch", mean=HALF, std=HALF),
)

TOWERS: dict[str, Tower] = {
    tower.name: tower
    for tower in (
        _clip("openai/clip-vit-large-patch14", 224),
        _clip("openai/clip-vit-large-patch14-336", 336),
        _SIGLIP,
        _dinov2("facebook/dinov2-small", 384, 6),
        _dinov2("facebook/dinov2-base", 768, 12),
    )
}
"""The towers whose configuration needs no network. DINOv2 takes any size: replace `image.size`."""


def is_known_tower(vision_config: PreTrainedConfig) -> bool:
    """Whether images for this tower are one square that `ImageSpec` describes."""
    return vision_config.model_type in _HAS_CLS


def has_cls_token(vision_config: PreTrainedConfig) -> bool:
    """Whether feature 0 of this tower is no patch. Raises CheckpointError for other towers."""
    if not is_known_tower(vision_config):
        raise CheckpointError(
            f"A vision tower of model_type {vision_config.model_type!r} is not supported.",
            hint=f"Supported: {', '.join(_HAS_CLS)}.",
        )
    return _HAS_CLS[vision_config.model_type]


def num_image_tokens(
    vision_config: PreTrainedConfig, image_size: int, select_strategy: SelectStrategy
) -> int:
    """Features that one square image of `image_size` pixels becomes."""
    if image_size % vision_config.patch_size and vision_config.model_type == "dinov2":
        raise CheckpointError(
            f"Images of {image_size} px are no whole number of {vision_config.patch_size} px "
            "patches.",
            hint=f"Take a multiple of {vision_config.patch_size}.",
        )
    patches = (image_size // vision_config.patch_size) ** 2
    return patches + (has_cls_token(vision_config) and select_strategy == "full")


def llava_config(
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    *,
    image_token_id: int,
    image_size: int | None = None,
    select_strategy: SelectStrategy | None = None,
    feature_layer: int | list[int] | None = None,
    projector_hidden_act: str = "gelu",
) -> LlavaConfig:
    """Describe a LLaVA over any registered text model and a CLIP, SigLIP or DINOv2 tower.

    image_token_id: the id that stands for one image feature; it must be below the vocabulary size.
    image_size: pixels of a side, None for the tower's own. select_strategy: "default" drops the
    first feature, "full" keeps all; None drops exactly a CLS token. feature_layer: index of the
    tower's hidden states, None for what suits the tower.
    """
    has_cls = has_cls_token(vision_config)
    strategy: SelectStrategy = select_strategy or ("default" if has_cls else "full")
    if strategy == "default" and not has_cls:
        raise CheckpointError(
            f"vision_feature_select_strategy 'default' drops the first feature, but "
            f"{vision_config.model_type} has no CLS token there.",
            hint="Use 'full' for this tower.",
        )
    if not 0 <= image_token_id < text_config.vocab_size:
        raise CheckpointError(
            f"The image token id {image_token_id} is outside the vocabulary of "
            f"{text_config.vocab_size}.",
            hint="Enlarge the embeddings of the language model first.",
        )
    size = image_size or vision_config.image_size
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=num_image_tokens(vision_config, size, strategy),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=(
            _FEATURE_LAYER[vision_config.model_type] if feature_layer is None else feature_layer
        ),
        projector_hidden_act=projector_hidden_act,
        tie_word_embeddings=bool(getattr(text_config, "tie_word_embeddings", False)),
    )


def assemble(
    language_model: PreTrainedModel, vision_tower: PreTrainedModel, config: LlavaConfig
) -> LlavaForConditionalGeneration:
    """Put a causal LM and a tower together under a new, random projector.

    The parts are taken as they are, not copied; the projector gets the language model's dtype and
    device. `config` comes from `llava_config` with the parts' own configurations.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    example = language_model.get_input_embeddings().weight
    projector = model.model.multi_modal_projector.to_empty(device=example.device)
    projector.to(example.dtype)
    for linear in (projector.linear_1, projector.linear_2):
        linear.reset_parameters()
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def processor_for(
    config: LlavaConfig, tokenizer: PreTrainedTokenizerFast, image: ImageSpec
) -> LlavaProcessor:
    """The Hugging Face processor that prepares pixels as `image` says, for other programs.

    It has no word for a `pad_color` other than the mean colour; this project reads the spec itself.
    """
    shared: dict[str, Any] = {
        "resample": Resampling[image.resample.upper()],
        "rescale_factor": image.rescale_factor,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }
    square = {"height": image.size, "width": image.size}
    vision_config: Any = config.vision_config
    image_processor: Any
    if image.aspect == "stretch":
        image_processor = SiglipImageProcessorPil(size=square, **shared)
    elif image.aspect == "pad":
        edge = {"shortest_edge": image.size}
        image_processor = LlavaImageProcessorPil(do_pad=True, size=edge, crop_size=square, **shared)
    else:
        edge = {"shortest_edge": image.shortest_edge or image.size}
        image_processor = CLIPImageProcessorPil(size=edge, crop_size=square, **shared)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(has_cls_token(vision_config)),
        chat_template=tokenizer.chat_template,
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
    )
