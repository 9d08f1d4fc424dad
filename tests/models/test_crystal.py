"""CrystalCoder against an independent float64 reading of the published arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from w2c_tui.core.errors import CheckpointError, ContextOverflowError
from w2c_tui.models import crystal

from . import tiny

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- The reference: the published arithmetic in numpy float64, one sequence, no cache -------------


def reference_logits(config, published, inputs_embeds: np.ndarray) -> np.ndarray:
    """inputs_embeds: (T, n_embd), not scaled. Returns (T, vocab_size) float64."""
    weights = {name: tensor.double().numpy() for name, tensor in published.items()}
    length, head_dim = len(inputs_embeds), config["n_embd"] // config["n_head"]
    pairs = config["rotary_dim"] // 2
    angle = np.arange(length)[:, None] / 10000 ** (np.arange(pairs) * 2 / config["rotary_dim"])

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def conv1d(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def rotate(x):
        """x: (T, head_dim). Each pair (2i, 2i+1) is a complex number turned by its angle."""
        x = x.copy()
        turned = (x[:, 0 : 2 * pairs : 2] + 1j * x[:, 1 : 2 * pairs : 2]) * np.exp(1j * angle)
        x[:, 0 : 2 * pairs : 2], x[:, 1 : 2 * pairs : 2] = turned.real, turned.imag
        return x

    hidden = inputs_embeds.astype(np.float64) * config["mup_embeddings_scale"]
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        qkv = conv1d(norm(hidden, f"{block}.ln_1"), f"{block}.attn.c_attn")
        query, key, value = np.split(qkv, 3, axis=-1)
        heads = []
        for head in range(config["n_head"]):
            part = slice(head * head_dim, (head + 1) * head_dim)
            divisor = head_dim if config["mup_scale_qk_dot_by_d"] else head_dim**0.5
            if config["scale_attn_by_inverse_layer_idx"]:
                divisor *= layer + 1
            scores = rotate(query[:, part]) @ rotate(key[:, part]).T / divisor
            scores[np.triu_indices(length, 1)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ value[:, part])
        hidden = hidden + conv1d(np.concatenate(heads, -1), f"{block}.attn.c_proj")
        normed = norm(hidden, f"{block}.ln_2")
        gate = conv1d(normed, f"{block}.mlp.c_fc2")
        gated = conv1d(normed, f"{block}.mlp.c_fc") * (gate / (1 + np.exp(-gate)))
        hidden = hidden + conv1d(gated, f"{block}.mlp.c_proj")
    logits = norm(hidden, "transformer.ln_f") @ weights["lm_head.weight"].T
    return logits * config["mup_output_alpha"] * config["mup_width_scale"]


# --- Exactness ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    tensors = tiny.published_crystal(tiny.crystal_config())
    assert all(tensor.ne(0).all() for name, tensor in tensors.items() if name.endswith("bias"))
    return tensors


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(0, 320, (1, 96), generator=torch.Generator().manual_seed(1))


def expected(config, published, input_ids: torch.Tensor) -> torch.Tensor:
    embeds = published["transformer.wte.weight"][input_ids].numpy()
    return torch.from_numpy(reference_logits(config.to_dict(), published, embeds))


def assert_close(actual: torch.Tensor, reference: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    assert reference.abs().max() > 1, "logits near zero would agree with anything"
    torch.testing.assert_close(actual.double(), reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_prefill_equals_the_reference(published, input_ids, attn):
    config = tiny.crystal_config()
    model = tiny.crystal_model(config, published, attn_implementation=attn)
    with torch.inference_mode():
        assert_close(model(input_ids).logits[0], expected(config, published, input_ids[0]))


@pytest.mark.parametrize(
    "overrides",
    [
        {"mup_scale_qk_dot_by_d": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"rotary_dim": 16},
        {"mup_embeddings_scale": 1.0, "mup_output_alpha": 1.0, "mup_width_scale": 1.0},
    ],
)
def test_each_variant_of_the_config_equals_the_reference(published, input_ids, overrides):
    config = tiny.crystal_config(**overrides)
    model = tiny.crystal_model(config, published)
    with torch.inference_mode():
        assert_close(model(input_ids).logits[0], expected(config, published, input_ids[0]))


def test_the_reference_notices_each_part_of_the_arithmetic(published, input_ids):
    """The tolerance is far below what any wrong scale, bias or rotation would change."""
    config = tiny.crystal_config()
    right = expected(config, published, input_ids[0])
    for field, value in (
        ("mup_embeddings_scale", 14.5),
        ("mup_output_alpha", 2.2),
        ("mup_scale_qk_dot_by_d", False),
        ("rotary_dim", 16),
        ("n_head", 8),
    ):
        wrong = expected(tiny.crystal_config(**{field: value}), published, input_ids[0])
        assert (wrong - right).abs().max() > 10 * TOLERANCE, field
    for name in published:
        if name.endswith("attn.c_attn.bias"):
            continue  # its middle third, the keys', nearly cancels in the softmax
        without = dict(published) | {name: torch.zeros_like(published[name])}
        wrong = expected(config, without, input_ids[0])
        assert (wrong - right).abs().max() > 10 * TOLERANCE, name


def test_decoding_step_by_step_equals_the_reference(published, input_ids):
    config = tiny.crystal_config()
    model = tiny.crystal_model(config, published)
    cache = DynamicCache(config=config)
    rows = []
    with torch.inference_mode():
        for chunk in (input_ids[:, :40], input_ids[:, 40:57], *input_ids[:, 57:].split(1, dim=1)):
            rows.append(model(chunk, past_key_values=cache, use_cache=True).logits[0])
    assert_close(torch.cat(rows), expected(config, published, input_ids[0]))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_left_padded_batch_equals_each_sequence_alone(published, input_ids, attn):
    config = tiny.crystal_config()
    model = tiny.crystal_model(config, published, attn_implementation=attn)
    lengths = [96, 71, 1]
    batch = torch.zeros(len(lengths), 96, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, length in enumerate(lengths):
        batch[row, 96 - length :] = input_ids[0, :length]
        mask[row, 96 - length :] = 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = model(batch, attention_mask=mask, position_ids=position_ids).logits
        cache = DynamicCache(config=config)
        model(
            batch[:, :90],
            attention_mask=mask[:, :90],
            position_ids=position_ids[:, :90],
            past_key_values=cache,
        )
        stepped = [
            model(
                batch[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=position_ids[:, at : at + 1],
                past_key_values=cache,
            ).logits
            for at in range(90, 96)
        ]
    for row, length in enumerate(lengths):
        reference = expected(config, published, input_ids[0, :length])
        assert_close(logits[row, 96 - length :], reference)
        assert_close(torch.cat(stepped, 1)[row, -min(6, length) :], reference[-6:])


def test_positions_are_taken_from_position_ids(published, input_ids):
    model = tiny.crystal_model(tiny.crystal_config(), published)
    shifted = torch.arange(96)[None] * 2
    with torch.inference_mode():
        assert not torch.allclose(
            model(input_ids, position_ids=shifted).logits, model(input_ids).logits, atol=1e-2
        )


def llava_over(config, published) -> LlavaForConditionalGeneration:
    """A LLaVA whose text model holds the published weights; 4 patches per image, token 319."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=config, image_token_index=319)
    )
    state = tiny.crystal_state_dict(published)
    model.lm_head.load_state_dict({"weight": state.pop("lm_head.weight")})
    model.model.language_model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in state.items()}, strict=True
    )
    return model.eval()


def test_image_features_are_spliced_in_before_the_embedding_scale(published, input_ids):
    config = tiny.crystal_config()
    model = llava_over(config, published)
    image_ids = input_ids.clone()
    image_ids[input_ids == 319] = 0
    image_ids[0, 10:14] = 319
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        features = model.get_image_features(pixels).pooler_output[0]
        embeds = published["transformer.wte.weight"][image_ids[0]].clone()
        embeds[10:14] = features
        reference = torch.from_numpy(reference_logits(config.to_dict(), published, embeds.numpy()))
        assert_close(model(image_ids, pixel_values=pixels).logits[0], reference)

        cache = DynamicCache(config=config)
        rows = [model(image_ids[:, :60], pixel_values=pixels, past_key_values=cache).logits[0]]
        for step in image_ids[:, 60:].split(1, dim=1):
            rows.append(model(step, past_key_values=cache).logits[0])
        assert_close(torch.cat(rows), reference)

        text_model = tiny.crystal_model(config, published)
        assert_close(text_model(inputs_embeds=embeds[None]).logits[0], reference)


def test_one_layer_at_the_real_width_equals_the_reference():
    config = tiny.crystal_config(
        vocab_size=64, n_embd=4096, n_layer=1, n_head=32, n_inner=10922, rotary_dim=32
    )
    published = tiny.published_crystal(config, seed=5)
    published["lm_head.weight"] *= 64**0.5 / 4096**0.5
    model = tiny.crystal_model(config, published)
    ids = torch.randint(0, 64, (1, 96), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert_close(model(ids).logits[0], expected(config, published, ids[0]))


# --- What transformers expects of a model ---------------------------------------------------------


def test_the_auto_classes_know_it_and_registering_again_changes_nothing():
    crystal.register()
    crystal.register()
    config = AutoConfig.for_model("crystalcoder", n_embd=64, n_layer=1, n_head=4, rotary_dim=8)
    assert isinstance(config, crystal.CrystalCoderConfig)
    assert isinstance(AutoModel.from_config(config), crystal.CrystalCoderModel)
    assert isinstance(AutoModelForCausalLM.from_config(config), crystal.CrystalCoderForCausalLM)


def test_the_published_field_names_are_read():
    config = crystal.CrystalCoderConfig(n_embd=4096, n_layer=32, n_head=32, n_inner=10922)
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 32)
    assert (config.intermediate_size, config.max_position_embeddings) == (10922, 2048)
    assert not config.tie_word_embeddings
    assert crystal.CrystalCoderConfig(rotary_dim=None).rotary_dim == 128


@pytest.mark.parametrize(
    "overrides",
    [{"position_embedding_type": "alibi"}, {"activation_function": "gelu"}, {"rotary_dim": 18}],
)
def test_another_architecture_under_this_name_is_refused(overrides):
    with pytest.raises(CheckpointError, match=next(iter(overrides))):
        tiny.crystal_config(**overrides)


def test_a_saved_model_loads_to_identical_logits(published, input_ids, tmp_path):
    model = tiny.crystal_model(tiny.crystal_config(), published)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(model(input_ids).logits, again(input_ids).logits)


def test_only_the_asked_logits_are_computed(published, input_ids):
    model = tiny.crystal_model(tiny.crystal_config(), published)
    with torch.inference_mode():
        everything = model(input_ids).logits
        last = model(input_ids, logits_to_keep=1).logits
    assert last.shape == (1, 1, 320)
    torch.testing.assert_close(last, everything[:, -1:])


def test_generate_equals_decoding_without_a_cache(published, input_ids):
    model = tiny.crystal_model(tiny.crystal_config(eos_token_id=None), published)
    ids = input_ids[:, :9]
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        for _ in range(12):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert cached.tolist() == ids.tolist()


def test_a_context_past_n_positions_is_refused_and_leaves_the_cache_alone(published):
    config = tiny.crystal_config(n_positions=16)
    model = tiny.crystal_model(config, published)
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(torch.ones(1, 16, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ContextOverflowError, match=r"17 tokens .* 16 tokens"):
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ContextOverflowError, match="17 tokens"):
            model(torch.ones(1, 17, dtype=torch.long))
    assert cache.get_seq_length() == 16


def test_gradient_checkpointing_changes_no_gradient(published, input_ids):
    plain = tiny.crystal_model(tiny.crystal_config(), published).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    ids = input_ids[:, :24]
    for model in (plain, checkpointed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, first), second in zip(
        plain.named_parameters(), checkpointed.parameters(), strict=True
    ):
        assert first.grad is not None, name
        torch.testing.assert_close(first.grad, second.grad)


def test_hidden_states_and_attentions_can_be_recorded(published, input_ids):
    model = tiny.crystal_model(tiny.crystal_config(), published, attn_implementation="eager")
    with torch.inference_mode():
        outputs = model(input_ids[:, :7], output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(1, 7, 64)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(1, 4, 7, 7)] * 3


def test_blocks_are_kept_whole_when_a_model_is_spread_over_devices(published):
    from accelerate import infer_auto_device_map

    model = tiny.crystal_model(tiny.crystal_config(), published)
    size = sum(p.numel() * 4 for p in model.parameters())
    plan = infer_auto_device_map(
        model,
        max_memory={0: size // 2, 1: size},
        no_split_module_classes=list(model._no_split_modules),
    )
    assert set(plan.values()) == {0, 1}
    assert all(name.count(".") <= 2 for name in plan), plan
