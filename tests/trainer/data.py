"""Small published-looking data sets on disk, with real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tests.tiny import word_mark_tokenizer
from trainer.preparation import Job, Tokens
from trainer.sources import find_source
from w2c_tui.core.prompt import V1
from w2c_tui.models.tokenize import PromptTokenizer


def record(ident: Any, *values: str, image: Any = None, **fields: Any) -> dict[str, Any]:
    """A LLaVA record whose turns are `values`, questions and answers in turn."""
    speakers = ("human", "gpt")
    made: dict[str, Any] = {
        "id": ident,
        "conversations": [
            {"from": speakers[at % 2], "value": value} for at, value in enumerate(values)
        ],
    }
    return (made if image is None else made | {"image": image}) | fields


def page(number: int) -> str:
    return f"<html><body><h1>Shop {number}</h1>{'<p>old price</p>' * (number % 5)}</body></html>"


def write_json(path: Path, content: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, **options), encoding="utf-8")
    return path


def write_image(path: Path, size: tuple[int, int] = (20, 10), format: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 120, 200)).save(path, format)


def write_web2code(folder: Path, count: int = 12) -> Path:
    """The published layout: Web2Code.json, Web2Code_image/pix2code/N.png."""
    records = []
    for at in range(count):
        write_image(folder / f"Web2Code_image/pix2code/{at}.png", (20 + at, 10))
        records.append(
            record(f"{at:04}", "<image>\nMake this page.", page(at), image=f"pix2code/{at}.png")
        )
    write_json(folder / "Web2Code.json", records, indent=1)
    return folder


def tokens(max_length: int = 128, bos: bool = False) -> Tokens:
    return Tokens(
        tokenizer=PromptTokenizer(word_mark_tokenizer(bos=bos)),
        tokenizer_name="tiny",
        template=V1,
        tokens_per_image=16,
        max_length=max_length,
    )


def job(*sources: tuple[str, Path], **fields: Any) -> Job:
    return Job(
        sources=tuple(find_source(name, path) for name, path in sources),
        **({"tokens": tokens()} | fields),
    )
