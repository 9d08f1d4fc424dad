"""Text models: the exported file computes what the checkpoint computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.export import native
from tests.export.models import FAMILIES, VOCABULARY, save_crystal, save_family
from tests.models import tiny
from w2c_tui.core.config import ExportSpec
from w2c_tui.core.errors import CheckpointError, W2CError
from w2c_tui.export.gguf_export import export
from w2c_tui.models.checkpoint import load_model


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def exported(folder, out, quant="f32"):
    return export(str(folder), out, ExportSpec(quant=quant, verify=False), silent).model


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 400, (length,), generator=generator).tolist()


def reference_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


CRYSTALS = {
    "published": {},
    "whole-heads-rotate": {"rotary_dim": None},
    "no-mup": {
        "mup_scale_qk_dot_by_d": False,
        "mup_embeddings_scale": 1.0,
        "mup_output_alpha": 1.0,
        "mup_width_scale": 1.0,
    },
    "inverse-layer-scaling": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled-attention": {"scale_attn_weights": False},
    "tied": {"head": False},
}


@pytest.mark.parametrize("variant", CRYSTALS)
def test_crystal_equals_its_float64_reference(variant, tmp_path):
    folder = save_crystal(tmp_path / "crystal", **CRYSTALS[variant])
    reference = load_model(folder, dtype=torch.float64).model
    ids = prompt(96)
    with native.opened(exported(folder, tmp_path)) as model:
        expected = reference_logits(reference, ids)
        assert np.abs(native.logits_of(model, ids) - expected).max() < 1e-4
        assert np.abs(expected).max() > 0.5
        output = reference.generate(
            torch.tensor([ids[:24]]), max_new_tokens=64, do_sample=False, eos_token_id=VOCABULARY
        )
        assert native.greedy(model, ids[:24], 64) == output[0, 24:].tolist()


def test_crystal_of_the_published_width_equals_its_float64_reference(tmp_path):
    folder = save_crystal(
        tmp_path / "wide", n_embd=4096, n_head=32, n_inner=10922, n_layer=1, rotary_dim=32
    )
    ids = prompt(24)
    expected = reference_logits(load_model(folder, dtype=torch.float64).model, ids)
    with native.opened(exported(folder, tmp_path), context=64) as model:
        assert np.abs(native.logits_of(model, ids) - expected).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_their_float64_reference(family, tmp_path):
    folder = save_family(tmp_path / family, FAMILIES[family])
    reference = load_model(folder, dtype=torch.float64).model
    ids = prompt(96)
    with native.opened(exported(folder, tmp_path)) as model:
        difference = native.logits_of(model, ids) - reference_logits(reference, ids)
    assert np.abs(difference).max() < 1e-4


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny.write_tokenizer(tmp_path / "gpt2", bos=False)
    with pytest.raises(CheckpointError, match="'gpt2'") as caught:
        exported(tmp_path / "gpt2", tmp_path / "out")
    assert "crystalcoder, llama, mistral, qwen2" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    ],
)
def test_variants_that_llama_cpp_computes_differently_are_refused(field, value, tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(**(FAMILIES["llama"].to_dict() | {field: value}))
    with pytest.raises(W2CError, match=value if isinstance(value, str) else "dynamic"):
        exported(save_family(tmp_path / "odd", config), tmp_path / "out")
