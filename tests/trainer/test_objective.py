"""The loss: over supervised tokens only, and the same packed, padded or one by one."""

from __future__ import annotations

import msgspec
import pytest
import torch
import torch.nn.functional as F

from trainer import objective as objective_module
from trainer.batches import Collator, examples_of
from trainer.dataset import open_dataset
from trainer.model import build, describe
from trainer.objective import Objective, SupervisedHead, attention_for, packed_attention
from trainer.recipes import named


def set_up(data, **changes):
    recipe = msgspec.structs.replace(named("debug", "finetune"), **changes)
    parts = describe(recipe)
    model = build(recipe, parts)
    training_set = examples_of(open_dataset(data), parts, recipe)
    return recipe, parts, model, training_set


def loss_and_gradients(recipe, parts, training_set, groups, attention=None):
    """Summed loss and gradients over `groups` of row numbers, each one batch, on a fresh model."""
    model = build(recipe, parts)
    attention = attention or attention_for(model, recipe)
    model.model.language_model.set_attn_implementation(attention)
    collate = Collator(
        parts.image,
        parts.tokens_per_image,
        packed=recipe.batching == "packed",
        attention=attention,
    )
    objective = Objective(model).train()
    total = 0.0
    for group in groups:
        batch = collate([training_set[at] for at in group])
        for name in ("records", "lengths", "num_images"):
            batch.pop(name)
        loss = objective(**batch)
        loss.backward()
        total += loss.item()
    gradients = {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return total, gradients


ROWS = [0, 9, 3, 13, 8, 5]


@pytest.mark.parametrize("name", ["debug", "crystal-chat-7b-debug"])
@pytest.mark.parametrize("layout", ["packed", "packed-by-positions", "padded"])
def test_every_layout_has_the_loss_and_gradient_of_single_samples(prepared, name, layout):
    data = prepared("mixed", "finetune")
    recipe, parts, _, training_set = set_up(data, model=named(name, "finetune").model)
    alone = loss_and_gradients(recipe, parts, training_set, [[at] for at in ROWS])
    batching = "padded" if layout == "padded" else "packed"
    together = loss_and_gradients(
        msgspec.structs.replace(recipe, batching=batching),
        parts,
        training_set,
        [ROWS],
        attention="sdpa" if layout == "packed-by-positions" else None,
    )
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    for parameter, gradient in alone[1].items():
        torch.testing.assert_close(together[1][parameter], gradient, rtol=1e-3, atol=1e-4)


def test_attention_on_a_cpu_is_that_of_torch_in_half_precision_too():
    lengths = (300, 17, 513)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    torch.manual_seed(0)
    # As under autocast: positions are turned in float32, values are in half precision.
    query, key, value = (torch.randn(1, heads, sum(lengths), 16) for heads in (6, 2, 2))
    given = {"scaling": 0.25, "sample_lengths": lengths}
    exact, _ = packed_attention(module, query, key, value, None, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = packed_attention(module, query, key, value.bfloat16(), None, **given)
        torchs, _ = packed_attention(
            module, query, key, value.bfloat16(), None, **given, dropout=1e-9
        )
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() <= 2 * (torchs - exact).abs().max()
    assert (half - exact).abs().max() < 0.05


def test_the_loss_is_that_of_transformers_own_forward(prepared):
    recipe, parts, model, training_set = set_up(prepared("pages", "finetune"))
    total, _ = loss_and_gradients(recipe, parts, training_set, [[0, 1, 2]])
    expected = 0.0
    for at in range(3):
        example = training_set[at]
        output = model(
            input_ids=torch.tensor(example.encoded.input_ids[None], dtype=torch.long),
            pixel_values=torch.from_numpy(example.pixels[0])[None],
            labels=torch.tensor(example.encoded.labels[None], dtype=torch.long),
        )
        expected += output.loss.item() * example.encoded.num_supervised
    assert total == pytest.approx(expected, rel=1e-5)


def test_text_alone_runs_the_tower_and_gives_the_projector_a_gradient(prepared):
    recipe, parts, _, training_set = set_up(prepared("mixed", "finetune"))
    ran = []
    texts = [at for at in range(len(training_set)) if not training_set[at].pixels]
    model = build(recipe, parts)
    model.model.vision_tower.register_forward_hook(lambda *_: ran.append(True))
    attention = attention_for(model, recipe)
    model.model.language_model.set_attn_implementation(attention)
    collate = Collator(parts.image, parts.tokens_per_image, packed=True, attention=attention)
    batch = collate([training_set[at] for at in texts[:2]])
    for name in ("records", "lengths", "num_images"):
        batch.pop(name)
    objective = Objective(model).train()
    with_dummy = objective(**batch)
    with_dummy.backward()
    assert ran
    for parameter in model.model.multi_modal_projector.parameters():
        assert not parameter.grad.any()
    changed = batch | {"pixel_values": torch.randn_like(batch["pixel_values"])}
    assert objective(**changed) == with_dummy


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_chunked_loss_equals_cross_entropy(monkeypatch, bias, autocast, frozen):
    monkeypatch.setattr(objective_module, "_LOGITS_AT_ONCE", 3 * 50)
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 50, bias=bias).requires_grad_(not frozen)
    head = SupervisedHead.over(linear)
    targets = torch.randint(0, 50, (11,))
    hidden = torch.randn(11, 16)
    results = []
    for ours in (True, False):
        linear.zero_grad()
        given = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = (
                head(given, targets)
                if ours
                else F.cross_entropy(linear(given).float(), targets, reduction="sum")
            )
        (loss * 0.25).backward()
        grads = [given.grad, *(p.grad for p in linear.parameters() if not frozen)]
        results.append([loss.detach(), *grads])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), **tolerance)


def test_nothing_supervised_is_a_loss_of_zero_with_gradients_of_zero():
    head = SupervisedHead.over(torch.nn.Linear(16, 50, bias=False))
    hidden = torch.randn(0, 16, requires_grad=True)
    loss = head(hidden, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert not head.weight.grad.any()


def test_gradient_checkpointing_changes_nothing(prepared):
    recipe, parts, _, training_set = set_up(prepared("mixed", "finetune"))
    plain = loss_and_gradients(recipe, parts, training_set, [ROWS])
    model = build(recipe, parts)
    language_model = model.model.language_model
    language_model.set_attn_implementation(attention_for(model, recipe))
    language_model.activation_checkpointing_enable({"use_reentrant": False})
    objective = Objective(model).train()
    collate = Collator(parts.image, parts.tokens_per_image, packed=True, attention="packed")
    batch = collate([training_set[at] for at in ROWS])
    for name in ("records", "lengths", "num_images"):
        batch.pop(name)
    loss = objective(**batch)
    loss.backward()
    assert loss.item() == plain[0]
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, plain[1][name]), name
