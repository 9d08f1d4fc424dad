"""Models of which only the trained part comes with this package.

A bundled folder holds what training made: vision tower, projector and low-rank adapters, beside the
configuration and the card. The language model under the adapters is fetched once, from where the
catalogue says; both together become a standard folder in the cache, which is all that is needed
from then on. Owns the bundled folder's format, writing and reading. Knows nothing about training.

    bundled.json         what the language model is, and the hash of the weights
    trained.safetensors  vision_tower.*, multi_modal_projector.*, layers.N.MATRIX.lora_{A,B}
    config.json, w2c.json, chat_template.jinja, README.md

Adapters (LoRA, arXiv 2106.09685) are stored as W = W0 + B A: their scale is part of B.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from w2c_tui.core.catalog import BUNDLED_NAME
from w2c_tui.core.errors import CheckpointError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.locate import locate

WEIGHTS_NAME = "trained.safetensors"
TEMPLATE_NAME = "chat_template.jinja"
FORMAT_VERSION = 1

Report = Callable[[str, int, int], None]

_ADAPTER = re.compile(r"(layers\.\d+\..+)\.lora_([AB])")


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """`bundled.json`. `language_model`: a catalogue name, or a folder."""

    language_model: str
    sha256: str
    format_version: int = FORMAT_VERSION


def is_bundled(folder: Path) -> bool:
    """Whether `folder` holds only the trained part of a model."""
    return (folder / BUNDLED_NAME).is_file()


def describe(folder: Path) -> Description:
    """Raises CheckpointError if `folder` is damaged or of a later version."""
    try:
        found = msgspec.json.decode((folder / BUNDLED_NAME).read_bytes(), type=Description)
    except (OSError, msgspec.MsgspecError) as error:
        raise _damaged(folder, str(error)) from error
    if found.format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is of format {found.format_version}, and this version of w2c-tui reads up "
            f"to {FORMAT_VERSION}.",
            hint="Update w2c-tui.",
        )
    return found


def assembled_folder(folder: Path, models_folder: Path) -> Path:
    """Where the whole model is put; other weights have another place."""
    return models_folder / "bundled" / f"{folder.name}-{describe(folder).sha256[:12]}"


def write_bundled(
    out: Path,
    *,
    language_model: str,
    tensors: Mapping[str, torch.Tensor],
    beside: Mapping[str, Path],
) -> None:
    """Write the new bundled folder `out`; `beside`: files to copy, by their names in it."""
    out.mkdir(parents=True)
    # Matrices in 16 bit; the few vectors exactly.
    save_file(dict(tensors), out / WEIGHTS_NAME)
    for name, source in beside.items():
        shutil.copyfile(source, out / name)
    sha256 = _hash(out / WEIGHTS_NAME)
    described = msgspec.json.encode(Description(language_model=language_model, sha256=sha256))
    write_atomically(out / BUNDLED_NAME, msgspec.json.format(described, indent=2).decode())


def assemble(folder: Path, models_folder: Path, report: Report) -> Path:
    """The standard folder of the bundled model in `folder`, made on first use.

    Fetches the language model if it is not there. The folder appears complete or not at all, also
    when `report` raises. Raises DownloadError or CheckpointError.
    """
    from w2c_tui.models.checkpoint import (
        IMAGE_TOKEN,
        new_folder,
        open_checkpoint,
        read_card,
        write_parts,
    )

    out = assembled_folder(folder, models_folder)
    if (out / "config.json").is_file():
        return out
    described = describe(folder)
    if _hash(folder / WEIGHTS_NAME) != described.sha256:
        raise _damaged(folder, f"{WEIGHTS_NAME} is not the file it was")
    source = locate(described.language_model, models_folder, report)
    base = open_checkpoint(source, report=report, cache_dir=models_folder)
    config = LlavaConfig.from_pretrained(folder)
    card = read_card(folder)
    if card is None or base.tensors is None:
        raise _damaged(folder, "it has no w2c.json" if card is None else f"{source} has no weights")
    tokenizer: Any = base.tokenizer
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.image_token = IMAGE_TOKEN
    if (folder / TEMPLATE_NAME).is_file():
        tokenizer.chat_template = (folder / TEMPLATE_NAME).read_text(encoding="utf-8")
    report("Putting the model together", 0, 2)
    try:
        trained = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from error
    state = _merged(config, base.tensors, trained, report)
    report("Putting the model together", 1, 2)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with new_folder(out, or_existing=True) as scratch:
        write_parts(scratch, model, state, tokenizer=tokenizer, card=card)
        report("Putting the model together", 2, 2)
    return out


def adapters_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The adapters in a bundled folder: by the module's name (layers.N.MATRIX) its A and B."""
    return _adapters(load_file(folder / WEIGHTS_NAME))


def _adapters(trained: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in trained.items():
        if match := _ADAPTER.fullmatch(name):
            adapters.setdefault(match[1], {})[match[2]] = tensor
    return adapters


def _merged(
    config: LlavaConfig,
    base: Mapping[str, Any],
    trained: dict[str, torch.Tensor],
    report: Report,
) -> dict[str, torch.Tensor]:
    adapters = _adapters(trained)
    state = {
        f"model.{name}": tensor for name, tensor in trained.items() if not _ADAPTER.fullmatch(name)
    }
    text_config: Any = config.text_config
    for at, (name, stored) in enumerate(base.items()):
        report("Merging", at, len(base))
        tensor = stored[...]
        if name == "lm_head.weight":
            # A file made from GGUF holds a head that is tied, too.
            if config.tie_word_embeddings:
                continue
            state[name] = _grown(tensor, text_config.vocab_size)
            continue
        name = name.removeprefix("model.")
        if name == "embed_tokens.weight":
            tensor = _grown(tensor, text_config.vocab_size)
        adapter = adapters.pop(name.removesuffix(".weight"), None)
        if adapter is not None:
            delta = adapter["B"].float() @ adapter["A"].float()
            tensor = (tensor.float() + delta).to(tensor.dtype)
        state[f"model.language_model.{name}"] = tensor
    report("Merging", len(base), len(base))
    if adapters:
        raise CheckpointError(
            f"The language model has no {', '.join(sorted(adapters)[:3])}, which were trained.",
            hint="It is another language model than the one that was trained on.",
        )
    return state


def _grown(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """New rows are the mean of all, as when the model was trained."""
    before = weight.shape[0]
    if rows <= before:
        return weight
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat((weight, mean.expand(rows - before, -1)))


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(path.parent, str(error)) from error


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"The bundled model in {folder} is damaged: {why}.", hint="Install w2c-tui again."
    )
