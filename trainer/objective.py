"""What is minimised: the model and its loss as one module.

DeepSpeed gathers parameters only around the `forward` of the module that owns them, and all ranks
must do that in the same order; so everything that touches weights happens in here, in one order,
whatever is in a batch. Owns the attention over samples laid end to end and the loss over supervised
tokens. Knows nothing about data, optimizers or checkpoints.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.recipes import Recipe

PACKED_ATTENTION = "packed"
_LOGITS_AT_ONCE = 2**25


class Objective(nn.Module):
    """`model` (with or without adapters) under the loss of `trainer.batches` batches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        llava = self.llava
        llava.lm_head = SupervisedHead.over(llava.lm_head)

    @property
    def llava(self) -> LlavaForConditionalGeneration:
        """The model itself, inside its adapters if it has any."""
        found = self.model
        if not isinstance(found, LlavaForConditionalGeneration):
            found = found.get_base_model()
        assert isinstance(found, LlavaForConditionalGeneration)
        return found

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        # Frozen in both stages: its features are those of inference.
        self.llava.model.vision_tower.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        image_positions: torch.Tensor,
        target_positions: torch.Tensor,
        targets: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **attention: Any,
    ) -> torch.Tensor:
        """The summed negative log-likelihood of `targets` (see `trainer.batches.Collator`).

        input_ids, position_ids: (rows, length). pixel_values: (num_images, 3, S, S), at least one,
        or image_features: (num_images, tokens, width) of the tower.
        image_positions: (num_image_tokens,) where features go in the flattened rows; empty where
        the one image is a dummy. target_positions, targets: (num_supervised,). attention:
        `sample_lengths` and whatever else the attention implementation takes.
        """
        llava = self.llava.model
        embeddings = llava.get_input_embeddings()(input_ids)
        if image_features is not None:
            features = llava.multi_modal_projector(image_features).flatten(0, 1)
        else:
            assert pixel_values is not None
            vision: Any = llava.vision_tower
            features = torch.cat(
                llava.get_image_features(
                    pixel_values.to(next(vision.parameters()).dtype), return_dict=True
                ).pooler_output
            )
        features = features.to(embeddings.dtype)
        flat = embeddings.flatten(0, 1)
        if image_positions.numel():
            flat = flat.index_copy(0, image_positions, features)
        else:
            # Every rank runs the tower and the projector, and their gradients exist, on text too.
            flat = flat + 0.0 * features.sum()
        hidden = llava.language_model(
            inputs_embeds=flat.view_as(embeddings),
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **attention,
        ).last_hidden_state
        loss: torch.Tensor = self.llava.lm_head(
            hidden.flatten(0, 1).index_select(0, target_positions), targets
        )
        return loss


class SupervisedHead(nn.Linear):
    """A language model's head that, given targets, returns their loss and never all logits."""

    @classmethod
    def over(cls, head: nn.Module) -> SupervisedHead:
        """`head` with its own parameters, tied ones included."""
        assert isinstance(head, nn.Linear)
        with torch.device("meta"):
            new = cls(head.in_features, head.out_features, bias=head.bias is not None)
        new.weight = head.weight
        if head.bias is not None:
            new.bias = head.bias
        return new

    def forward(self, input: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, or with `targets` (n,) the summed negative log-likelihood over `input` (n, H)."""
        if targets is None:
            return super().forward(input)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        loss: torch.Tensor = _SummedLoss.apply(
            input.to(dtype or self.weight.dtype), self.weight, self.bias, targets, dtype
        )
        return loss


class _SummedLoss(torch.autograd.Function):
    """Cross entropy through a linear layer, a few rows at a time.

    The gradients are computed beside the loss, so that no logits are kept and none are computed
    twice; and under ZeRO-3 the weight is needed in the forward pass only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        device = hidden.device.type
        with torch.autocast(device, enabled=False):
            matrix = weight if dtype is None else weight.to(dtype)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = (
                torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                if needs_weight
                else None
            )
            grad_bias = (
                torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
                if needs_bias
                else None
            )
            rows = max(1, _LOGITS_AT_ONCE // weight.shape[0])
            for start in range(0, len(targets), rows):
                part, wanted = hidden[start : start + rows], targets[start : start + rows]
                logits = F.linear(part, matrix)
                if bias is not None:
                    logits = logits.float() + bias.float()
                log_probs = logits.log_softmax(dim=-1, dtype=torch.float32)
                loss -= log_probs.gather(1, wanted[:, None]).sum()
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                error = log_probs.exp_()
                error.scatter_add_(
                    1, wanted[:, None], torch.full_like(wanted[:, None], -1, dtype=error.dtype)
                )
                if grad_bias is not None:
                    grad_bias += error.sum(0)
                error = error.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = error @ matrix
                if grad_weight is not None:
                    grad_weight += error.T @ part
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (
            None if each is None else each * grad.to(each.dtype) for each in ctx.saved_tensors
        )
        return (*scaled, None, None)


# --- Attention over samples laid end to end -------------------------------------------------------


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sample_lengths: tuple[int, ...] = (),
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of a packed row, one sample after the other.

    query, key, value: (1, heads, sum(sample_lengths), head_dim). No scores between samples are
    computed and no mask is built. Without `sample_lengths` the row is one text, as in generation.
    """
    if not sample_lengths:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, **kwargs
        )
    assert query.shape[0] == 1
    # torch's own kernel for CPUs is slow, and keeps nothing that grows with the square.
    ours = query.device.type == "cpu" and not dropout and max(sample_lengths) <= _LONGEST_ON_CPU
    attend = (
        _attention_on_cpu if ours else functools.partial(sdpa_attention_forward, dropout=dropout)
    )
    outputs = [
        attend(module, q, k, v, None, **kwargs)[0]
        for q, k, v in zip(
            query.split(sample_lengths, dim=2),
            key.split(sample_lengths, dim=2),
            value.split(sample_lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=1), None


_QUERIES_AT_ONCE, _LONGEST_ON_CPU = 256, 2048


def _attention_on_cpu(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one sample by matrix products, some queries at a time.

    torch's own kernel takes 1.6 times as long in bf16, forwards and backwards (1,000 tokens, 9
    heads of 64); this one keeps the probabilities, half the square of the length for each head,
    which `arithmetic.saved_bytes` does not count: 1.1 GB for 9 heads in 30 layers and a sample of
    2,048 tokens. query: (1, heads, T, D); key, value: (1, groups, T, D); result: (1, T, heads, D).
    """
    _, heads, length, size = query.shape
    groups = key.shape[1]
    if torch.is_autocast_enabled("cpu"):
        # Positions are turned in float32, while values come out of a product in half precision.
        half = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(half), key.to(half), value.to(half)
    with torch.autocast("cpu", enabled=False):
        scaled = query * (size**-0.5 if scaling is None else scaling)
        parts = []
        for start in range(0, length, _QUERIES_AT_ONCE):
            stop = min(start + _QUERIES_AT_ONCE, length)
            # The heads of a group look at the same keys: they are one product.
            rows = scaled[0, :, start:stop].reshape(groups, -1, size)
            scores = rows @ key[0, :, :stop].transpose(1, 2)
            scores = scores.view(heads, stop - start, stop)
            later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[..., start:].masked_fill_(later, float("-inf"))
            probs = scores.softmax(dim=-1)
            seen = probs.view(groups, -1, stop) @ value[0, :, :stop]
            parts.append(seen.view(heads, stop - start, size))
        return torch.cat(parts, dim=1).transpose(0, 1)[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def attention_for(model: LlavaForConditionalGeneration, recipe: Recipe) -> str:
    """The implementation for the language model: `packed`, or one that transformers has.

    `packed` needs a model that hands attention its extra arguments and no window shorter than a
    sample; for others transformers itself finds the samples by their positions.
    """
    if recipe.attn != "auto":
        return recipe.attn
    if recipe.batching == "padded":
        return "sdpa"
    text_config: Any = model.config.text_config
    window = getattr(text_config, "sliding_window", None)
    language_model: Any = model.model.language_model
    takes_lengths = bool(getattr(language_model, "_supports_attention_backend", False))
    short = window is not None and window < recipe.max_length
    return PACKED_ATTENTION if takes_lengths and not short else "sdpa"
