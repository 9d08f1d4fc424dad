"""The model that a recipe trains: looked at without weights, built, and put under a loss.

Owns how parts come together (language model, tower, projector, image token, adapters), which
parameters train, and what is written at the end. Knows nothing about data, batches or the loop.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from trainer import nano, tiny
from trainer.recipes import Recipe
from w2c_tui.core.config import paths
from w2c_tui.core.errors import CheckpointError, ConfigError
from w2c_tui.core.image import ImageSpec
from w2c_tui.core.locate import bundled_folder, locate
from w2c_tui.core.prompt import TEMPLATES, AnyTemplate
from w2c_tui.models import bundled, llava
from w2c_tui.models.checkpoint import (
    IMAGE_TOKEN,
    PROJECTOR_NAME,
    Checkpoint,
    CheckpointCard,
    TowerSource,
    load_checkpoint,
    open_checkpoint,
    open_tower,
    read_projector,
    write_model,
    write_projector,
)
from w2c_tui.models.tokenize import PromptTokenizer

Report = Callable[[str, int, int], None]
PADDED_VOCABULARY = 64
"""Embeddings grow to a multiple of this, which suits the matrix units of GPUs."""


def _silent(phase: str, done: int, total: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a recipe's model is, without its weights.

    `config`: of the whole. `checkpoint`: the language model, or the multimodal model to go on from,
    in which case there is no `tower`. `tokens_per_image`: features that an image becomes.
    """

    config: LlavaConfig
    checkpoint: Checkpoint
    tower: TowerSource | None
    tokenizer: PromptTokenizer
    template: AnyTemplate
    image: ImageSpec
    tokens_per_image: int
    family: str

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def hf_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer as it is saved beside the weights."""
        tokenizer: Any = self.tokenizer.tokenizer
        return tokenizer


def describe(recipe: Recipe, report: Report = _silent, *, weights: bool = True) -> Parts:
    """Look at everything that `recipe` names. Reads no weights, and fetches none that are listed.

    Without `weights` the language model need not have any, which is enough for a dry run. Raises
    ConfigError, CheckpointError, ModelNotFoundError or DownloadError.
    """
    source = nano.resolve(tiny.resolve(recipe.model), report)
    source = locate(source, paths().models, report)
    checkpoint = open_checkpoint(source, weights=weights, report=report)
    tokenizer: Any = checkpoint.tokenizer
    tower = None
    config: LlavaConfig
    if isinstance(checkpoint.config, LlavaConfig):
        config = checkpoint.config
        if checkpoint.card.image is None:
            raise CheckpointError(
                f"{recipe.model} prepares images in a way that is not known here.",
                hint="Take a LLaVA model with a CLIP, SigLIP or DINOv2 tower.",
            )
        image = checkpoint.card.image
        _refuse_other_features(recipe, config, image)
    elif hasattr(checkpoint.config, "vision_config"):
        raise CheckpointError(
            f"{recipe.model} is a multimodal model of another family than LLaVA.",
            hint="Name a language model and a --vision-tower, or a LLaVA model.",
        )
    else:
        if not recipe.vision_tower:
            raise ConfigError(
                f"{recipe.model} is a language model and the recipe names no vision tower.",
                hint="Add --vision-tower, for example openai/clip-vit-large-patch14-336.",
            )
        tower = open_tower(tiny.resolve(recipe.vision_tower), report=report)
        image = tower.image
        if recipe.image_size is not None:
            image = msgspec.structs.replace(image, size=recipe.image_size, shortest_edge=None)
        config = _llava_config(recipe, checkpoint, tower, tokenizer, image.size)
    if recipe.image_aspect not in ("tower", image.aspect):
        image = msgspec.structs.replace(image, aspect=recipe.image_aspect, shortest_edge=None)
    vision_config: Any = config.vision_config
    prompt_tokenizer = PromptTokenizer(tokenizer, IMAGE_TOKEN)
    return Parts(
        config=config,
        checkpoint=checkpoint,
        tower=tower,
        tokenizer=prompt_tokenizer,
        template=_template(recipe, tokenizer, prompt_tokenizer),
        image=image,
        tokens_per_image=llava.num_image_tokens(
            vision_config, image.size, config.vision_feature_select_strategy
        ),
        family=llava_family(checkpoint, config),
    )


def llava_family(checkpoint: Checkpoint, config: LlavaConfig) -> str:
    """The family that the card of the result names."""
    if isinstance(checkpoint.config, LlavaConfig):
        return checkpoint.card.family
    text_config: Any = config.text_config
    return (
        "llava_crystal"
        if text_config.model_type == "crystalcoder"
        else (f"llava_{text_config.model_type}")
    )


def _refuse_other_features(recipe: Recipe, config: LlavaConfig, image: ImageSpec) -> None:
    layer: Any = config.vision_feature_layer
    layers = tuple(layer) if isinstance(layer, list | tuple) else (layer,)
    for name, asked, found in (
        ("feature_layer", recipe.feature_layer or None, layers),
        ("image_size", recipe.image_size, image.size),
    ):
        if asked is not None and asked != found:
            raise ConfigError(
                f"{recipe.model} was made with {name} {found}, the recipe says {asked}.",
                hint=f"Leave out {name}, or start from the language model.",
            )


def _llava_config(
    recipe: Recipe, checkpoint: Checkpoint, tower: TowerSource, tokenizer: Any, image_size: int
) -> LlavaConfig:
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text_config: Any = checkpoint.config
    text_config = type(text_config).from_dict(text_config.to_dict())
    if image_token_id >= text_config.vocab_size:
        rows = -(-(image_token_id + 1) // PADDED_VOCABULARY) * PADDED_VOCABULARY
        text_config.vocab_size = rows
    layers = list(recipe.feature_layer)
    return llava.llava_config(
        text_config,
        tower.config,
        image_token_id=image_token_id,
        image_size=image_size,
        feature_layer=layers if len(layers) > 1 else layers[0] if layers else None,
    )


def _template(recipe: Recipe, tokenizer: Any, prompt_tokenizer: PromptTokenizer) -> AnyTemplate:
    if recipe.template in TEMPLATES:
        return TEMPLATES[recipe.template]
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{recipe.model} has no chat template.", hint="Use --template v1, or plain in stage 1."
        )
    return prompt_tokenizer.chat_template(tokenizer.chat_template, IMAGE_TOKEN)


# --- Building -------------------------------------------------------------------------------------


def build(recipe: Recipe, parts: Parts, report: Report = _silent) -> LlavaForConditionalGeneration:
    """The model with its weights on the CPU, the right parameters set to train, in their types.

    Under DeepSpeed in bf16 everything is bf16 (it keeps float32 copies of what trains); otherwise
    what trains is float32 and what is frozen has the precision of the computation.
    """
    half = recipe.precision == "bf16"
    frozen_text = recipe.stage == "pretrain" or recipe.lora_rank > 0
    dtype = torch.bfloat16 if half and (recipe.zero_stage or frozen_text) else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _assembled(recipe, parts, dtype, report)
    if recipe.projector:
        _put_projector(model, recipe.projector)
    # A model's own sampling settings may be invalid, which would only show when it is saved.
    ids = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    model.config.use_cache = False
    model.requires_grad_(False)
    for part in trained_parts(model, recipe):
        part.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not recipe.zero_stage:
            frozen = torch.bfloat16 if half else torch.float32
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
    return model


def trained_parts(model: LlavaForConditionalGeneration, recipe: Recipe) -> Iterator[nn.Module]:
    """The modules of which every parameter trains; adapters come on top."""
    yield model.model.multi_modal_projector
    if recipe.stage == "finetune" and not recipe.lora_rank:
        yield model.model.language_model
        yield model.lm_head


def _assembled(
    recipe: Recipe, parts: Parts, dtype: torch.dtype, report: Report
) -> LlavaForConditionalGeneration:
    loaded = load_checkpoint(
        parts.checkpoint, dtype=dtype, quantization=recipe.quantization, report=report
    ).model
    if parts.tower is None:
        assert isinstance(loaded, LlavaForConditionalGeneration)
        return loaded
    text_config: Any = parts.config.text_config
    _grow_embeddings(loaded, text_config.vocab_size)
    return llava.assemble(loaded, parts.tower.load(dtype, report), parts.config)


def _grow_embeddings(language_model: Any, rows: int) -> None:
    """New rows are the mean of all, so that a token never trained is never the likeliest."""
    embeddings = language_model.get_input_embeddings()
    before = embeddings.weight.shape[0]
    if rows <= before:
        return
    language_model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (
        language_model.get_input_embeddings(),
        language_model.get_output_embeddings(),
    ):
        weight = layer.weight.data
        weight[before:] = weight[:before].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def _put_projector(model: LlavaForConditionalGeneration, source: str) -> None:
    projector = model.model.multi_modal_projector
    projector.load_state_dict(fitting_projector(source, projector))


def fitting_projector(source: str, projector: nn.Module) -> dict[str, torch.Tensor]:
    """The weights in `source` for `projector`. Raises CheckpointError if they do not fit it."""
    weights = read_projector(source)
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, the model needs {tuple(parameter.shape)}"
        for name, parameter in projector.named_parameters()
        if weights[name].shape != parameter.shape
    ]
    if wrong:
        raise CheckpointError(
            f"The projector {source} does not fit this tower and language model: "
            + "; ".join(wrong)
            + ".",
            hint="Take the projector that was trained for this pair.",
        )
    return weights


def add_adapters(model: LlavaForConditionalGeneration, recipe: Recipe) -> Any:
    """`model` with LoRA adapters on every linear layer of the language model's blocks (peft).

    The adapters that a bundled model has are trained further. Raises ConfigError where they cannot.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=r"model\.language_model\.layers\..*proj",
        bias="none",
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            # Autocast gives products the right type; peft's own cast to the type of the adapters
            # would first blow all activations up to float32.
            module.cast_input_dtype_enabled = recipe.precision != "bf16" or bool(recipe.zero_stage)
    if (folder := bundled_folder(recipe.model)) is not None:
        _take_over_adapters(adapted, recipe, folder)
    for part in trained_parts(model, recipe):
        part.requires_grad_(True)
    return adapted


def _take_over_adapters(adapted: Any, recipe: Recipe, folder: Path) -> None:
    """Put the adapters of the bundled model in `folder` in place of new ones.

    What is under them is then the language model as it was before them, to the bit.
    """
    before = bundled.adapters_of(folder)
    rank = max((len(adapter["A"]) for adapter in before.values()), default=0)
    if rank > recipe.lora_rank:
        raise ConfigError(
            f"{recipe.model} has adapters of rank {rank}, more than --lora-rank "
            f"{recipe.lora_rank} can hold.",
            hint=f"Train them further with --lora-rank {rank}.",
        )
    if before and recipe.quantization != "none":
        raise ConfigError(
            f"The adapters of {recipe.model} are over weights that are not quantised.",
            hint="Leave out --quantization: the model is small.",
        )
    source = locate(bundled.describe(folder).language_model, paths().models, _silent)
    base = open_checkpoint(source).tensors or {}
    scale = recipe.lora_alpha / recipe.lora_rank
    with torch.no_grad():
        for name, adapter in before.items():
            layer = adapted.get_submodule(f"base_model.model.model.language_model.{name}")
            layer.base_layer.weight.copy_(base[f"model.{name}.weight"][...])
            layer.lora_A["default"].weight[: len(adapter["A"])].copy_(adapter["A"])
            layer.lora_B["default"].weight[:, : adapter["B"].shape[1]].copy_(adapter["B"] / scale)


# --- Writing --------------------------------------------------------------------------------------


def card(recipe: Recipe, parts: Parts, data_fingerprint: str) -> CheckpointCard:
    """`w2c.json` of the result."""
    return CheckpointCard(
        family=parts.family,
        template=recipe.template,
        image=parts.image,
        recipe=msgspec.to_builtins(recipe),
        data_fingerprint=data_fingerprint,
    )


def write_result(
    model: LlavaForConditionalGeneration,
    out: Path,
    recipe: Recipe,
    parts: Parts,
    *,
    state_dict: dict[str, torch.Tensor],
    data_fingerprint: str,
) -> Path:
    """Write the standard folder `out`/model, after stage 1 with the projector file beside it."""
    prefix = "model.multi_modal_projector."
    if recipe.stage == "pretrain":
        write_projector(
            {
                name.removeprefix(prefix): tensor.contiguous()
                for name, tensor in state_dict.items()
                if name.startswith(prefix)
            },
            out / PROJECTOR_NAME,
        )
    return write_model(
        model,
        out / "model",
        tokenizer=parts.hf_tokenizer,
        card=card(recipe, parts, data_fingerprint),
        state_dict=state_dict,
    )


def rehearse_writing(recipe: Recipe, parts: Parts) -> None:
    """Write everything of the result but its weights, and throw it away.

    What cannot be saved has to fail here and not after days of training. Raises CheckpointError.
    """
    folder = Path(tempfile.mkdtemp(prefix="w2c-rehearsal-"))
    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(parts.config)
        write_model(
            model,
            folder / "model",
            tokenizer=parts.hf_tokenizer,
            card=card(recipe, parts, ""),
            state_dict={"lm_head.weight": torch.zeros(1)},
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"The result of this run could not be saved: {error}",
            hint="Check the tokenizer and the configuration of the model.",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
