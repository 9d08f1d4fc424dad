"""What makes transformers models decode faster on a CPU without changing what they compute.

Two things, both found by measuring (`tests/bench/bench_hf.py`): bfloat16 weights are laid out once
in oneDNN's blocked order, as torch's own compiler does when it freezes a model, instead of at
every product; and attention of a single new token runs on the key-value heads as they are. Knows
nothing about prompts, caches or checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "w2c_grouped_sdpa"
_MIN_ELEMENTS = 4096


def prepare(model: PreTrainedModel, report: Callable[[str, int, int], None]) -> None:
    """Make `model`, which lies wholly on the CPU, ready for fast decoding."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    if model.config._attn_implementation == "sdpa" and heads != getattr(
        config, "num_key_value_heads", heads
    ):
        AttentionInterface.register(ATTENTION, grouped_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        own = config is model.config
        model.set_attn_implementation(ATTENTION if own else {"text_config": ATTENTION})
    if packing_works():
        pack_linears(model, report)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa`, except for one query token that sees all keys.

    query: (batch, num_heads, 1, head_dim); key, value: (batch, num_key_value_heads, length,
    head_dim). torch's kernel with `enable_gqa` reads the keys once per query head; with the group
    as the query dimension it reads them once per key-value head (7 times faster in bfloat16).
    """
    batch, num_heads, length, head_dim = query.shape
    groups = key.shape[1]
    if length != 1 or attention_mask is not None or groups == num_heads or kwargs.get("cache"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, groups, num_heads // groups, head_dim),
        key,
        value,
        scale=kwargs.get("scaling"),
    )
    return output.reshape(batch, 1, num_heads, value.shape[-1]), None


class PackedLinear(nn.Module):
    """An inference-only `nn.Linear` whose weight oneDNN has laid out for its own product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(_packed(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden_states, self.weight, self.bias, "none", [], ""
        )
        return output


def pack_linears(model: nn.Module, report: Callable[[str, int, int], None]) -> None:
    """Replace every bfloat16 `nn.Linear` by its packed form, one at a time."""
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.numel() >= _MIN_ELEMENTS
    ]
    total = sum(module.weight.numel() * 2 for _, module in linears)
    done = 0
    while linears:
        name, module = linears.pop()
        done += module.weight.numel() * 2
        packed = PackedLinear(module)
        packed.train(module.training)
        model.set_submodule(name, packed)
        report("Arranging weights for this CPU", done, total)


def packing_works() -> bool:
    """Whether this build of torch and this processor have oneDNN's bfloat16 product."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        linear = nn.Linear(64, 64, dtype=torch.bfloat16)
        with torch.inference_mode():
            inputs = torch.ones(1, 2, 64, dtype=torch.bfloat16)
            return torch.allclose(PackedLinear(linear)(inputs), linear(inputs), rtol=0.02)
    # These operators belong to torch's compiler and may move; without them all is as it was.
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def bf16_is_faster() -> bool:
    """Whether this CPU computes in bfloat16 faster than in float32.

    One decode-like and one prefill-like product, timed in both (about 0.1 s).
    """
    if not packing_works():
        return False
    with torch.inference_mode():
        linear = nn.Linear(1024, 4096)
        whole = _seconds(linear)
        half = _seconds(PackedLinear(linear.to(torch.bfloat16)))
    return half[0] * half[1] < whole[0] * whole[1]


def _seconds(linear: nn.Module) -> list[float]:
    best = []
    for rows in (1, 64):
        inputs = torch.ones(rows, 1024, dtype=linear.weight.dtype)  # type: ignore[arg-type]
        spent = []
        for _ in range(6):
            began = time.perf_counter()
            linear(inputs)
            spent.append(time.perf_counter() - began)
        best.append(min(spent))
    return best


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed
