"""The trained part of LoRA runs: packed, put together again, and run by both backends."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import screenshot
from trainer import tiny
from trainer.loop import train
from trainer.model import add_adapters, build, describe
from trainer.pack import command, pack
from trainer.recipes import resolve
from w2c_tui.console import run
from w2c_tui.core.config import GenerationParams, LoadSpec, paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import CheckpointError, ConfigError
from w2c_tui.core.reference import load_attachment
from w2c_tui.engine.client import EngineClient
from w2c_tui.models.bundled import assemble, assembled_folder, write_bundled
from w2c_tui.models.bundled import describe as describe_bundled
from w2c_tui.models.checkpoint import load_model, read_card


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    """Two LoRA runs over a language model of its own, the second going on from the first."""
    root = tmp_path_factory.mktemp("runs")
    language_model = root / "language-model"
    shutil.copytree(tiny.resolve("debug:llama"), language_model)
    flags = {
        "data": str(prepared("pages", "finetune")),
        "vision_tower": "debug:clip",
        "lora_rank": 4,
        "lora_alpha": 8,
        "save_every": 100,
        "warmup_ratio": 0.0,
        "epochs": 2,
    }
    first = flags | {"model": str(language_model), "out": str(root / "first")}
    train(resolve("debug", "finetune", flags=first))
    second = flags | {"model": str(root / "first" / "model"), "out": str(root / "second")}
    train(resolve("debug", "finetune", flags=second | {"lora_rank": 2, "vision_tower": ""}))
    return root


@pytest.fixture(scope="module")
def packed(runs) -> Path:
    out = runs / "packed"
    arguments = [runs / "second", "--out", out, "--language-model", runs / "language-model"]
    assert run(command, list(map(str, arguments))) == 0
    return out


def test_the_packed_part_of_two_runs_is_the_last_result_again(runs, packed):
    stored = load_file(packed / "trained.safetensors")
    kept = stored["layers.0.self_attn.q_proj.lora_A"]
    assert kept.shape == (4 + 2, 64)
    assert kept.dtype == torch.float16
    assert not any("embed_tokens" in name for name in stored)
    expected = load_model(runs / "second" / "model")
    found = load_model(packed)
    assert found.hints == read_card(packed).hints == "colors"
    assert found.template == expected.template
    assert found.image_spec == expected.image_spec
    before = load_model(runs / "language-model").model.state_dict()
    moved = "layers.1.mlp.down_proj.weight"
    names = dict(found.model.named_parameters())
    assert names.keys() == dict(expected.model.named_parameters()).keys()
    for name, tensor in expected.model.named_parameters():
        torch.testing.assert_close(names[name], tensor, rtol=0, atol=1e-4)
    after = names[f"model.language_model.{moved}"]
    assert (after - before[f"model.{moved}"]).abs().max() > 2e-3


def test_a_run_that_goes_on_from_a_packed_model_is_packed_with_it(runs, packed, prepared):
    # A tower in 16 bit stays so, though a run in float32 writes it in 32.
    start = runs / "with-a-small-tower"
    write_bundled(
        start,
        language_model=describe_bundled(packed).language_model,
        tensors={
            name: tensor.bfloat16() if name.startswith("vision_tower.") else tensor
            for name, tensor in load_file(packed / "trained.safetensors").items()
        },
        beside={name: packed / name for name in ("config.json", "w2c.json")},
    )
    flags = {
        "data": str(prepared("pages", "finetune")),
        "model": str(start),
        "lora_rank": 7,
        "lora_alpha": 21,
        "save_every": 100,
        "max_steps": 2,
        "out": str(runs / "third"),
    }
    train(resolve("debug", "finetune", flags=flags))
    out = runs / "packed-again"
    arguments = [runs / "third", "--out", out, "--language-model", runs / "language-model"]
    assert run(command, list(map(str, arguments))) == 0
    stored = load_file(out / "trained.safetensors")
    assert stored["layers.0.mlp.up_proj.lora_A"].shape == (7, 64)
    tower = {tensor.dtype for name, tensor in stored.items() if name.startswith("vision_tower.")}
    assert tower == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_training_further_begins_where_the_packed_model_is(packed, prepared):
    flags = {"data": str(prepared("pages", "finetune")), "model": str(packed), "lora_alpha": 10}
    recipe = resolve("debug", "finetune", flags=flags | {"lora_rank": 7, "out": "none"})
    adapted = add_adapters(build(recipe, describe(recipe)), recipe).merge_and_unload()
    expected = load_model(packed).model.state_dict()
    for name, tensor in adapted.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("projector" in name for name in trained)
    smaller = msgspec.structs.replace(recipe, lora_rank=5)
    with pytest.raises(ConfigError, match="rank 6, more than --lora-rank 5 can hold"):
        add_adapters(build(smaller, describe(smaller)), smaller)


def test_putting_together_can_be_interrupted_and_is_done_once(packed, tmp_path):
    def interrupted(phase: str, done: int, total: int) -> None:
        if phase == "Putting the model together" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assemble(packed, tmp_path, interrupted)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    phases: list[str] = []
    folder = assemble(packed, tmp_path, lambda phase, *_: phases.append(phase))
    assert "Merging" in phases
    assert folder == assembled_folder(packed, tmp_path)
    phases.clear()
    assert assemble(packed, tmp_path, lambda phase, *_: phases.append(phase)) == folder
    assert not phases


def test_a_damaged_part_is_said(packed, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    data = bytearray((folder / "trained.safetensors").read_bytes())
    data[-1] ^= 255
    (folder / "trained.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"trained\.safetensors is not the file it was"):
        assemble(folder, tmp_path / "models", silent)


def test_another_language_model_is_noticed(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "language-model", other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"up_proj\.weight comes out different"):
        pack(
            runs / "second",
            tmp_path / "out",
            language_model=str(other),
            hints="none",
            report=silent,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["hf", "gguf"])
def test_a_bundled_model_answers_through_both_backends(backend, packed, tmp_path):
    if backend == "gguf":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    picture = tmp_path / "page.png"
    screenshot(0).save(picture)
    message = Message("user", "Write the page.", (load_attachment(str(picture)),))
    phases: list[str] = []
    with EngineClient(tmp_path / "engine.log") as engine:
        spec = LoadSpec(name=str(packed), backend=backend, threads=1)
        info = engine.load(spec, lambda phase, *_: phases.append(phase))
        assert info.backend == backend
        assert info.name == "packed"
        assert info.hints == "colors"
        assert info.reads_images
        params = GenerationParams(max_new_tokens=4, temperature=0.0)
        assert list(engine.stream([message], params))
        if backend == "gguf":
            made = assembled_folder(packed, paths().models)
            files = sorted(path.name for path in made.with_name(f"{made.name}-gguf").iterdir())
            assert files == ["packed-mmproj-f16.gguf", "packed-q8_0.gguf"]
            phases.clear()
            engine.load(spec, lambda phase, *_: phases.append(phase))
            assert not [phase for phase in phases if "Writing" in phase]
