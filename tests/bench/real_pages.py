"""Forty real pages of freely licensed (MIT) npm packages, fetched with `npm pack` on first use."""

from __future__ import annotations

import re
import subprocess
import tarfile
from pathlib import Path

import platformdirs

from w2c_tui.web.render import PageSource

PAGES = {
    "gentelella@4.2.0": (
        "dist/production/",
        "calendar chartjs chat contacts e_commerce faq file_manager fixed_sidebar form_buttons",
    ),
    "startbootstrap-sb-admin-2@4.1.4": (
        "",
        "404 buttons cards index tables utilities-border utilities-color",
    ),
    "material-dashboard@3.1.0": (
        "pages/",
        "billing dashboard icons notifications profile sign-in tables typography",
    ),
    "spectre.css@0.5.9": (
        "docs/components/",
        "accordions avatars badges bars cards menu nav tabs",
    ),
    "startbootstrap-creative@7.0.7": ("dist/", "index"),
    "startbootstrap-resume@7.0.6": ("dist/", "index"),
    "soft-ui-design-system@1.0.4": ("pages/", "about-us author contact-us"),
    "uikit@3.25.29": ("tests/", "accordion article comment"),
}


def real_pages() -> list[PageSource]:
    """The pages, each with the folder that its references reach into."""
    found = []
    for package, (folder, names) in PAGES.items():
        root = _fetched(package)
        for name in names.split():
            path = root / folder / f"{name}.html"
            html = path.read_bytes()
            ups = [m.count(b"../") for m in re.findall(rb'(?:src|href)="((?:\.\./)+)', html)]
            base = path.parent
            for _ in range(min(max(ups, default=0), len(path.relative_to(root).parts) - 1)):
                base = base.parent
            found.append(PageSource(html, base, f"{package.partition('@')[0]}/{name}"))
    return found


def _fetched(package: str) -> Path:
    folder = platformdirs.user_cache_path("w2c-tui") / "bench-pages" / package
    if not (folder / "package").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"
