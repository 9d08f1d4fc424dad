"""Where a model would be put, and what each device would hold, before anything is loaded.

Reads configuration and tensor headers only. Knows nothing about how the plan is shown.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from w2c_tui.core.config import DeviceShare, Quantization
from w2c_tui.models.checkpoint import Checkpoint, device_plan

_QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.516}
"""Per weight; nf4 in blocks of 64 with double quantisation takes 4.127 bits."""


def device_shares(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device_map: str,
    max_memory: dict[int | str, int | str] | None,
    quantization: Quantization,
) -> tuple[DeviceShare, ...]:
    """What each device would hold, in the order of the plan; empty where only transformers knows.

    Raises CheckpointError or ModelNotFoundError as loading would.
    """
    named = device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    plan = (
        device_plan(
            checkpoint,
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            quantization=quantization,
        )
        if named
        else {"": device_map}
    )
    modules: dict[str, list[str]] = defaultdict(list)
    for module, device in plan.items():
        modules[str(device)].append(module)
    held: dict[str, float] = defaultdict(float)
    for name, tensor in (checkpoint.tensors or {}).items():
        owners = [m for m in plan if not m or name == m or name.startswith(f"{m}.")]
        if owners:
            size = _bytes(name, tensor.shape, dtype, quantization)
            held[str(plan[max(owners, key=len)])] += size
    return tuple(
        DeviceShare(device=device, modules=tuple(names), num_bytes=round(held[device]))
        for device, names in modules.items()
    )


def _bytes(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, quantization: Quantization
) -> float:
    # Quantisation acts on the matrices of the language model's blocks and on nothing else.
    in_block = ".layers." in name and "vision_tower" not in name
    if quantization != "none" and in_block and len(shape) == 2:
        return math.prod(shape) * _QUANTISED_BYTES[quantization]
    return math.prod(shape) * dtype.itemsize
