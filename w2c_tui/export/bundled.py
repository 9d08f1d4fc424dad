"""The GGUF files of a bundled model, made once into the cache.

Owns where they lie and that they are complete. Knows nothing about how either is made.
"""

from __future__ import annotations

from pathlib import Path

from w2c_tui.core.config import ExportSpec
from w2c_tui.export.gguf_export import export
from w2c_tui.models.bundled import assemble, assembled_folder
from w2c_tui.models.checkpoint import Report

_SPEC = ExportSpec(quant="q8_0", verify=False)
"""Half the size of 16 bit, and faster on a CPU. Not compared with the checkpoint each time: that
takes longer than all the rest."""


def gguf_of(folder: Path, models_folder: Path, report: Report) -> Path:
    """The GGUF file of the bundled model in `folder`; its image encoder lies beside it.

    Made from the whole model on first use, which then need not stay. Raises a W2CError, or what
    `report` raises, and then leaves no file behind.
    """
    whole = assembled_folder(folder, models_folder)
    out = whole.with_name(f"{whole.name}-gguf")
    model = out / f"{folder.name}-{_SPEC.quant}.gguf"
    if model.is_file() and any(out.glob("*mmproj*.gguf")):
        return model
    source = assemble(folder, models_folder, report)
    exported = export(str(source), out, _SPEC, report, name=folder.name, force=True)
    return Path(exported.model)
