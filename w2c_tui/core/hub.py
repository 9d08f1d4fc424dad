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


def fetch_from_hub(name: str, report: Report, *, with_code: bool = False) -> Path:
    """The local snapshot of a hub repository, fetched unless HF_HUB_OFFLINE forbids it.

    Takes safetensors where there are any, `.bin` files else; `with_code`: its Python files too.
    Raises ModelNotFoundError or DownloadError; what was fetched is kept for another try.
    """
    import httpx2
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    local = is_offline_mode()
    try:
        if not local:
            try:
                # Asked like this, a hub that cannot be reached is noticed without half a minute of
                # trying again.
                files = [each.rfilename for each in HfApi().model_info(name).siblings or []]
                safe = any(re.fullmatch(r"model.*\.safetensors", file) for file in files)
                patterns.append("*.safetensors" if safe else "*.bin")
            except httpx2.TransportError:
                local = True
        return Path(
            snapshot_download(
                name,
                allow_patterns=patterns + ["*.py"] * with_code,
                ignore_patterns=["*/*"],
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
