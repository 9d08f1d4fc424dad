"""`w2c export-gguf` as a user meets it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import psutil
import pytest
from PIL import Image
from transformers import LlamaConfig

from tests.cli.test_cli import w2c
from tests.export import models, native
from tests.models import tiny
from tests.tiny import PAGE
from w2c_tui.core.config import ExportSpec
from w2c_tui.core.errors import CheckpointError, ConfigError, EngineError
from w2c_tui.export.gguf_export import export

QUANTS = ("f32", "bf16", "f16", "q8_0", "q4_k_m")


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    return models.save_crystal(tmp_path_factory.mktemp("crystal") / "crystal")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return models.save_llava(tmp_path_factory.mktemp("llava") / "see-er", models.CLIP)


def test_a_checkpoint_becomes_a_verified_file_that_llama_cpp_runs(crystal, own_folders):
    out = own_folders / "out"
    done = w2c("export-gguf", crystal, "--out", out)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    assert file.name == "crystal-q4_k_m.gguf"
    assert str(file) in done.stdout
    assert "Verified the whole model" in done.stderr
    assert "blocks of 256; rows of 64" in done.stderr.replace("\n", " ")
    with native.opened(file, context=64) as model:
        assert len(set(native.greedy(model, [5, 6, 7], 24))) > 4


@pytest.mark.parametrize("quant", QUANTS)
def test_every_type_verifies(quant, crystal, tmp_path):
    exported = export(str(crystal), tmp_path, ExportSpec(quant=quant), silent)
    result = exported.verification
    assert result.kl <= result.kl_limit
    assert result.num_agreeing > result.num_positions * 0.6
    if quant == "f32":
        assert result.max_logit_error < 1e-4
        assert result.num_agreeing == result.num_positions


def test_a_published_page_writer_writes_its_page_from_gguf(page_writer, own_folders):
    """From a folder on disk to a page, through both commands."""
    done = w2c("export-gguf", page_writer, "--out", own_folders, "-q", "q8_0", "--name", "writer")
    assert done.returncode == 0, done.stderr
    names = {"writer-q8_0.gguf", "writer-mmproj-f16.gguf"}
    assert {path.name for path in own_folders.glob("*.gguf")} == names
    Image.new("RGB", (300, 100), "navy").save(own_folders / "shot.png")
    done = w2c(
        *("generate", own_folders / "shot.png", "--out", "-", "--threads", "1"),
        *("--model", own_folders / "writer-q8_0.gguf", "--temperature", "0"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PAGE


@pytest.mark.parametrize("head", [True, False], ids=["own-head", "tied"])
def test_a_published_crystalchat_folder_exports_as_it_is(head, tmp_path):
    """LLaVA's own layout over CrystalCoder: pickled shards, fused projections, the tower inside."""
    raw, tensors = tiny.published_llava_crystal(head=head)
    folder = tmp_path / "CrystalChat"
    tiny.write_bin(folder, tensors, shards=2)
    tiny.write_json(folder / "config.json", raw)
    tiny.write_json(folder / "preprocessor_config.json", tiny.PREPROCESSOR)
    tiny.write_tokenizer(folder, bos=False)
    exported = export(str(folder), tmp_path / "out", ExportSpec(quant="f16"), silent)
    assert exported.verification.kl < 1e-4
    assert exported.verification.feature_error < 2e-3
    assert Path(exported.mmproj).name == "CrystalChat-mmproj-f16.gguf"


@pytest.mark.parametrize("layout", ["rolled", "last", "standard"])
def test_every_layout_says_what_it_is_and_verifies(layout, llava, tmp_path):
    spec = ExportSpec(quant="f16", clip_layout=layout)
    exported = export(str(llava), tmp_path, spec, silent)
    reader = gguf.GGUFReader(exported.mmproj)
    assert reader.fields["w2c.clip_layout"].contents() == layout
    assert reader.fields["w2c.pad_color"].contents() == [122, 116, 104]
    result = exported.verification
    if layout == "standard":
        # Today's runtime cannot read it.
        assert "without its pictures" in result.subject
        assert result.feature_error is None
    else:
        assert result.feature_error < 1e-3
        assert result.kl < 1e-4


def test_what_the_files_say_about_themselves(llava, tmp_path):
    folder = tmp_path / "My model"
    shutil.copytree(llava, folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [web]\n---\n# Mine\n")
    exported = export(str(folder), tmp_path, ExportSpec(quant="q8_0", verify=False), silent)
    assert Path(exported.model).name == "My-model-q8_0.gguf"
    fields = gguf.GGUFReader(exported.model).fields
    say = {name: field.contents() for name, field in fields.items()}
    assert say["general.name"] == "My-model"
    assert say["general.license"] == "apache-2.0"
    assert say["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert say["w2c.template"] == "v1"
    assert '"family":"llava_llama"' in say["w2c.card"]
    assert say["tokenizer.ggml.add_bos_token"] is True
    mmproj = gguf.GGUFReader(exported.mmproj).fields
    assert '"size":56' in mmproj["w2c.image_spec"].contents()


# --- Nothing half-written -------------------------------------------------------------------------


def test_files_that_are_there_stay_unless_told_otherwise(crystal, own_folders):
    kept = own_folders / "crystal-f16.gguf"
    kept.write_text("mine")
    done = w2c("export-gguf", crystal, "--out", own_folders, "-q", "f16")
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert kept.read_text() == "mine"
    done = w2c("export-gguf", crystal, "--out", own_folders, "-q", "f16", "--force")
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_size > 100_000


@pytest.mark.parametrize("phase", ["Writing the language", "Quantising", "Writing the v", "Verify"])
def test_an_export_that_is_stopped_leaves_nothing(phase, llava, tmp_path):
    def stop(now: str, done: int, total: int) -> None:
        if now.startswith(phase):
            raise EngineError("stopped")

    with pytest.raises(EngineError, match="stopped"):
        export(str(llava), tmp_path / "out", ExportSpec(quant="q8_0"), stop)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_found_before_anything_is_written(crystal, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"0\.0 GB free.*needs 0\.1 GB"):
        export(str(crystal), tmp_path / "out", ExportSpec(quant="f16"), silent)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_meanwhile_is_an_error_that_leaves_nothing(crystal, tmp_path):
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match="disk may be full"):
            export(str(crystal), tmp_path / "out", ExportSpec(quant="f32"), silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_leaves_no_file_and_no_process(tmp_path, own_folders):
    config = LlamaConfig(
        vocab_size=models.VOCABULARY, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6
    )
    folder = models.save_family(tmp_path / "large", config)
    out = own_folders / "out"
    command = [sys.executable, "-m", "w2c_tui.cli", "export-gguf", folder, "--out", out]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "Quantising" not in process.stderr.readline():
            assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("w2c_tui.export.quantize" in child.cmdline() for child in children)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - began < 5
    assert not out.exists()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


# --- What cannot be exported ----------------------------------------------------------------------


def test_a_type_that_the_shapes_do_not_allow_is_refused(tmp_path):
    config = LlamaConfig(**(models.FAMILIES["llama"].to_dict() | {"hidden_size": 48}))
    folder = models.save_family(tmp_path / "odd", config)
    with pytest.raises(ConfigError, match="rows of 48"):
        export(str(folder), tmp_path / "out", ExportSpec(quant="q4_k_m"), silent)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_are_named(crystal, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holed"
    shutil.copytree(crystal, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc2.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: .*gate_proj"):
        export(str(folder), tmp_path / "out", ExportSpec(quant="f16"), silent)


def test_numbers_that_16_bit_cannot_hold_are_an_error_that_names_the_tensor(crystal, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "huge"
    shutil.copytree(crystal, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1e7
    save_file(tensors, folder / "model.safetensors")
    spec = ExportSpec(quant="f16", verify=False)
    with pytest.raises(CheckpointError, match=r"output\.weight holds numbers up to") as caught:
        export(str(folder), tmp_path / "out", spec, silent)
    assert "bf16" in caught.value.hint
    export(str(folder), tmp_path / "out", ExportSpec(quant="bf16", verify=False), silent)


def test_an_unknown_name_is_an_error_with_a_hint(own_folders):
    done = w2c("export-gguf", "no-such-model")
    assert done.returncode == 1
    assert "no-such-model" in done.stderr
    assert not any(name.endswith(".gguf") for name in os.listdir(own_folders))
