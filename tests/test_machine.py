"""The report about a machine is made on this machine and on described ones, and never fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from w2c_tui import machine as machine_module
from w2c_tui.core.catalog import ENTRIES, find
from w2c_tui.machine import (
    Gpu,
    Machine,
    describe_fit,
    find_browser,
    guess_graphics,
    inspect_machine,
    report_lines,
)

posix_only = pytest.mark.skipif(os.name == "nt", reason="the stand-in programs are shell scripts")


@pytest.fixture(scope="module")
def here() -> Machine:
    return inspect_machine()


def put_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_this_machine_has_a_processor_memory_and_packages(here: Machine) -> None:
    assert here.cpu != ""
    assert 1 <= here.cores <= here.threads
    assert 0 < here.memory_available_bytes <= here.memory_bytes
    assert here.packages["textual"]
    assert here.packages["torch"]


def test_report_names_every_model_and_says_whether_it_fits(here: Machine) -> None:
    report = dict(report_lines(here, ENTRIES))
    for entry in ENTRIES:
        assert report[entry.id].startswith(("fits:", "does not fit:"))
    assert {"system", "cpu", "memory", "gpu", "browser", "terminal graphics"} <= report.keys()


def test_inspection_imports_no_torch() -> None:
    code = (
        "import sys; from w2c_tui.machine import inspect_machine; inspect_machine();"
        "print({'torch', 'transformers', 'llama_cpp', 'textual'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_fit_depends_on_memory_and_bits(here: Machine) -> None:
    model = find("LLM360/CrystalChat-7B-Web2Code")
    assert model is not None
    small = msgspec.structs.replace(here, memory_available_bytes=8_000_000_000, gpus=())
    assert describe_fit(small, model).startswith("fits: cpu at 4 bit")
    tiny = msgspec.structs.replace(small, memory_available_bytes=2_000_000_000)
    assert describe_fit(tiny, model).startswith("does not fit")
    cards = (Gpu("A", "nvidia", 12 * 10**9, 11 * 10**9),) * 2
    both = msgspec.structs.replace(tiny, gpus=cards)
    assert describe_fit(both, model).startswith("fits: gpu at 16, 8, 4 bit")


@posix_only
def test_gpus_are_read_from_their_drivers_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_program(tmp_path, "nvidia-smi", "echo 'NVIDIA H200, 143771, 143000'")
    put_program(
        tmp_path,
        "rocm-smi",
        """echo '{"card0": {"Card Series": "MI300X", "VRAM Total Memory (B)": "1000",
        "VRAM Total Used Memory (B)": "400"}, "system": {"Driver version": "6"}}'""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    nvidia, amd, *_ = inspect_machine().gpus
    assert nvidia == Gpu("NVIDIA H200", "nvidia", 143771 * 2**20, 143000 * 2**20)
    assert amd == Gpu("MI300X", "amd", 1000, 600)


@posix_only
@pytest.mark.parametrize("script", ["exit 9", "echo garbage", "echo a, b, c", "sleep 60"])
def test_broken_driver_program_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(machine_module, "PROBE_TIMEOUT_S", 0.5)
    put_program(tmp_path, "nvidia-smi", f"exec {script}" if "sleep" in script else script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    start = time.monotonic()
    assert not [gpu for gpu in inspect_machine().gpus if gpu.vendor == "nvidia"]
    assert time.monotonic() - start < 10


@posix_only
def test_browser_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_program(tmp_path, "google-chrome", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_browser() == tmp_path / "google-chrome"


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color", "WT_SESSION": "x"}, "sixel"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "half cells"),
        ({"TERM": "tmux-256color", "TMUX": "/x", "KITTY_WINDOW_ID": "1"}, "half cells"),
        ({"TERM": "linux"}, "half cells"),
        ({"TERM": "dumb"}, "none"),
    ],
)
def test_terminal_graphics_are_guessed(environment: dict[str, str], protocol: str) -> None:
    graphics = guess_graphics(environment)
    assert graphics.protocol == protocol
    assert graphics.reason
