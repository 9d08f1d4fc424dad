"""Screenshots with their pages as published data, prepared for the debug recipes, and launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
QUESTION = "Please generate html code for the given image"


def page(at: int) -> str:
    return (
        f"<html><body style='background:#{at * 53 % 256:02x}{at * 101 % 256:02x}'>"
        f"<h1>Page {at}</h1><p>Now <s>old {at}</s> {at * 7}.99</p></body></html>"
    )


def screenshot(at: int) -> Image.Image:
    image = Image.new("RGB", (80, 100), (at * 53 % 256, at * 101 % 256, at * 197 % 256))
    box = (10, 10 + 5 * at, 50, 30 + 5 * at)
    ImageDraw.Draw(image).rectangle(box, fill=(255 - at * 31 % 256, at * 77 % 256, 30))
    return image


@pytest.fixture(scope="session", autouse=True)
def training_cache(tmp_path_factory):
    """The debug models live in a cache of the test run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("W2C_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """8 screenshots with pages (pages.json), and the same with 6 text-only records (mixed.json)."""
    folder = tmp_path_factory.mktemp("published")
    records: list[dict] = []
    for at in range(8):
        screenshot(at).save(folder / f"{at}.png")
        turns = [("human", f"<image>\n{QUESTION}"), ("gpt", page(at))]
        records.append({"id": f"page-{at}", "image": f"{at}.png", "conversations": _turns(turns)})
    (folder / "pages.json").write_text(json.dumps(records))
    for at in range(6):
        turns = [("human", "Say something."), ("gpt", f"Text {at}. " * (at + 1))]
        records.append({"id": f"text-{at}", "conversations": _turns(turns)})
    (folder / "mixed.json").write_text(json.dumps(records))
    return folder


def _turns(turns):
    return [{"from": speaker, "value": value} for speaker, value in turns]


@pytest.fixture(scope="session")
def prepared(published, tmp_path_factory):
    """`prepared(name, stage, *flags)`: the prepared folder of `pages` or `mixed`, made once."""
    made: dict[tuple, Path] = {}

    def prepare(name: str, stage: str, *flags: str) -> Path:
        from trainer.prepare import command
        from w2c_tui.console import run

        key = (name, stage, *flags)
        if key not in made:
            out = tmp_path_factory.mktemp("prepared") / f"{name}-{stage}"
            source = [
                "--source",
                f"pages={published / name}.json",
                "--images",
                f"pages={published}",
            ]
            recipe = ["--recipe", "debug", "--stage", stage, "--workers", "1"]
            assert run(command, [str(out), *source, *recipe, *flags]) == 0
            made[key] = out
        return made[key]

    return prepare


def launch(
    stage: str, *flags: object, processes: int = 1, wait: bool = True, launcher: str = "torchrun"
):
    """`python -m trainer.STAGE --recipe debug` in so many processes; what it said, or running."""
    starts = {
        "torchrun": [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
        ],
        "deepspeed": ["deepspeed.launcher.runner", f"--num_gpus={processes}", "--module"],
    }
    start = starts[launcher] if processes > 1 else []
    command = [sys.executable, "-m", *start, f"trainer.{stage}", "--recipe", "debug"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [*command, *map(str, flags)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(run: Path) -> dict[int, float]:
    """The loss of each step of a run."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}
