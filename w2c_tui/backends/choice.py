"""Which backend runs a model, and what is known before. Knows nothing about how they do it."""

from __future__ import annotations

import importlib.util
from typing import Literal

import msgspec

from w2c_tui.core.catalog import find
from w2c_tui.core.config import LoadSpec
from w2c_tui.core.errors import ConfigError
from w2c_tui.core.locate import names_gguf

_HF_ONLY = {
    "quantization": "--load-4bit and --load-8bit",
    "dtype": "--dtype",
    "device_map": "--device-map",
    "max_memory": "--max-memory",
    "offload_folder": "--offload-folder",
    "attn": "--attn",
}
_GGUF_ONLY = {
    "mmproj": "--mmproj",
    "n_gpu_layers": "--n-gpu-layers",
    "tensor_split": "--tensor-split",
    "main_gpu": "--main-gpu",
    "flash_attn": "--flash-attn",
    "cache_type": "--cache-type",
}


def choose_backend(spec: LoadSpec) -> Literal["hf", "gguf", "openai"]:
    """The backend for `spec`: "auto" is openai where the address of a server is given, gguf for
    GGUF files where llama-cpp-python is installed, unless a setting is given that only
    transformers has.

    Raises ConfigError for settings that the named backend does not have.
    """
    for_hf, for_gguf = _given(spec, _HF_ONLY), _given(spec, _GGUF_ONLY)
    if spec.backend == "openai" or (spec.backend == "auto" and spec.base_url):
        if for_hf or for_gguf:
            raise ConfigError(
                f"The openai backend has no {', '.join([*for_hf, *for_gguf])}.",
                hint="The server decides how its model is loaded.",
            )
        return "openai"
    if spec.base_url:
        raise ConfigError(
            f"The {spec.backend} backend has no --base-url.", hint="It is for --backend openai."
        )
    if spec.backend == "gguf" and for_hf:
        raise ConfigError(
            f"The gguf backend has no {', '.join(for_hf)}.",
            hint="A GGUF file is quantised already; --n-gpu-layers and --tensor-split place it.",
        )
    if spec.backend == "hf" and for_gguf:
        raise ConfigError(
            f"The hf backend has no {', '.join(for_gguf)}.", hint="These are for --backend gguf."
        )
    if spec.backend != "auto":
        return spec.backend
    if not names_gguf(spec.name) or for_hf:
        return "hf"
    # Who asks for what only llama.cpp has is told how to install it.
    installed = importlib.util.find_spec("llama_cpp") is not None
    return "gguf" if installed or for_gguf else "hf"


def knows_pages(spec: LoadSpec) -> bool:
    """False where the model of `spec` is known not to have learnt to write pages."""
    entry = None if choose_backend(spec) == "openai" else find(spec.name)
    return entry is None or entry.knows_pages


def _given(spec: LoadSpec, names: dict[str, str]) -> list[str]:
    defaults = {field.name: field.default for field in msgspec.structs.fields(LoadSpec)}
    return [flag for name, flag in names.items() if getattr(spec, name) != defaults[name]]
