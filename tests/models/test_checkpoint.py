"""Published checkpoints load bit for bit, in every layout, and bad ones fail with a clear error."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from tests.core.hub_server import hub, offer
from w2c_tui.core.errors import (
    CheckpointError,
    DownloadError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsafeCheckpointError,
)
from w2c_tui.core.image import ImageSpec
from w2c_tui.models import checkpoint, weights
from w2c_tui.models.checkpoint import (
    CheckpointCard,
    convert,
    device_plan,
    load_model,
    open_checkpoint,
)

from . import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*SwigPy.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*swigvarlink.*:DeprecationWarning"),
]
EMBEDS = "model.language_model.embed_tokens.weight"


__all__ = ["hub"]


@pytest.fixture(autouse=True)
def _one_thread_and_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_crystal(
    folder: Path, *, form: str = "safetensors", shards: int = 1, raw: dict | None = None, **kwargs
) -> dict[str, torch.Tensor]:
    """A LLaVA-layout Crystal checkpoint in `folder`; returns its tensors."""
    config, tensors = tiny.published_llava_crystal(**kwargs)
    write = tiny.write_bin if form == "bin" else tiny.write_safetensors
    write(folder, tensors, shards)
    tiny.write_tokenizer(folder, bos=False)
    tiny.write_json(folder / "config.json", config | (raw or {}))
    return tensors


def assert_holds(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Every parameter is bit for bit the one in `state`, and there is no other."""
    actual = model.state_dict()
    if "lm_head.weight" not in state:
        assert actual.pop("lm_head.weight").data_ptr() == actual[EMBEDS].data_ptr()
    assert actual.keys() == state.keys()
    for name, tensor in state.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
        assert actual[name].is_contiguous(), name


def logits_of(model, image_token_id: int, seed: int = 1) -> torch.Tensor:
    ids = torch.randint(3, 399, (1, 24), generator=torch.Generator().manual_seed(seed))
    ids[0, 5:9] = image_token_id
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(ids, pixel_values=pixels.to(model.dtype)).logits


# --- LLaVA layout over CrystalCoder ---------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_crystal_llava_loads_bit_for_bit(tmp_path, form, shards, dtype):
    tensors = write_crystal(tmp_path, form=form, shards=shards, dtype=dtype)
    loaded = load_model(tmp_path, dtype=dtype)
    assert isinstance(loaded.model, LlavaForConditionalGeneration)
    assert_holds(loaded.model, tiny.llava_state_dict(tensors))
    assert not loaded.model.training


def test_bin_and_safetensors_give_identical_logits(tmp_path):
    outputs = []
    for form in ("bin", "safetensors"):
        write_crystal(tmp_path / form, form=form, shards=2)
        model = load_model(tmp_path / form).model
        outputs.append(logits_of(model, model.config.image_token_id))
    assert torch.equal(*outputs)


def test_what_a_crystal_llava_says_about_itself(tmp_path):
    write_crystal(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.family, loaded.template) == ("llava_crystal", "v1")
    assert loaded.image_spec == ImageSpec(size=28, aspect="pad")
    assert (loaded.image_seq_length, loaded.context_length) == (4, 256)
    assert loaded.processor is None
    assert loaded.source_label == str(tmp_path)
    assert loaded.tokenizer("a").input_ids[0] != loaded.tokenizer.bos_token_id
    assert loaded.model.config.image_token_id == loaded.tokenizer.convert_tokens_to_ids("<image>")
    assert loaded.model.config.text_config.vocab_size == 416, "the image token fits the padding"
    assert loaded.model.config.vision_feature_select_strategy == "default"


def test_a_released_config_without_vision_config_uses_the_built_in_tower(tmp_path):
    config, _ = tiny.published_llava_crystal()
    del config["vision_config"]
    tiny.write_json(tmp_path / "config.json", config)
    vision, image, own = checkpoint._tower_of(tmp_path, config, lambda *_: None, None)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (1024, 24, 336)
    assert image.size == 336
    assert own is None


def test_a_checkpoint_without_head_is_tied(tmp_path):
    tensors = write_crystal(tmp_path, head=False)
    model = load_model(tmp_path).model
    assert_holds(model, tiny.llava_state_dict(tensors))
    untied = LlavaForConditionalGeneration(model.config)
    untied.config.tie_word_embeddings = False
    head = {"lm_head.weight": tensors["transformer.wte.weight"]}
    untied.load_state_dict(tiny.llava_state_dict(tensors) | head)
    image = model.config.image_token_id
    assert torch.equal(logits_of(model, image), logits_of(untied.eval(), image))


def test_a_named_tower_is_read_from_its_own_folder(tmp_path):
    tiny.write_tower(tmp_path / "tower")
    raw = {"mm_vision_tower": str(tmp_path / "tower")}
    tensors = write_crystal(tmp_path / "model", tower=False, raw=raw)
    loaded = load_model(tmp_path / "model")
    assert_holds(loaded.model, tiny.llava_state_dict(tensors | tiny.published_clip()))
    assert loaded.image_spec is not None
    assert loaded.image_spec.size == 28


def test_a_cast_on_loading_equals_a_cast_after_it(tmp_path):
    tensors = write_crystal(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16).model
    assert_holds(model, {k: t.bfloat16() for k, t in tiny.llava_state_dict(tensors).items()})


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_with_a_class_of_its_own_is_read_without_its_code(tmp_path, fast, bos):
    write_crystal(tmp_path)
    if fast:
        # What is stored adds a BOS; the published class puts its own flags in place of that.
        tiny.write_tokenizer(tmp_path, bos=not bos)
        AutoTokenizer.from_pretrained(tmp_path, config=LlamaConfig()).save_pretrained(tmp_path)
        (tmp_path / "tokenizer.model").unlink()
    tiny.write_json(
        tmp_path / "tokenizer_config.json",
        {
            "tokenizer_class": "CrystalCoderTokenizerFast",
            "auto_map": {"AutoTokenizer": [None, "evil.CrystalCoderTokenizerFast"]},
            "add_bos_token": bos,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    tiny.write_tokenizer(tmp_path / "expected", bos=bos)
    expected = AutoTokenizer.from_pretrained(tmp_path / "expected", config=LlamaConfig())
    tokenizer = open_checkpoint(tmp_path).tokenizer
    for text in ("USER: <html> é</s>", " a  b", "<s>x"):
        assert tokenizer(text).input_ids == expected(text).input_ids
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)


# --- Other layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_published_crystal_text_model_loads_bit_for_bit(tmp_path, form):
    config = tiny.crystal_config(vocab_size=416)
    published = tiny.published_crystal(config)
    buffer = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    write = tiny.write_bin if form == "bin" else tiny.write_safetensors
    write(tmp_path, published | buffer, 2)
    raw = config.to_dict()
    del raw["tie_word_embeddings"]
    raw |= {"auto_map": {"AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel"}}
    tiny.write_json(tmp_path / "config.json", raw)
    tiny.write_tokenizer(tmp_path, bos=False)
    loaded = load_model(tmp_path)
    assert_holds(loaded.model, tiny.crystal_state_dict(published))
    assert (loaded.family, loaded.image_spec, loaded.processor) == ("crystalcoder", None, None)


def write_llama(folder: Path, tower: Path, *, form: str = "bin") -> dict[str, torch.Tensor]:
    config, tensors = tiny.published_llava_llama()
    config |= {"mm_vision_tower": str(tower)}
    (tiny.write_bin if form == "bin" else tiny.write_safetensors)(folder, tensors, 2)
    tiny.write_json(folder / "config.json", config)
    tiny.write_tokenizer(folder, bos=True)
    return tensors


def test_a_llama_llava_gets_rows_for_the_image_token(tmp_path):
    tiny.write_tower(tmp_path / "tower")
    tensors = write_llama(tmp_path / "model", tmp_path / "tower")
    loaded = load_model(tmp_path / "model")
    state = loaded.model.state_dict()
    expected = tiny.llava_state_dict(tensors | tiny.published_clip())
    for name, tensor in expected.items():
        assert torch.equal(state[name][: len(tensor)] if tensor.ndim else state[name], tensor), name
    assert state["lm_head.weight"].shape == state[EMBEDS].shape == (448, 64)
    assert loaded.model.config.image_token_id == 400
    logits = logits_of(loaded.model, 400)[0]
    assert (logits[:, :400].amax(-1) >= logits[:, 400:].amax(-1)).all(), "no new token ever wins"
    assert (loaded.family, loaded.template) == ("llava_llama", "v1")


def test_a_stage_1_projector_beside_its_base_model(tmp_path):
    config, tensors = tiny.published_llava_crystal()
    projector = {name: t for name, t in tensors.items() if "mm_projector" in name}
    tiny.write_safetensors(tmp_path, {k: t for k, t in tensors.items() if k not in projector})
    torch.save(projector, tmp_path / "mm_projector.bin")
    tiny.write_json(tmp_path / "config.json", config)
    tiny.write_tokenizer(tmp_path, bos=False)
    assert_holds(load_model(tmp_path).model, tiny.llava_state_dict(tensors))


def test_a_stage_1_projector_that_names_its_base_model(tmp_path):
    base = tiny.crystal_config(vocab_size=416)
    published = tiny.published_crystal(base)
    tiny.write_bin(tmp_path / "base", published)
    tiny.write_json(tmp_path / "base" / "config.json", base.to_dict())
    tiny.write_tokenizer(tmp_path / "base", bos=False)
    tiny.write_tower(tmp_path / "tower")
    config, _ = tiny.published_llava_crystal()
    config |= {
        "_name_or_path": str(tmp_path / "base"),
        "mm_vision_tower": str(tmp_path / "tower"),
        "image_aspect_ratio": "square",
    }
    projector = tiny.published_projector(64, "model.")
    (tmp_path / "stage1").mkdir()
    torch.save(projector, tmp_path / "stage1" / "mm_projector.bin")
    tiny.write_json(tmp_path / "stage1" / "config.json", config)
    loaded = load_model(tmp_path / "stage1")
    everything = published | projector | tiny.published_clip()
    assert_holds(loaded.model, tiny.llava_state_dict(everything))
    assert loaded.template == "plain"
    assert loaded.image_spec is not None
    assert loaded.image_spec.aspect == "crop"


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_converting_keeps_every_bit_and_every_fact(tmp_path, max_shard_bytes):
    tensors = write_crystal(tmp_path / "published", form="bin", shards=2, dtype=torch.float16)
    steps = []
    out = convert(
        tmp_path / "published",
        tmp_path / "out",
        lambda *step: steps.append(step),
        max_shard_bytes=max_shard_bytes,
    )
    before = load_model(tmp_path / "published", dtype=torch.float16)
    after = load_model(out, dtype=torch.float16)
    assert_holds(after.model, tiny.llava_state_dict(tensors))
    for field in ("family", "template", "image_spec", "context_length", "image_seq_length"):
        assert getattr(after, field) == getattr(before, field), field
    text = "USER: <p>price</p> é ASSISTANT:"
    assert after.tokenizer(text).input_ids == before.tokenizer(text).input_ids
    assert steps[-1][1] == steps[-1][2] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "published"]
    names = {path.name for path in out.iterdir()}
    wanted = {"config.json", "w2c.json", "chat_template.jinja", "tokenizer.json"}
    assert names >= {*wanted, "processor_config.json"}
    assert ("model.safetensors" in names) == (max_shard_bytes == 10**9)


def test_a_converted_llama_is_read_by_plain_transformers(tmp_path):
    tiny.write_tower(tmp_path / "tower")
    write_llama(tmp_path / "published", tmp_path / "tower")
    out = convert(tmp_path / "published", tmp_path / "out")
    ours = load_model(out)
    plain = AutoModelForImageTextToText.from_pretrained(out)
    assert torch.equal(logits_of(plain, 400), logits_of(ours.model, 400))
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "language_model.model.embed_tokens.weight" in names
    processor = AutoProcessor.from_pretrained(out)
    config = json.loads((out / "processor_config.json").read_text())
    assert ImageSpec.from_processor_config(config).aspect == "pad"
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Code?"}]}],
        add_generation_prompt=True,
    )
    assert prompt.endswith("USER: <image>\nCode? ASSISTANT:")


def test_converting_onto_something_is_refused(tmp_path):
    write_crystal(tmp_path / "published")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(tmp_path / "published", tmp_path / "out")


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    write_crystal(tmp_path / "published")

    def fail(*_):
        raise RuntimeError("stopped half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        convert(tmp_path / "published", tmp_path / "out", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_card_is_read_as_it_was_written(tmp_path):
    card = CheckpointCard(
        family="llava_crystal",
        template="v1",
        image=ImageSpec(size=224, aspect="crop"),
        recipe={"stage": "finetune", "lr": 2e-5},
        data_fingerprint="abc",
    )
    checkpoint.write_card(tmp_path, card)
    assert checkpoint.read_card(tmp_path) == card
    assert checkpoint.read_card(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"image": {"size": "big"}}, "image.size"),
        ({"family": 3}, "family"),
    ],
)
def test_a_card_that_cannot_be_used_says_why(tmp_path, change, message):
    content = {"family": "llava", "template": "v1", "format_version": 1}
    tiny.write_json(tmp_path / "w2c.json", content | change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_card(tmp_path)


# --- Quantised, and spread over devices -----------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "kind"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")]
)
def test_only_the_blocks_are_quantised(tmp_path, quantization, kind):
    tensors = write_crystal(tmp_path)
    loaded = load_model(
        tmp_path, dtype=torch.bfloat16, device_map="auto", quantization=quantization
    )
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for name, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kinds[".language_model." in name].add(type(module).__name__)
    assert kinds == {True: {kind}, False: {"Linear"}}
    head = loaded.model.lm_head.weight
    assert torch.equal(head, tensors["lm_head.weight"].bfloat16())
    exact = load_model(tmp_path, dtype=torch.bfloat16).model
    image = exact.config.image_token_id
    ours, reference = logits_of(loaded.model, image), logits_of(exact, image)
    similarity = torch.cosine_similarity(ours.float().flatten(), reference.float().flatten(), dim=0)
    assert similarity > (0.9 if quantization == "4bit" else 0.99)


def test_a_width_that_the_fast_kernel_cannot_take_changes_no_answer(tmp_path):
    """10922, CrystalCoder's own, is such a width: bitsandbytes' CPU kernel asserts on it."""
    write_crystal(tmp_path)
    found = open_checkpoint(tmp_path)
    padded = checkpoint._padded_for_4bit(found)
    assert padded.config.text_config.n_inner == 192
    outputs = [
        logits_of(checkpoint.load_checkpoint(each, dtype=torch.float32).model, 400)
        for each in (found, padded)
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    text_folder = tmp_path / "text"
    write_text_model(text_folder, intermediate_size=100)
    model = load_model(text_folder, dtype=torch.bfloat16, quantization="4bit").model
    with torch.inference_mode():
        assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_four_bit_is_nf4_with_double_quantisation_and_bf16_compute(tmp_path):
    write_crystal(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16, quantization="4bit").model
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    assert (weight.quant_type, weight.quant_state.nested) == ("nf4", True)
    assert model.model.language_model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_a_folder_that_was_saved_in_four_bit_is_read_as_it_is(tmp_path):
    write_text_model(tmp_path, intermediate_size=128)
    quantised = load_model(tmp_path, dtype=torch.bfloat16, quantization="4bit")
    quantised.model.save_pretrained(tmp_path / "saved")
    quantised.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.bfloat16, device_map="auto")
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        torch.testing.assert_close(again.model(ids).logits, quantised.model(ids).logits)
    with pytest.raises(CheckpointError, match="quantised already"):
        load_model(tmp_path / "saved", quantization="4bit")
    with pytest.raises(CheckpointError, match="cannot be converted"):
        convert(tmp_path / "saved", tmp_path / "out")


def test_placement_keeps_blocks_whole_and_the_tower_first(tmp_path):
    write_crystal(tmp_path)
    found = open_checkpoint(tmp_path)
    for device_map in ("auto", "balanced", "sequential"):
        plan = device_plan(
            found,
            dtype=torch.float32,
            device_map=device_map,
            max_memory={0: 400_000, 1: 400_000, "cpu": 10**9},
        )
        assert plan["model.vision_tower"] == plan["model.multi_modal_projector"] == 0
        assert {0, 1} <= set(plan.values()), device_map
        blocks = {name for name in plan if name.startswith("model.language_model.layers")}
        assert blocks == {f"model.language_model.layers.{at}" for at in range(3)}


def test_four_bit_needs_less_room_in_the_plan(tmp_path):
    write_crystal(tmp_path)
    found = open_checkpoint(tmp_path)
    memory = {0: 450_000, 1: 450_000}
    plans = [
        device_plan(found, dtype=torch.float32, device_map="sequential", max_memory=memory)
        if quantization is None
        else device_plan(
            found,
            dtype=torch.float32,
            device_map="sequential",
            max_memory=memory,
            quantization=quantization,
        )
        for quantization in (None, "4bit")
    ]
    on_disk = [sum(device == "disk" for device in plan.values()) for plan in plans]
    assert on_disk[0] > on_disk[1]


def test_a_model_that_overflows_to_disk_answers_the_same(tmp_path):
    write_crystal(tmp_path / "model", form="bin")
    whole = load_model(tmp_path / "model").model
    spread = load_model(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 600_000},
        offload_folder=tmp_path / "offload",
    ).model
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    image = whole.config.image_token_id
    assert torch.equal(logits_of(spread, image), logits_of(whole, image))


def test_without_an_offload_folder_the_overflow_is_an_error(tmp_path):
    write_crystal(tmp_path)
    with pytest.raises(OutOfMemoryError, match="would go to disk") as caught:
        load_model(tmp_path, device_map="auto", max_memory={"cpu": 600_000})
    assert "--offload-folder" in caught.value.hint


def test_progress_is_reported_in_bytes_up_to_the_end(tmp_path):
    tensors = write_crystal(tmp_path)
    steps = []
    load_model(tmp_path, report=lambda *step: steps.append(step))
    assert {phase for phase, _, _ in steps} == {"Loading weights"}
    done = [at for _, at, _ in steps]
    assert done == sorted(done)
    floats = sum(t.numel() * 4 for t in tiny.llava_state_dict(tensors).values())
    assert steps[-1][1:] == (floats, floats)


# --- Models of transformers' own kinds ------------------------------------------------------------


@pytest.fixture
def saved_llava(tmp_path):
    write_crystal(tmp_path / "published")
    return convert(tmp_path / "published", tmp_path / "saved")


def test_a_folder_saved_by_transformers_loads_the_same(tmp_path, saved_llava):
    loaded = load_model(saved_llava)
    loaded.model.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "w2c.json"):
        shutil.copy(saved_llava / name, tmp_path / "again" / name)
    again = load_model(tmp_path / "again")
    assert_holds(again.model, loaded.model.state_dict())
    assert again.image_spec == loaded.image_spec


def test_without_a_card_the_processor_says_how_pixels_are_prepared(saved_llava):
    (saved_llava / "w2c.json").unlink()
    loaded = load_model(saved_llava)
    assert loaded.image_spec == ImageSpec(size=28, aspect="pad")
    assert (loaded.family, loaded.template) == ("llava_crystal", "chat")


def test_another_image_text_model_keeps_its_own_processor(tmp_path):
    tiny.write_tokenizer(tmp_path, bos=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, config=LlamaConfig())
    processor = Idefics3Processor(Idefics3ImageProcessorPil(), tokenizer, chat_template="{{ 1 }}")
    processor.save_pretrained(tmp_path)
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_id=3,
        pad_token_id=0,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert_holds(loaded.model, model.state_dict())
    assert loaded.image_spec is None
    assert isinstance(loaded.processor, Idefics3Processor)
    assert (loaded.family, loaded.template) == ("idefics3", "chat")
    again = load_model(convert(tmp_path, tmp_path / "out"))
    assert_holds(again.model, model.state_dict())
    assert again.processor.chat_template == "{{ 1 }}"
    quantised = load_model(tmp_path, dtype=torch.bfloat16, quantization="4bit").model
    kinds = {
        name: type(module).__name__
        for name, module in quantised.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {kind for name, kind in kinds.items() if "text_model" in name} == {"Linear4bit"}
    assert {kind for name, kind in kinds.items() if "text_model" not in name} == {"Linear"}


def write_text_model(folder: Path, intermediate_size: int = 96) -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=64,
            intermediate_size=intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    )
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder, bos=True)
    return model


def test_a_text_model_loads_with_its_generation_settings(tmp_path):
    model = write_text_model(tmp_path)
    loaded = load_model(tmp_path, attn="eager")
    assert_holds(loaded.model, model.state_dict())
    assert (loaded.template, loaded.image_spec, loaded.processor) == ("chat", None, None)
    assert loaded.context_length == 128
    assert loaded.model.generation_config.temperature == 0.7
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.tokenizer("a").input_ids[0] == 1


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A one-block Llama in llama.cpp's format; returns its tensors under transformers' names."""
    import gguf

    torch.manual_seed(0)
    hidden, inner, heads = 64, 96, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "d", "ab", "cd"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd.weight": (8, hidden),
        "output_norm.weight": (hidden,),
        "output.weight": (8, hidden),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (hidden, hidden),
        "blk.0.attn_v.weight": (hidden, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (inner, hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
    }
    tensors = {name: torch.randn(*shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path):
    tensors = write_gguf(tmp_path / "model.gguf")
    cache = tmp_path / "cache"
    phases = []
    for _ in range(2):
        loaded = load_model(
            tmp_path / "model.gguf", cache_dir=cache, report=lambda phase, *_: phases.append(phase)
        )
        weight = loaded.model.model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight, tensors["blk.0.ffn_up.weight"].half().float())
        norm = loaded.model.model.norm.weight
        assert torch.equal(norm, tensors["output_norm.weight"])
        phases.append("loaded")
    first, second = " ".join(phases).split("loaded")[:2]
    assert "Converting" in first
    assert "Converting" not in second
    os.utime(tmp_path / "model.gguf", (1, 1))
    load_model(tmp_path / "model.gguf", cache_dir=cache)
    assert len(list((cache / "gguf").iterdir())) == 2
    out = convert(tmp_path / "model.gguf", tmp_path / "out", cache_dir=cache)
    weight = load_model(out).model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, tensors["blk.0.ffn_up.weight"].half().float())


# --- Bad input ------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(tmp_path):
    write_crystal(tmp_path, form="bin", shards=3)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 files .* pytorch_model-00002-of-00003.bin"):
        load_model(tmp_path)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 300, -200_000, -1])
def test_a_file_that_is_cut_off_is_named(tmp_path, form, kept):
    write_crystal(tmp_path, form=form)
    path = tmp_path / ("pytorch_model.bin" if form == "bin" else "model.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=path.name) as caught:
        load_model(tmp_path)
    assert "download" in caught.value.hint.lower()


class _Executes:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    write_crystal(tmp_path, form="bin")
    content = {"a": _Executes()}
    if zipped:
        torch.save(content, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin"):
        load_model(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_an_old_pickle_without_zip_is_read(tmp_path):
    tensors = write_crystal(tmp_path, form="bin")
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_holds(load_model(tmp_path).model, tiny.llava_state_dict(tensors))


def test_tensors_that_share_a_storage_or_lie_crosswise_are_read(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"part": whole[1:3, 2:5], "crosswise": whole.t()}, tmp_path / "pytorch_model.bin")
    stored = weights.stored_tensors(tmp_path)
    assert torch.equal(stored["part"][...], whole[1:3, 2:5])
    assert torch.equal(stored["crosswise"][...], whole.t())
    assert stored["crosswise"][...].is_contiguous()


def test_a_pickle_of_something_else_is_named(tmp_path):
    write_crystal(tmp_path, form="bin")
    torch.save({"epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="epoch is a int"):
        load_model(tmp_path)


def test_unexpected_and_missing_keys_are_listed(tmp_path):
    config, tensors = tiny.published_llava_crystal()
    del tensors["transformer.h.1.mlp.c_fc2.weight"]
    tensors["transformer.h.9.extra.weight"] = torch.ones(1)
    tensors["transformer.h.3.ln_1.weight"] = torch.ones(64)
    tiny.write_safetensors(tmp_path, tensors)
    tiny.write_tokenizer(tmp_path, bos=False)
    tiny.write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    message = caught.value.message
    assert "missing: language_model.model.layers.1.mlp.gate_proj.weight" in message
    assert "transformer.h.9.extra.weight (model.safetensors)" in message
    assert "transformer.h.3.ln_1.weight (model.safetensors)" in message


def test_a_projector_of_another_width_is_named(tmp_path):
    config, tensors = tiny.published_llava_crystal()
    tensors |= tiny.published_projector(48, "transformer.")
    tiny.write_safetensors(tmp_path, tensors)
    tiny.write_tokenizer(tmp_path, bos=False)
    tiny.write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    wanted = "transformer.mm_projector.2.weight (model.safetensors) is 48 x 48"
    assert wanted in caught.value.message
    assert "needs 64 x 64" in caught.value.message


def test_keys_of_a_transformers_folder_are_accounted_for(tmp_path):
    model = write_text_model(tmp_path)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.1.mlp.other.weight"] = torch.ones(2)
    state["model.norm.weight"] = torch.ones(3)
    tiny.write_safetensors(tmp_path, state)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    for name in ("layers.1.mlp.up_proj.weight", "layers.1.mlp.other.weight", "model.norm.weight"):
        assert name in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_mpt"}, "model_type is 'llava_mpt'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_vision_tower": None}, "mm_vision_tower"),
        ({"n_head": 5}, "n_head 5"),
        ({"n_layer": "three"}, "n_layer"),
        ({"mm_vision_tower": "someone/unknown", "vision_config": None}, "someone/unknown"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(tmp_path, change, message):
    write_crystal(tmp_path, raw=change)
    if change.get("model_type"):
        config = json.loads((tmp_path / "config.json").read_text())
        del config["auto_map"]
        tiny.write_json(tmp_path / "config.json", config)
    with pytest.raises((CheckpointError, DownloadError), match=message):
        load_model(tmp_path)


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path):
    tiny.write_json(
        tmp_path / "config.json",
        {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}},
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsafeCheckpointError, match="needs the Python code") as caught:
        load_model(tmp_path)
    assert "--trust-remote-code" in caught.value.hint


def test_code_that_comes_with_a_model_is_run_if_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(tmp_path / "c")
    folder = tmp_path / "model"
    write_text_model(folder)
    (folder / "theirs.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class TheirConfig(LlamaConfig):\n"
        "    model_type = 'theirs'\n"
        "class TheirModel(LlamaForCausalLM):\n"
        "    config_class = TheirConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "theirs",
        "auto_map": {
            "AutoConfig": "theirs.TheirConfig",
            "AutoModelForCausalLM": "theirs.TheirModel",
        },
    }
    tiny.write_json(folder / "config.json", config)
    with pytest.raises(UnsafeCheckpointError):
        load_model(folder)
    loaded = load_model(folder, trust_remote_code=True, device_map="auto")
    assert type(loaded.model).__name__ == "TheirModel"
    assert loaded.family == "theirs"


def test_a_lora_folder_without_its_base_is_refused(tmp_path):
    tiny.write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "x/base"})
    tiny.write_safetensors(tmp_path, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"adapter_config.json\) without its base model x/b"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.model", "tokenizer"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(tmp_path, remove, message):
    write_crystal(tmp_path)
    (tmp_path / remove).unlink()
    if remove == "tokenizer.model":
        (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01", '{"model_type": 3}'])
def test_a_broken_config_is_named(tmp_path, content):
    write_crystal(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/folder", "no-such-folder", "./a/b", "a b/c"])
def test_a_source_that_does_not_exist(source):
    with pytest.raises(ModelNotFoundError, match="There is no model"):
        load_model(source)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "picture.gguf").write_bytes(b"\x89PNG....")
    with pytest.raises(ModelNotFoundError, match="not a GGUF model"):
        load_model(tmp_path / "picture.gguf")


def test_a_damaged_gguf_is_named(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        load_model(path, cache_dir=tmp_path / "cache")
    assert not any((tmp_path / "cache").glob("*/*"))


# --- The hub --------------------------------------------------------------------------------------


def test_an_offline_hub_name_says_so():
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids"):
        load_model("LLM360/CrystalChat-7B-Web2Code")


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="cannot be reached"):
        load_model("LLM360/CrystalChat-7B-Web2Code")


def test_a_hub_name_is_downloaded_once_without_what_is_not_needed(hub, monkeypatch):
    tensors = write_crystal(hub / "someone" / "model", form="bin")
    tiny.write_safetensors(hub / "someone" / "model", tensors)
    (hub / "someone" / "model" / "evil.py").write_text("raise SystemExit('ran')")
    steps = []
    loaded = load_model("someone/model", report=lambda *step: steps.append(step))
    assert_holds(loaded.model, tiny.llava_state_dict(tensors))
    assert loaded.source_label == "someone/model"
    downloads = [(done, total) for phase, done, total in steps if phase == "Downloading"]
    assert downloads[-1][0] == downloads[-1][1] > 10**6
    folder = open_checkpoint("someone/model").folder
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names
    assert not {"pytorch_model.bin", "evil.py"} & names
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_holds(load_model("someone/model").model, tiny.llava_state_dict(tensors))


def test_a_hub_name_that_does_not_exist_says_so(hub):
    with pytest.raises(ModelNotFoundError, match="no public model of that name"):
        load_model("someone/nothing")


def test_gguf_files_of_a_hub_are_no_folder_to_open(hub):
    offer(hub, "m-Q4_K_M.gguf", "m-Q8_0.gguf")
    with pytest.raises(ModelNotFoundError, match="holds GGUF files") as caught:
        load_model("someone/files")
    assert "someone/files:Q8_0" in caught.value.hint
