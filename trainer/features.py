"""What a frozen vision tower makes of every image of a dataset, computed once.

Owns the file of features: which model and data it is for, filling it before the first step, and
reading it by row. It lies in the dataset's folder under a name that says what it holds, so that
later runs find it. Worth it for small language models, whose steps the tower would dominate. Knows
nothing about the loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from trainer.dataset import Dataset
from w2c_tui.core.errors import ConfigError
from w2c_tui.core.image import ImageSpec, normalised


class Features:
    """(num_images, tokens, width) of a dataset's images, in the tower's precision, memory-mapped.

    Opened where it is used, so that it travels to worker processes as its path.
    """

    def __init__(self, path: Path, dataset: Dataset, tokens: int, width: int, dtype: torch.dtype):
        self.path = path
        self.dtype = dtype
        self._starts = np.concatenate([[0], np.cumsum(dataset.num_images, dtype=np.int64)])
        self._shape = (int(self._starts[-1]), tokens, width)
        self._map: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self._shape, dtype=np.int64)) * self.dtype.itemsize

    def of(self, row: int, count: int) -> list[torch.Tensor]:
        """The features, (tokens, width) each, of the first `count` images of `row`."""
        start = int(self._starts[row])
        return [
            torch.from_numpy(self._opened()[at].copy()).view(self.dtype)
            for at in range(start, start + count)
        ]

    def empty(self) -> torch.Tensor:
        """(1, tokens, width) zeros, for a batch without images."""
        return torch.zeros(1, *self._shape[1:], dtype=self.dtype)

    def write(self, row: int, features: torch.Tensor) -> None:
        """Put down those of all images of `row`."""
        start = int(self._starts[row])
        self._opened()[start : start + len(features)] = (
            features.to("cpu", self.dtype).contiguous().view(self._stored).numpy()
        )

    @property
    def _stored(self) -> torch.dtype:
        # numpy has no bfloat16.
        return torch.int16 if self.dtype.itemsize == 2 else torch.int32

    def _opened(self) -> Any:
        if self._map is None:
            stored = np.dtype(f"i{self.dtype.itemsize}")
            self._map = np.memmap(self.path, stored, mode="r+", shape=self._shape)
        return self._map


def cached_features(
    dataset: Dataset,
    model: LlavaForConditionalGeneration,
    image: ImageSpec,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
    wait_for_all: Callable[[], None],
    report: Callable[[str, int, int], None],
) -> Features:
    """The features of `dataset` under the tower of `model`, computed if they are not there yet.

    Every process calls this and computes its share. Raises ConfigError if they cannot be stored,
    ImageError for an image that cannot be opened.
    """
    config: Any = model.config
    tower: Any = model.model.vision_tower
    dtype = next(tower.parameters()).dtype
    folder = dataset.path / "features"
    path = folder / f"{_key(dataset, model, image, dtype)}.bin"
    width = model.model.multi_modal_projector.linear_1.in_features
    features = Features(path, dataset, config.image_seq_length, width, dtype)
    if path.is_file() or not features.num_bytes:
        return features
    partial = Features(path.with_suffix(".partial"), dataset, config.image_seq_length, width, dtype)
    if rank == 0:
        _make_room(partial)
    wait_for_all()
    home = next(tower.parameters()).device
    tower.to(device)
    rows = np.flatnonzero(dataset.modality)[rank::world_size]
    for done, row in enumerate(rows):
        pictures = dataset.pictures(int(row), image)
        pixels = torch.from_numpy(np.stack([normalised(each, image) for each in pictures]))
        partial.write(int(row), projector_input(model, pixels.to(device, dtype)))
        report("features of images", done + 1, len(rows))
    tower.to(home)
    if rows.size:
        partial._opened().flush()
    wait_for_all()
    if rank == 0:
        os.replace(partial.path, path)
    wait_for_all()
    return features


class _Held(Exception):
    """Ends a forward pass where the projector would begin."""


def projector_input(
    model: LlavaForConditionalGeneration, pixel_values: torch.Tensor
) -> torch.Tensor:
    """(num_images, tokens, width): what the projector of `model` is given for these pixels."""
    given: list[torch.Tensor] = []

    def hold(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        given.append(inputs[0])
        raise _Held

    handle = model.model.multi_modal_projector.register_forward_pre_hook(hold)
    model.model.vision_tower.eval()
    try:
        with torch.no_grad(), contextlib.suppress(_Held):
            model.model.get_image_features(pixel_values, return_dict=True)
    finally:
        handle.remove()
    return given[0]


def _key(dataset: Dataset, model: Any, image: ImageSpec, dtype: torch.dtype) -> str:
    config: Any = model.config
    weights = hashlib.sha256()
    for name, parameter in model.model.vision_tower.named_parameters():
        # The beginning of every tensor tells towers apart, and other weights of the same tower.
        begin = parameter.detach().flatten()[:64].float().cpu()
        weights.update(name.encode() + begin.numpy().tobytes())
    facts = [
        dataset.fingerprint,
        config.vision_config.to_json_string(),
        repr(config.vision_feature_layer),
        config.vision_feature_select_strategy,
        msgspec.to_builtins(image),
        str(dtype),
        weights.hexdigest(),
    ]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]


def _make_room(features: Features) -> None:
    """An empty file of the whole size, so that a disk that is too small is noticed now."""
    try:
        features.path.parent.mkdir(exist_ok=True)
        with features.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, features.num_bytes)
    except OSError as error:
        features.path.unlink(missing_ok=True)
        raise ConfigError(
            f"The features of all images take {features.num_bytes / 1e9:,.1f} GB, and "
            f"{features.path.parent} cannot hold them: {error.strerror or error}.",
            hint="Free some space, or train without --cache-features.",
        ) from error
