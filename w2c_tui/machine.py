"""What this machine has: the facts behind `w2c doctor`.

Owns the probes and their wording. Every probe is bounded in time and says "unknown" or "none"
rather than fail. Never imports torch: versions come from package metadata, graphics cards from
their drivers' own programs. Knows nothing about loading models or about printing.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import psutil

from w2c_tui.core.catalog import CatalogEntry, fits, memory_needed

PROBE_TIMEOUT_S = 5.0

PACKAGES = (
    *("w2c-tui", "torch", "transformers", "accelerate", "bitsandbytes", "tokenizers", "textual"),
    *("llama-cpp-python", "gguf", "rapidocr", "onnxruntime", "deepspeed", "flash-attn"),
)
"""Distributions whose versions matter when something does not work."""

_CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "bf16", "i8mm"),
)
"""Those that decide which data type is fast; the second row is ARM's."""

_BROWSERS = (
    # Made for renders: start three times faster and need a quarter less per page.
    *("chrome-headless-shell", "chromium-headless-shell"),
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    *("microsoft-edge", "microsoft-edge-stable", "msedge", "brave-browser"),
)
_MAC_BROWSERS = (
    # Made for renders: start three times faster and need a quarter less per page.
    *("chrome-headless-shell", "chromium-headless-shell"),
    "Google Chrome.app/Contents/MacOS/Google Chrome",
    "Chromium.app/Contents/MacOS/Chromium",
    "Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    "Brave Browser.app/Contents/MacOS/Brave Browser",
)
_WINDOWS_BROWSERS = (
    # Made for renders: start three times faster and need a quarter less per page.
    *("chrome-headless-shell", "chromium-headless-shell"),
    r"Google\Chrome\Application\chrome.exe",
    r"Chromium\Application\chrome.exe",
    r"Microsoft\Edge\Application\msedge.exe",
)

GraphicsProtocol = Literal["kitty", "iterm2", "sixel", "half cells", "none"]
T = TypeVar("T")


class Gpu(msgspec.Struct, frozen=True):
    """One graphics card. Bytes; Apple's share the main memory."""

    name: str
    vendor: Literal["nvidia", "amd", "apple"]
    memory_bytes: int
    free_bytes: int


class Graphics(msgspec.Struct, frozen=True):
    """How pictures can be shown in this terminal, as guessed from the environment, and why."""

    protocol: GraphicsProtocol
    reason: str


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The facts. Memory respects a container's limit; a package that is missing maps to None."""

    system: str
    python: str
    cpu: str
    cores: int
    threads: int
    cpu_features: tuple[str, ...]
    memory_bytes: int
    memory_available_bytes: int
    gpus: tuple[Gpu, ...]
    packages: dict[str, str | None]
    browser: str | None
    graphics: Graphics
    clipboard: tuple[str, ...]

    @property
    def gpu_memory_bytes(self) -> int:
        """Free memory of all cards that have their own."""
        return sum(gpu.free_bytes for gpu in self.gpus if gpu.vendor != "apple")


def inspect_machine() -> Machine:
    """Look at this machine. Takes under a second, at most a few times `PROBE_TIMEOUT_S`."""
    no_features: tuple[str, ...] = ()
    no_gpus: list[Gpu] = []
    cpu, features = _probe(_cpu, ("unknown", no_features))
    total, available = _probe(main_memory, (0, 0))
    return Machine(
        system=_probe(lambda: f"{platform.system()} {platform.release()} {platform.machine()}", ""),
        python=f"{platform.python_version()} ({sys.executable})",
        cpu=cpu,
        cores=_probe(lambda: psutil.cpu_count(logical=False) or 0, 0) or os.cpu_count() or 1,
        threads=os.cpu_count() or 1,
        cpu_features=features,
        memory_bytes=total,
        memory_available_bytes=available,
        gpus=tuple(
            gpu for find in (_nvidia_gpus, _amd_gpus, _apple_gpus) for gpu in _probe(find, no_gpus)
        ),
        packages={name: _probe(partial(_version, name), None) for name in PACKAGES},
        browser=_probe(lambda: _as_text(find_browser()), None),
        graphics=guess_graphics(os.environ),
        clipboard=_probe(_clipboard_tools, ()),
    )


def report_lines(machine: Machine, entries: Iterable[CatalogEntry] = ()) -> list[tuple[str, str]]:
    """(label, value) pairs for a report: the machine first, then which of `entries` fit."""
    cores = f"{machine.cores} cores, {machine.threads} threads"
    features = " ".join(machine.cpu_features)
    missing = [name for name, version in machine.packages.items() if version is None]
    return [
        ("system", machine.system),
        ("python", machine.python),
        ("cpu", ", ".join(filter(None, [machine.cpu, cores, features]))),
        (
            "memory",
            f"{_gb(machine.memory_bytes)}, {_gb(machine.memory_available_bytes)} available",
        ),
        *(
            [
                ("gpu", f"{gpu.name}, {_gb(gpu.memory_bytes)}, {_gb(gpu.free_bytes)} free")
                for gpu in machine.gpus
            ]
            or [("gpu", "none")]
        ),
        *[(name, version) for name, version in machine.packages.items() if version],
        ("not installed", ", ".join(missing) or "none"),
        ("browser", machine.browser or "none found: no renders, no scores"),
        ("terminal graphics", f"{machine.graphics.protocol} ({machine.graphics.reason})"),
        ("clipboard", ", ".join(machine.clipboard) or "none found"),
        *[(entry.id, describe_fit(machine, entry)) for entry in entries],
    ]


def describe_fit(machine: Machine, entry: CatalogEntry) -> str:
    """Where `entry` fits right now, and at which bits, in words."""
    places = {"gpu": machine.gpu_memory_bytes, "cpu": machine.memory_available_bytes}
    found = [
        f"{place} at {', '.join(map(str, bits))} bit"
        for place, memory in places.items()
        if (bits := fits(entry, memory))
    ]
    if found:
        return f"fits: {'; '.join(found)} (16 bit takes {_gb(memory_needed(entry, 16))})"
    return f"does not fit: 4 bit takes {_gb(memory_needed(entry, 4))}"


def find_browser() -> Path | None:
    """A Chromium-like browser that can render without a window, or None."""
    for name in _BROWSERS:
        if found := shutil.which(name):
            return Path(found)
    folders: list[Path] = []
    names: tuple[str, ...] = ()
    if sys.platform == "darwin":
        folders, names = [Path("/Applications"), Path.home() / "Applications"], _MAC_BROWSERS
    elif sys.platform == "win32":
        variables = ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")
        folders = [Path(os.environ[name]) for name in variables if name in os.environ]
        names = _WINDOWS_BROWSERS
    return next((path for f in folders for n in names if (path := f / n).is_file()), None)


def guess_graphics(environment: Mapping[str, str]) -> Graphics:
    """The best way of showing pictures in the terminal that `environment` describes."""
    term = environment.get("TERM", "")
    program = environment.get("TERM_PROGRAM", "")
    if term == "dumb" or (not term and "WT_SESSION" not in environment and os.name != "nt"):
        return Graphics("none", f"TERM={term or 'unset'}")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return Graphics("half cells", "inside tmux or screen, which drop pictures")
    if "KITTY_WINDOW_ID" in environment or "kitty" in term:
        return Graphics("kitty", "kitty")
    if program == "ghostty" or "ghostty" in term:
        return Graphics("kitty", "Ghostty")
    if program in ("iTerm.app", "WezTerm", "mintty"):
        return Graphics("iterm2", f"TERM_PROGRAM={program}")
    if "KONSOLE_VERSION" in environment:
        return Graphics("sixel", "Konsole")
    if "WT_SESSION" in environment:
        return Graphics("sixel", "Windows Terminal, from version 1.22")
    if "sixel" in term or term.startswith(("foot", "mlterm", "contour", "yaft")):
        return Graphics("sixel", f"TERM={term}")
    if environment.get("COLORTERM", "") in ("truecolor", "24bit"):
        return Graphics("half cells", f"TERM={term}, true colour")
    return Graphics("half cells", f"TERM={term}, colours are reduced")


def _probe(function: Callable[[], T], otherwise: T) -> T:
    try:
        return function()
    except Exception:  # noqa: BLE001 - a report about a broken machine must not break on it
        return otherwise


def _run(*command: str) -> str:
    """Standard output of a program that may not exist; raises on failure or after the timeout."""
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(command[0])
    return subprocess.run(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PROBE_TIMEOUT_S,
        check=True,
    ).stdout


def _cpu() -> tuple[str, tuple[str, ...]]:
    fallback = platform.processor() or platform.machine() or "unknown"
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string").strip() or fallback, ()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return fallback, ()
    fields: dict[str, str] = {}
    for line in info.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set(fields.get("flags", fields.get("features", "")).split())
    return fields.get("model name", fallback), tuple(f for f in _CPU_FEATURES if f in flags)


def main_memory() -> tuple[int, int]:
    """Bytes of main memory in total and available, within a container's limit."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = _probe(lambda: int(Path("/sys/fs/cgroup/memory.max").read_text()), total)
    used = _probe(lambda: int(Path("/sys/fs/cgroup/memory.current").read_text()), 0)
    if limit < total:
        return limit, max(min(available, limit - used), 0)
    return total, available


def _nvidia_gpus() -> list[Gpu]:
    query = "--query-gpu=name,memory.total,memory.free"
    gpus = []
    for line in _run("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines():
        name, total, free = (part.strip() for part in line.rsplit(",", 2))
        gpus.append(Gpu(name, "nvidia", int(total) * 2**20, int(free) * 2**20))
    return gpus


def _amd_gpus() -> list[Gpu]:
    cards = json.loads(_run("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json"))
    gpus = []
    for card, facts in cards.items():
        if "VRAM Total Memory (B)" in facts:
            total = int(facts["VRAM Total Memory (B)"])
            used = int(facts.get("VRAM Total Used Memory (B)", 0))
            name = facts.get("Card Series") or facts.get("Card series") or card
            gpus.append(Gpu(str(name), "amd", total, total - used))
    return gpus


def _apple_gpus() -> list[Gpu]:
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return []
    memory = psutil.virtual_memory()
    return [Gpu("Apple GPU (Metal)", "apple", memory.total, memory.available)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _clipboard_tools() -> tuple[str, ...]:
    if sys.platform == "darwin":
        return ("built in",)
    if sys.platform == "win32":
        return ("built in",)
    tools = []
    if "WAYLAND_DISPLAY" in os.environ:
        tools += ["wl-paste"]
    if "DISPLAY" in os.environ:
        tools += ["xclip", "xsel"]
    found = [name for name in tools if shutil.which(name)]
    if "SSH_TTY" in os.environ:
        found.append("OSC 52 (text only, over SSH)")
    return tuple(found)


def _as_text(path: Path | None) -> str | None:
    return str(path) if path else None


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
