"""Recipes: the published numbers, overrides and their precedence, and what cannot be combined."""

from __future__ import annotations

import pytest

from trainer.recipes import RECIPES, checked, named, resolve
from w2c_tui.core.errors import ConfigError


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (
            "pretrain",
            {
                "global_batch": 256,
                "learning_rate": 1e-3,
                "zero_stage": 2,
                "template": "plain",
                "image_aspect": "crop",
                "gradient_checkpointing": False,
            },
        ),
        (
            "finetune",
            {
                "global_batch": 128,
                "learning_rate": 2e-5,
                "zero_stage": 3,
                "template": "v1",
                "image_aspect": "pad",
            },
        ),
    ],
)
def test_crystal_chat_is_trained_as_published(stage, expected):
    recipe = named("crystal-chat-7b", stage)
    shared = {
        "model": "LLM360/CrystalChat",
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "epochs": 1,
        "max_length": 2048,
        "weight_decay": 0,
        "schedule": "cosine",
        "warmup_ratio": 0.03,
        "precision": "bf16",
        "max_grad_norm": 1.0,
    }
    for field, value in (expected | shared).items():
        assert getattr(recipe, field) == value, field
    # 16 devices, as published.
    assert recipe.gradient_accumulation(16) * 16 * recipe.per_device_batch == recipe.global_batch


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_together_and_has_a_debug_sibling(name, stage):
    recipe = checked(named(name, stage))
    assert recipe.name == name
    assert recipe.stage == stage
    assert name.endswith("debug") or f"{name}-debug" in RECIPES


def test_flags_go_before_the_file_and_the_file_before_the_recipe(tmp_path):
    yaml, toml = tmp_path / "a.yaml", tmp_path / "a.toml"
    yaml.write_text("learning_rate: 0.002\nepochs: 3\nfeature_layer: [4, -1]\n")
    toml.write_text("learning_rate = 0.002\nepochs = 3\nfeature_layer = [4, -1]\n")
    for file in (yaml, toml):
        recipe = resolve("debug", "pretrain", file=file, flags={"epochs": "5"})
        assert (recipe.learning_rate, recipe.epochs, recipe.global_batch) == (0.002, 5, 8)
        assert recipe.feature_layer == (4, -1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("learning_rte: 1", "learning_rte in"),
        ("stage: finetune", "stage in"),
        ("zero_stage: 1", "zero_stage"),
        ("learning_rate: -1", "learning_rate"),
        ("a: [", "cannot be read"),
        ("- 1", "no table"),
    ],
)
def test_a_wrong_file_is_named_with_its_field(tmp_path, content, problem):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        resolve("debug", "pretrain", file=file)
    assert str(file) in caught.value.message


def test_a_misspelt_field_or_recipe_is_suggested():
    with pytest.raises(ConfigError) as caught:
        resolve("debug", "pretrain", flags={"learning_rte": 1})
    assert "learning_rate" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        named("crystal-chat", "pretrain")
    assert "crystal-chat-7b" in caught.value.hint


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("finetune", {"offload": "cpu"}),
        ("finetune", {"offload": "nvme", "zero_stage": 3}),
        ("finetune", {"offload": "nvme", "zero_stage": 2, "offload_folder": "x"}),
        ("pretrain", {"lora_rank": 8}),
        ("finetune", {"quantization": "4bit"}),
        ("finetune", {"quantization": "4bit", "lora_rank": 8, "zero_stage": 3}),
        ("finetune", {"attn": "flash_attention_2"}),
    ],
)
def test_fields_that_exclude_each_other_are_refused(stage, flags):
    with pytest.raises(ConfigError):
        resolve("debug", stage, flags=flags)


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32])
def test_accumulation_follows_from_the_global_batch(devices):
    recipe = named("crystal-chat-7b", "pretrain")
    assert recipe.gradient_accumulation(devices) * devices * recipe.per_device_batch == 256


@pytest.mark.parametrize("devices", [3, 24, 64])
def test_a_global_batch_that_does_not_divide_is_an_error(devices):
    with pytest.raises(ConfigError, match=r"128 does not divide"):
        named("crystal-chat-7b", "finetune").gradient_accumulation(devices)


def test_steps_fill_the_last_batch_and_stop_at_the_limit():
    recipe = named("debug", "pretrain")
    assert recipe.steps(17) == 3
    assert resolve("debug", "pretrain", flags={"epochs": 2}).steps(17) == 6
    assert resolve("debug", "pretrain", flags={"max_steps": 4, "epochs": 2}).steps(17) == 4
    assert resolve("debug", "pretrain", flags={"warmup_ratio": 0.03}).warmup_steps(100) == 3
