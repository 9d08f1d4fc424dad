"""Features of the tower computed once: the same training, without the tower."""

from __future__ import annotations

import pickle
import resource
import shutil

import msgspec
import pytest
import torch

from tests.trainer.conftest import launch, losses
from trainer.batches import Collator, examples_of
from trainer.dataset import open_dataset
from trainer.features import cached_features, projector_input
from trainer.model import build, describe
from trainer.objective import Objective, attention_for
from trainer.recipes import named
from w2c_tui.core.errors import ConfigError
from w2c_tui.core.image import normalised


def cached(dataset, model, parts, **changes):
    settings = {
        "device": torch.device("cpu"),
        "rank": 0,
        "world_size": 1,
        "wait_for_all": lambda: None,
        "report": lambda *_: None,
    }
    return cached_features(dataset, model, parts.image, **(settings | changes))


@pytest.fixture
def data(prepared, tmp_path):
    """A copy, so that what is computed for one test is not there for another."""
    shutil.copytree(prepared("mixed", "finetune"), tmp_path / "data")
    return open_dataset(tmp_path / "data")


@pytest.mark.parametrize("name", ["debug", "crystal-chat-7b-debug"])
@pytest.mark.parametrize("rows", [[0, 9, 3, 13], [8, 9]])
def test_loss_and_gradients_are_those_with_pixels(name, rows, data):
    recipe = msgspec.structs.replace(
        named("debug", "finetune"), model=named(name, "finetune").model
    )
    parts = describe(recipe)
    found = {}
    for kind in ("pixels", "features"):
        model = build(recipe, parts)
        attention = attention_for(model, recipe)
        model.model.language_model.set_attn_implementation(attention)
        training_set = examples_of(data, parts, recipe)
        if kind == "features":
            training_set.features = pickle.loads(pickle.dumps(cached(data, model, parts)))
        collate = Collator(
            parts.image,
            parts.tokens_per_image,
            packed=True,
            attention=attention,
            features=training_set.features,
        )
        batch = collate([training_set[at] for at in rows])
        assert ("pixel_values" in batch) == (kind == "pixels")
        for field in ("records", "lengths"):
            batch.pop(field)
        num_images = batch.pop("num_images")
        objective = Objective(model).train()
        loss = objective(**batch)
        loss.backward()
        gradients = {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}
        found[kind] = (num_images, loss, gradients)
    assert found["pixels"][0] == found["features"][0]
    torch.testing.assert_close(found["features"][1], found["pixels"][1])
    for parameter, gradient in found["pixels"][2].items():
        torch.testing.assert_close(
            found["features"][2][parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter
        )


def test_processes_share_the_work_and_a_later_run_finds_it(data):
    recipe = named("debug", "pretrain")
    parts = describe(recipe)
    model = build(recipe, parts)
    seen = []

    def interrupted() -> None:
        # The second process does its share where the first one would wait for it.
        seen.append("wait")
        if len(seen) == 2:
            cached(data, model, parts, rank=1, world_size=2)

    features = cached(data, model, parts, world_size=2, wait_for_all=interrupted)
    for row in range(len(data)):
        pictures = data.pictures(row, parts.image)
        assert len(features.of(row, len(pictures))) == len(pictures)
        for at, picture in enumerate(pictures):
            pixels = torch.from_numpy(normalised(picture, parts.image))[None]
            torch.testing.assert_close(
                features.of(row, at + 1)[at], projector_input(model, pixels)[0]
            )
    again = cached(data, model, parts, report=lambda *_: pytest.fail("computed again"))
    assert again.path == features.path
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(1)
    other = cached(data, model, parts)
    assert other.path != features.path


def test_a_disk_without_room_is_named_before_anything_is_computed(data):
    recipe = named("debug", "pretrain")
    parts = describe(recipe)
    model = build(recipe, parts)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match="features of all images take"):
            cached(data, model, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((data.path / "features").iterdir())


def test_a_run_with_cached_features_takes_the_same_steps(data, tmp_path):
    for kind, flags in (("pixels", []), ("features", ["--cache-features"])):
        launch("finetune", "--data", data.path, "--out", tmp_path / kind, *flags, "--max-steps", 3)
    with_pixels, with_features = losses(tmp_path / "pixels"), losses(tmp_path / "features")
    assert with_features == pytest.approx(with_pixels, rel=1e-4)
    assert len(list((data.path / "features").glob("*.bin"))) == 1
