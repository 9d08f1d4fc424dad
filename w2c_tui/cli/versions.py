"""`w2c versions`: see, compare, save and edit what the answers of a session came to."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from w2c_tui.console.terminal import say, say_json, write_bytes
from w2c_tui.core.errors import StoreError
from w2c_tui.core.printable import one_line
from w2c_tui.core.versions import Version, Versions, versions_of


class _Number(click.ParamType):
    """A version as it is shown (v003) or as it is counted (3)."""

    name = "version"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"[vV]?(\d{1,9})", str(value))
        if match is None:
            self.fail(f"{value!r} is no version; write it as v003 or 3.", param, ctx)
        return int(match[1])


class _DefaultsToList(click.Group):
    """`w2c versions SESSION` lists the versions of SESSION."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and not args[0].startswith("-")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


_session = click.argument("session", metavar="SESSION")
_version = click.argument("version", required=False, type=_Number(), metavar="[VERSION]")


@click.group(
    cls=_DefaultsToList,
    epilog="Examples:  w2c versions last   w2c versions diff last v001 v002   "
    "w2c versions show last | wl-copy",
)
def versions() -> None:
    """See, compare, save and edit the versions of a page.

    Every answer with a page is a version of its session, and so is every edit. SESSION is the
    beginning of a session's id, "last", or a folder of versions. Where VERSION is left out, it is
    the one in sight.
    """


@versions.command("list")
@click.argument("session", required=False, metavar="[SESSION]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def list_(session: str | None, as_json: bool) -> None:
    """List the versions of SESSION, or the sessions that have any."""
    if session is None:
        _list_sessions(as_json)
        return
    found = _versions(session)
    current = found.current()
    for version in found.all():
        meta = version.meta
        if as_json:
            row = {"version": version.number, "folder": str(version.folder)}
            say_json(row | msgspec.to_builtins(meta))
            continue
        parent = f"from v{meta.parent:03d}" if meta.parent is not None else ""
        about = [
            time.strftime("%Y-%m-%d %H:%M", time.localtime(meta.created_at)),
            f"{meta.origin:<9} {parent:<9}",
            "" if meta.score is None else f"score {meta.score:.3f}",
            "" if meta.complete else "cut off",
            one_line(" ".join(meta.prompt.split()), 60),
        ]
        mark = "*" if current and version.number == current.number else " "
        say(f"{mark} {version.name}  " + "  ".join(filter(None, about)))


@versions.command()
@_session
@click.argument("before", required=False, type=_Number(), metavar="[BEFORE]")
@click.argument("after", required=False, type=_Number(), metavar="[AFTER]")
def diff(session: str, before: int | None, after: int | None) -> None:
    """Show what changed from BEFORE to AFTER.

    With one version, or none, it is compared with the one that it was made from.
    """
    found = _versions(session)
    if after is None:
        new = _chosen(found, before)
        if new.meta.parent is None:
            raise StoreError(f"{new.name} was not made from another version.")
        before, after = new.meta.parent, new.number
    assert before is not None
    changes = found.diff(before, after)
    colors = {"+": "green", "-": "red", "@": "cyan"}
    for line in changes.splitlines():
        say(line, fg=colors.get(line[:1]))


@versions.command()
@_session
@_version
def show(session: str, version: int | None) -> None:
    """Write the code of VERSION to standard output, byte for byte."""
    write_bytes(_chosen(_versions(session), version).data)


@versions.command()
@_session
@_version
@click.option("-o", "--out", required=True, metavar="FILE", help="Where to write the page.")
def save(session: str, version: int | None, out: str) -> None:
    """Save VERSION as FILE, byte for byte."""
    found = _versions(session)
    chosen = _chosen(found, version)
    found.save_as(chosen.number, Path(out).expanduser())
    say(f"{chosen.name} -> {out}", err=True)


@versions.command()
@_session
@_version
@click.option(
    "--from",
    "edited",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take this file instead of opening an editor.",
)
def edit(session: str, version: int | None, edited: Path | None) -> None:
    """Edit VERSION in $EDITOR and keep what comes back as a new version."""
    found = _versions(session)
    before = _chosen(found, version)
    if edited is None:
        with tempfile.TemporaryDirectory(prefix="w2c-") as folder:
            copy = Path(folder, f"{before.name}.html")
            copy.write_bytes(before.data)
            click.edit(filename=str(copy))
            after = found.take_edit(copy, before.number)
    else:
        after = found.take_edit(edited, before.number)
    if after.number == before.number:
        say(f"Nothing was changed; {before.name} is as it was.", err=True)
    else:
        say(f"{before.name} -> {after.name}  {after.html_path}", err=True)


@versions.command()
@_session
def undo(session: str) -> None:
    """Go back to the version that the one in sight was made from."""
    say(_versions(session).undo().name)


@versions.command()
@_session
def redo(session: str) -> None:
    """Go on to the newest version made from the one in sight."""
    say(_versions(session).redo().name)


def _versions(session: str) -> Versions:
    from w2c_tui.cli.sessions import find_session, open_store
    from w2c_tui.core.config import paths

    folder = Path(session).expanduser()
    if folder.is_dir():
        return Versions(folder)
    with open_store() as store:
        return versions_of(paths().pages, find_session(store, session).id)


def _chosen(found: Versions, number: int | None) -> Version:
    version = found.current() if number is None else found.get(number)
    if version is None:
        raise StoreError("This session has no pages yet.")
    return version


def _list_sessions(as_json: bool) -> None:
    from w2c_tui.cli.sessions import open_store
    from w2c_tui.core.config import paths

    with open_store() as store:
        for session in store.sessions():
            count = len(versions_of(paths().pages, session.id).all())
            if as_json and count:
                row = {"session": session.id, "title": session.title, "versions": count}
                say_json(row)
            elif count:
                used = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.updated_at))
                pages = "1 version" if count == 1 else f"{count} versions"
                say(f"{session.id}  {used}  {pages:<12}  {one_line(session.title, 60)}")
