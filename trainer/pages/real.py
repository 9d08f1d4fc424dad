"""`python -m trainer.pages.real`: sections of published page templates, for validation only.

Owns which packages are taken, how their pages are cut into sections that stand alone, and the
record of where each came from and under which licence. A section is a part of a page as a browser
shows it, its styles inlined, pictures replaced by grey boxes and icons left out; the screenshot is
of that HTML, so that both fit exactly. Nothing of it is used for training.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
from playwright.sync_api import Browser, Error, sync_playwright
from rapidfuzz import fuzz
from rich.console import Console

from trainer.pages.write import Made, save_picture, write_page_records
from w2c_tui.core.colors import contrast
from w2c_tui.core.config import RenderSettings
from w2c_tui.core.conversation import TextLine
from w2c_tui.core.errors import DownloadError, MissingPackageError, RenderError, W2CError
from w2c_tui.core.files import write_atomically
from w2c_tui.models.page_text import with_colors
from w2c_tui.web.render import PageSource, Renderer, find_browser

MAX_CHARACTERS = 1700
"""A longer section is cut into its parts: about 600 tokens of SmolLM2."""
MOST_OF_A_PAGE, MOST_OF_A_PACKAGE = 3, 14
MIN_HEIGHT_SHARE = 0.12
"""Sections that are lower than this times their width are mere strips."""
MOST_ALIKE = 75
"""In percent: of sections whose words are more alike only the first is taken."""
WIDTH = 1280
FREE = ("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "CC0-1.0", "0BSD")


class Template(msgspec.Struct, frozen=True):
    """A package of the npm index with finished pages under `folder`; `sha256` of its archive."""

    package: str
    version: str
    folder: str
    sha256: str


TEMPLATES: tuple[Template, ...] = (
    Template(
        "startbootstrap-creative",
        "7.0.7",
        "dist",
        "746c2e46c5292e797358c90533ed695fbeb6ceff58ad7fd43284d93e9c3d0555",
    ),
    Template(
        "startbootstrap-resume",
        "7.0.6",
        "dist",
        "2a9caf5deefcb3ea7cd4839a074ef3bf62ca8f647611a59541b15c6ebb48b76c",
    ),
    Template(
        "startbootstrap-sb-admin",
        "7.0.7",
        "dist",
        "bcbfda7072fa8267ddfb114d925fe4dba15eca5ba92e6e08db92ef44a1345afa",
    ),
    Template(
        "startbootstrap-sb-admin-2",
        "4.1.4",
        "",
        "5cb4d3875078a735953af3b1b12ed8271f1bcbb73ec0cb793d5ee81d22881b0f",
    ),
    Template(
        "soft-ui-design-system",
        "1.0.4",
        "pages",
        "b999a9fe6dc31469bcb498c9d0560ac17060d76957abe7f1cb1c2dddf61a5095",
    ),
    Template(
        "soft-ui-dashboard",
        "1.0.1",
        "pages",
        "a829e661517184f7a7a84f6cc86efa17a65d91e30807b6d2bf631bb34d94f1ee",
    ),
    Template(
        "@digitallyhappy/backstrap",
        "0.5.1",
        "dist",
        "c9b3be5c578e30b38da25725a4cb6bfae6db7ee5e76b08fb03f78b2f7a47ce9d",
    ),
    Template(
        "spectre.css",
        "0.5.9",
        "docs",
        "285c3bc709a1c30a83c8276f0f87b838e3089ec41c78621e496b638146eeeb03",
    ),
    Template(
        "material-dashboard",
        "3.1.0",
        "pages",
        "424b8c15e9446bae383106122e22e37a349139ee6fb4b94e214a6ffabc8b41b0",
    ),
)


class Origin(msgspec.Struct, frozen=True):
    """Where a section comes from."""

    package: str
    version: str
    licence: str
    page: str


def fetch(template: Template, folder: Path) -> tuple[Path, str]:
    """Fetch and unpack the package; its folder and licence.

    Nothing of it is installed or run. Raises DownloadError or MissingPackageError.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise MissingPackageError(
            "Fetching page templates needs the program npm.", hint="Install Node.js."
        )
    name = f"{template.package}@{template.version}"
    unpacked = folder / name.replace("/", "-")
    if not unpacked.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            run = subprocess.run(
                [npm, "pack", name, "--silent", "--ignore-scripts", "--pack-destination", scratch],
                capture_output=True,
                text=True,
                check=False,
            )
            archives = list(Path(scratch).glob("*.tgz"))
            if run.returncode or len(archives) != 1:
                said = run.stderr.strip().splitlines()
                raise DownloadError(
                    f"npm could not fetch {name}: {said[-1] if said else 'it said nothing'}",
                    hint="Check the network and npm's registry setting.",
                )
            digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
            if digest != template.sha256:
                raise DownloadError(
                    f"{name} is not the expected archive: its SHA-256 is {digest}.",
                    hint="The npm registry in use serves another file.",
                )
            with tarfile.open(archives[0]) as archive:
                archive.extractall(Path(scratch) / "unpacked", filter="data")
            (Path(scratch) / "unpacked" / "package").rename(unpacked)
    about = json.loads((unpacked / "package.json").read_text(encoding="utf-8"))
    licence = str(about.get("license", ""))
    if licence not in FREE:
        raise DownloadError(
            f"{name} is under {licence or 'no licence'}, which is not in the list of free ones."
        )
    return unpacked, licence


def sections_of(browser: Browser, page: Path, root: Path) -> Iterator[dict[str, Any]]:
    """The sections of the file `page`, which may use files under `root` and nothing else."""
    script = Path(__file__).with_name("section.js").read_text(encoding="utf-8")
    context = browser.new_context(
        viewport={"width": WIDTH, "height": 900}, java_script_enabled=False, offline=True
    )
    try:
        tab = context.new_page()
        context.route(
            "**/*",
            lambda route, request: (
                route.continue_() if request.url.startswith(root.as_uri()) else route.abort()
            ),
        )
        tab.goto(page.as_uri(), wait_until="load", timeout=20_000)
        yield from tab.evaluate(script, MAX_CHARACTERS)
    finally:
        context.close()


def section_html(section: dict[str, Any]) -> str:
    """A document of its own, in the form that composed pages have."""
    lines = re.sub(
        r"(?<=>)(?=<(?:div|p|h\d|ul|li|section|table|tr|form|input|nav)\b)",
        "\n",
        "".join(section["html"]),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Section</title>'
        f"<style>\n*{{box-sizing:border-box}}\nbody{{{_short(section['style'])}}}\n</style></head>\n"
        f"<body>\n{_short_styles(lines)}\n</body>\n</html>\n"
    )


def _short_styles(html: str) -> str:
    return re.sub(r' style="([^"]*)"', lambda match: f' style="{_short(match[1])}"', html)


def _short(css: str) -> str:
    """The same declarations in fewer characters; lengths in whole px, colours as #rrggbb."""
    css = css.replace("&quot;", "'")
    css = re.sub(r"rgba?\(([\d., ]+)\)", _hex, css)
    css = re.sub(r"(\d+\.\d+)px", lambda match: f"{round(float(match[1]))}px", css)
    css = re.sub(r"\s*([;:,])\s*", r"\1", css).strip("; ")
    css = re.sub(
        r"border-width:(\w+);border-style:(\w+);border-color:([#\w]+)", r"border:\1 \2 \3", css
    )
    css = re.sub(r"border-(?:top|bottom)-(?:left|right)-radius:0(?:px)?;?", "", css).strip(";")
    return re.sub(r"background-color:", "background:", css)


def _hex(match: re.Match[str]) -> str:
    parts = [float(part) for part in match[1].split(",")]
    alpha = parts[3] if len(parts) > 3 else 1.0
    # Over white: what is behind is mostly that, and a model cannot tell.
    red, green, blue = (round(alpha * part + (1 - alpha) * 255) for part in parts[:3])
    text = f"#{red:02x}{green:02x}{blue:02x}"
    return f"#{text[1]}{text[3]}{text[5]}" if text[1::2] == text[2::2] else text


def collect(out: Path, console: Console) -> int:
    """Write the sections of all `TEMPLATES` into `out`; how many there are."""
    out.mkdir(parents=True, exist_ok=True)
    packages = out / "packages"
    packages.mkdir(exist_ok=True)
    found: list[tuple[str, int, Origin]] = []
    seen: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(),
            args=["--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"],
            chromium_sandbox=False,
        )
        for template in TEMPLATES:
            root, licence = fetch(template, packages)
            taken = 0
            for page in sorted((root / template.folder).rglob("*.html")):
                if taken >= MOST_OF_A_PACKAGE:
                    break
                origin = Origin(
                    template.package, template.version, licence, str(page.relative_to(root))
                )
                try:
                    sections = list(sections_of(browser, page, root))
                except Error:
                    continue
                fresh = 0
                for section in sections:
                    html = section_html(section)
                    if fresh >= MOST_OF_A_PAGE or taken >= MOST_OF_A_PACKAGE:
                        break
                    words = re.sub(
                        r"<style>.*?</style>|<[^>]*>|[\s\d]+", " ", html, flags=re.DOTALL
                    )
                    if any(fuzz.ratio(words, other) > MOST_ALIKE for other in seen):
                        continue
                    seen.append(words)
                    found.append((html, section["width"], origin))
                    fresh += 1
                    taken += 1
            console.print(f"{template.package}: {taken} sections, {licence}")
        browser.close()
    return _render(out, found)


def _render(out: Path, found: list[tuple[str, int, Origin]]) -> int:
    made: list[Made] = []
    origins: list[dict[str, Any]] = []
    sources = [PageSource(html, width=width, name=origin.page) for html, width, origin in found]
    with Renderer(RenderSettings(height=16)) as renderer:
        views = renderer.render_all(sources)
        for (html, width, origin), view in zip(found, views, strict=True):
            if isinstance(view, RenderError):
                raise view
            picture = view.picture
            lines = with_colors(
                picture, [TextLine(line.text, line.box) for line in view.lines or ()]
            )
            if not view.lines or not MIN_HEIGHT_SHARE <= picture.height / width <= 2.2:
                continue
            # White letters on what was a picture, scripts that no small model writes.
            if not all(map(_can_be_read, lines)):
                continue
            index = len(made)
            image = f"images/{index:04}.png"
            save_picture(picture, out / image)
            made.append(
                Made(
                    index=index,
                    image=image,
                    width=picture.width,
                    height=picture.height,
                    html=html,
                    dialect="inline",
                    language="en",
                    layout="section",
                    theme=None,
                    blocks=(),
                    lines=lines,
                )
            )
            origins.append({"id": f"real-{index:07}", **msgspec.to_builtins(origin)})
    write_page_records(out, made, "text", "real")
    licences = Counter(origin["licence"] for origin in origins)
    manifest = {"sections": len(made), "licences": licences, "origins": origins}
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    write_atomically(out / "manifest.json", data)
    return len(made)


def _can_be_read(line: TextLine) -> bool:
    if line.ink is None or line.ground is None or contrast(line.ink, line.ground) < 1.3:
        return False
    return all(ord(letter) < 0x250 or 0x2000 <= ord(letter) < 0x2200 for letter in line.text)


@click.command(epilog="Example: python -m trainer.pages.real --out data/real")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Their folder."
)
def main(out: Path) -> None:
    """Cut published page templates of free licences into sections, for validation."""
    console = Console(stderr=True)
    try:
        num = collect(out, console)
    except W2CError as error:
        click.echo(f"Error: {error.message}\n{error.hint}".rstrip(), err=True)
        sys.exit(1)
    click.echo(f"{out}: {num} sections in pages.json; where they come from is in manifest.json.")


if __name__ == "__main__":
    main()
