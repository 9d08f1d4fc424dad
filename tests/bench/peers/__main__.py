"""This program beside what people would use instead, on one machine in one run.

    python -m tests.bench.peers [--runs N] [--only turns|handler|terminals]

Prints a table in Markdown: what was measured, ours, theirs, the ratio; with machine, versions and
date. Prints to standard error how far it is. `turns` and `handler` have random weights in the size
of small models, as the same work is done whatever they are; `terminals` installs oterm and elia
into a throw-away environment and says so where that fails.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

from tests.bench.peers.rows import Row
from w2c_tui.machine import inspect_machine

PARTS = ("turns", "handler", "terminals")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=PARTS, action="append")
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="w2c-peers-") as scratch:
        for part in given.only or PARTS:
            print(f"{part} ...", file=sys.stderr, flush=True)
            folder = Path(scratch) / part
            folder.mkdir()
            if part == "terminals":
                from tests.bench.peers.terminals import measure

                rows += measure(folder, given.runs)
            else:
                from tests.bench.peers import models

                rows += getattr(models, part)(folder, given.threads, given.runs)
    machine = inspect_machine()
    names = ("w2c-tui", "torch", "transformers", "llama-cpp-python", "textual")
    versions = ", ".join(f"{name} {machine.packages[name]}" for name in names)
    print(f"{datetime.date.today().isoformat()}; {machine.cpu}, {machine.threads} threads, models "
          f"on {given.threads}, {machine.memory_bytes / 2**30:.0f} GiB; {versions}; medians of "
          f"{given.runs} runs in turn.\n")  # fmt: skip
    print("| what | instead | w2c-tui | theirs | theirs / ours |\n|---|---|---|---|---|")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
