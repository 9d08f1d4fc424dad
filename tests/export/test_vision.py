"""Models that see: picture, features and next words of the exported files are the checkpoint's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.export import models
from w2c_tui.backends.gguf_header import GGUFHeader
from w2c_tui.backends.image_encoder import ImageEncoder
from w2c_tui.backends.llama import LanguageModel, RuntimeOptions
from w2c_tui.core.config import ExportSpec
from w2c_tui.core.errors import CheckpointError
from w2c_tui.core.image import pixel_values
from w2c_tui.export.gguf_export import export
from w2c_tui.export.language_model import plan_language_model
from w2c_tui.export.tensors import parts_of
from w2c_tui.export.vision import plan_vision
from w2c_tui.models.checkpoint import load_model, open_checkpoint

OPTIONS = RuntimeOptions(context=512, threads=1, cache_type="f32", n_gpu_layers=0, flash_attn="off")
TOWERS = {"clip": models.CLIP, "siglip": models.SIGLIP, "dinov2": models.DINOV2}


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def banner(width: int = 300, height: int = 100) -> Image.Image:
    """Wide enough that the corners of its square are padding."""
    picture = Image.new("RGB", (width, height), (250, 250, 245))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width // 3, height), fill=(40, 80, 160))
    draw.ellipse((width // 2, 10, width - 20, height - 10), fill=(200, 60, 40))
    return picture


@dataclasses.dataclass
class Sides:
    """What both sides say about one picture and the text after it."""

    features: np.ndarray
    native_features: np.ndarray
    logits: np.ndarray
    native_logits: np.ndarray
    written: list[int]
    native_written: list[int]

    @property
    def feature_error(self) -> float:
        difference = self.native_features - self.features
        return float(np.linalg.norm(difference) / np.linalg.norm(self.features))

    @property
    def kl(self) -> float:
        p, q = (
            torch.from_numpy(rows).double().log_softmax(-1)
            for rows in (self.logits, self.native_logits)
        )
        return float((p.exp() * (p - q)).sum(-1).mean())


def both(folder, exported, picture, *, steps: int = 48) -> Sides:
    """Run "USER: <image> ..." with `picture` through the checkpoint and the exported files."""
    source = load_model(folder, dtype=torch.float32)
    config, model = source.model.config, source.model
    before, after = [3, 40, 41], list(range(50, 74))
    slots = [config.image_token_id] * source.image_seq_length
    ids = torch.tensor([[*before, *slots, *after]])
    pixels = torch.from_numpy(pixel_values(picture, source.image_spec))[None]
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels).pooler_output[0]
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, -len(after) :].numpy()
        output = model.generate(
            input_ids=ids,
            pixel_values=pixels,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
        )
    if config.text_config.model_type == "crystalcoder":
        features = features * 14.6
        features = features - features.mean(-1, keepdim=True)
    with (
        LanguageModel(Path(exported.model), OPTIONS) as native,
        ImageEncoder(Path(exported.mmproj), native, OPTIONS) as encoder,
    ):
        (chunk,) = encoder.prepare(picture, "picture")
        native_features = encoder.encode(chunk)
        native_logits = native.run([*before, chunk, *after], keep=len(after))
        native_written = [int(native_logits[-1].argmax())]
        while len(native_written) < steps:
            (row,) = native.run(native_written[-1:])
            native_written.append(int(row.argmax()))
        native.crop(0)
        del chunk
    return Sides(
        features.numpy(),
        native_features,
        logits,
        native_logits,
        output[0, ids.shape[1] :].tolist(),
        native_written,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """LLaVAs by (tower, text model), made when first asked for."""
    root = tmp_path_factory.mktemp("llava")
    made = {}

    def folder(tower: str, text: str):
        if (tower, text) not in made:
            made[tower, text] = models.save_llava(root / f"{tower}-{text}", TOWERS[tower], text)
        return made[tower, text]

    return folder


@pytest.mark.parametrize("text", ["llama", "crystalcoder"])
@pytest.mark.parametrize("tower", TOWERS)
def test_16_bit_files_see_and_write_what_the_checkpoint_does(tower, text, folders, tmp_path):
    folder = folders(tower, text)
    exported = export(str(folder), tmp_path, ExportSpec(quant="f16", verify=False), silent)
    sides = both(folder, exported, banner())
    assert sides.feature_error < (2e-3 if tower == "dinov2" else 1e-3)
    assert sides.kl < 1e-4
    assert sides.native_written == sides.written
    assert len(set(sides.written)) > 8


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("vision_feature_layer", [1, 4], "4 does not exist in 3 layers"),
        ("vision_feature_layer", 0, "leaves the tower out"),
        ("vision_feature_layer", [1, -1], "features of 64, and 2 layers of the tower make 128"),
        ("vision_feature_select_strategy", "full", "'full'; llama.cpp computes 'default'"),
        ("projector_hidden_act", "relu", "projector_hidden_act is 'relu'"),
    ],
)
def test_what_the_native_graph_lacks_is_refused(field, value, said, folders):
    checkpoint = open_checkpoint(folders("clip", "llama"))
    parts = parts_of(checkpoint)
    model = plan_language_model(checkpoint.config.get_text_config(), parts.text)
    setattr(checkpoint.config, field, value)
    with pytest.raises(CheckpointError, match=said):
        plan_vision(checkpoint.config, parts, checkpoint.card.image, model, "auto")


def test_a_picture_size_that_the_tower_has_no_positions_for_is_refused(folders):
    checkpoint = open_checkpoint(folders("clip", "llama"))
    parts = parts_of(checkpoint)
    model = plan_language_model(checkpoint.config.get_text_config(), parts.text)
    image = msgspec.structs.replace(checkpoint.card.image, size=70)
    with pytest.raises(CheckpointError, match="17 positions, and pictures of 70 px need 26"):
        plan_vision(checkpoint.config, parts, image, model, "auto")


@pytest.mark.parametrize("tower", TOWERS)
def test_32_bit_features_of_every_shape_of_picture(tower, folders, tmp_path):
    folder = folders(tower, "llama")
    spec = ExportSpec(quant="f32", mmproj="f32", verify=False)
    exported = export(str(folder), tmp_path, spec, silent)
    for picture in (banner(), banner(90, 400), banner(700, 130)):
        assert both(folder, exported, picture, steps=1).feature_error < 1e-3


@pytest.mark.parametrize(
    ("vision", "layers", "mmproj", "limit"),
    [
        (models.DINOV2, [1, 3], "f16", 2e-3),
        (models.DINOV2, [1, 3], "f32", 1e-3),
        (models.DINOV2, [-1, 0, 2, 0], "f32", 1e-3),
        (models.CLIP, [0, 2], "f32", 1e-3),
    ],
)
def test_features_of_several_layers_and_of_a_page_that_fills_the_picture(
    vision, layers, mmproj, limit, tmp_path
):
    image = models.IMAGES[vision["model_type"]]
    image = msgspec.structs.replace(image, aspect="stretch", blank_corner=14)
    folder = models.save_llava(tmp_path / "model", vision, feature_layer=layers, image=image)
    spec = ExportSpec(quant="f16", mmproj=mmproj, verify=mmproj == "f16")
    exported = export(str(folder), tmp_path / "gguf", spec, silent)
    assert not any("patch" in note for note in exported.notes)
    header = GGUFHeader(Path(exported.mmproj))
    count = vision["num_hidden_layers"]
    states = sorted({layer if layer >= 0 else count + 1 + layer for layer in layers})
    assert list(header.numbers("clip.vision.feature_layer")) == states
    # A picture that says something in every patch, the last one too.
    sides = both(folder, exported, banner(300, 300).rotate(180), steps=24)
    assert sides.feature_error < limit
    assert sides.kl < 1e-4
    assert sides.native_written == sides.written


def test_a_page_that_fills_the_picture_needs_its_corner_blank(tmp_path):
    image = msgspec.structs.replace(models.IMAGES["dinov2"], aspect="stretch")
    folder = models.save_llava(tmp_path / "model", models.DINOV2, feature_layer=[1, 3], image=image)
    spec = ExportSpec(quant="f16", verify=False)
    exported = export(str(folder), tmp_path / "gguf", spec, silent)
    assert any("bottom right patch" in note for note in exported.notes)
    assert both(folder, exported, banner(300, 300).rotate(180), steps=1).feature_error > 2e-3
