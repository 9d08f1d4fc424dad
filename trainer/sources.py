"""The data sets that are known: their files, the folders of their images, where they come from.

Owns the published layouts of LLaVA-Pretrain, llava_v1_5_mix665k and Web2Code, and finding the files
of a source on disk. Knows nothing about what is in the records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from w2c_tui.core.errors import ConfigError


class KnownSource(msgspec.Struct, frozen=True, kw_only=True):
    """A published data set.

    `files`: record files, of which at least the first must be there. `image_folders`: where its
    image paths may start from, relative to its folder, the likeliest first. `parts`: the folders
    of images that its paths name, each with where it comes from.
    """

    name: str
    files: tuple[str, ...]
    image_folders: tuple[str, ...]
    home: str
    parts: Mapping[str, str] = {}


_LLAVA = "https://huggingface.co/datasets/liuhaotian"
_WEB2CODE = "https://huggingface.co/datasets/MBZUAI/Web2Code"

KNOWN = {
    source.name: source
    for source in (
        KnownSource(
            name="llava-pretrain",
            files=("blip_laion_cc_sbu_558k.json",),
            image_folders=(".", "images"),
            home=f"{_LLAVA}/LLaVA-Pretrain (images.zip)",
        ),
        KnownSource(
            name="mix665k",
            files=("llava_v1_5_mix665k.json",),
            image_folders=(".", "data", "images"),
            home=f"{_LLAVA}/LLaVA-Instruct-150K",
            parts={
                "coco/train2017": "http://images.cocodataset.org/zips/train2017.zip",
                "gqa/images": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
                "ocr_vqa/images": "OCR-VQA's own download script; several hundred pictures are no "
                "longer on the net, and their records can only be dropped",
                "textvqa/train_images": (
                    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
                ),
                "vg/VG_100K": "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
                "vg/VG_100K_2": "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
            },
        ),
        KnownSource(
            name="web2code",
            files=("Web2Code.json", "GPT4_QA.json", "WebSRC_QA.json"),
            image_folders=("Web2Code_image", ".", "images"),
            home=f"{_WEB2CODE} (Web2Code_image.zip)",
        ),
    )
}


class SourceFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A source on this disk.

    `image_folders`: the folders that its image paths may start from. `missing`: known record files
    that are not there.
    """

    name: str
    files: tuple[Path, ...]
    image_folders: tuple[Path, ...]
    home: str = ""
    parts: Mapping[str, str] = {}
    missing: tuple[str, ...] = ()

    def how_to_fetch(self, folder: str) -> str:
        """Where the images under `folder` come from, or "" if that is not known."""
        parts = (home for part, home in self.parts.items() if f"{folder}/".startswith(f"{part}/"))
        return next(parts, self.home)

    def folder_of(self, images: Sequence[str]) -> Path | None:
        """The folder in which most of these image paths are found; None if none is in any."""
        found = {
            folder: sum((folder / image).is_file() for image in images)
            for folder in self.image_folders
        }
        best = max(found, key=lambda folder: found[folder], default=None)
        return best if best is not None and found[best] else None


def find_source(name: str, path: Path, images: Path | None = None) -> SourceFiles:
    """The source called `name` in the folder or JSON file `path`.

    A name of `KNOWN` (or one that begins with it, as `web2code-small`) brings its layout along;
    any other needs a file of LLaVA records. `images`: where its image paths start from. Raises
    ConfigError naming what is not there and where to fetch it.
    """
    path = path.expanduser().absolute()
    known = next((k for k in KNOWN.values() if f"{name}-".startswith(f"{k.name}-")), None)
    files: tuple[Path, ...]
    missing: tuple[str, ...] = ()
    if path.is_file():
        files, folder = (path,), path.parent
    elif not path.is_dir():
        raise ConfigError(
            f"Source {name}: {path} does not exist.",
            hint=f"Fetch it from {known.home}." if known else "Check the path.",
        )
    elif known is None:
        raise ConfigError(
            f"Source {name}: {path} is a folder, and this is no known data set.",
            hint=f"Name the JSON file itself. Known: {', '.join(KNOWN)}.",
        )
    else:
        folder = path
        files = tuple(path / file for file in known.files if (path / file).is_file())
        missing = tuple(file for file in known.files if not (path / file).is_file())
        if not files or files[0].name != known.files[0]:
            raise ConfigError(
                f"Source {name}: {path} has no {known.files[0]}.",
                hint=f"Fetch it from {known.home}.",
            )
    if images is not None:
        roots = [images.expanduser().absolute()]
        if not roots[0].is_dir():
            raise ConfigError(f"Source {name}: {roots[0]} is no folder.", hint="Check the path.")
    else:
        roots = [folder / sub for sub in (known.image_folders if known else (".", "images"))]
    return SourceFiles(
        name=name,
        files=files,
        image_folders=tuple(root.resolve() for root in roots if root.is_dir()),
        home=known.home if known else "",
        parts=known.parts if known else {},
        missing=missing,
    )
