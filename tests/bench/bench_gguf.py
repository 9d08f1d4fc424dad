"""What the GGUF backend costs over llama.cpp itself, and what keeping the context saves.

    python -m tests.bench.bench_gguf decode    writing, against a bare loop over llama_decode
    python -m tests.bench.bench_gguf hf        writing, against the HF backend on the same model
    python -m tests.bench.bench_gguf turns     first token of turn 2 over an image of 576 tokens,
                                               as a share of turn 1
    python -m tests.bench.bench_gguf handler   the same turn 2, against Llava15ChatHandler
    python -m tests.bench.bench_gguf cancel    seconds until an answer has ended that was cancelled
                                               while the picture, the prompt or the page was at work
    python -m tests.bench.bench_gguf best_of   four candidates at once, against one after another

The model is the packaged SmolLM2-135M; the image encoder has random weights and the size of
DINOv2-S (or --tower large for that of CLIP-L).
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import tempfile
import threading
import time
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
from PIL import Image

import tests.llama_library  # noqa: F401 - models are loaded without what crashes
from tests.backends.contract import events, stats, text_of, user
from tests.backends.gguf_files import save_mmproj
from tests.bench.candidates import compare_candidates
from w2c_tui.backends.base import Backend, Text
from w2c_tui.backends.gguf import GGUFBackend
from w2c_tui.backends.llama import LanguageModel, RuntimeOptions
from w2c_tui.core.config import GenerationParams, LoadSpec, paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.locate import locate

_TOWERS = {"small": (384, 12), "large": (1024, 23)}


def load(path: Path, threads: int, mmproj: Path | None = None) -> GGUFBackend:
    backend = GGUFBackend()
    named = str(mmproj) if mmproj else None
    spec = LoadSpec(name=str(path), threads=threads, context=4096, mmproj=named)
    backend.load(spec, lambda *_: None)
    return backend


class Clock:
    """Wall and CPU seconds since it was made; CPU time is fair where others use the machine."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> np.ndarray:
        return np.array([time.perf_counter() - self._wall, time.process_time() - self._cpu])


def bare(model: LanguageModel, ids: list[int], count: int) -> np.ndarray:
    """Seconds for each token as fast as llama.cpp writes greedily: only decode and argmax."""
    context, size = model._context, model.vocab_size
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    prompt = (lib.llama_token * len(ids))(*ids)
    assert lib.llama_decode(context, lib.llama_batch_get_one(prompt, len(ids))) == 0
    one = (lib.llama_token * 1)()
    clock = None
    for at in range(count):
        row = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (size,))
        one[0] = int(row.argmax())
        clock = clock or Clock()
        if at < count - 1:
            assert lib.llama_decode(context, lib.llama_batch_get_one(one, 1)) == 0
    return clock.read() / (count - 1)


def ours(backend: Backend, messages: list[Message], count: int) -> np.ndarray:
    """Seconds for each token of the backend, after the first."""
    params = GenerationParams(temperature=0, max_new_tokens=count)
    clock = None
    for event in backend.stream(messages, params, lambda: False):
        if isinstance(event, Text):
            clock = clock or Clock()
    assert event.stats.new_tokens == count, "the answer ended early; use a smaller --count"
    return clock.read() / (count - 1)


def decode(path: Path, threads: int, runs: int, count: int) -> None:
    messages = [user("Write a long web page about a shop, with many sections and a table.")]
    backend = load(path, threads)
    ids = backend.encode(messages).ids
    spent = []
    with LanguageModel(path, RuntimeOptions(context=4096, threads=threads)) as model:
        for _ in range(runs):
            spent.append([ours(backend, messages, count), bare(model, ids, count)])
    mine, theirs = np.median(np.array(spent), axis=0)
    print(f"ours {1 / mine[0]:.1f} tokens/s, bare {1 / theirs[0]:.1f} (medians of {runs} runs)")
    print(f"ratio {theirs[0] / mine[0]:.3f} by the clock, {theirs[1] / mine[1]:.3f} in CPU time")
    backend.close()


def against_hf(path: Path, threads: int, runs: int, count: int) -> None:
    from w2c_tui.backends.hf import HFBackend

    messages = [user("Write a long web page about a shop, with many sections and a table.")]
    other = HFBackend()
    info = other.load(LoadSpec(name=str(path), backend="hf", threads=threads), lambda *_: None)
    backend = load(path, threads)
    spent = [[ours(backend, messages, count), ours(other, messages, count)] for _ in range(runs)]
    mine, theirs = np.median(np.array(spent), axis=0)
    print(f"llama.cpp {1 / mine[0]:.1f} tokens/s, transformers in {info.dtype} {1 / theirs[0]:.1f}")
    print(f"ratio {theirs[0] / mine[0]:.2f} by the clock, {theirs[1] / mine[1]:.2f} in CPU time")
    backend.close()


def screenshot() -> bytes:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((1280, 720), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def turns(path: Path, mmproj: Path, threads: int, runs: int) -> list[float]:
    """Prints the share, and returns seconds to the first token of turn 2."""
    backend = load(path, threads, mmproj)
    firsts, seconds, whole = [], [], []
    params = GenerationParams(temperature=0, max_new_tokens=16)
    for run in range(runs):
        # Other pixels each time, as equal ones would be known already.
        image = Image.open(io.BytesIO(screenshot()))
        image.putpixel((0, 0), (run, 0, 0))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        asked = [user("What is on this page?", attachment_from_bytes(buffer.getvalue()))]
        found = events(backend, asked, params)
        assert stats(found).prompt_tokens > 576
        firsts.append(stats(found).time_to_first_token_s)
        answered = [*asked, Message("assistant", text_of(found)), user("Now make it blue.")]
        found = events(backend, answered, params)
        seconds.append(stats(found).time_to_first_token_s)
        whole.append(stats(found).total_s)
    first, second = statistics.median(firsts), statistics.median(seconds)
    print(f"turn 1 {first:.2f} s, turn 2 {second:.3f} s to the first token")
    print(f"share {second / first:.3f}")
    backend.close()
    return [second, statistics.median(whole)]


def by_handler(path: Path, mmproj: Path, threads: int, runs: int) -> list[float]:
    """Seconds to the first token of turn 2, and for all of it, by Llava15ChatHandler."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    chat = Llava15ChatHandler(clip_model_path=str(mmproj), verbose=False)
    model = Llama(
        str(path),
        chat_handler=chat,
        n_ctx=4096,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    uri = "data:image/png;base64," + base64.b64encode(screenshot()).decode()
    picture = {"type": "image_url", "image_url": {"url": uri}}
    conversation = [
        {
            "role": "user",
            "content": [picture, {"type": "text", "text": "What is on this page?"}],
        }
    ]

    def ask() -> tuple[str, float, float]:
        began = time.perf_counter()
        first = 0.0
        text = ""
        for part in model.create_chat_completion(
            conversation, temperature=0, max_tokens=16, stream=True
        ):
            piece = part["choices"][0]["delta"].get("content")
            if piece is not None:
                first = first or time.perf_counter() - began
                text += piece
        return text, first, time.perf_counter() - began

    answer, _, _ = ask()
    conversation += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Now make it blue."},
    ]
    taken = [ask() for _ in range(runs)]
    model.close()
    return [statistics.median(each[at] for each in taken) for at in (1, 2)]


def handler(path: Path, mmproj: Path, threads: int, runs: int) -> None:
    mine = turns(path, mmproj, threads, runs)
    first, whole = by_handler(path, mmproj, threads, runs)
    print(f"Llava15ChatHandler: turn 2 {first:.2f} s to the first token, {whole:.2f} s in all")
    print(f"turn 2 faster: first token {first / mine[0]:.1f} x, 16 tokens {whole / mine[1]:.1f} x")


def cancel(path: Path, mmproj: Path, threads: int, runs: int) -> None:
    """Cancels after a while in each phase, and prints how long the end took at most."""
    backend = load(path, threads, mmproj)
    params = GenerationParams(temperature=0, max_new_tokens=512)
    rng = np.random.default_rng(0)
    page = "<p>" + " ".join(str(number) for number in range(800)) + "</p>"
    for phase, waits in (("picture", (0.2, 1.0)), ("prompt", (0.2, 2.0)), ("answer", (0.1, 0.5))):
        taken = []
        for run in range(runs):
            words = page if phase == "prompt" else "Make this page"
            images = ()
            if phase == "picture":
                picture = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                images = (attachment_from_bytes(buffer.getvalue()),)
            flag = threading.Event()
            asked: list[float] = []

            def later(flag: threading.Event = flag, asked: list[float] = asked) -> None:
                asked.append(time.perf_counter())
                flag.set()

            timer = threading.Timer(rng.uniform(*waits), later)
            if phase != "answer":
                timer.start()
            for event in backend.stream([user(f"{run} {words}", *images)], params, flag.is_set):
                if isinstance(event, Text) and timer.ident is None:
                    timer.start()
            assert event.reason == "cancelled", f"{phase} was over before it was cancelled"
            taken.append(time.perf_counter() - asked[0])
        print(f"{phase:<8} at most {max(taken):.2f} s, median {statistics.median(taken):.2f} s")
    backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["decode", "hf", "best_of", "turns", "handler", "cancel"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--tower", choices=list(_TOWERS), default="small")
    given = parser.parse_args()
    path = Path(locate(given.model, paths().models, lambda *_: None))
    if given.what == "decode":
        decode(path, given.threads, given.runs, given.count)
        return
    if given.what == "best_of":
        backend = load(path, given.threads)
        compare_candidates(backend, 4, given.count, 4, given.runs)
        backend.close()
        return
    if given.what == "hf":
        against_hf(path, given.threads, given.runs, given.count)
        return
    hidden, layers = _TOWERS[given.tower]
    with tempfile.TemporaryDirectory() as folder:
        mmproj = save_mmproj(
            Path(folder) / "mmproj.gguf", 576, image_size=336, hidden=hidden, layers=layers
        )
        run = {"turns": turns, "handler": handler, "cancel": cancel}[given.what]
        run(path, mmproj, given.threads, given.runs)


if __name__ == "__main__":
    main()
