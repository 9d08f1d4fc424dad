"""Model repositories on the Hugging Face hub, as folders on this machine.

Honours huggingface_hub's own settings (HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, the token of `hf auth
login`) and its cache. Owns what is fetched of a repository and what is said when that fails. Knows
nothing about what is in the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from w2c_tui.core.errors import DownloadError, ModelNotFoundError

Report = Callable[[str, int, int], None]


def fetch_from_hub(
    name: str, report: Report, *, with_code: bool = False, weights: bool = True
) -> Path:
    """The local snapshot of a hub repository, fetched unless HF_HUB_OFFLINE forbids it.

    Takes safetensors where there are any, `.bin` files else, and none without `weights`;
    `with_code`: its Python files too.
    Raises ModelNotFoundError or DownloadError; what was fetched is kept for another try.
    """

    def wanted(files: list[str] | None) -> list[str]:
        patterns = ["*.json", "*.jinja", "*.model", "*.txt"] + ["*.py"] * with_code
        if files is None:
            return patterns
        safe = any(re.fullmatch(r"model.*\.safetensors", file) for file in files)
        if not safe and "config.json" not in files and _models(files):
            raise ModelNotFoundError(
                f"{name} holds GGUF files.", hint=f"Name one of them: {_choices(name, files)}."
            )
        return patterns + ["*.safetensors" if safe else "*.bin"] * weights

    return _snapshot(name, wanted, report, ignore=["*/*"])


def fetch_gguf(name: str, quant: str, report: Report) -> Path:
    """The GGUF file of quantisation `quant` in a hub repository, fetched with its mmproj file.

    `quant` is a part of the file's name (Q4_K_M); empty takes Q4_K_M or the first there is.
    Raises ModelNotFoundError, which names what is there, or DownloadError.
    """

    def wanted(files: list[str] | None) -> list[str]:
        if files is None:
            # Whatever is there will do; what is not cannot be had.
            return ["nothing more"]
        found = _of_quant(_models(files), quant)
        if not found:
            raise ModelNotFoundError(
                f"{name} has no GGUF file {quant}.".replace(" .", "."),
                hint=f"There are: {_choices(name, files)}."
                if _models(files)
                else "The repository holds no GGUF files; use --backend hf.",
            )
        encoders = [file for file in files if _is_mmproj(file)]
        # 16 bit is what encoders are made for; other precisions of the same are not needed.
        half = [file for file in encoders if re.search(r"(?<!b)f16", file, re.IGNORECASE)]
        return [*found, *(half or encoders)[:1]]

    folder = _snapshot(name, wanted, report)
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf")]
    found = _of_quant(_models(files), quant)
    if not found:
        raise DownloadError(
            f"{name}:{quant} is not on this machine, and HF_HUB_OFFLINE forbids to download it."
            if quant
            else f"{name} has no GGUF file on this machine.",
            hint="Unset HF_HUB_OFFLINE, or name a local file.",
        )
    return folder / found[0]


def _is_mmproj(file: str) -> bool:
    return file.endswith(".gguf") and "mmproj" in file.casefold()


def _models(files: list[str]) -> list[str]:
    return sorted(file for file in files if file.endswith(".gguf") and not _is_mmproj(file))


def _of_quant(files: list[str], quant: str) -> list[str]:
    """The file of `quant` among `files`, or all parts of it where it was split."""
    for wanted in [quant] if quant else ["Q4_K_M", ""]:
        pattern = rf"(^|[-._/]){re.escape(wanted)}([-._/]|$)" if wanted else ""
        found = [file for file in files if re.search(pattern, file, re.IGNORECASE)]
        if found:
            stem = re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", found[0])
            return [file for file in found if file.startswith(stem)]
    return []


def _choices(name: str, files: list[str]) -> str:
    stems = [re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", file) for file in _models(files)]
    quants = dict.fromkeys(re.split(r"[-./]", stem)[-1] for stem in stems)
    return ", ".join(f"{name}:{quant}" for quant in quants)


def _snapshot(
    name: str,
    wanted: Callable[[list[str] | None], list[str]],
    report: Report,
    ignore: list[str] | None = None,
) -> Path:
    """The folder with the files of a repository that match `wanted(files)`; None: unknown files."""
    import httpx2
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    files: list[str] | None = None
    local = is_offline_mode()
    try:
        if not local:
            try:
                # Asked like this, a hub that cannot be reached is noticed without half a minute of
                # trying again.
                files = [each.rfilename for each in HfApi().model_info(name).siblings or []]
            except httpx2.TransportError:
                local = True
        return Path(
            snapshot_download(
                name,
                allow_patterns=wanted(files),
                ignore_patterns=ignore,
                tqdm_class=_progress_bar(report),
                local_files_only=local,
            )
        )
    except GatedRepoError as error:
        raise DownloadError(
            f"{name} is given out only to people who accepted its licence.",
            hint="Accept it on the model's page of the hub and run `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"There is no folder {name}, and no public model of that name on the hub.",
            hint="Check the spelling; for a private model run `hf auth login`.",
        ) from error
    except LocalEntryNotFoundError as error:
        if is_offline_mode():
            raise DownloadError(
                f"{name} is not on this machine, and HF_HUB_OFFLINE forbids to download it.",
                hint="Unset HF_HUB_OFFLINE, or name a local folder.",
            ) from error
        raise DownloadError(
            f"{name} is not on this machine, and the model hub cannot be reached.",
            hint="Download it where there is a network, and name the folder here.",
        ) from error
    except (HfHubHTTPError, httpx2.TransportError, OSError) as error:
        raise DownloadError(
            f"Downloading {name} failed: {_first_line(error)}",
            hint="Try again; what was already fetched is kept.",
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _progress_bar(report: Report) -> Any:
    """A tqdm class for huggingface_hub that shows nothing and reports bytes written."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._reports = str(kwargs.get("desc", "")).startswith("Reconstructing")
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self._done = 0

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if self._reports:
                report("Downloading", self._done, int(self.total or 0))
            return None

    return Bar
