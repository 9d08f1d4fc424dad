"""What a run is: every hyperparameter in one typed struct, and the named recipes.

A field is at once a key of a YAML or TOML file, a command-line flag and its help. Precedence: flag,
then file, then the named recipe. What follows from other fields (gradient accumulation, DeepSpeed's
configuration) is computed and cannot be given. Knows nothing about models, data or torch.

Published hyperparameters: Web2Code (arXiv 2406.20098) and LLaVA-1.5 (2310.03744).
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from w2c_tui.core.errors import ConfigError

Stage = Literal["pretrain", "finetune"]
Positive = Annotated[int, Meta(ge=1)]


class Recipe(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False
):
    """A complete description of one stage of training."""

    name: Annotated[str, Meta(description="The recipe's name.")]
    stage: Annotated[Stage, Meta(description="What is trained.")]

    # The model
    model: Annotated[
        str,
        Meta(
            min_length=1,
            description="Language model, or a multimodal one to go on from: folder or OWNER/NAME.",
        ),
    ]
    vision_tower: Annotated[
        str, Meta(description="CLIP, SigLIP or DINOv2 tower, if the model has none yet.")
    ] = ""
    projector: Annotated[
        str,
        Meta(description="Projector of stage 1: projector.safetensors, or an mm_projector.bin."),
    ] = ""
    feature_layer: Annotated[
        tuple[int, ...],
        Meta(description="The tower's hidden state(s) to take; its usual one if not given."),
    ] = ()
    image_size: Annotated[
        Annotated[int, Meta(ge=14, le=2048)] | None,
        Meta(description="Pixels of a side; the tower's own if not given."),
    ] = None
    image_aspect: Annotated[
        Literal["tower", "pad", "crop", "stretch"],
        Meta(description="What happens to pictures that are not square."),
    ] = "tower"
    template: Annotated[
        Literal["plain", "v1", "chat"],
        Meta(description="Conversation format; chat is the tokenizer's own template."),
    ] = "v1"

    # The data
    data: Annotated[str, Meta(description="Folder that trainer.prepare wrote.")] = ""
    max_length: Annotated[
        int, Meta(ge=16, description="Most tokens of a sample, with images expanded.")
    ] = 2048

    # Optimisation
    global_batch: Annotated[int, Meta(ge=1, description="Samples per optimizer step.")]
    per_device_batch: Annotated[int, Meta(ge=1, description="Samples per device at a time.")]
    learning_rate: Annotated[float, Meta(gt=0, description="Peak learning rate.")]
    epochs: Annotated[int, Meta(ge=1, description="Passes over the data.")] = 1
    max_steps: Annotated[int, Meta(ge=0, description="Stop after this many steps; 0: all.")] = 0
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Meta(description="Learning rate after the warmup.")
    ] = "cosine"
    warmup_ratio: Annotated[
        float, Meta(ge=0, lt=1, description="Share of the steps that warm up.")
    ] = 0.03
    weight_decay: Annotated[float, Meta(ge=0, description="AdamW's weight decay.")] = 0.0
    max_grad_norm: Annotated[float, Meta(gt=0, description="Clip gradients to this norm.")] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1, description="Same seed, same run.")] = 0
    length_grouped: Annotated[
        bool, Meta(description="Put samples of like length into one step, by real token counts.")
    ] = True
    batching: Annotated[
        Literal["packed", "padded"],
        Meta(description="Lay samples end to end without padding, or pad them to the longest."),
    ] = "packed"

    # LoRA
    lora_rank: Annotated[int, Meta(ge=0, description="Train adapters of this rank; 0: all.")] = 0
    lora_alpha: Annotated[int, Meta(ge=1, description="Scale of the adapters.")] = 256
    lora_dropout: Annotated[float, Meta(ge=0, lt=1, description="Dropout of adapters.")] = 0.05
    quantization: Annotated[
        Literal["none", "4bit"],
        Meta(description="Hold the language model in 4 bit under its adapters (QLoRA)."),
    ] = "none"

    # Precision, memory, speed
    precision: Annotated[
        Literal["bf16", "fp32"], Meta(description="Number format of the computation.")
    ] = "bf16"
    zero_stage: Annotated[
        Literal[0, 2, 3], Meta(description="DeepSpeed's ZeRO stage; 0: without DeepSpeed.")
    ] = 0
    offload: Annotated[
        Literal["none", "cpu", "nvme"],
        Meta(description="Where ZeRO keeps optimizer states, and in stage 3 parameters."),
    ] = "none"
    offload_folder: Annotated[str, Meta(description="Folder on the disk for offload nvme.")] = ""
    gradient_checkpointing: Annotated[
        bool, Meta(description="Compute activations twice instead of keeping them.")
    ] = False
    cache_features: Annotated[
        bool,
        Meta(
            description="Compute what the vision tower makes of each image once, and keep it "
            "beside the data; for language models of at most half a billion parameters."
        ),
    ] = False
    attn: Annotated[
        Literal["auto", "sdpa", "flash_attention_2", "eager"],
        Meta(description="Attention; auto is torch's own, sample by sample where packed."),
    ] = "auto"
    workers: Annotated[int, Meta(ge=0, description="Processes that load data, per device.")] = 2

    # The run
    out: Annotated[str, Meta(description="Folder of the run.")] = ""
    save_every: Annotated[int, Meta(ge=0, description="Steps between checkpoints; 0: none.")] = 500
    keep_checkpoints: Annotated[int, Meta(ge=1, description="Checkpoints to keep.")] = 2
    log_to: Annotated[
        Literal["none", "tensorboard", "wandb"], Meta(description="Experiment logging.")
    ] = "none"
    sample_every: Annotated[
        int, Meta(ge=0, description="Steps between pages written for the report; 0: never.")
    ] = 500
    stall_timeout_s: Annotated[
        float, Meta(ge=0, description="Stop when a step takes longer, in seconds; 0: never.")
    ] = 1800.0

    def gradient_accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step. Raises ConfigError if the batch does not divide."""
        share = self.per_device_batch * world_size
        if self.global_batch % share:
            raise ConfigError(
                f"A global batch of {self.global_batch} does not divide into {world_size} "
                f"device(s) times {self.per_device_batch} samples.",
                hint="Choose --per-device-batch so that per-device batch times devices "
                f"divides {self.global_batch}.",
            )
        return self.global_batch // share

    def steps(self, num_samples: int) -> int:
        """Optimizer steps over `num_samples`; the last step of an epoch is filled up."""
        steps = math.ceil(num_samples / self.global_batch) * self.epochs
        return min(steps, self.max_steps) if self.max_steps else steps

    def warmup_steps(self, num_steps: int) -> int:
        return math.ceil(num_steps * self.warmup_ratio)


# --- Named recipes --------------------------------------------------------------------------------

CLIP_336 = "openai/clip-vit-large-patch14-336"


def crystal_chat_7b(stage: Stage) -> Recipe:
    """CrystalChat-7B as Web2Code trained it, on 16 devices of 40 GB."""
    if stage == "pretrain":
        return _pretrain("crystal-chat-7b", "LLM360/CrystalChat")
    return _finetune("crystal-chat-7b", "LLM360/CrystalChat")


def llava_15_7b(stage: Stage) -> Recipe:
    """LLaVA-1.5 over Vicuna-7B."""
    if stage == "pretrain":
        return _pretrain("llava-1.5-7b", "lmsys/vicuna-7b-v1.5")
    return _finetune("llava-1.5-7b", "lmsys/vicuna-7b-v1.5")


def smollm2_135m(stage: Stage) -> Recipe:
    """A small model for one GPU, or a patient CPU: DINOv2-S at 224 px, two of its layers."""
    small: dict[str, Any] = {
        "vision_tower": "facebook/dinov2-small",
        "feature_layer": (4, -1),
        "image_aspect": "pad",
        "zero_stage": 0,
    }
    model = "smollm2-135m"
    if stage == "pretrain":
        return _pretrain("smollm2-135m", model, **small, global_batch=64, per_device_batch=16)
    return _finetune(
        "smollm2-135m",
        model,
        **small,
        template="chat",
        global_batch=32,
        per_device_batch=8,
        learning_rate=2e-4,
        gradient_checkpointing=False,
    )


def w2c_nano(stage: Stage) -> Recipe:
    """The bundled model, from its packaged parts: SmolLM2-135M, DINOv2-S at 224 px, two layers.

    Stage 1 learns short captions of composed pages (`captions.json`), stage 2 their HTML.
    """
    small: dict[str, Any] = {"vision_tower": "", "image_aspect": "tower", "zero_stage": 0}
    if stage == "pretrain":
        return _pretrain("w2c-nano", "nano:parts", **small, global_batch=64, per_device_batch=16)
    return _finetune(
        "w2c-nano",
        "nano:parts",
        **small,
        template="chat",
        global_batch=32,
        per_device_batch=8,
        learning_rate=3e-4,
        gradient_checkpointing=False,
    )


def _pretrain(name: str, model: str, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "vision_tower": CLIP_336,
        "template": "plain",
        "image_aspect": "crop",
        "global_batch": 256,
        "per_device_batch": 8,
        "learning_rate": 1e-3,
        "zero_stage": 2,
    }
    return Recipe(name=name, stage="pretrain", model=model, **(fields | changes))


def _finetune(name: str, model: str, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "vision_tower": CLIP_336,
        "template": "v1",
        "image_aspect": "pad",
        "global_batch": 128,
        "per_device_batch": 8,
        "learning_rate": 2e-5,
        "zero_stage": 3,
        "gradient_checkpointing": True,
    }
    return Recipe(name=name, stage="finetune", model=model, **(fields | changes))


def _debug(recipe: Recipe, family: str) -> Recipe:
    """The same stage over tiny random models, for one minute of CPU."""
    return msgspec.structs.replace(
        recipe,
        name=f"{recipe.name}-debug",
        model=f"debug:{family}",
        vision_tower="debug:clip",
        feature_layer=(),
        template="plain" if recipe.stage == "pretrain" else "v1",
        max_length=512,
        global_batch=8,
        per_device_batch=4,
        learning_rate=1e-2 if recipe.stage == "pretrain" else 3e-3,
        precision="fp32",
        zero_stage=0,
        gradient_checkpointing=False,
        workers=0,
    )


RECIPES: dict[str, Callable[[Stage], Recipe]] = {
    "crystal-chat-7b": crystal_chat_7b,
    "llava-1.5-7b": llava_15_7b,
    "smollm2-135m": smollm2_135m,
    "w2c-nano": w2c_nano,
    "crystal-chat-7b-debug": lambda stage: _debug(crystal_chat_7b(stage), "crystalcoder"),
    "llava-1.5-7b-debug": lambda stage: _debug(llava_15_7b(stage), "llama"),
    "smollm2-135m-debug": lambda stage: _debug(smollm2_135m(stage), "llama"),
    "w2c-nano-debug": lambda stage: _debug(w2c_nano(stage), "llama"),
    "debug": lambda stage: msgspec.structs.replace(
        _debug(llava_15_7b(stage), "llama"), name="debug"
    ),
}


def named(name: str, stage: Stage) -> Recipe:
    """The recipe called `name`. Raises ConfigError listing what there is."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        raise ConfigError(
            f"There is no recipe {name!r}.",
            hint=f"Did you mean {close[0]}?" if close else f"Known: {', '.join(RECIPES)}.",
        )
    return RECIPES[name](stage)


# --- Overrides ------------------------------------------------------------------------------------

_FIXED = ("name", "stage")


def resolve(
    name: str, stage: Stage, *, file: Path | None = None, flags: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe `name` with the fields of `file` (YAML or TOML) and `flags` put over it.

    Raises ConfigError that names the source and the field.
    """
    values = msgspec.to_builtins(named(name, stage))
    recipe = named(name, stage)
    for source, given in (
        (str(file), _read(file) if file is not None else {}),
        ("the command line", dict(flags or {})),
    ):
        for key in given:
            if key in _FIXED or key not in Recipe.__struct_fields__:
                close = difflib.get_close_matches(key, Recipe.__struct_fields__, n=1)
                raise ConfigError(
                    f"{key} in {source} is nothing that a recipe can be given.",
                    hint=f"Did you mean {close[0]}?" if close else "See --help.",
                )
        values |= given
        try:
            recipe = msgspec.convert(values, Recipe, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"A value in {source} is wrong: {str(error).replace('$.', '')}.",
                hint="See --help for what is possible.",
            ) from error
    return checked(recipe)


def checked(recipe: Recipe) -> Recipe:
    """`recipe` if its fields fit together. Raises ConfigError for what could only fail later."""

    def refuse(problem: str, hint: str) -> ConfigError:
        return ConfigError(problem, hint=hint)

    if recipe.offload != "none" and not recipe.zero_stage:
        raise refuse("offload needs DeepSpeed.", "Set --zero-stage 2 or 3.")
    if recipe.offload == "nvme" and not recipe.offload_folder:
        raise refuse("offload nvme needs a folder.", "Name one with --offload-folder.")
    if recipe.offload == "nvme" and recipe.zero_stage != 3:
        raise refuse("offload nvme works in ZeRO stage 3 only.", "Set --zero-stage 3.")
    if recipe.lora_rank and recipe.stage == "pretrain":
        raise refuse(
            "Stage 1 trains the projector only, there is nothing for adapters.",
            "Leave --lora-rank to stage 2.",
        )
    if recipe.quantization != "none" and not recipe.lora_rank:
        raise refuse("4 bit weights cannot be trained.", "Add --lora-rank, for example 64.")
    if recipe.quantization != "none" and recipe.zero_stage == 3:
        raise refuse("ZeRO stage 3 cannot split 4 bit weights.", "Set --zero-stage 0 or 2.")
    if recipe.attn == "flash_attention_2" and recipe.precision == "fp32":
        raise refuse("flash_attention_2 computes in 16 bit only.", "Set --precision bf16.")
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        loads = yaml.safe_load if path.suffix in (".yaml", ".yml") else tomllib.loads
        content = loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read: {' '.join(str(error).split())}", hint="Correct it; see --help."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no table of fields.", hint="Write field: value lines.")
    return content
