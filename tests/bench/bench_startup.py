"""CPU seconds that the front ends take to start; at most 0.3 s each.

python -m tests.bench.bench_startup
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python (nothing)": ["-c", "pass"],
    "w2c --help": ["-m", "w2c_tui.cli", "--help"],
    "w2c generate --help": ["-m", "w2c_tui.cli", "generate", "--help"],
    "w2c-tui --help": ["-m", "w2c_tui", "--help"],
    "import of w2c-tui's application": ["-c", "import w2c_tui.tui.app"],
}


def cpu_s(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    for name, arguments in COMMANDS.items():
        cpu_s(arguments)
        runs = [cpu_s(arguments) for _ in range(7)]
        print(f"{name:<34} {statistics.median(runs):.3f} s CPU  (best {min(runs):.3f})")


if __name__ == "__main__":
    main()
