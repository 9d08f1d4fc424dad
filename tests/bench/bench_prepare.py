"""Records per second and memory of preparing a Web2Code-like file, images not opened.

python -m tests.bench.bench_prepare [--megabytes 400] [--workers 2] [--tokenizer FOLDER]

The file is written first: pages of about 650 tokens. Memory is that of all processes together,
sampled during the run: its peak in the first and in the second half say whether it grows. On a busy
machine the rate by CPU time says what a quiet one would do. Beside it
`json.load` of the same file in a process of its own, which is what holding every record costs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from trainer.json_stream import read_records
from trainer.preparation import Job, Tokens, prepare
from trainer.sources import find_source
from w2c_tui.core.config import paths
from w2c_tui.core.locate import locate
from w2c_tui.core.prompt import V1

WORDS = """
div class container style color padding margin header nav footer button section href alt img src
Lorem ipsum dolor sit amet the quick brown fox text-center btn btn-primary col-md-4 about contact
product price cart checkout 1024 #336699 rgba font-family Arial sans-serif display flex grid
align-items center justify-content space-between border-radius shadow
"""


def page(source: random.Random) -> str:
    known = WORDS.split()
    parts = ["<!DOCTYPE html>\n<html><head><style>body{margin:0}</style></head><body>\n"]
    size = len(parts[0])
    length = source.randint(1300, 2300)
    while size < length:
        words = " ".join(source.choices(known, k=source.randint(4, 12)))
        parts.append(f'<div class="{source.choice(known)}"><p>{words}</p></div>\n')
        size += len(parts[-1])
    return "".join(parts) + "</body></html>"


def write_records(path: Path, megabytes: int) -> int:
    source = random.Random(0)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        while file.tell() < megabytes * 1e6:
            values = ("<image>\nUse the webpage screenshot to generate HTML code.", page(source))
            record = {
                "id": f"{count:08}",
                "image": f"pix2code/{count:08}.png",
                "conversations": [
                    {"from": speaker, "value": value}
                    for speaker, value in zip(("human", "gpt"), values, strict=True)
                ],
            }
            file.write((",\n" if count else "\n") + json.dumps(record, indent=2))
            count += 1
        file.write("\n]\n")
    return count


class MemoryOf(threading.Thread):
    """Samples (time, bytes) of this process and those below it, pages shared by them once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self._over = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._over.wait(1.0):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.samples.append((time.monotonic(), total))

    def end(self) -> None:
        self._over.set()
        self.join()

    def halves(self) -> tuple[int, int]:
        """Peaks between the start of the workers and half time, and afterwards."""
        began, ended = self.samples[0][0], self.samples[-1][0]
        middle = (began + ended) / 2
        first = max(size for at, size in self.samples if at <= middle)
        second = max(size for at, size in self.samples if at >= middle)
        return first, second


def cpu_s() -> float:
    """CPU seconds of this process and of those below it that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def load_whole(path: str, results: multiprocessing.Queue) -> None:
    before = psutil.Process().memory_info().rss
    began = time.monotonic()
    with open(path, encoding="utf-8") as file:
        records = json.load(file)
    seconds = time.monotonic() - began
    results.put((seconds, psutil.Process().memory_info().rss - before, len(records)))


def main() -> None:
    # As in the command: worker processes import the main module, and do without torch.
    from w2c_tui.models.checkpoint import open_checkpoint
    from w2c_tui.models.tokenize import PromptTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", help="a folder with config.json and a tokenizer")
    options = parser.parse_args()
    model = options.tokenizer or locate("smollm2-135m", paths().models, lambda *_: None)
    tokenizer = PromptTokenizer(open_checkpoint(model, weights=False).tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "Web2Code.json"
        count = write_records(path, options.megabytes)
        size = path.stat().st_size
        print(f"{count:,} records, {size / 1e6:,.0f} MB, {os.cpu_count()} cores")

        began = time.monotonic()
        assert sum(1 for _ in read_records(path)) == count
        split_s = time.monotonic() - began
        print(f"splitting alone           {size / 1e6 / split_s:8,.0f} MB/s")

        job = Job(
            sources=(find_source("web2code", path),),
            tokens=Tokens(
                tokenizer=tokenizer,
                tokenizer_name=str(model),
                template=V1,
                tokens_per_image=576,
                max_length=2048,
            ),
            images="none",
            workers=options.workers,
        )
        memory = MemoryOf()
        memory.start()
        began, cpu_began = time.monotonic(), cpu_s()
        report = prepare(job, Path(scratch) / "out", progress=sys.stderr.isatty())
        seconds, used = time.monotonic() - began, cpu_s() - cpu_began
        memory.end()
        first, second = memory.halves()
        rate = count / seconds
        mean = report.total.mean
        print(
            f"prepare, {options.workers} workers        {rate:8,.0f} records/s ({mean:,.0f} tokens)"
        )
        print(f"  against 1,500 records/s {rate / 1500:8.2f} x")
        print(f"  2 cores, by CPU time    {2 * count / used:8,.0f} records/s, with start")
        print(f"  memory, first half      {first / 2**20:8,.0f} MiB, all processes")
        print(f"  memory, second half     {second / 2**20:8,.0f} MiB, {second / first:.2f} x")

        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=load_whole, args=(str(path), results))
        process.start()
        load_s, held, _ = results.get()
        process.join()
        print(
            f"json.load                 {size / 1e6 / load_s:8,.0f} MB/s, {held / 2**20:,.0f} MiB"
        )


if __name__ == "__main__":
    main()
