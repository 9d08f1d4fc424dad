"""The page writer as a GGUF file."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def page_file(page_writer, tmp_path_factory):
    from w2c_tui.core.config import ExportSpec
    from w2c_tui.export.gguf_export import export

    out = tmp_path_factory.mktemp("page-writer")
    spec = ExportSpec(quant="f16", verify=False)
    return export(str(page_writer), out, spec, lambda *_: None, name="page-writer").model
