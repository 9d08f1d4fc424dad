"""The parts of w2c-nano: the tower out of its ONNX file, and the assembled folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from trainer import nano
from trainer.nano import FEATURE_LAYERS, image_spec, read_tower, tower_state
from trainer.recipes import named
from w2c_tui.core import catalog
from w2c_tui.core.catalog import PackagedFile
from w2c_tui.core.config import paths
from w2c_tui.core.image import prepare

# The user's own cache: tests have a cache of their own, and no network.
MODELS = paths().models
TOWER_FILE = MODELS / nano.TOWER.name
LANGUAGE_FILE = catalog.find(nano.LANGUAGE_MODEL)
needs_tower = pytest.mark.skipif(
    not TOWER_FILE.is_file(), reason=f"{nano.TOWER.name} was not fetched (python -m trainer.nano)"
)


def as_exported(tower: Dinov2Model) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Names and layouts as PyTorch's ONNX exporter leaves them."""
    stored: dict[str, np.ndarray] = {}
    products: dict[str, str] = {}
    old = {new: name for name, new in nano._NEW_NAMES.items()}
    for name, tensor in tower.state_dict().items():
        array = tensor.numpy()
        for new, before in old.items():
            name = name.replace(new, before)
        if name == "embeddings.position_embeddings":
            stored["onnx::Concat_1"], stored["onnx::Resize_2"] = array[:, :1], array[:, 1:]
        elif array.ndim == 2 and name.startswith("encoder"):
            number = f"onnx::MatMul_{len(stored)}"
            stored[number] = array.T
            operation = name.removesuffix(".weight")
            layer, rest = operation.split(".", 3)[1:3], operation.split(".", 3)[3]
            products[f"/backbone/encoder/layer.{layer[1]}/{rest.replace('.', '/')}/MatMul"] = number
        else:
            stored[f"backbone.{name}"] = array
    return stored, products


def test_the_tower_comes_out_of_exported_names_as_it_went_in() -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    tower = Dinov2Model(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter)
    state = tower_state(*as_exported(tower))
    assert state.keys() == tower.state_dict().keys()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_corner_of_every_picture_is_blank_and_the_rest_is_stretched_over_all() -> None:
    picture = Image.new("RGB", (900, 300), "navy")
    seen = prepare(picture, image_spec())
    assert seen.size == (224, 224)
    assert seen.getpixel((209, 223)) == seen.getpixel((0, 0)) == (0, 0, 128)
    assert seen.crop((210, 210, 224, 224)).getcolors() == [(14 * 14, (255, 255, 255))]


def test_the_recipe_starts_from_the_parts() -> None:
    for stage in ("pretrain", "finetune"):
        recipe = named("w2c-nano", stage)
        assert recipe.model == nano.SOURCE
        assert not recipe.vision_tower


@needs_tower
def test_the_real_tower_computes_what_its_file_computes() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = onnx.load(TOWER_FILE)
    last = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, 1, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([last], {"input_image": pixels})
    ours = read_tower(TOWER_FILE)
    # The file's own GELU; ours is the tanh form on purpose.
    config = Dinov2Config(**{**ours.config.to_dict(), "hidden_act": "gelu"})
    tower = Dinov2Model(config).eval()
    tower.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        found = tower(torch.tensor(pixels)).last_hidden_state.numpy()
    assert np.abs(found - expected).max() < 1e-4


@needs_tower
@pytest.mark.skipif(
    LANGUAGE_FILE is None
    or not isinstance(LANGUAGE_FILE.source, PackagedFile)
    or not (MODELS / LANGUAGE_FILE.source.name).is_file(),
    reason="SmolLM2 was not fetched (w2c models pull smollm2-135m)",
)
def test_the_assembled_folder_writes_about_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from w2c_tui.core.image import pixel_values
    from w2c_tui.models.checkpoint import load_model

    monkeypatch.setenv("W2C_CACHE_DIR", str(MODELS.parent))
    folder = nano.assemble(tmp_path / "nano")
    loaded = load_model(folder)
    model = loaded.model
    assert loaded.image_spec == image_spec()
    assert loaded.image_seq_length == 256
    assert model.config.vision_feature_layer == FEATURE_LAYERS
    assert model.model.multi_modal_projector.linear_1.in_features == 768
    # Images come out about as large as words, from both layers.
    features = []
    for color in ("white", "crimson"):
        pixels = pixel_values(Image.new("RGB", (640, 480), color), image_spec())[None]
        with torch.inference_mode():
            found = model.model.get_image_features(torch.tensor(pixels))
        features.append(found.pooler_output[0])
    words = model.get_input_embeddings().weight.std()
    assert 0.3 < features[0].std() / words < 3
    assert (features[0] - features[1]).std() > 0.2 * features[0].std()
