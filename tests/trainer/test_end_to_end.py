"""From eight screenshots through both stages to the same eight pages in the application."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from tests.trainer.conftest import QUESTION, page
from trainer.batches import examples_of
from trainer.dataset import open_dataset
from trainer.loop import train
from trainer.model import describe
from trainer.recipes import resolve
from w2c_tui.backends.base import Text
from w2c_tui.backends.gguf import GGUFBackend
from w2c_tui.backends.hf import HFBackend
from w2c_tui.cli.generate import generate
from w2c_tui.console import run
from w2c_tui.core.config import ExportSpec, GenerationParams, LoadSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.reference import load_attachment
from w2c_tui.export.gguf_export import export

# Training takes a minute or two of a core.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """The folder of a debug model that went through both stages until it knew its eight pages."""
    out = tmp_path_factory.mktemp("runs")
    flags = {"data": str(prepared("pages", "pretrain")), "out": str(out / "1"), "epochs": 10}
    first = train(resolve("debug", "pretrain", flags=flags))
    flags = {
        "data": str(prepared("pages", "finetune")),
        "out": str(out / "2"),
        "model": str(first),
        "epochs": 140,
        "schedule": "constant",
        "save_every": 0,
    }
    return train(resolve("debug", "finetune", flags=flags))


def test_generate_writes_the_eight_pages_that_were_trained(trained, published, tmp_path):
    pages = tmp_path / "pages"
    flags = ["--temperature", "0", "--dtype", "float32", "--max-new-tokens", "200"]
    images = [str(published / f"{at}.png") for at in range(8)]
    given = [*images, "--model", str(trained), "--out", str(pages), "-p", QUESTION, *flags]
    assert run(generate, given) == 0
    for at in range(8):
        assert (pages / f"{at}.html").read_text().strip() == page(at)


def test_the_exported_model_writes_the_same_pages_in_llama_cpp(trained, published, tmp_path):
    exported = export(
        str(trained), tmp_path, ExportSpec(quant="f16"), lambda *_: None, name="pages"
    )
    backend = GGUFBackend()
    backend.load(LoadSpec(name=str(exported.model), threads=1), lambda *_: None)
    greedy = GenerationParams(temperature=0, max_new_tokens=200)
    try:
        for at in range(8):
            image = load_attachment(str(published / f"{at}.png"))
            messages = [Message("user", QUESTION, (image,))]
            events = list(backend.stream(messages, greedy, lambda: False))
            text = "".join(event.delta for event in events if isinstance(event, Text))
            assert text == page(at)
    finally:
        backend.close()


def test_training_and_inference_feed_the_model_the_same_ids_and_pixels(
    trained, prepared, published
):
    data = prepared("pages", "finetune")
    recipe = resolve("debug", "finetune", flags={"model": str(trained)})
    parts = describe(recipe)
    training_set = examples_of(open_dataset(data), parts, recipe)
    backend = HFBackend()
    backend.load(LoadSpec(name=str(trained), dtype="float32"), lambda *_: None)
    try:
        for at in range(8):
            image = load_attachment(str(published / f"{at}.png"))
            ids = backend.encode([Message("user", QUESTION, (image,))]).ids
            example, prompt = training_set[at], training_set.prompt(at)
            assert ids == prompt.encoded.input_ids.tolist()
            assert ids == example.encoded.input_ids[: len(ids)].tolist()
            assert (example.encoded.labels[: len(ids)] == -100).all()
            assert (example.encoded.labels[len(ids) :] != -100).all()
            pixels = backend._prepare_image(image).inputs["pixel_values"]
            assert torch.equal(pixels[0], torch.from_numpy(np.asarray(example.pixels[0])))
    finally:
        backend.close()


def test_the_report_shows_the_run(trained):
    text = (trained.parent / "report.html").read_text()
    assert "140 steps" in text
    assert text.count("<polyline") == 8
    assert "learning_rate" in text


def test_the_card_tells_how_the_model_was_made(trained, prepared):
    from w2c_tui.models.checkpoint import read_card

    card = read_card(trained)
    assert card.family == "llava_llama"
    assert card.template == "v1"
    assert card.image.aspect == "pad"
    assert card.recipe["stage"] == "finetune"
    assert card.recipe["global_batch"] == 8
    assert card.data_fingerprint == open_dataset(prepared("pages", "finetune")).fingerprint
    assert msgspec.json.encode(card)
