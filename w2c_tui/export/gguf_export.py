"""`w2c export-gguf`: one checkpoint in, GGUF files out, complete or not at all.

Owns the order of the work: everything that can be wrong is found before long work begins; files are
written in a hidden folder beside their places, compared with the checkpoint there, and moved at
the end. Knows nothing about the terminal; progress is reported as (phase, done, total), in bytes
where bytes are moved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import msgspec
from gguf import GGMLQuantizationType as StorageType
from transformers import LlavaConfig

from w2c_tui.core.config import ExportSpec
from w2c_tui.core.errors import CheckpointError, ConfigError
from w2c_tui.core.prompt import TEMPLATES, as_jinja
from w2c_tui.export.language_model import LanguageModel, check_family, plan_language_model
from w2c_tui.export.outcome import Exported
from w2c_tui.export.quantize import quantize, require_llama_cpp
from w2c_tui.export.tensors import PlannedTensor, parts_of, write_gguf
from w2c_tui.export.tokenizer import Vocabulary, read_vocabulary
from w2c_tui.export.vision import VisionModel, plan_vision
from w2c_tui.models.checkpoint import Checkpoint, Report, open_checkpoint

TEMPLATE_KEY = "w2c.template"
CARD_KEY = "w2c.card"

_STORED = {"f32": StorageType.F32, "f16": StorageType.F16, "bf16": StorageType.BF16}
# Bits per weight as a whole, generously: llama.cpp mixes types, and says so only afterwards.
_BITS = {"q8": 8.6, "q6": 6.8, "q5": 6.1, "q4": 5.2, "q3": 4.6, "q2": 3.7}
_SPARE_BYTES = 64_000_000


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything that is known before anything is written."""

    checkpoint: Checkpoint
    name: str
    spec: ExportSpec
    model: LanguageModel
    vision: VisionModel | None
    vocabulary: Vocabulary

    @property
    def quantised(self) -> bool:
        return self.spec.quant not in _STORED

    @property
    def stage(self) -> StorageType:
        """How the matrices are stored in the file that quantising starts from, or in the result."""
        return _STORED.get(self.spec.quant, StorageType.F16)

    @property
    def quantised_bytes(self) -> int:
        """About the size of the quantised file; 0 where nothing is quantised."""
        if not self.quantised:
            return 0
        elements = _num_bytes(self.model.tensors, StorageType.F16) // 2
        return int(elements * _BITS[self.spec.quant[:2]] / 8)


def export(
    source: str,
    out: Path,
    spec: ExportSpec,
    report: Report,
    *,
    name: str = "",
    force: bool = False,
    cache_dir: Path | None = None,
) -> Exported:
    """Write the model `source` as GGUF files into the folder `out`.

    `name`: the first part of the files' names, the model's own if empty. `force`: replace files
    that are there. `report` may raise to cancel. Raises a W2CError, and then leaves no file behind.
    """
    if spec.verify or spec.quant not in _STORED:
        require_llama_cpp()
    plan = _plan(open_checkpoint(source, report=report, cache_dir=cache_dir), spec, name)
    final = out / f"{plan.name}-{spec.quant}.gguf"
    final_mmproj = out / f"{plan.name}-mmproj-{spec.mmproj}.gguf" if plan.vision else None
    for path in (final, final_mmproj):
        if path is not None and path.exists() and not force:
            raise ConfigError(f"{path} exists already.", hint="Add --force to replace it.")
    notes = _check_shapes(plan)
    _check_disk(out, plan)

    with _scratch(out) as scratch:
        written = scratch / "model.gguf"
        _write_model(written, plan, report)
        if plan.quantised:
            packed = scratch / "quantised.gguf"
            quantize(written, packed, spec.quant, report, plan.quantised_bytes)
            written.unlink()
            written = packed
        mmproj = None
        if plan.vision is not None:
            mmproj = scratch / "mmproj.gguf"
            _write_mmproj(mmproj, plan, plan.vision, report)
            notes += plan.vision.notes
        verification = None
        if spec.verify:
            from w2c_tui.export.verify import verify

            verification = verify(plan.checkpoint, written, mmproj, spec, report)
        written.replace(final)
        if mmproj is not None and final_mmproj is not None:
            mmproj.replace(final_mmproj)
    return Exported(
        model=str(final),
        mmproj=str(final_mmproj or ""),
        notes=notes,
        verification=verification,
    )


def _plan(checkpoint: Checkpoint, spec: ExportSpec, name: str) -> _Plan:
    config = checkpoint.config
    text_config = config.get_text_config()
    check_family(text_config, checkpoint.label)
    sees = text_config is not config
    if sees and not isinstance(config, LlavaConfig):
        raise CheckpointError(
            f"{checkpoint.label}: models of type {config.model_type!r} cannot be exported to GGUF.",
            hint="Models that see are exported in LLaVA's form: a CLIP, SigLIP or DINOv2 tower "
            "and a two-layer projector.",
        )
    parts = parts_of(checkpoint)
    model = plan_language_model(text_config, parts.text)
    image_token = None
    if sees:
        image_token = str(checkpoint.tokenizer.convert_ids_to_tokens(config.image_token_id))
    return _Plan(
        checkpoint=checkpoint,
        name=re.sub(r"[^\w.-]+", "-", name or _name_of(checkpoint)),
        spec=spec,
        model=model,
        vision=plan_vision(config, parts, checkpoint.card.image, model, spec.clip_layout)
        if sees
        else None,
        vocabulary=read_vocabulary(checkpoint.tokenizer, model.vocab_size, image_token),
    )


def _name_of(checkpoint: Checkpoint) -> str:
    name = checkpoint.label.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    return checkpoint.folder.resolve().name if name in ("", ".", "..") else name


# --- Before anything is written -------------------------------------------------------------------


def _check_shapes(plan: _Plan) -> tuple[str, ...]:
    """Notes about rows that do not divide into the quantisation's blocks.

    Raises ConfigError where nothing is left to quantise to.
    """
    if not plan.quantised:
        return ()
    quant = plan.spec.quant
    widths = {t.shape[-1] for t in plan.model.tensors if t.storage is None}
    if wrong := sorted(width for width in widths if width % 32):
        raise ConfigError(
            f"{quant} packs rows of weights in blocks, of 32 at least, and this model has rows of "
            f"{', '.join(map(str, wrong))}.",
            hint="Export with --quant f16 or --quant bf16.",
        )
    odd = sorted(width for width in widths if width % 256)
    if odd and "k" in quant:
        return (
            f"{quant} packs rows in blocks of 256; rows of {', '.join(map(str, odd))} are stored "
            "in a larger type instead.",
        )
    return ()


def _check_disk(out: Path, plan: _Plan) -> None:
    needed = _num_bytes(plan.model.tensors, plan.stage) + plan.quantised_bytes + _SPARE_BYTES
    if plan.vision is not None:
        needed += _num_bytes(plan.vision.tensors, _STORED[plan.spec.mmproj])
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"{out} has {free / 1e9:.1f} GB free, and the export needs {needed / 1e9:.1f} GB"
            + (" for a while, for the file that is quantised." if plan.quantised else "."),
            hint="Free some space, or name a folder on another disk with --out.",
        )


def _num_bytes(tensors: list[PlannedTensor], storage: StorageType) -> int:
    return sum(tensor.num_bytes(storage) for tensor in tensors)


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A hidden folder in `out` that is gone afterwards; `out` too if it was made and is empty."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
            yield Path(folder)
    except OSError as error:
        raise ConfigError(
            # numpy's short writes carry no reason.
            f"The export to {out} failed: {error.strerror or f'the disk may be full ({error})'}.",
            hint="Check the folder and the space on its disk, or name another one with --out.",
        ) from error
    finally:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()


# --- Files ----------------------------------------------------------------------------------------


def _write_model(path: Path, plan: _Plan, report: Report) -> None:
    def write_keys(writer: gguf.GGUFWriter) -> None:
        _write_general(writer, plan, gguf.GGUFType.MODEL, plan.stage)
        plan.model.write_keys(writer)
        plan.vocabulary.write(writer)
        _write_prompt(writer, plan.checkpoint)

    arch, tensors = plan.model.arch, plan.model.tensors
    write_gguf(path, arch, write_keys, tensors, plan.stage, report, "Writing the language model")


def _write_mmproj(path: Path, plan: _Plan, vision: VisionModel, report: Report) -> None:
    storage = _STORED[plan.spec.mmproj]

    def write_keys(writer: gguf.GGUFWriter) -> None:
        _write_general(writer, plan, gguf.GGUFType.MMPROJ, storage)
        vision.write_keys(writer)

    write_gguf(
        path, "clip", write_keys, vision.tensors, storage, report, "Writing the vision tower"
    )


def _write_general(writer: gguf.GGUFWriter, plan: _Plan, kind: str, storage: StorageType) -> None:
    """Where the model comes from: its own model card as far as there is one."""
    folder, label = plan.checkpoint.folder, plan.checkpoint.label
    about = gguf.Metadata.load(None, folder, plan.name)
    about.name = plan.name
    if not Path(label).exists() and re.fullmatch(r"[^/]+/[^/]+", label):
        about.source_repo_url = f"https://huggingface.co/{label}"
    about.set_gguf_meta_model(writer)
    writer.add_type(kind)
    file_type = "ALL_F32" if storage == StorageType.F32 else f"MOSTLY_{storage.name}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(CARD_KEY, msgspec.json.encode(plan.checkpoint.card).decode())


def _write_prompt(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    template = checkpoint.card.template
    writer.add_string(TEMPLATE_KEY, template)
    own = getattr(checkpoint.processor, "chat_template", None)
    own = own or checkpoint.tokenizer.chat_template
    source = as_jinja(TEMPLATES[template]) if template in TEMPLATES else own
    if source:
        writer.add_chat_template(source)
