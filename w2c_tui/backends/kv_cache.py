"""A key-value cache that grows without copying and can be cut back to any length.

Knows nothing about what is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer with room to grow, so that a step copies only its own token.

    Shapes as in `DynamicLayer`: (batch, num_heads, length, head_dim).
    """

    def __init__(self) -> None:
        super().__init__()
        self._length = 0
        self._buffers: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            room = -(-(end + end // 4) // 256) * 256
            grown = [
                states.new_empty(*states.shape[:-2], room, states.shape[-1])
                for states in (key_states, value_states)
            ]
            for new, old in zip(grown, self._buffers, strict=False):
                new[..., :start, :] = old[..., :start, :]
            self._buffers = grown
        self._buffers[0][..., start:end, :] = key_states
        self._buffers[1][..., start:end, :] = value_states
        self._length = end
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._length

    def branched(self, count: int) -> GrowingLayer:
        """A layer that holds this one's single sequence `count` times."""
        layer = GrowingLayer()
        if self._length:
            held = [buffer[..., : self._length, :] for buffer in self._buffers]
            layer.update(*(states.expand(count, -1, -1, -1) for states in held))
        return layer

    @property
    def position_bytes(self) -> int:
        """What one position of one sequence takes."""
        return sum(b[:1, :, 0].numel() * b.element_size() for b in self._buffers)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self._buffers:
            chosen = torch.tensor(rows, device=self.device)
            self._buffers = [buffer.index_select(0, chosen) for buffer in self._buffers]
            # Or these would hold on to all sequences until the layer's next turn.
            self.keys, self.values = (b[..., : self._length, :] for b in self._buffers)

    def crop_to(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self._length = min(self._length, length)


def growing_cache(num_layers: int) -> Cache:
    """An empty cache for a model of `num_layers` attention layers."""
    return Cache(layers=[GrowingLayer() for _ in range(num_layers)])
