"""How soon the preview shows what was written: `python -m tests.bench.bench_preview [disk|stream]`.

A headless Chromium looks at a real preview. `disk` rewrites a file that `w2c preview` (a process of
its own) follows and waits for the next frame that shows it. `stream` pushes a page of 60 kB that
grows 50 times a second, as a model would write it if it were that fast, and says for each update
how long it took until it, or a newer one, was in a frame. Prints one JSON object. The gaps between
frames of the same run say how busy the machine was: 17 ms where it was not.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tests.web.preview_page import CHROMIUM
from w2c_tui.web.preview import PreviewServer, Shown

TARGETS = {"disk_max_ms": 200, "stream_max_ms": 500}
NUM_BYTES = 60_000
HEAD = (
    "<!DOCTYPE html>\n<html><head><meta charset='utf-8'><style>"
    "body { font: 15px sans-serif; margin: 2rem } .card { border: 1px solid #ddd; padding: 1rem }"
    "</style></head><body><h1 id='count'>{}</h1>\n"
)
CARD = '<div class="card"><h2>Fresh new layout</h2>\n<p>We have <b>created</b> it.</p></div>\n'

# Notes when the number in the heading was in a frame, in seconds of the machine's clock.
WATCH = """() => {
  globalThis.seen = [];
  globalThis.gaps = [];
  let last = "";
  let before = performance.now();
  const note = (at) => {
    globalThis.gaps.push(at - before);
    before = at;
    const now = document.getElementById("count")?.textContent ?? "";
    if (now !== last) globalThis.seen.push([Number(last = now), Date.now() / 1000]);
    requestAnimationFrame(note);
  };
  note(before);
}"""


def page(count: int, num_bytes: int) -> str:
    """`num_bytes` of a page that is numbered `count`."""
    head = HEAD.replace("{}", str(count))
    return (head + CARD * (num_bytes // len(CARD) + 1))[:num_bytes]


def disk(tab: Page) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        path.write_text(page(0, NUM_BYTES))
        command = [sys.executable, "-m", "w2c_tui.cli", "preview", str(path), "--no-open"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            tab.goto(process.stdout.readline().strip())
            shown = look(tab)
            times = []
            for count in range(1, 41):
                time.sleep(0.25)
                scratch = path.with_suffix(".tmp")
                scratch.write_text(page(count, NUM_BYTES))
                written_at = time.time()
                os.replace(scratch, path)
                while (found := seen_at(shown, count)) is None:
                    time.sleep(0.01)
                times.append(1000 * (found - written_at))
            gaps = shown.evaluate("globalThis.gaps")
            process.terminate()
    return summary("disk", times) | busy("disk", gaps)


def stream(tab: Page) -> dict[str, Any]:
    num_updates, interval_s = 500, 1 / 50
    pages = [
        page(c, NUM_BYTES // 2 + c * NUM_BYTES // 2 // num_updates) for c in range(num_updates)
    ]
    with PreviewServer(Shown(title="bench", html=pages[0], writing=True)) as server:
        tab.goto(server.url)
        shown = look(tab)
        sent = []
        began = time.time()
        for count, html in enumerate(pages):
            time.sleep(max(0.0, began + count * interval_s - time.time()))
            sent.append(time.time())
            server.show(Shown(title="bench", html=html, writing=True))
        rate = len(sent) / (time.time() - began)
        while seen_at(shown, num_updates - 1) is None:
            time.sleep(0.05)
        frames = shown.evaluate("globalThis.seen")
        gaps = shown.evaluate("globalThis.gaps")
    times = []
    at = 0
    for count, sent_at in enumerate(sent):
        while frames[at][0] < count:
            at += 1
        times.append(1000 * (frames[at][1] - sent_at))
    return {
        "stream_updates_per_s": round(rate, 1),
        "stream_frames_with_news": len(frames),
        **summary("stream", times[1:]),
        **busy("stream", gaps),
    }


def look(tab: Page) -> Any:
    """The frame of the preview, with the first page in it and `WATCH` running."""
    tab.frame_locator("#frame").locator("#count").wait_for()
    frame = tab.frames[1]
    frame.evaluate(WATCH)
    return frame


def seen_at(frame: Any, count: int) -> float | None:
    return frame.evaluate(f"globalThis.seen.find(([n]) => n >= {count})?.[1] ?? null")


def summary(name: str, times_ms: list[float]) -> dict[str, Any]:
    ordered = sorted(times_ms)
    return {
        f"{name}_median_ms": round(statistics.median(ordered)),
        f"{name}_p95_ms": round(ordered[int(0.95 * len(ordered))]),
        f"{name}_max_ms": round(ordered[-1]),
    }


def busy(name: str, gaps_ms: list[float]) -> dict[str, Any]:
    return {f"{name}_frame_gap_p99_ms": round(sorted(gaps_ms)[int(0.99 * len(gaps_ms))])}


def main() -> None:
    names = sys.argv[1:] or ["disk", "stream"]
    results: dict[str, Any] = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        for name in names:
            tab = browser.new_page(viewport={"width": 1400, "height": 900})
            results |= {"disk": disk, "stream": stream}[name](tab)
            tab.close()
        results["browser"] = browser.version
        browser.close()
    results["targets"] = {k: v for k, v in TARGETS.items() if k.split("_")[0] in names}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
