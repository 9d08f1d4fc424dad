"""Vision towers with LLaVA's projector as llama.cpp's `mlp` image encoder (an mmproj file).

CLIP, SigLIP and DINOv2 are all written for one native graph, and what that graph lacks is folded
into the weights, in float64: LayerScale, the bias of the patch convolution, positions for another
picture size, the scale and centring of a CrystalCoder's residual stream, and the normalisation of
pixels, which the file replaces by one that 16-bit floats hold exactly.

Towers with a CLS token come in three layouts, as today's llama.cpp puts that token behind the
patches while it reads positions and features as if it were in front (ggml-org/llama.cpp#25814):

- `rolled`: the first place holds a patch of the padding's colour that its position turns into CLS;
  the picture is handed in moved on by one patch. Right features in both orders.
- `last`: positions moved so that CLS is right at the end. Today's order only, and the first patch
  is lost, but pictures need no moving.
- `standard`: as CLIP is written; right once llama.cpp's order is.

Features may come from several layers: the native graph joins the hidden states that
`clip.vision.feature_layer` lists (0 is what enters the first block, as in transformers), each once
and in ascending order, so the projector's columns are put in that order. No final norm is written:
transformers' hidden states have none.

llama.cpp's side: `tools/mtmd/models/llava.cpp` and `tools/mtmd/clip.cpp`. Knows nothing about
files or tokenizers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import gguf
import msgspec
import torch
from gguf import GGMLQuantizationType as StorageType

from w2c_tui.core.errors import CheckpointError
from w2c_tui.core.image import ImageSpec
from w2c_tui.export.language_model import LanguageModel, centred_columns, centred_rows
from w2c_tui.export.tensors import Parts, PlannedTensor, exact, matrix, stored
from w2c_tui.models.llava import has_cls_token
from w2c_tui.models.weights import StoredTensor

LAYOUT_KEY = "w2c.clip_layout"
IMAGE_SPEC_KEY = "w2c.image_spec"
PAD_COLOR_KEY = "w2c.pad_color"

Layout = Literal["rolled", "last", "standard"]
Tensors = Mapping[str, StoredTensor]

# Pixels (u - 128) / 64, which the convolution's rounding to 16 bit leaves as they are.
_PIXEL_MEAN, _PIXEL_SPREAD = 128.0, 64.0

_CLIP_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_DINOV2_BLOCK = {
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_out": "attention.o_proj",
    "ln1": "norm1",
    "ln2": "norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_LAYER_SCALES = {"attn_out": "layer_scale1.lambda1", "ffn_down": "layer_scale2.lambda1"}


@dataclasses.dataclass(frozen=True)
class VisionModel:
    """An image encoder as a GGUF file; `notes` are what its user should know."""

    write_keys: Callable[[gguf.GGUFWriter], None]
    tensors: list[PlannedTensor]
    layout: Layout
    notes: tuple[str, ...]


def plan_vision(
    config: Any,
    parts: Parts,
    image: ImageSpec | None,
    model: LanguageModel,
    layout: Literal["auto", "rolled", "last", "standard"],
) -> VisionModel:
    """How the tower and projector of the LLaVA with `config` are written for `model`.

    `image`: how its pictures are prepared. Raises CheckpointError for what llama.cpp would compute
    differently.
    """
    vision = config.vision_config
    has_cls = has_cls_token(vision)
    if image is None:
        raise CheckpointError(
            "This checkpoint's pictures are prepared in a way that has no words here, so they "
            "cannot be prepared for its GGUF files.",
            hint="Check preprocessor_config.json in the checkpoint's folder.",
        )
    layers = _feature_layers(config, vision.num_hidden_layers)
    num_blocks = max(layers)
    notes = _check(config, vision, has_cls)
    if not has_cls or layout == "standard":
        chosen: Layout = "standard"
    else:
        chosen = "rolled" if layout == "auto" else layout
    blank = image.blank_corner >= vision.patch_size + image.size % vision.patch_size
    if chosen == "rolled" and image.aspect != "pad" and not blank:
        notes += ("clip layout `rolled`: the model does not see the bottom right patch.",)
    if chosen == "last":
        notes += ("clip layout `last`: the model does not see the top left patch.",)
    if chosen == "standard" and has_cls:
        notes += ("clip layout `standard`: wrong features in llama.cpp releases of today.",)
    head_dim = vision.hidden_size // vision.num_attention_heads
    assert head_dim * vision.num_attention_heads == vision.hidden_size
    inner = parts.tower[_name(vision, 0, "ffn_up") + ".weight"].shape[0]

    def write_keys(writer: gguf.GGUFWriter) -> None:
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_projection_dim(model.embedding_length)
        writer.add_vision_image_size(image.size)
        writer.add_vision_patch_size(vision.patch_size)
        writer.add_vision_embedding_length(vision.hidden_size)
        writer.add_vision_feed_forward_length(inner)
        writer.add_vision_block_count(num_blocks)
        # Without it the graph leaves out the last block.
        writer.add_array("clip.vision.feature_layer", sorted(set(layers)))
        writer.add_vision_head_count(vision.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        writer.add_vision_image_mean([_PIXEL_MEAN / 255] * 3)
        writer.add_vision_image_std([_PIXEL_SPREAD / 255] * 3)
        if vision.hidden_act != "quick_gelu":
            writer.add_vision_use_gelu(True)
        writer.add_string(LAYOUT_KEY, chosen)
        writer.add_string(IMAGE_SPEC_KEY, msgspec.json.encode(image).decode())
        writer.add_array(PAD_COLOR_KEY, list(image.background))

    tensors = [
        *_embeddings(vision, parts.tower, image, chosen),
        *(tensor for layer in range(num_blocks) for tensor in _block(vision, parts.tower, layer)),
        *_projector(parts.projector, model, layers, vision.hidden_size),
    ]
    return VisionModel(write_keys, tensors, chosen, notes)


def _feature_layers(config: Any, num_layers: int) -> tuple[int, ...]:
    """The hidden states that features are made of, in the projector's order."""
    named = config.vision_feature_layer
    layers = tuple(named) if isinstance(named, list | tuple) else (named,)
    found = tuple(layer if layer >= 0 else num_layers + layer + 1 for layer in layers)
    for layer, state in zip(layers, found, strict=True):
        if not 0 <= state <= num_layers:
            raise CheckpointError(
                f"config.json: vision_feature_layer {layer} does not exist in {num_layers} layers.",
                hint="The file belongs to another tower.",
            )
    if not any(found):
        raise CheckpointError(
            f"config.json: vision_feature_layer is {named}, which leaves the tower out.",
            hint="llama.cpp has no such graph.",
        )
    return found


def _check(config: Any, vision: Any, has_cls: bool) -> tuple[str, ...]:
    """What the user should know of small differences; large ones raise CheckpointError."""
    for field, value, known in (
        (
            "vision_feature_select_strategy",
            config.vision_feature_select_strategy,
            ("default",) if has_cls else ("full",),
        ),
        ("hidden_act", vision.hidden_act, ("quick_gelu", "gelu", "gelu_pytorch_tanh")),
        ("projector_hidden_act", config.projector_hidden_act, ("gelu", "gelu_pytorch_tanh")),
        ("use_swiglu_ffn", getattr(vision, "use_swiglu_ffn", False), (False,)),
    ):
        if value not in known:
            raise CheckpointError(
                f"config.json: {field} is {value!r}; llama.cpp computes "
                f"{', '.join(map(repr, known))}.",
                hint="This variant cannot be exported.",
            )
    if vision.hidden_act == "gelu":
        return (
            "This tower computes GELU exactly and llama.cpp its tanh form: features differ by "
            "about half a percent.",
        )
    return ()


def _embeddings(
    vision: Any, tower: Tensors, image: ImageSpec, layout: Layout
) -> Iterator[PlannedTensor]:
    """Patch convolution, positions, and the class token where there is one."""
    dinov2 = vision.model_type == "dinov2"
    patch = "embeddings.patch_embeddings.projection" if dinov2 else "embeddings.patch_embedding"
    weight = tower[patch + ".weight"]
    bias = tower.get(patch + ".bias")
    mean, std = torch.tensor(image.mean).double(), torch.tensor(image.std).double()
    rescale = image.rescale_factor
    count = (image.size // vision.patch_size) ** 2
    width = vision.hidden_size

    def kernel() -> torch.Tensor:
        """For pixels (u - 128) / 64, as the file stores it."""
        scale = _PIXEL_SPREAD * rescale / std
        return (weight[...].double() * scale[None, :, None, None]).half()

    def constant() -> torch.Tensor:
        """What every patch gets whatever its pixels."""
        offset = (_PIXEL_MEAN * rescale - mean) / std
        value = (weight[...].double() * offset[None, :, None, None]).sum(dim=(1, 2, 3))
        return value if bias is None else value + bias[...].double()

    def padding() -> torch.Tensor:
        """What the convolution makes of a patch of the padding's colour."""
        pixels = (torch.tensor(image.background).double() - _PIXEL_MEAN) / _PIXEL_SPREAD
        return (kernel().double() * pixels[None, :, None, None]).sum(dim=(1, 2, 3))

    yield PlannedTensor("v.patch_embd.weight", weight.shape, kernel, StorageType.F16)
    if vision.model_type == "siglip_vision_model":
        rows = tower["embeddings.position_embedding.weight"]
        _check_positions(rows.shape[0], count, image.size)
        yield exact("v.position_embd.weight", rows.shape, lambda: rows[...].double() + constant())
        return

    def class_token() -> torch.Tensor:
        name = "embeddings.cls_token" if dinov2 else "embeddings.class_embedding"
        return tower[name][...].double().flatten()

    def positions() -> torch.Tensor:
        if dinov2:
            return _interpolated(tower["embeddings.position_embeddings"][...][0], count)
        return tower["embeddings.position_embedding.weight"][...].double()

    def placed() -> torch.Tensor:
        rows = positions()
        rows[1:] += constant()
        if layout == "last":
            return rows.roll(-1, dims=0)
        if layout == "rolled":
            # Row 0 meets a patch of padding, and CLS is what must come out. The last row meets
            # the class embedding, which stands for the last patch and is padding as well.
            rows[0] += class_token() - padding()
        return rows

    if not dinov2:
        given = tower["embeddings.position_embedding.weight"].shape[0]
        _check_positions(given, count + 1, image.size)
    made = padding if layout == "rolled" else class_token
    yield exact("v.class_embd", (width,), made)
    yield exact("v.position_embd.weight", (count + 1, width), placed)
    if not dinov2:
        for kind in ("weight", "bias"):
            yield stored(f"v.pre_ln.{kind}", tower[f"pre_layrnorm.{kind}"])


def _check_positions(given: int, needed: int, size: int) -> None:
    if given != needed:
        raise CheckpointError(
            f"The vision tower has {given} positions, and pictures of {size} px need {needed}.",
            hint="The size in preprocessor_config.json (or w2c.json) belongs to another tower.",
        )


def _interpolated(positions: torch.Tensor, count: int) -> torch.Tensor:
    """(1 + count, width): DINOv2's positions for another picture size.

    `Dinov2Embeddings.interpolate_pos_encoding` of transformers.
    """
    side, wanted = round((len(positions) - 1) ** 0.5), round(count**0.5)
    if side == wanted:
        return positions.double()
    grid = positions[1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(wanted, wanted), mode="bicubic", align_corners=False
    )
    rows = grid.permute(0, 2, 3, 1).reshape(count, -1)
    return torch.cat((positions[:1].float(), rows)).double()


def _name(vision: Any, layer: int, part: str) -> str:
    if vision.model_type == "dinov2":
        return f"encoder.layer.{layer}.{_DINOV2_BLOCK[part]}"
    return f"encoder.layers.{layer}.{_CLIP_BLOCK[part]}"


def _block(vision: Any, tower: Tensors, layer: int) -> Iterator[PlannedTensor]:
    for part in _CLIP_BLOCK:
        for kind in ("weight", "bias"):
            tensor = tower.get(f"{_name(vision, layer, part)}.{kind}")
            if tensor is None:
                continue
            plan = stored(f"v.blk.{layer}.{part}.{kind}", tensor)
            scale = tower.get(f"encoder.layer.{layer}.{_LAYER_SCALES.get(part, '')}")
            if scale is not None:
                plan = dataclasses.replace(plan, make=partial(_scaled_rows, tensor, scale))
            yield plan


def _scaled_rows(tensor: StoredTensor, scale: StoredTensor) -> torch.Tensor:
    factors = scale[...].double()
    return tensor[...].double() * factors.reshape(-1, *[1] * (len(tensor.shape) - 1))


def _projector(
    projector: Tensors, model: LanguageModel, layers: tuple[int, ...], width: int
) -> Iterator[PlannedTensor]:
    first, second = projector["linear_1.weight"], projector["linear_2.weight"]
    if second.shape[0] != model.embedding_length:
        raise CheckpointError(
            f"The projector writes embeddings of {second.shape[0]}, and the language model reads "
            f"{model.embedding_length}.",
            hint="The projector belongs to another language model.",
        )

    def bias(name: str, length: int) -> torch.Tensor:
        found = projector.get(name)
        return torch.zeros(length).double() if found is None else found[...].double()

    def written(value: torch.Tensor) -> torch.Tensor:
        value = value * model.embedding_scale
        if not model.centred:
            return value
        return centred_columns(value) if value.dim() == 2 else centred_rows(value)

    if first.shape[1] != len(layers) * width:
        raise CheckpointError(
            f"The projector reads features of {first.shape[1]}, and {len(layers)} layers of the "
            f"tower make {len(layers) * width}.",
            hint="The projector belongs to another tower, or to other layers of it.",
        )
    states = sorted(set(layers))

    def in_order() -> torch.Tensor:
        made = torch.zeros(first.shape[0], len(states) * width).double()
        for part, layer in zip(first[...].double().split(width, dim=1), layers, strict=True):
            start = states.index(layer) * width
            made[:, start : start + width] += part
        return made

    if layers == tuple(states):
        yield stored("mm.0.weight", first)
    else:
        yield matrix("mm.0.weight", (first.shape[0], len(states) * width), in_order)
    yield exact("mm.0.bias", first.shape[:1], lambda: bias("linear_1.bias", first.shape[0]))
    yield matrix("mm.2.weight", second.shape, lambda: written(second[...].double()))
    yield exact(
        "mm.2.bias",
        second.shape[:1],
        lambda: written(bias("linear_2.bias", second.shape[0])),
    )
