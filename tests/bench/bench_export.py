"""`w2c export-gguf` on checkpoints of real shapes: time, peak memory, sizes.

    python -m tests.bench.bench_export [--shape 1b|7b] [--layers N] [--quant f16 q4_k_m]
        [--verify] [--folder DIR]

Writes a CrystalCoder of that shape (7b: 32 layers of 4096, 13.5 GB in 16 bit) with random weights
into DIR, exports it in a process of its own, and removes everything again. Memory is that of the
process and its children together: `own` is what cannot be dropped, `mapped` are pages of files,
which the system takes back when it needs the memory. `copy` is the time to copy the checkpoint's
files, for a measure of the disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from tests.models import tiny

SHAPES = {
    "1b": {"n_embd": 2048, "n_layer": 16, "n_head": 16, "n_inner": 5462},
    "7b": {"n_embd": 4096, "n_layer": 32, "n_head": 32, "n_inner": 10922},
}
_SHARD_BYTES = 2_000_000_000


def write_checkpoint(folder: Path, shape: str, layers: int | None) -> None:
    """Random float16 weights, repeated, as making new ones would take longer than the export."""
    sizes = SHAPES[shape] | ({"n_layer": layers} if layers else {})
    config = tiny.crystal_config(**sizes, vocab_size=32032, n_positions=2048, rotary_dim=32)
    folder.mkdir(parents=True)
    tiny.write_json(folder / "config.json", config.to_dict())
    tiny.write_tokenizer(folder, bos=False)
    width, inner = config.n_embd, config.n_inner
    shapes = {"transformer.wte.weight": (32032, width), "lm_head.weight": (32032, width)}
    shapes |= {f"transformer.ln_f.{kind}": (width,) for kind in ("weight", "bias")}
    for layer in range(config.n_layer):
        prefix = f"transformer.h.{layer}"
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_fc2", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            shapes[f"{prefix}.{name}.bias"] = (columns,)
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
    longest = max(torch.Size(size).numel() for size in shapes.values())
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul(0.02).half()
    noise = noise.repeat(-(-longest // len(noise)) + 1)
    weight_map: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())):05}.safetensors"
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
        part.clear()

    for at, (name, size) in enumerate(shapes.items()):
        start = (at * 7919) % (1 << 20)
        part[name] = noise[start : start + torch.Size(size).numel()].reshape(size).clone()
        if ".ln_" in name and name.endswith("weight"):
            part[name] += 1
        if sum(tensor.nbytes for tensor in part.values()) > _SHARD_BYTES:
            flush()
    if part:
        flush()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    tiny.write_json(folder / "model.safetensors.index.json", index)


def export_watched(source: Path, out: Path, quant: str, verify: bool) -> None:
    """Run the export in a process and print what it took."""
    code = (
        "import sys, pathlib, msgspec\n"
        "from w2c_tui.core.config import ExportSpec\n"
        "from w2c_tui.export.gguf_export import export\n"
        f"done = export({str(source)!r}, pathlib.Path({str(out)!r}),"
        f" ExportSpec(quant={quant!r}, verify={verify}), lambda *_: None)\n"
        "print(msgspec.json.encode(done).decode())\n"
    )
    began = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = mapped = 0
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        process = psutil.Process(run.pid)
        while run.poll() is None:
            now_own = now_mapped = 0
            for each in (process, *process.children(recursive=True)):
                try:
                    status = Path(f"/proc/{each.pid}/status").read_text().splitlines()
                except OSError:
                    continue
                sizes = {line.split(":")[0]: line.split()[1] for line in status if "Rss" in line}
                now_own += int(sizes.get("RssAnon", 0))
                now_mapped += int(sizes.get("RssFile", 0))
            own, mapped = max(own, now_own), max(mapped, now_mapped)
            time.sleep(0.1)
        output = run.stdout.read() if run.stdout else ""
    if run.returncode:
        sys.exit(f"the export to {quant} failed")
    spent = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    done = json.loads(output.splitlines()[-1])
    size = Path(done["model"]).stat().st_size
    print(
        f"{quant}: {spent:.0f} s, of CPU {cpu:.0f} s, peak memory own {own * 1024 / 1e9:.2f} GB, "
        f"mapped {mapped * 1024 / 1e9:.2f} GB, file {size / 1e9:.2f} GB",
        flush=True,
    )
    if done.get("verification"):
        print(f"  {done['verification']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--quant", nargs="+", default=["f16", "q4_k_m"])
    parser.add_argument("--folder", default=None)
    parser.add_argument("--verify", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        source = root / "checkpoint"
        write_checkpoint(source, arguments.shape, arguments.layers)
        size = sum(file.stat().st_size for file in source.iterdir())
        began = time.perf_counter()
        shutil.copytree(source, root / "copy")
        print(
            f"checkpoint {size / 1e9:.2f} GB, copy {time.perf_counter() - began:.0f} s", flush=True
        )
        shutil.rmtree(root / "copy")
        for quant in arguments.quant:
            export_watched(source, root / "out", quant, arguments.verify)
            shutil.rmtree(root / "out")


if __name__ == "__main__":
    main()
