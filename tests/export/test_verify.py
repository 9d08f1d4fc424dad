"""Verification: it finds what is wrong, and a sample of layers says what the whole does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.export import models, native
from w2c_tui.core.config import ExportSpec
from w2c_tui.core.errors import CheckpointError
from w2c_tui.export.gguf_export import export
from w2c_tui.export.verify import copy_layers, verify, with_layers
from w2c_tui.models.checkpoint import load_checkpoint, open_checkpoint


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A LLaVA over a CrystalCoder of six layers, and its 16-bit files."""
    folder = tmp_path_factory.mktemp("deep") / "deep-crystalcoder"
    models.save_llava(folder, models.CLIP, "crystalcoder", num_layers=6)
    spec = ExportSpec(quant="f16", verify=False)
    return folder, export(str(folder), folder.parent, spec, silent)


def test_a_sample_of_layers_is_the_same_model_on_both_sides(deep, tmp_path):
    folder, exported = deep
    sampled = tmp_path / "sampled.gguf"
    copy_layers(Path(exported.model), sampled, [1, 4])
    source = load_checkpoint(with_layers(open_checkpoint(folder), [1, 4]), dtype=torch.float32)
    ids = list(range(40, 80))
    with torch.no_grad():
        expected = source.model(input_ids=torch.tensor([ids])).logits[0].numpy()
    with native.opened(sampled) as model:
        found = native.logits_of(model, ids)
    assert np.abs(found - expected).max() < 0.02
    assert np.abs(expected).max() > 0.5


def test_where_memory_is_short_a_sample_is_verified(deep, monkeypatch, tmp_path):
    folder, exported = deep
    memory = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    result = verify(
        open_checkpoint(folder),
        Path(exported.model),
        Path(exported.mmproj),
        ExportSpec(quant="f16"),
        silent,
    )
    assert "layers 0 and 5" in result.subject
    assert result.kl < 1e-4
    assert result.feature_error < 1e-3


@pytest.mark.parametrize("part", ["model", "mmproj"])
def test_files_of_another_model_do_not_pass(part, deep, tmp_path):
    folder, exported = deep
    other = tmp_path / "other-crystalcoder"
    models.save_llava(other, models.CLIP, "crystalcoder", num_layers=6, seed=9)
    wrong = export(str(other), tmp_path, ExportSpec(quant="f16", verify=False), silent)
    files = {"model": exported.model, "mmproj": exported.mmproj, part: getattr(wrong, part)}
    with pytest.raises(CheckpointError, match="not the same model"):
        verify(
            open_checkpoint(folder),
            Path(files["model"]),
            Path(files["mmproj"]),
            ExportSpec(quant="f16"),
            silent,
        )
