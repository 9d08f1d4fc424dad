"""Both stages in one process: what changes and by how much, and what stops a run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.trainer.conftest import launch, losses
from trainer import tiny
from trainer.batches import examples_of
from trainer.dataset import open_dataset
from trainer.loop import TRAINED_NAME, start_processes, train, zero_config
from trainer.model import add_adapters, build, describe
from trainer.monitor import TrainingStopped
from trainer.recipes import named, resolve
from trainer.reshard import reshard
from trainer.run_folder import PARTIAL, RunFolder, read_lines
from trainer.samples import IGNORE_INDEX
from w2c_tui.backends.hf import HFBackend
from w2c_tui.core.config import LoadSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import CheckpointError, ConfigError
from w2c_tui.core.reference import load_attachment
from w2c_tui.models.checkpoint import PROJECTOR_NAME, load_model, read_card


def recipe_for(stage, data, out, **flags):
    defaults = {"warmup_ratio": 0.0, "save_every": 0}
    return resolve("debug", stage, flags={"data": str(data), "out": str(out), **defaults, **flags})


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).model.named_parameters())


def is_part(name: str, part: str) -> bool:
    return f".{part}." in f".{name}"


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_changes_what_it_trains_and_nothing_else(prepared, tmp_path, stage):
    recipe = recipe_for(stage, prepared("pages", stage), tmp_path / "run", max_steps=2)
    before = {n: p.detach().clone() for n, p in build(recipe, describe(recipe)).named_parameters()}
    after = weights(train(recipe))
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if is_part(name, "multi_modal_projector")}
    if stage == "finetune":
        trained = {name for name in before if not is_part(name, "vision_tower")}
    assert changed == trained


@pytest.mark.parametrize("per_device_batch", [8, 2])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_step_is_a_step_of_plain_adamw(prepared, tmp_path, stage, per_device_batch):
    data = prepared("pages", stage)
    recipe = recipe_for(
        stage,
        data,
        tmp_path / "run",
        max_steps=1,
        per_device_batch=per_device_batch,
        # Adam takes one step size for all; of gradients near 0 only noise decides the sign.
        learning_rate=1e-4,
        weight_decay=0.1,
    )
    parts = describe(recipe)
    model = build(recipe, parts).train()
    training_set = examples_of(open_dataset(data), parts, recipe)
    summed, count = torch.zeros(()), 0
    for at in range(8):
        example = training_set[at]
        labels = torch.tensor(example.encoded.labels, dtype=torch.long)
        logits = model(
            input_ids=torch.tensor(example.encoded.input_ids[None], dtype=torch.long),
            pixel_values=torch.from_numpy(example.pixels[0])[None],
        ).logits[0]
        summed = summed + F.cross_entropy(
            logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
        )
        count += int((labels[1:] != IGNORE_INDEX).sum())
    (summed / count).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item()
    decays = [p for name, p in trained.items() if p.dim() > 1]
    rest = [p for name, p in trained.items() if p.dim() == 1]
    torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    ).step()

    after = weights(train(recipe))
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["loss"] == pytest.approx((summed / count).item(), abs=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after[name], parameter, rtol=0, atol=1e-5)


def test_accumulation_changes_nothing(prepared, tmp_path):
    data = prepared("mixed", "finetune")
    runs = {}
    for size in (1, 8):
        recipe = recipe_for("finetune", data, tmp_path / f"{size}", per_device_batch=size, epochs=3)
        result = train(recipe)
        runs[size] = losses(tmp_path / f"{size}"), weights(result)
    assert runs[1][0] == pytest.approx(runs[8][0], abs=1e-5)
    for name, parameter in runs[8][1].items():
        torch.testing.assert_close(runs[1][1][name], parameter, rtol=0, atol=1e-4)


def test_the_same_seed_is_the_same_run_and_another_is_not(prepared, tmp_path):
    data = prepared("mixed", "finetune")
    curves = [
        (train(recipe_for("finetune", data, tmp_path / str(at), seed=seed, max_steps=3)), at)
        for at, seed in enumerate((1, 1, 2))
    ]
    first, second, other = (losses(tmp_path / str(at)) for _, at in curves)
    assert first == second
    assert first != other


def test_stage_1_writes_a_projector_that_stage_2_starts_from(prepared, tmp_path):
    stage_1 = train(recipe_for("pretrain", prepared("pages", "pretrain"), tmp_path / "1"))
    projector = stage_1.parent / PROJECTOR_NAME
    stored = load_file(projector)
    assert projector.stat().st_size < 100_000
    state = weights(stage_1)
    for name, tensor in stored.items():
        assert torch.equal(state[f"model.{name}"], tensor)
    # As LLaVA publishes it.
    numbers = {"linear_1": "0", "linear_2": "2"}
    published = {}
    for name, tensor in stored.items():
        _, linear, kind = name.split(".")
        published[f"model.mm_projector.{numbers[linear]}.{kind}"] = tensor.half()
    torch.save(published, tmp_path / "mm_projector.bin")
    data = prepared("pages", "finetune")
    for source in (projector, tmp_path / "mm_projector.bin"):
        recipe = recipe_for("finetune", data, tmp_path / "2", projector=str(source))
        model = build(recipe, describe(recipe))
        for name, parameter in model.model.multi_modal_projector.named_parameters():
            expected = stored[f"multi_modal_projector.{name}"]
            torch.testing.assert_close(parameter.data, expected, rtol=0, atol=1e-3)
    card = read_card(stage_1)
    assert card.template == "plain"
    assert card.image.aspect == "crop"
    assert card.recipe["stage"] == "pretrain"
    assert card.data_fingerprint == open_dataset(prepared("pages", "pretrain")).fingerprint


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_adapters_are_merged_into_the_result(prepared, tmp_path, quantization):
    recipe = recipe_for(
        "finetune",
        prepared("mixed", "finetune"),
        tmp_path / "run",
        lora_rank=4,
        lora_alpha=8,
        quantization=quantization,
        epochs=6,
    )
    before = {
        n: p.detach().clone()
        for n, p in build(
            msgspec.structs.replace(recipe, quantization="none"), describe(recipe)
        ).named_parameters()
    }
    after = weights(train(recipe))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {n for n in before if is_part(n, "layers") and "proj" in n and "vision" not in n}
    projector = {name for name in before if is_part(name, "multi_modal_projector")}
    assert changed == adapted | projector
    curve = losses(tmp_path / "run")
    assert curve[max(curve)] < curve[1] - 0.1


def test_bf16_trains_what_learns_in_float32_and_saves_bf16(prepared, tmp_path):
    recipe = recipe_for(
        "finetune", prepared("mixed", "finetune"), tmp_path / "run", precision="bf16", epochs=4
    )
    model = build(recipe, describe(recipe))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    result = train(recipe)
    curve = losses(tmp_path / "run")
    assert curve[max(curve)] < curve[1] - 0.3
    stored = load_file(result / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    # The debug model's head is tied to its embeddings.
    assert not [name for name in stored if "lm_head" in name]


# --- Signals, checkpoints, stops ------------------------------------------------------------------


def when_step(run, step, action):
    """Call `action` from a thread once `step` is in the metrics of `run`."""

    def watch():
        while not ((run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= step):
            time.sleep(0.01)
        action()

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_sigterm_saves_and_stops_and_resume_gives_the_same_curve(prepared, tmp_path, stage):
    data = prepared("pages", stage)
    flags = {"epochs": 12}
    whole = train(recipe_for(stage, data, tmp_path / "whole", **flags))
    recipe = recipe_for(stage, data, tmp_path / "run", **flags)
    handler = signal.getsignal(signal.SIGTERM)
    when_step(tmp_path / "run", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(recipe) is None
    assert signal.getsignal(signal.SIGTERM) is handler
    stopped = max(losses(tmp_path / "run"))
    assert 3 <= stopped < 12
    assert (tmp_path / "run" / f"checkpoint-{stopped}").is_dir()
    with pytest.raises(ConfigError, match="another run"):
        train(recipe)
    other = msgspec.structs.replace(recipe, learning_rate=1e-5)
    with pytest.raises(ConfigError, match="learning_rate was"):
        train(other, resume=True)
    result = train(recipe, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, parameter in weights(whole).items():
        assert torch.equal(weights(result)[name], parameter)
    with pytest.raises(ConfigError, match="finished"):
        train(recipe, resume=True)


def test_a_stopped_run_can_end_where_it_stands(prepared, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for("pretrain", prepared("pages", "pretrain"), run, epochs=12)
    when_step(run, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(recipe) is None
    stopped = max(losses(run))
    state = load_file(run / f"checkpoint-{stopped}" / TRAINED_NAME)
    with pytest.raises(ConfigError, match="max_steps was"):
        train(msgspec.structs.replace(recipe, max_steps=stopped - 1), resume=True)
    result = train(msgspec.structs.replace(recipe, max_steps=stopped), resume=True)
    assert result == run / "model"
    assert max(losses(run)) == stopped
    made = weights(result)
    for name, tensor in state.items():
        part = name.split("multi_modal_projector.")[1]
        assert torch.equal(made[next(n for n in made if n.endswith(part))], tensor)


def test_a_stopped_run_can_end_earlier_than_planned(prepared, tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for("pretrain", prepared("pages", "pretrain"), run, epochs=12, max_steps=12)
    when_step(run, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(recipe) is None
    stopped = max(losses(run))
    with pytest.raises(ConfigError, match="max_steps was"):
        train(msgspec.structs.replace(recipe, max_steps=13), resume=True)
    assert train(msgspec.structs.replace(recipe, max_steps=stopped + 2), resume=True)
    rates = [line["learning_rate"] for line in read_lines(run / "metrics.jsonl")]
    assert len(rates) == stopped + 2
    assert rates[-1] < 0.4 * rates[stopped - 1]


def test_sigusr1_saves_and_goes_on(prepared, tmp_path):
    recipe = recipe_for("pretrain", prepared("pages", "pretrain"), tmp_path / "run", epochs=12)
    when_step(tmp_path / "run", 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert train(recipe) is not None
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert len(saved) == 1
    assert saved != ["checkpoint-12"]


def test_checkpoints_are_kept_to_the_limit_and_a_half_written_one_is_not_taken(prepared, tmp_path):
    run = tmp_path / "run"
    data = prepared("pages", "pretrain")
    recipe = recipe_for("pretrain", data, run, epochs=6, save_every=1, keep_checkpoints=2)
    train(recipe)
    names = sorted(path.name for path in run.glob("checkpoint-*"))
    assert names == ["checkpoint-5", "checkpoint-6"]
    # As a process that is killed while it writes leaves it.
    for path in (run / "model").iterdir():
        path.unlink()
    (run / "model").rmdir()
    (run / ".partial" / "checkpoint-7").mkdir(parents=True)
    (run / ".partial" / "checkpoint-7" / "trainer_state.json").write_text("{")
    before = losses(run)
    assert train(recipe, resume=True) == run / "model"
    assert losses(run) == before
    assert not (run / ".partial").exists()


def test_a_full_disk_in_a_checkpoint_is_named_and_the_earlier_one_stays(prepared, tmp_path):
    run = tmp_path / "run"
    data = prepared("pages", "finetune")
    recipe = recipe_for("finetune", data, run, epochs=4, save_every=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    when_checkpoint = threading.Thread(target=_when_exists, args=(run / "checkpoint-2", fill))
    when_checkpoint.start()
    try:
        with pytest.raises(TrainingStopped, match="step 4 cannot be written") as caught:
            train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-2 is there" in caught.value.hint
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-2"]
    assert train(recipe, resume=True) == run / "model"


def test_adapters_take_activations_in_the_precision_of_the_run(prepared, tmp_path):
    data = prepared("pages", "finetune")
    recipe = recipe_for("finetune", data, tmp_path / "run", lora_rank=4, precision="bf16")
    start_processes(recipe)
    adapted = add_adapters(build(recipe, describe(recipe)), recipe)
    seen = set()
    for name, module in adapted.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        adapted(input_ids=ids)
    assert seen == {torch.bfloat16}


def test_a_disk_without_room_is_named_before_anything_is_written(prepared, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    run = tmp_path / "run"
    recipe = recipe_for("finetune", prepared("pages", "finetune"), run)
    with pytest.raises(ConfigError, match=r"writes up to .* GB to .* and 0\.00 GB are free"):
        train(recipe)
    assert not run.exists()


def _when_exists(path, action):
    while not path.is_dir():
        time.sleep(0.005)
    action()


def test_a_loss_that_is_no_number_stops_the_run_with_the_samples(prepared, tmp_path):
    data = prepared("pages", "finetune")
    recipe = recipe_for("finetune", data, tmp_path / "run", learning_rate=1e30, epochs=4)
    with pytest.raises(TrainingStopped, match=r"loss of step \d is (nan|inf)") as caught:
        train(recipe)
    for at in range(8):
        assert f"pages/page-{at}" in caught.value.message


def test_a_step_without_supervised_tokens_stops_the_run_with_the_samples(prepared, tmp_path):
    data = prepared("pages", "finetune")
    recipe = recipe_for("finetune", data, tmp_path / "run", max_length=60)
    with pytest.raises(TrainingStopped, match="No token of step 1") as caught:
        train(recipe)
    assert "pages/page-3" in caught.value.message


def test_a_stall_ends_the_process_and_names_the_samples(prepared, tmp_path):
    run = tmp_path / "run"
    flags = ["--data", prepared("pages", "finetune"), "--out", run, "--epochs", 500]
    process = launch("finetune", *flags, "--workers", 1, "--stall-timeout-s", 4, wait=False)
    while not ((run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= 2):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    try:
        for worker in workers:
            worker.suspend()
        process.wait(timeout=120)
    finally:
        for worker in workers:
            worker.kill()
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "No step ended for" in output
    assert "pages/page-" in output.partition("Samples of the last step")[2]


def test_a_damaged_zero_checkpoint_is_named(tmp_path):
    run = tmp_path / "run"
    recipe = recipe_for("pretrain", "x", run, zero_stage=2)
    folder = RunFolder(recipe, "fingerprint")
    folder.claim()
    (folder.path / PARTIAL / "checkpoint-3").mkdir(parents=True)
    folder.publish("checkpoint-3", 8)
    assert folder.devices_of(folder.newest()) == 8
    with pytest.raises(TrainingStopped, match=r"checkpoint-3 cannot be put together.*latest"):
        reshard(folder.newest(), folder.resharded)
    (folder.newest() / "launch.json").unlink()
    with pytest.raises(ConfigError, match="checkpoint-3 is damaged"):
        folder.devices_of(folder.newest())


# --- Towers ---------------------------------------------------------------------------------------


def save_siglip(folder):
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(folder)


def save_dinov2(folder):
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    square = {"height": 56, "width": 56}
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_siglip, save_dinov2])
def test_every_patch_of_towers_without_a_cls_token_is_trained_on(
    prepared, published, tmp_path, save
):
    save(tmp_path / "tower")
    flags = ["--vision-tower", str(tmp_path / "tower")]
    layers = (1, -1) if save is save_dinov2 else ()
    recipe = recipe_for(
        "pretrain",
        prepared("pages", "pretrain", *flags),
        tmp_path / "run",
        vision_tower=str(tmp_path / "tower"),
        feature_layer=layers,
        max_steps=1,
    )
    parts = describe(recipe)
    assert parts.tokens_per_image == 16
    result = train(recipe)
    backend = HFBackend()
    backend.load(LoadSpec(name=str(result), dtype="float32"), lambda *_: None)
    try:
        image = load_attachment(str(published / "0.png"))
        ids = backend.encode([Message("user", "", (image,))]).ids
        assert ids == [parts.image_token_id] * 16
        expected = parts.config.vision_feature_layer
        assert backend._model.config.vision_feature_layer == expected
    finally:
        backend.close()


# --- What is refused before anything starts -------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"global_batch": 10}, "10 does not divide"),
        ({"data": ""}, "no data"),
        ({"out": ""}, "no folder"),
        ({"vision_tower": ""}, "no vision tower"),
        ({"template": "chat"}, "no chat template"),
        ({"template": "plain"}, "template"),
        ({"image_size": 28}, "tokens per image"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(prepared, tmp_path, flags, problem):
    data = prepared("pages", "finetune")
    given = {"data": str(data), "out": str(tmp_path / "run")} | flags
    with pytest.raises(ConfigError, match=problem):
        train(resolve("debug", "finetune", flags=given))
    assert not (tmp_path / "run").exists()


def test_a_projector_of_another_pair_is_refused(prepared, tmp_path):
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save(
        {f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()},
        tmp_path / "mm_projector.bin",
    )
    recipe = recipe_for(
        "finetune",
        prepared("pages", "finetune"),
        tmp_path / "run",
        projector=str(tmp_path / "mm_projector.bin"),
    )
    with pytest.raises(CheckpointError, match=r"linear_1\.weight is \(64, 32\)"):
        train(recipe)


def copied_model(tmp_path):
    return Path(shutil.copytree(tiny.resolve("debug:llama"), tmp_path / "model"))


def test_a_tokenizer_without_eos_is_refused(prepared, tmp_path):
    model = copied_model(tmp_path)
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token")
    path.write_text(json.dumps(settings))
    data = prepared("pages", "finetune")
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        train(recipe_for("finetune", data, tmp_path / "run", model=str(model)))


def test_sampling_settings_that_cannot_be_saved_do_not_spoil_the_result(prepared, tmp_path):
    """As Vicuna has them: a temperature, and sampling switched off."""
    model = copied_model(tmp_path)
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(settings))
    data = prepared("pages", "pretrain")
    recipe = recipe_for("pretrain", data, tmp_path / "run", model=str(model), max_steps=1)
    result = train(recipe)
    assert json.loads((result / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(("zero_stage", "offload"), [(2, "none"), (2, "cpu"), (3, "nvme")])
def test_deepspeed_is_configured_from_the_recipe_alone(zero_stage, offload):
    recipe = msgspec.structs.replace(
        named("crystal-chat-7b", "finetune"),
        zero_stage=zero_stage,
        offload=offload,
        offload_folder="/scratch",
    )
    config = zero_config(recipe, 2, 8, LlamaConfig(hidden_size=4096))
    assert config["train_batch_size"] == 128
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == zero_stage
    place = config["zero_optimization"].get("offload_optimizer", {"device": "none"})
    assert place["device"] == offload
    assert ("offload_param" in config["zero_optimization"]) == (offload == "nvme")


def test_a_folder_with_something_else_in_it_is_refused(prepared, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no training run"):
        train(recipe_for("pretrain", prepared("pages", "pretrain"), tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_picture_is_named(prepared, published, tmp_path):
    from w2c_tui.core.errors import ImageError

    data = prepared("pages", "pretrain", "--max-length", "400")
    gone = published / "3.png"
    gone.rename(tmp_path / "3.png")
    try:
        with pytest.raises(ImageError, match=r"3\.png"):
            train(recipe_for("pretrain", data, tmp_path / "run"))
    finally:
        (tmp_path / "3.png").rename(gone)
