"""FLOPs and bytes against what torch and DeepSpeed count, and against what was published."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaForConditionalGeneration

from tests.models.tiny import crystal_config
from trainer import arithmetic
from trainer.arithmetic import (
    memory_plan,
    model_size,
    parse_devices,
    peak_flops,
    saved_bytes,
    training_flops,
)
from trainer.recipes import named
from w2c_tui.core.errors import ConfigError
from w2c_tui.models import llava
from w2c_tui.models.crystal import CrystalCoderConfig

CLIP_336 = "openai/clip-vit-large-patch14-336"


def crystal_7b():
    text = CrystalCoderConfig(
        n_embd=4096,
        n_layer=32,
        n_head=32,
        n_inner=10922,
        vocab_size=32064,
        rotary_dim=32,
        n_positions=2048,
    )
    vision = llava.TOWERS[CLIP_336].vision_config()
    return llava.llava_config(text, vision, image_token_id=32032)


def small(family):
    if family == "llama":
        text = LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    else:
        text = crystal_config(vocab_size=320)
    tower = msgspec.structs.replace(
        llava.TOWERS[CLIP_336],
        config=llava.TOWERS[CLIP_336].config
        | {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
        },
    )
    return llava.llava_config(text, tower.vision_config(), image_token_id=319)


def built(config, learns):
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float()
    model.requires_grad_(learns)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


# --- FLOPs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "crystal"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_flops_are_those_that_torch_counts(family, stage):
    config = small(family)
    model = built(config, stage == "finetune")
    # Of the fused attention of CPUs torch counts nothing.
    model.set_attn_implementation("eager")
    tokens = config.image_seq_length
    ids = torch.cat([torch.full((tokens,), 319), torch.arange(40)])[None]
    pixels = torch.randn(1, 3, 56, 56)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        features = model.model.multi_modal_projector(hidden[:, 1:])
        embeddings = model.get_input_embeddings()(ids[0, tokens:])[None]
        output = model.model.language_model(inputs_embeds=torch.cat([features, embeddings], dim=1))
        model.lm_head(output.last_hidden_state).sum().backward()
    counted = counter.get_total_flops()
    # torch counts the masked half of attention, too.
    length = ids.shape[1]
    size = model_size(config)
    half = 6 * length**2 * size.attention_width * size.num_layers
    ours = training_flops(config, length, 1, stage) + half
    assert ours == pytest.approx(counted, rel=0.03)


def test_flops_of_stage_1_are_the_published_ones():
    config = crystal_7b()
    flops = training_flops(config, 600, 1, "pretrain")
    assert flops == pytest.approx(16.8e12, rel=0.03)
    tower = (flops - training_flops(config, 600, 0, "pretrain")) / flops
    assert tower == pytest.approx(0.023, abs=0.006)
    # 558K samples in 20 hours on 16 A100; stage 2: 1.845M samples of 1050 tokens in 26 hours.
    peak = 16 * 312e12
    assert 558e3 / (20 * 3600) * flops / peak == pytest.approx(0.026, rel=0.03)
    stage_2 = training_flops(config, 1050, 1, "finetune")
    assert 1.845e6 / (26 * 3600) * stage_2 / peak == pytest.approx(0.17, rel=0.03)


def test_only_supervised_tokens_go_through_the_head():
    config = small("llama")
    whole = training_flops(config, 100, 1, "finetune")
    part = training_flops(config, 100, 1, "finetune", num_supervised=10)
    assert whole - part == 6 * 64 * 320 * 90


# --- Sizes and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "crystal"])
def test_a_model_is_counted_without_being_built(family):
    config = small(family)
    model = built(config, True)
    size = model_size(config)
    assert size.total == sum(parameter.numel() for parameter in model.parameters())
    assert size.trainable(named("debug", "pretrain")) == sum(
        parameter.numel() for parameter in model.model.multi_modal_projector.parameters()
    )
    assert size.image_tokens == 16


def test_the_published_model_has_seven_billion_parameters():
    size = model_size(crystal_7b())
    assert size.language_model + size.lm_head == pytest.approx(6.74e9, rel=0.01)
    assert size.vision_tower == pytest.approx(303.5e6, rel=0.01)


@pytest.mark.parametrize("world_size", [1, 8, 16])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_memory_of_states_is_what_deepspeed_estimates(world_size, offload, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    config = crystal_7b()
    size = model_size(config)
    everything = size.total
    # The estimators know nothing that is frozen.
    monkeypatch.setattr(arithmetic.ModelSize, "trainable", lambda self, recipe: everything)
    for zero_stage in (2, 3):
        recipe = msgspec.structs.replace(
            named("crystal-chat-7b", "finetune"), zero_stage=zero_stage, offload=offload
        )
        plan = memory_plan(config, recipe, world_size, 2048, 1)
        if zero_stage == 2:
            _, expected = estimate_zero2_model_states_mem_needs(
                everything, world_size, 1, cpu_offload=offload == "cpu"
            )
            found = plan.states
        else:
            _, expected, _ = estimate_zero3_model_states_mem_needs(
                everything,
                size.largest_module,
                world_size,
                1,
                cpu_offload=offload == "cpu",
                cpu_offload_params=offload == "cpu",
            )
            found = plan.states + 4 * size.largest_module
        assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "crystal"])
@pytest.mark.parametrize("learns", [True, False])
def test_activations_are_those_that_autograd_keeps(family, learns):
    """Against a real forward pass, whose attention on the CPU is of the flash kind."""
    config = small(family)
    length = 64
    held = []
    for num_layers in (1, 2):
        text = type(config.text_config).from_dict(
            config.text_config.to_dict() | {"num_hidden_layers": num_layers}
        )
        part = llava.llava_config(text, config.vision_config, image_token_id=319)
        model = built(part, learns)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def keep(tensor, weights=weights, seen=seen):
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in weights:
                seen[pointer] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        embeddings = torch.randn(1, length, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.model.language_model(inputs_embeds=embeddings, use_cache=False)
        held.append(sum(size for size, _ in seen.values()))
        del output
    counted = saved_bytes(config, learns=learns, half=False)
    assert counted == pytest.approx((held[1] - held[0]) / length, rel=0.1)


def test_checkpointing_and_frozen_weights_keep_less():
    config = crystal_7b()
    recipe = named("crystal-chat-7b", "finetune")
    with_it = memory_plan(config, recipe, 16, 8192, 8)
    without = memory_plan(
        config, msgspec.structs.replace(recipe, gradient_checkpointing=False), 16, 8192, 8
    )
    assert without.activations > 8 * with_it.activations
    assert saved_bytes(config, learns=False, half=True) < saved_bytes(
        config, learns=True, half=True
    )


def test_adapters_need_a_fraction_of_the_memory():
    config = crystal_7b()
    recipe = msgspec.structs.replace(
        named("crystal-chat-7b", "finetune"), zero_stage=0, per_device_batch=1
    )
    whole, lora, qlora = (
        memory_plan(config, msgspec.structs.replace(recipe, **fields), 1, 2048, 1)
        for fields in ({}, {"lora_rank": 64}, {"lora_rank": 64, "quantization": "4bit"})
    )
    assert whole.total > 100e9 > 30e9 > lora.total > qlora.total
    # 6.44 billion weights go from 2 bytes to about half a byte each.
    assert lora.weights - qlora.weights == pytest.approx(6.44e9 * 1.49, rel=0.01)


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("16xA100-40GB", 16, "A100-40GB"),
        ("8 x H100-80gb", 8, "H100-80GB"),
        ("H200", 1, "H200"),
        ("2*rtx-4090", 2, "RTX-4090"),
    ],
)
def test_devices_are_read_from_a_count_and_a_name(text, count, name):
    found_count, device = parse_devices(text)
    assert (found_count, device.name) == (count, name)


@pytest.mark.parametrize("text", ["", "0xH200", "16xA100", "H999", "8x", "eight H100"])
def test_devices_that_are_not_known_are_refused_with_those_that_are(text):
    with pytest.raises(ConfigError, match="--devices") as caught:
        parse_devices(text)
    assert "H100-80GB" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA T1000", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_card_is_found_by_the_name_its_driver_gives(name, tflops):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
