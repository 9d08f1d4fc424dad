"""A settings struct as command-line flags: each field becomes one option, and its type, range and
help are the field's own. Knows nothing about what the settings do.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import click
import msgspec

F = TypeVar("F", bound=Callable[..., Any])


def field_options(
    kind: type[msgspec.Struct],
    section: str,
    *,
    skip: Container[str] = (),
    names: Mapping[str, Sequence[str]] = MappingProxyType({}),
    metavars: Mapping[str, str] = MappingProxyType({}),
    defaults: bool = True,
) -> Callable[[F], F]:
    """One option per field of `kind`, passed to the command as `section__field`.

    `skip`: fields without a flag. `names`: flags that are not their field's own name. `metavars`:
    what stands for the value in the help. `defaults`: whether the defaults of the fields hold;
    otherwise none is shown, and what is on can be switched off.
    """

    def decorate(command: F) -> F:
        for field in reversed(msgspec.structs.fields(kind)):
            if field.name in skip:
                continue
            name = "--" + field.name.replace("_", "-")
            arguments = {**_click_type(field.type), "help": _help(field, defaults)}
            if arguments.get("is_flag") and not defaults:
                name += "/--no-" + field.name.replace("_", "-")
            if field.name in metavars:
                arguments["metavar"] = metavars[field.name]
            flags = names.get(field.name, [name])
            command = click.option(*flags, f"{section}__{field.name}", **arguments)(command)
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


def _help(field: Any, defaults: bool) -> str:
    text = description(field.type)
    default = field.default
    if not defaults or default in (None, (), False, msgspec.NODEFAULT):
        return text
    return f"{text}  [default: {default}]"


def description(annotation: Any) -> str:
    for meta in getattr(annotation, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.description:
            return meta.description
    return ""
