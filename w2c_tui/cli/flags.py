"""The settings of this program as command-line flags, by the names that users of such tools know
(`--load-4bit`, `--model`). Knows nothing about what the settings do.
"""

from __future__ import annotations

from typing import Any, get_args

import click
import msgspec

from w2c_tui.console.options import F, description, field_options
from w2c_tui.core.config import (
    ExportSpec,
    GenerationParams,
    LoadSpec,
    OcrHints,
    RenderSettings,
    Settings,
    load_settings,
)
from w2c_tui.core.errors import ConfigError

_MODEL_NAMES = {"name": ["-m", "--model", "--model-path"]}
_EXPORT_NAMES = {"quant": ["-q", "--quant"], "verify": ["--verify/--no-verify"]}
_METAVARS = {"name": "MODEL", "max_memory": "DEVICE=SIZE", "mmproj": "FILE"}
_BITS = {"load_4bit": "4bit", "load_8bit": "8bit"}


def model_options(command: F) -> F:
    """The flags that choose and load a model."""
    for bits in ("8bit", "4bit"):
        option = click.option(
            f"--load-{bits}",
            is_flag=True,
            help=f"Quantise to {bits[0]} bit on loading, on GPU or CPU (bitsandbytes).",
        )
        command = option(command)
    return field_options(
        LoadSpec, "model", skip={"quantization"}, names=_MODEL_NAMES, metavars=_METAVARS
    )(command)


def generation_options(command: F) -> F:
    """The flags that say how to write an answer."""
    command = click.option("--system", help=_describe(Settings, "system"))(command)
    command = click.option("--ocr/--no-ocr", default=None, help=_describe(Settings, "ocr"))(command)
    command = click.option(
        "--ocr-hints",
        type=click.Choice(get_args(OcrHints)),
        help=_describe(Settings, "ocr_hints"),
    )(command)
    return field_options(GenerationParams, "generation")(command)


def export_options(command: F) -> F:
    """The flags that say what GGUF files to write."""
    return field_options(ExportSpec, "export", names=_EXPORT_NAMES)(command)


def render_options(command: F) -> F:
    """The flags that say how pages become pictures."""
    return field_options(RenderSettings, "render")(command)


def settings_from(flags: dict[str, Any]) -> Settings:
    """The settings of this run. `flags` are the parameters that click passed to the command."""
    given: dict[str, Any] = {}
    bits = [value for flag, value in _BITS.items() if flags.get(flag)]
    if len(bits) > 1:
        raise click.UsageError("--load-4bit and --load-8bit exclude each other.")
    if bits:
        given["model.quantization"] = bits[0]
    for name, value in flags.items():
        section, found, field = name.partition("__")
        if found and value is not None and value != ():
            given[f"{section}.{field}"] = value
    if "model.tensor_split" in given:
        given["model.tensor_split"] = ",".join(given["model.tensor_split"]).split(",")
    if given.get("model.max_memory"):
        given["model.max_memory"] = _pairs(given["model.max_memory"])
    if flags.get("ocr") is not None:
        given["ocr"] = "on" if flags["ocr"] else "off"
    if flags.get("ocr_hints") is not None:
        given["ocr_hints"] = flags["ocr_hints"]
    if flags.get("system") is not None:
        given["system"] = flags["system"]
    return load_settings(given)


def _pairs(values: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for value in values:
        device, equals, size = value.partition("=")
        if not (device and equals and size):
            raise ConfigError(
                f"--max-memory cannot be {value!r}.", hint="Write it as 0=20GiB or cpu=30GiB."
            )
        pairs[device] = size
    return pairs


def _describe(kind: type[msgspec.Struct], name: str) -> str:
    return next(description(f.type) for f in msgspec.structs.fields(kind) if f.name == name)
