"""The dry run: what it finds out about a run, and that it fails where the run would."""

from __future__ import annotations

import json
import re
import shutil

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import word_mark_tokenizer
from tests.trainer.data import record, write_json
from trainer.batches import StepSampler
from trainer.check import Cluster, _encoded, check, command, load_of, show
from trainer.dataset import open_dataset
from trainer.model import describe
from trainer.prepare import command as prepare_command
from trainer.recipes import named
from trainer.run_folder import RunFolder
from w2c_tui.console import run
from w2c_tui.models.crystal import CrystalCoderConfig


def checked(capsys, *arguments):
    """Exit status and output of `python -m trainer.check --recipe debug ...`."""
    if "--recipe" not in arguments:
        arguments = ("--recipe", "debug", *arguments)
    capsys.readouterr()
    status = run(command, [str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out + output.err


@pytest.fixture
def finetune(prepared, tmp_path):
    """Arguments of a run that would succeed."""
    return ["--stage", "finetune", "--data", prepared("mixed", "finetune"), "--out", tmp_path / "r"]


@pytest.fixture(scope="module")
def crystal_7b(tmp_path_factory):
    """CrystalChat's folder as it is published, but for its weights and its own words."""
    folder = tmp_path_factory.mktemp("models") / "CrystalChat"
    config = CrystalCoderConfig(
        n_embd=4096,
        n_layer=32,
        n_head=32,
        n_inner=10922,
        vocab_size=32032,
        rotary_dim=32,
        n_positions=2048,
    )
    config.save_pretrained(folder)
    word_mark_tokenizer(bos=False).save_pretrained(folder)
    return folder


# --- What it finds out ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_that_would_succeed_passes(stage, prepared, tmp_path, capsys):
    data = prepared("mixed", stage)
    status, output = checked(
        capsys, "--stage", stage, "--data", data, "--out", tmp_path / "r", "--devices", "2xH200"
    )
    assert status == 0, output
    assert "No problem was found." in output
    assert "global batch 8 = 2 device(s) x 4 samples x 1 accumulated" in output
    assert "2 steps, 16 samples" in output
    assert "pages: 14 samples, 6 of them text only" in output
    assert "0.00 % of samples are masked out" in output
    assert not (tmp_path / "r").exists()


def test_samples_are_shown_with_what_is_under_the_loss(finetune, capsys):
    _, output = checked(capsys, *finetune)
    shown = re.search(r"pages/page-0: .*?(?=\n  pages/)", output, re.DOTALL)[0]
    assert "USER: [16 image tokens]" in shown
    ((answer, *others),) = [re.findall("«(.*?)»", shown, re.DOTALL)]
    assert others == []
    assert answer.startswith(" <html>")
    # The page's own tag, and the end of the answer.
    assert "<s>old 0</s>" in answer
    assert answer.endswith("</html></s>")


def test_supervised_text_is_coloured_on_a_terminal(prepared, capsys):
    recipe = msgspec.structs.replace(
        named("debug", "finetune"), data=str(prepared("mixed", "finetune"))
    )
    assert show(check(recipe, Cluster(1)), color=True) == 0
    output = capsys.readouterr().out
    assert "\x1b[32m <html>" in output
    assert "\x02" not in output


def test_steps_and_micro_batches_are_those_of_the_run(prepared):
    recipe = msgspec.structs.replace(
        named("debug", "finetune"), data=str(prepared("mixed", "finetune")), epochs=2
    )
    dataset = open_dataset(recipe.data)
    load = load_of(recipe, dataset, 2)
    order = list(StepSampler(dataset.lengths, recipe, num_micro_batches=2))
    assert load.num_steps == recipe.steps(len(dataset)) == 4
    assert load.tokens == dataset.lengths[order].sum()
    assert load.tokens_at_once == dataset.lengths[order].reshape(-1, 4).sum(axis=1).max()
    padded = load_of(msgspec.structs.replace(recipe, batching="padded"), dataset, 2)
    assert padded.tokens_at_once >= load.tokens_at_once


def test_a_device_that_would_wait_for_its_data_is_named(finetune, capsys):
    """A tiny model on a large device is done before the next page is decoded."""
    status, output = checked(capsys, *finetune, "--devices", "1xH200", "--workers", "2")
    assert status == 0, output
    assert re.search(r"by 2 process\(es\) .* it waits (9\d|100) % of the time", output)
    assert "--store-pixels" in output
    _, cached = checked(capsys, *finetune, "--devices", "1xH200", "--cache-features")
    assert "Raise --workers" in cached
    assert "--store-pixels" not in cached
    _, alone = checked(capsys, *finetune)
    assert "data loads at" in alone
    assert "it waits" not in alone


def test_a_7b_model_is_checked_without_weights_or_memory(crystal_7b, tmp_path, capsys):
    data = tmp_path / "data"
    path = write_json(
        tmp_path / "m.json", [record(str(n), "Q", "<p>page</p>" * (n % 90)) for n in range(1, 300)]
    )
    recipe = ["--recipe", "crystal-chat-7b", "--stage", "finetune", "--model", crystal_7b]
    arguments = [data, *recipe, "--source", f"m={path}", "--workers", "1", "--check-images", "none"]
    assert run(prepare_command, [str(argument) for argument in arguments]) == 0
    arguments = [*recipe, "--data", data]
    status, output = checked(capsys, *arguments, "--devices", "16xA100-40GB")
    assert status == 0, output
    assert "language model: 6.706 B parameters" in output
    assert "vision tower: 303.51 M parameters" in output
    assert "fits A100-40GB" in output
    assert "at 40 % MFU" in output
    assert "data loads at" in output
    assert "of the time" not in output
    status, output = checked(capsys, *arguments, "--devices", "1xA100-40GB")
    assert status == 1
    assert "does not fit A100-40GB" in output
    assert "--lora-rank" in output


# --- What it refuses ------------------------------------------------------------------------------


def test_a_global_batch_that_does_not_divide(finetune, capsys):
    status, output = checked(capsys, *finetune, "--devices", "3xH200")
    assert status == 1
    assert "A global batch of 8 does not divide into 3 device(s)" in output


def test_data_measured_for_another_template(prepared, capsys):
    status, output = checked(capsys, "--stage", "finetune", "--data", prepared("mixed", "pretrain"))
    assert status == 1
    assert "the template was 'plain', is 'v1'" in output
    assert "python -m trainer.prepare" in output


def test_no_dataset_where_one_is_named(tmp_path, capsys):
    status, output = checked(capsys, "--stage", "finetune", "--data", tmp_path / "nothing")
    assert status == 1
    assert "holds no dataset" in output


def test_images_that_are_gone(published, prepared, tmp_path, capsys):
    moved = tmp_path / "published"
    shutil.copytree(published, moved)
    out = tmp_path / "data"
    recipe = ["--recipe", "debug", "--stage", "finetune", "--workers", "1"]
    source = ["--source", f"pages={moved / 'mixed.json'}"]
    assert run(prepare_command, [str(out), *recipe, *source]) == 0
    (moved / "3.png").unlink()
    (moved / "4.png").write_bytes(b"not an image")
    status, output = checked(capsys, "--stage", "finetune", "--data", out)
    assert status == 1
    assert "2 of 8 samples that were tried have images that cannot be opened" in output
    assert "pages/page-3" in output


def test_samples_of_which_nothing_is_learnt(finetune, capsys):
    status, output = checked(capsys, *finetune, "--max-length", 64)
    assert status == 1
    assert re.search(r"problem: \d+\.\d\d % of samples are masked out", output)
    assert "Raise --max-length" in output


def test_an_image_that_leaves_no_room_for_text(finetune, capsys):
    status, output = checked(capsys, *finetune, "--max-length", 16)
    assert status == 1
    assert "An image takes 16 of 16 tokens" in output


def test_more_length_than_the_model_was_made_for(finetune, capsys):
    status, output = checked(capsys, *finetune, "--max-length", 1000000)
    assert status == 1
    assert "positions that the language model was made for" in output


def test_a_projector_of_another_model(finetune, tmp_path, capsys):
    save_file(
        {
            "linear_1.weight": torch.zeros(8, 4),
            "linear_1.bias": torch.zeros(8),
            "linear_2.weight": torch.zeros(8, 8),
            "linear_2.bias": torch.zeros(8),
        },
        tmp_path / "projector.safetensors",
    )
    status, output = checked(capsys, *finetune, "--projector", tmp_path / "projector.safetensors")
    assert status == 1
    assert "does not fit this tower and language model" in output


def test_a_tokenizer_without_an_end_of_sequence(crystal_7b, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(crystal_7b, folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    status, output = checked(capsys, "--stage", "finetune", "--model", folder)
    assert status == 1
    assert "no end-of-sequence token" in output


def test_a_folder_that_holds_another_run(finetune, tmp_path, prepared, capsys):
    recipe = msgspec.structs.replace(
        named("debug", "finetune"), data=str(prepared("mixed", "finetune")), out=str(tmp_path / "r")
    )
    RunFolder(recipe, "0" * 64).claim()
    before = (tmp_path / "r/run.json").read_bytes()
    status, output = checked(capsys, *finetune)
    assert status == 1
    assert "holds another run" in output
    assert (tmp_path / "r/run.json").read_bytes() == before


def test_a_disk_without_room_for_the_result(finetune, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    status, output = checked(capsys, *finetune)
    assert status == 1
    assert "Free some space" in output


def test_devices_that_are_not_known(finetune, capsys):
    status, output = checked(capsys, *finetune, "--devices", "8xH999")
    assert status == 1
    assert "--devices cannot be '8xH999'" in output


def test_without_data_the_rest_is_checked(capsys):
    status, output = checked(capsys, "--stage", "pretrain")
    assert status == 0
    assert "No dataset is named" in output
    assert "per device" in output


def test_masked_out_samples_are_counted_as_training_would(prepared):
    """Every sample encoded as in training, against the dry run's figure."""
    recipe = msgspec.structs.replace(
        named("debug", "finetune"), data=str(prepared("mixed", "finetune")), max_length=190
    )
    parts = describe(recipe)
    dataset = open_dataset(recipe.data)
    supervised = [
        _encoded(recipe, parts, dataset.record(row)).num_supervised for row in range(len(dataset))
    ]
    share = 100 * np.mean(np.array(supervised) == 0)
    assert 0 < share < 100
    (line,) = [line for line in check(recipe, Cluster(1)) if "masked out" in line.text]
    assert line.text.startswith(f"{share:.2f} %")
