"""Every setting and every path, each in one place.

A setting is a field of one of the structs below; its constraint and its description stand beside
it and serve the configuration file, the environment, the command line's help and the checks alike.
Precedence: flag, then environment (`W2C_MODEL_DTYPE`), then `config.toml` (`[model] dtype`), then
the default. Unknown keys are errors. Knows nothing about who reads the settings.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import platformdirs
from msgspec import Meta

from w2c_tui.core.errors import ConfigError
from w2c_tui.core.image import ImageLimits

Quantization = Literal["none", "4bit", "8bit"]
FlashAttention = Literal["auto", "on", "off"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class LoadSpec(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """`[model]`: which model to load, and how."""

    name: Annotated[
        str, Meta(min_length=1, description="Folder, file, catalogue name or hub name OWNER/NAME.")
    ] = "w2c-nano"
    backend: Annotated[
        Literal["auto", "hf", "gguf", "openai"],
        Meta(
            description="What runs the model: hf is transformers, gguf is llama.cpp, openai is a "
            "server elsewhere; auto takes gguf for GGUF files where llama-cpp-python is installed."
        ),
    ] = "auto"
    base_url: Annotated[
        str,
        Meta(description="Address of an OpenAI-compatible server, for --backend openai."),
    ] = ""
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Meta(description="Number format of the weights; auto takes this machine's fastest."),
    ] = "auto"
    quantization: Annotated[
        Quantization, Meta(description="Quantise to 4 or 8 bit on loading (bitsandbytes).")
    ] = "none"
    device_map: Annotated[
        str,
        Meta(description="auto, balanced, balanced_low_0, sequential, or a device: cpu, cuda:0."),
    ] = "auto"
    max_memory: Annotated[
        dict[str, str] | None,
        Meta(description="Most memory to use per device, as DEVICE=SIZE (0=20GiB, cpu=30GiB)."),
    ] = None
    offload_folder: Annotated[
        str | None, Meta(description="Folder for weights that fit no device's memory.")
    ] = None
    attn: Annotated[
        Literal["sdpa", "flash_attention_2", "eager"] | None,
        Meta(description="Attention implementation; the model's default if not given."),
    ] = None
    trust_remote_code: Annotated[
        bool, Meta(description="Run Python code that comes with the model. It can do anything.")
    ] = False
    context: Annotated[
        int, Meta(ge=0, description="Most tokens of context; 0 is the model's own length.")
    ] = 0
    threads: Annotated[int, Meta(ge=0, description="CPU threads; 0 is one per core.")] = 0
    mmproj: Annotated[
        str | None,
        Meta(description="GGUF: the image encoder's file; found by itself beside the model."),
    ] = None
    n_gpu_layers: Annotated[
        int, Meta(ge=-1, description="GGUF: layers to put on GPUs; -1 is all of them.")
    ] = -1
    tensor_split: Annotated[
        tuple[Annotated[float, Meta(ge=0)], ...],
        Meta(description="GGUF: how much of the model each GPU takes, as in 3,1."),
    ] = ()
    main_gpu: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="GGUF: put the whole model on this one GPU."),
    ] = None
    flash_attn: Annotated[
        FlashAttention,
        Meta(description="GGUF: flash attention; auto is off on a CPU, and asks a GPU."),
    ] = "auto"
    cache_type: Annotated[
        CacheType,
        Meta(description="GGUF: number format of the key-value cache; q8_0 halves its memory."),
    ] = "f16"


class DeviceShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one device would hold of a model: a GPU's number, "cpu" or "disk"."""

    device: str
    modules: tuple[str, ...]
    num_bytes: int


class GenerationParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """`[generation]`: how to write an answer."""

    temperature: Annotated[
        float, Meta(ge=0, le=100, description="Randomness; 0 always takes the likeliest token.")
    ] = 0.2
    top_p: Annotated[
        float, Meta(gt=0, le=1, description="Sample among the likeliest that sum to this; 1: off.")
    ] = 1.0
    top_k: Annotated[
        int, Meta(ge=0, description="Sample among this many likeliest tokens; 0: off.")
    ] = 0
    repetition_penalty: Annotated[
        float, Meta(gt=0, le=10, description="Over 1 makes tokens that were used less likely.")
    ] = 1.0
    max_repeats: Annotated[
        int,
        Meta(
            ge=0,
            le=1000,
            description="A passage that was written this often in a row is not written again, as "
            "small models go round in circles; at least 3; 0: off.",
        ),
    ] = 8
    max_new_tokens: Annotated[int, Meta(ge=1, description="Longest answer in tokens.")] = 2048
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        Meta(description="Same seed, same answer; a new one each time if not given."),
    ] = None
    stop: Annotated[
        tuple[str, ...], Meta(description="End the answer before this text (repeatable).")
    ] = ()
    prompt_lookup: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="Tokens that may be guessed per step from what was written before "
            "(prompt lookup decoding); faster on repetitive pages, same text; 0: off.",
        ),
    ] = 0


# fmt: off
Quant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0",
    "q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]
# fmt: on


class ExportSpec(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """`[export]`: what `w2c export-gguf` writes."""

    quant: Annotated[
        Quant,
        Meta(description="How the language model's weights are stored."),
    ] = "q4_k_m"
    mmproj: Annotated[
        Literal["f16", "f32"], Meta(description="How the vision tower's weights are stored.")
    ] = "f16"
    clip_layout: Annotated[
        Literal["auto", "rolled", "last", "standard"],
        Meta(
            description="Where a tower with a CLS token keeps it: rolled is exact in this program, "
            "last is for other llama.cpp programs of today, standard for repaired ones."
        ),
    ] = "auto"
    verify: Annotated[bool, Meta(description="Compare the written files with the checkpoint.")] = (
        True
    )


class InterfaceSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """`[interface]`: how the full-screen application looks and which keys it has."""

    theme: Annotated[
        str, Meta(description="Name of a theme; empty is the one that was chosen last.")
    ] = ""
    pictures: Annotated[
        Literal["auto", "kitty", "sixel", "half-cells", "none"],
        Meta(description="How pictures are drawn; auto asks the environment."),
    ] = "auto"
    ascii: Annotated[
        bool | None, Meta(description="Draw with plain ASCII; by default where UTF-8 is missing.")
    ] = None
    keys: Annotated[
        dict[str, str],
        Meta(description='Other keys for commands, as in: keys = {send = "ctrl+s"}.'),
    ] = {}


class RenderSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """`[render]`: how pages are turned into pictures."""

    browser: Annotated[
        str,
        Meta(description="Chromium or Chrome to use: a path or a name; looked for if empty."),
    ] = ""
    width: Annotated[
        int, Meta(ge=16, le=8192, description="Width of the window in CSS pixels.")
    ] = 1280
    height: Annotated[
        int, Meta(ge=16, le=8192, description="Height of the window in CSS pixels.")
    ] = 800
    max_page_height: Annotated[
        int, Meta(ge=16, le=16_384, description="Longest page to picture, in CSS pixels.")
    ] = 16_000
    timeout_s: Annotated[float, Meta(gt=0, le=3600, description="Most seconds for one page.")] = (
        15.0
    )
    memory_mib: Annotated[
        int, Meta(ge=64, description="Most memory that one page may take, in MiB.")
    ] = 1500
    javascript: Annotated[
        bool, Meta(description="Run the scripts of pages. Pictures may then differ each time.")
    ] = False
    tabs: Annotated[
        int, Meta(ge=0, le=64, description="Pages rendered at a time; 0 is one per core.")
    ] = 0


OcrHints = Literal["text", "colors", "layout"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings."""

    model: LoadSpec = LoadSpec()
    generation: GenerationParams = GenerationParams()
    images: ImageLimits = ImageLimits()
    interface: InterfaceSettings = InterfaceSettings()
    export: ExportSpec = ExportSpec()
    render: RenderSettings = RenderSettings()
    ocr: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="Put the text found on screenshots into the prompt; auto does so for "
            "models that read text only, or that were trained with it."
        ),
    ] = "auto"
    ocr_hints: Annotated[
        OcrHints,
        Meta(
            description="What is told of that text: its lines, these with their colours, or these "
            "in the boxes on which they lie; a model is told what it was trained with at least."
        ),
    ] = "text"
    system: Annotated[str, Meta(description="System text; empty is the template's own.")] = ""


class Paths(msgspec.Struct, frozen=True):
    """Where everything lives."""

    config: Path
    data: Path
    cache: Path

    @property
    def config_file(self) -> Path:
        return self.config / "config.toml"

    @property
    def sessions(self) -> Path:
        """The session database."""
        return self.data / "sessions.sqlite"

    @property
    def pages(self) -> Path:
        """The versions of pages, in one folder per session."""
        return self.data / "pages"

    @property
    def models(self) -> Path:
        """Downloaded and converted models."""
        return self.cache / "models"

    @property
    def renders(self) -> Path:
        """Views of pages that evaluations compare with; may be removed at any time."""
        return self.cache / "renders"

    @property
    def engine_log(self) -> Path:
        return self.data / "logs" / "engine.log"

    @property
    def app_log(self) -> Path:
        return self.data / "logs" / "app.log"


def paths(environ: Mapping[str, str] = os.environ) -> Paths:
    """The platform's folders, or those that W2C_CONFIG_DIR, _DATA_DIR and _CACHE_DIR name."""
    dirs = platformdirs.PlatformDirs("w2c-tui", appauthor=False)

    def folder(name: str, default: Path) -> Path:
        value = environ.get(f"W2C_{name}_DIR")
        return Path(value).expanduser() if value else default

    return Paths(
        config=folder("CONFIG", dirs.user_config_path),
        data=folder("DATA", dirs.user_data_path),
        cache=folder("CACHE", dirs.user_cache_path),
    )


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "model": LoadSpec,
    "generation": GenerationParams,
    "images": ImageLimits,
    "interface": InterfaceSettings,
    "export": ExportSpec,
    "render": RenderSettings,
}
_FOLDER_VARIABLES = {"W2C_CONFIG_DIR", "W2C_DATA_DIR", "W2C_CACHE_DIR"}
T = TypeVar("T", bound=msgspec.Struct)


def load_settings(
    flags: Mapping[str, Any] | None = None,
    config_file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Settings from `flags` over the environment over `config_file` over the defaults.

    `flags` maps "section.field" (or a top-level field) to a value. Raises ConfigError that names
    the source, the key and what was expected.
    """
    config_file = paths(environ).config_file if config_file is None else config_file
    merged: dict[str, Any] = {}
    for source, values in (
        (str(config_file), _read_toml(config_file)),
        ("the environment", _read_environment(environ)),
        ("the command line", _nested(flags or {})),
    ):
        _merge(merged, values)
        # Checked after each layer, so that the message can say which one is wrong.
        settings = _convert(merged, Settings, source)
    return settings


def checked(value: T) -> T:
    """`value` if its fields keep their constraints. Raises ConfigError otherwise."""
    return _convert(msgspec.to_builtins(value), type(value), "the request")


def _convert(values: Any, kind: type[T], source: str) -> T:
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"A setting in {source} is wrong: {str(error).replace('$.', '')}.",
            hint=_suggestion(str(error)),
        ) from error


def _suggestion(problem: str) -> str:
    known = [
        *(name for name in Settings.__struct_fields__ if name not in SECTIONS),
        *(f for kind in SECTIONS.values() for f in kind.__struct_fields__),
    ]
    if "unknown field" not in problem:
        return "See w2c generate --help for what is possible."
    name = problem.split("`")[1]
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Known settings: {', '.join([*SECTIONS, *known])}."


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error}.",
            hint="Correct it, or move it away to start with the defaults.",
        ) from error


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith("W2C_") or variable in _FOLDER_VARIABLES:
            continue
        name = variable.removeprefix("W2C_").lower()
        section, _, field = name.partition("_")
        if section in SECTIONS and field in SECTIONS[section].__struct_fields__:
            found[f"{section}.{field}"] = _parsed(value)
        elif name in Settings.__struct_fields__ and name not in SECTIONS:
            found[name] = value
        else:
            names = [
                f"W2C_{s.upper()}_{f.upper()}"
                for s, kind in SECTIONS.items()
                for f in kind.__struct_fields__
            ]
            close = difflib.get_close_matches(variable, names, n=1)
            raise ConfigError(
                f"The environment variable {variable} is not a setting.",
                hint=f"Did you mean {close[0]}?" if close else "Unset it.",
            )
    return _nested(found)


def _parsed(value: str) -> Any:
    """Lists and tables are written as in TOML; everything else is taken as it is."""
    if not value.startswith(("[", "{")):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, field = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    return nested


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            into[key] = {**into[key], **value}
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value
