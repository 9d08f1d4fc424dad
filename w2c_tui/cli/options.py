"""Settings as command-line flags: each field of a settings struct becomes one option.

The names are those that users of such tools know (`--load-4bit`, `--model`); type, range and help
come from the field itself. Knows nothing about what the settings do.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from w2c_tui.core.config import GenerationParams, LoadSpec, Settings, load_settings
from w2c_tui.core.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

_NAMES = {
    "model.name": ["-m", "--model", "--model-path"],
    "model.max_memory": ["--max-memory"],
}
_METAVARS = {"model.name": "MODEL", "model.max_memory": "DEVICE=SIZE"}
_SKIP = {"model.quantization"}
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
    return _fields(LoadSpec, "model")(command)


def generation_options(command: F) -> F:
    """The flags that say how to write an answer."""
    command = click.option("--system", help=_describe(Settings, "system"))(command)
    command = click.option("--ocr/--no-ocr", default=None, help=_describe(Settings, "ocr"))(command)
    return _fields(GenerationParams, "generation")(command)


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
    if given.get("model.max_memory"):
        given["model.max_memory"] = _pairs(given["model.max_memory"])
    if flags.get("ocr") is not None:
        given["ocr"] = "on" if flags["ocr"] else "off"
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


def _fields(kind: type[msgspec.Struct], section: str) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for field in reversed(msgspec.structs.fields(kind)):
            key = f"{section}.{field.name}"
            if key in _SKIP:
                continue
            names = _NAMES.get(key, ["--" + field.name.replace("_", "-")])
            arguments = {**_click_type(field.type), "help": _help(field)}
            if key in _METAVARS:
                arguments["metavar"] = _METAVARS[key]
            command = click.option(*names, f"{section}__{field.name}", **arguments)(command)
        return command

    return decorate


def _click_type(annotation: Any) -> dict[str, Any]:
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        return _click_type(kinds[0])
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return {"type": click.Choice(typing.get_args(annotation))}
    if origin in (tuple, dict):
        return {"multiple": True}
    if annotation is bool:
        return {"is_flag": True, "default": None}
    return {"type": annotation}


def _help(field: Any) -> str:
    text = _description(field.type)
    default = field.default
    if default in (None, (), False, msgspec.NODEFAULT):
        return text
    return f"{text}  [default: {default}]"


def _describe(kind: type[msgspec.Struct], name: str) -> str:
    return next(_description(f.type) for f in msgspec.structs.fields(kind) if f.name == name)


def _description(annotation: Any) -> str:
    for meta in getattr(annotation, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.description:
            return meta.description
    return ""
