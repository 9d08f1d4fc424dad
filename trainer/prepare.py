"""`python -m trainer.prepare`: the command line of preparing data.

Owns its flags and what it prints. `trainer.preparation` does the work. Knows nothing about records
or files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from trainer.recipes import RECIPES
from trainer.sources import KNOWN, find_source
from w2c_tui.console import run
from w2c_tui.core.errors import ConfigError

if TYPE_CHECKING:
    from trainer.prepare_report import Report

T = TypeVar("T")


@click.command(
    name="python -m trainer.prepare",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: python -m trainer.prepare data/finetune --recipe crystal-chat-7b "
    "--stage finetune --source mix665k=/data/mix665k --source web2code=/data/Web2Code",
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--source",
    "sources",
    multiple=True,
    required=True,
    metavar="NAME=PATH",
    help=f"A data set: its folder as it is published ({', '.join(KNOWN)}), or a JSON or JSON Lines "
    "file of LLaVA records under any other name (repeatable).",
)
@click.option(
    "--images",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Where the image paths of a source start from, if not in its usual place.",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="NAME=NUMBER",
    help="How often to take the rows of a source: 0.5 is a random half, 2 is everything twice.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=COUNT",
    help="Read only so many records of a source.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    required=True,
    metavar="NAME",
    help="Whose tokenizer, template and image tokens lengths are counted with: "
    f"{', '.join(RECIPES)}.",
)
@click.option("--stage", type=click.Choice(["pretrain", "finetune"]), required=True)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML or TOML file with fields over those of the recipe.",
)
@click.option("--model", help="Another language model: folder or OWNER/NAME.")
@click.option("--vision-tower", help="Another vision tower.")
@click.option("--image-size", type=int, help="Another image size, in pixels.")
@click.option("--template", type=click.Choice(["plain", "v1", "chat"]), help="Another template.")
@click.option("--max-length", type=int, help="Another limit of tokens, for the report.")
@click.option(
    "--check-images",
    type=click.Choice(["full", "header", "none"]),
    default="full",
    show_default=True,
    help="Decode every image, read its header only, or do not look at images.",
)
@click.option(
    "--store-pixels",
    is_flag=True,
    help="Store every image as the model will see it, without loss: training then reads a small "
    "picture instead of decoding and scaling a screenshot. Takes about 100 KB per image.",
)
@click.option(
    "--max-drops",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Fail when more than this share of a source would be left out.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For --weight.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one per core",
    help="Worker processes.",
)
@click.option("--overwrite", is_flag=True, help="Start over, whatever OUT holds of a dataset.")
def command(out: Path, **flags: Any) -> None:
    """Check published data sets and write them to the folder OUT as one dataset for training.

    Run again, it goes on where it was interrupted.
    """
    folders = {name: Path(path) for name, path in _pairs("--images", flags["images"], str)}
    sources = [
        find_source(name, Path(path), folders.get(name))
        for name, path in _pairs("--source", flags["sources"], str)
    ]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"Two sources are called {max(names, key=names.count)!r}.",
            hint="Give them names of their own, as in web2code-qa=PATH.",
        )
    weights = dict(_pairs("--weight", flags["weights"], float))
    limits = dict(_pairs("--limit", flags["limits"], int))
    for flag, given in (("--images", folders), ("--weight", weights), ("--limit", limits)):
        for name in given:
            if name not in names:
                raise ConfigError(
                    f"{flag}: there is no source {name!r}.", hint=f"Sources: {', '.join(names)}."
                )

    # Late, because they load torch.
    from trainer.model import describe
    from trainer.preparation import Job, Tokens, prepare
    from trainer.recipes import resolve

    fields = ("model", "vision_tower", "image_size", "template", "max_length")
    recipe = resolve(
        flags["recipe"],
        flags["stage"],
        file=flags["config"],
        flags={field: flags[field] for field in fields if flags[field] is not None},
    )
    parts = describe(recipe, weights=False)
    job = Job(
        sources=tuple(sources),
        tokens=Tokens(
            tokenizer=parts.tokenizer,
            tokenizer_name=recipe.model,
            template=parts.template,
            tokens_per_image=parts.tokens_per_image,
            max_length=recipe.max_length,
        ),
        weights=weights,
        limits=limits,
        images=flags["check_images"],
        pixels=parts.image if flags["store_pixels"] else None,
        seed=flags["seed"],
        workers=flags["workers"],
        max_drops=flags["max_drops"],
    )
    report = prepare(job, out, overwrite=flags["overwrite"])
    for line in summary(report):
        click.echo(line)
    click.echo(f"{out / 'report.html'} shows all of it.", err=True)


def summary(report: Report) -> list[str]:
    """What a person wants to know at once, line by line."""
    from trainer.records import REASONS, REPAIRS

    lines = []
    for source in report.sources:
        lines.append(
            f"{source.name}: {source.num_read:,} records, {source.num_kept:,} kept, "
            f"{source.num_rows:,} rows"
        )
        lines += [f"  left out {num:,}: {REASONS[key]}" for key, num in source.dropped.items()]
        lines += [f"  put right {num:,}: {REPAIRS[key]}" for key, num in source.repaired.items()]
        lines += [f"  {file} is not there" for file in source.missing_files]
    for folder, entry in report.missing.items():
        lines.append(f"{folder}: {entry['num_records']:,} records without their image")
        if entry["fetch"]:
            lines.append(f"  fetch: {entry['fetch']}")
    total = report.total
    lines.append(
        f"{total.num_rows:,} rows, {total.num_kept_tokens:,} tokens "
        f"({total.num_supervised:,} under the loss), {total.num_images:,} images"
    )
    lines.append(
        f"length: mean {total.mean:,.0f}, median {total.median:,}, 95 % below {total.p95:,}, "
        f"longest {total.longest:,}; {100 * total.truncated_share:.2f} % truncated to "
        f"{report.measured.max_length:,}, {total.num_masked_out:,} masked out"
    )
    if total.num_masked_out:
        lines.append(
            "Of those that are masked out nothing is learnt: their answers begin behind the limit. "
            "Raise --max-length, here and in training."
        )
    return lines


def _pairs(flag: str, values: tuple[str, ...], convert: Callable[[str], T]) -> list[tuple[str, T]]:
    """`NAME=VALUE` flags with their values converted; numbers must be above 0."""
    pairs = []
    for value in values:
        name, equals, given = value.partition("=")
        try:
            converted = convert(given)
            fits = not isinstance(converted, int | float) or 0 < converted < 1e9
        except ValueError:
            fits = False
        if not (name and equals and given and fits):
            what = {float: "NUMBER, above 0", int: "COUNT, above 0"}.get(convert, "PATH")  # type: ignore[call-overload]
            raise ConfigError(f"{flag} cannot be {value!r}.", hint=f"Write it as NAME={what}.")
        pairs.append((name, converted))
    return pairs


def main() -> None:
    """Run the command and end the process with its status."""
    sys.exit(run(command))


if __name__ == "__main__":
    main()
