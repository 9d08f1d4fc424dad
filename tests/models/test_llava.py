"""One assembly over every tower, and one description of pixels shared with Hugging Face."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from w2c_tui.core.errors import CheckpointError
from w2c_tui.core.image import ImageSpec, pixel_values
from w2c_tui.models import llava
from w2c_tui.models.crystal import CrystalCoderForCausalLM

from . import tiny

TINY_TOWERS = {
    "clip": tiny.VISION,
    "siglip": tiny.VISION | {"model_type": "siglip_vision_model"},
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_model(kind: str):
    torch.manual_seed(0)
    if kind == "crystal":
        return CrystalCoderForCausalLM(tiny.crystal_config())
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=kind == "tied llama",
        )
    )


@pytest.mark.parametrize("tower", TINY_TOWERS)
@pytest.mark.parametrize("text", ["crystal", "llama", "tied llama"])
def test_any_text_model_goes_with_any_tower(tower, text, tmp_path):
    language_model = text_model(text)
    vision_config = AutoConfig.for_model(**TINY_TOWERS[tower])
    vision_tower = AutoModel.from_config(vision_config)
    config = llava.llava_config(language_model.config, vision_config, image_token_id=319)
    model = llava.assemble(language_model, vision_tower, config)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is language_model.get_output_embeddings().weight

    ids = torch.full((1, config.image_seq_length + 3), 319)
    ids[0, :3] = torch.tensor([5, 6, 7])
    size = vision_config.image_size
    pixels = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        logits = model(ids, pixel_values=pixels).logits
        assert logits.shape == (1, ids.shape[1], 320)
        other = model(ids, pixel_values=-pixels).logits
        assert not torch.allclose(logits[:, -1], other[:, -1]), "the image is seen"
        text_only = model(ids[:, :3]).logits
        torch.testing.assert_close(text_only, language_model(ids[:, :3]).logits)

    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(ids, pixel_values=pixels).logits, logits)


def test_a_new_projector_is_random_and_trainable():
    language_model = text_model("crystal").to(torch.bfloat16)
    vision_config = AutoConfig.for_model(**TINY_TOWERS["clip"])
    config = llava.llava_config(language_model.config, vision_config, image_token_id=319)
    tower = AutoModel.from_config(vision_config)
    projectors = [
        llava.assemble(language_model, tower, config).model.multi_modal_projector for _ in range(2)
    ]
    weights = [projector.linear_1.weight for projector in projectors]
    assert weights[0].dtype == torch.bfloat16
    assert weights[0].requires_grad
    assert not torch.equal(*weights)
    assert 0.05 < weights[0].float().std() * 32**0.5 < 2


@pytest.mark.parametrize(
    ("name", "tokens", "strategy", "layer", "hidden", "parameters"),
    [
        ("openai/clip-vit-large-patch14", 256, "default", -2, 1024, 303_179_776),
        ("openai/clip-vit-large-patch14-336", 576, "default", -2, 1024, 303_507_456),
        ("google/siglip-so400m-patch14-384", 729, "full", -2, 1152, 428_225_600),
        ("facebook/dinov2-small", 256, "default", -1, 384, 22_056_576),
        ("facebook/dinov2-base", 256, "default", -1, 768, 86_580_480),
    ],
)
def test_a_built_in_tower_has_its_published_shape(
    name, tokens, strategy, layer, hidden, parameters
):
    tower = llava.TOWERS[name]
    config = llava.llava_config(
        tiny.crystal_config(),
        tower.vision_config(),
        image_token_id=319,
        image_size=tower.image.size,
    )
    assert config.image_seq_length == tokens
    assert config.vision_feature_select_strategy == strategy
    assert config.vision_feature_layer == layer
    assert config.vision_config.hidden_size == hidden
    with torch.device("meta"):
        model = AutoModel.from_config(tower.vision_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_tower_runs_at_another_size_if_it_can():
    vision_config = AutoConfig.for_model(**TINY_TOWERS["dinov2"])
    assert llava.num_image_tokens(vision_config, 28, "default") == 4
    assert llava.num_image_tokens(vision_config, 28, "full") == 5
    with pytest.raises(CheckpointError, match="30 px"):
        llava.num_image_tokens(vision_config, 30, "default")


def test_dropping_a_cls_token_that_is_not_there_is_refused():
    vision_config = AutoConfig.for_model(**TINY_TOWERS["siglip"])
    with pytest.raises(CheckpointError, match="no CLS token"):
        llava.llava_config(
            tiny.crystal_config(), vision_config, image_token_id=1, select_strategy="default"
        )


def test_a_tower_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match="'vit'"):
        llava.has_cls_token(AutoConfig.for_model("vit"))


def test_an_image_token_outside_the_vocabulary_is_refused():
    vision_config = AutoConfig.for_model(**TINY_TOWERS["clip"])
    with pytest.raises(CheckpointError, match="320 is outside the vocabulary of 320"):
        llava.llava_config(tiny.crystal_config(), vision_config, image_token_id=320)


SPECS = {
    name.split("/")[1]: msgspec.structs.replace(tower.image, **change)
    for name, tower in llava.TOWERS.items()
    for change in ({}, {"aspect": "pad", "shortest_edge": None})
    if tower.image.aspect == "crop" or not change
} | {
    "clip-336-pad": msgspec.structs.replace(
        llava.TOWERS["openai/clip-vit-large-patch14-336"].image, aspect="pad"
    ),
    "dinov2-crop": llava.TOWERS["facebook/dinov2-small"].image,
    "clip-crop": llava.TOWERS["openai/clip-vit-large-patch14"].image,
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [(64, 48), (31, 90), (400, 400)])
def test_the_written_processor_prepares_the_same_pixels(tmp_path, name, size):
    spec = SPECS[name]
    tiny.write_tokenizer(tmp_path, bos=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, config=LlamaConfig())
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vision_config = AutoConfig.for_model(**TINY_TOWERS["clip"])
    config = llava.llava_config(LlamaConfig(vocab_size=448), vision_config, image_token_id=400)
    processor = llava.processor_for(config, tokenizer, spec)
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    theirs = processor.image_processor(picture, return_tensors="np")["pixel_values"][0]
    ours = pixel_values(picture, spec)
    assert ours.shape == theirs.shape == (3, spec.size, spec.size)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)

    read = ImageSpec.from_processor_config(processor.image_processor.to_dict())
    assert (read.size, read.aspect) == (spec.size, spec.aspect)
    assert (read.mean, read.shortest_edge) == (spec.mean, spec.shortest_edge)
