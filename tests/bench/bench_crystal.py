"""CrystalCoder's speed and loading, each as a ratio within one run.

    python tests/bench/bench_crystal.py                     # all three, sizes that take a minute
    python tests/bench/bench_crystal.py --load 7b           # 13.8 GB on disk, needs as much memory

`prefill` and `decode` compare attention with the naive one of the published module on the same
random numbers: rotary embedding, cache and scores, without the matrix products with weights, which
are the same work in both. There the published module makes a T x T score matrix with a where-mask
and joins keys and values anew in every step. `model prefill` and `model decode` are whole blocks
with head, fused Conv1D projections against ours as the backend prepares them; they have no goal, as
the weights' products dominate. `load` compares with reading the same files into memory, each from
disk (the system's cache is emptied of them first) and in a process of its own. The exit status is 1
if a ratio misses its goal.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Cache

from w2c_tui.backends import cpu
from w2c_tui.backends.kv_cache import growing_cache
from w2c_tui.models.checkpoint import load_model
from w2c_tui.models.crystal import CrystalCoderConfig, CrystalCoderForCausalLM, rotary_cos_sin

GOALS = {"prefill": 1.5, "decode": 2.0, "load": 1.5}
SHAPES = {
    "tiny": {"n_embd": 512, "n_layer": 4, "n_head": 4, "n_inner": 1366},
    "1b": {"n_embd": 2048, "n_layer": 20, "n_head": 16, "n_inner": 5462},
    "3b": {"n_embd": 2560, "n_layer": 32, "n_head": 20, "n_inner": 6826},
    "7b": {"n_embd": 4096, "n_layer": 32, "n_head": 32, "n_inner": 10922},
}


def shaped(**fields) -> CrystalCoderConfig:
    mup = {"mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22, "mup_width_scale": 0.0625}
    return CrystalCoderConfig(mup_scale_qk_dot_by_d=True, rotary_dim=32, **(mup | fields))


# --- The baseline ---------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight (in, out)."""

    def __init__(self, linears: list[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([each.weight.T for each in linears], 1).contiguous())
        self.bias = nn.Parameter(torch.cat([each.bias for each in linears]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class NaiveBlock(nn.Module):
    def __init__(self, layer, config: CrystalCoderConfig):
        super().__init__()
        self.config, self.ln_1, self.ln_2 = (
            config,
            layer.input_layernorm,
            layer.post_attention_layernorm,
        )
        attention, mlp = layer.self_attn, layer.mlp
        self.c_attn = Conv1D([attention.q_proj, attention.k_proj, attention.v_proj])
        self.c_proj = Conv1D([attention.o_proj])
        self.c_fc, self.c_fc2 = Conv1D([mlp.up_proj]), Conv1D([mlp.gate_proj])
        self.mlp_c_proj = Conv1D([mlp.down_proj])
        length = config.n_positions
        self.register_buffer("causal", torch.ones(length, length).tril().bool()[None, None])

    def rotate(self, x: torch.Tensor, offset: int) -> torch.Tensor:
        """x: (batch, seq, heads, head_dim)."""
        rotary = self.config.rotary_dim
        inverse = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
        angles = torch.arange(offset, offset + x.shape[1])[:, None] * inverse
        sin, cos = (
            f(angles).repeat_interleave(2, -1)[None, :, None].to(x) for f in (torch.sin, torch.cos)
        )
        part, rest = x[..., :rotary], x[..., rotary:]
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
        return torch.cat((part * cos + turned * sin, rest), -1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past):
        """query, key, value: (batch, seq, n_embd). The same, attended, and what to keep."""
        offset = past[0].shape[-2] if past is not None else 0
        heads = (*query.shape[:2], self.config.n_head, self.config.head_dim)
        query = self.rotate(query.view(heads), offset).transpose(1, 2)
        key = self.rotate(key.view(heads), offset).transpose(1, 2)
        value = value.view(heads).transpose(1, 2)
        if past is not None:
            key, value = torch.cat((past[0], key), -2), torch.cat((past[1], value), -2)
        scores = query @ key.transpose(-1, -2) / self.config.head_dim
        total = key.shape[-2]
        mask = self.causal[:, :, total - query.shape[-2] : total, :total]
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
        attended = (scores.softmax(-1) @ value).transpose(1, 2)
        return attended.reshape(*attended.shape[:2], -1), (key, value)

    def forward(self, hidden: torch.Tensor, past):
        projected = self.c_attn(self.ln_1(hidden)).split(self.config.n_embd, 2)
        attended, present = self.attend(*projected, past)
        hidden = hidden + self.c_proj(attended)
        normed = self.ln_2(hidden)
        gated = self.c_fc(normed) * nn.functional.silu(self.c_fc2(normed))
        return hidden + self.mlp_c_proj(gated), present


class Naive(nn.Module):
    def __init__(self, model: CrystalCoderForCausalLM):
        super().__init__()
        self.config, self.wte, self.lm_head = model.config, model.model.embed_tokens, model.lm_head
        self.blocks = nn.ModuleList(NaiveBlock(layer, model.config) for layer in model.model.layers)
        self.ln_f = model.model.norm

    def forward(self, ids: torch.Tensor, past=None):
        hidden = self.wte(ids) * self.config.mup_embeddings_scale
        presents = []
        for at, block in enumerate(self.blocks):
            hidden, present = block(hidden, past[at] if past else None)
            presents.append(present)
        return self.lm_head(self.ln_f(hidden)) * self.config.logit_scale, presents


# --- Speed ----------------------------------------------------------------------------------------


def alternate(runs: int, *functions) -> list[float]:
    """The median time of each, taken in turns so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(runs + 1):
        for kept, function in zip(times, functions, strict=True):
            began = time.perf_counter()
            function()
            kept.append(time.perf_counter() - began)
    return [statistics.median(kept[1:]) for kept in times]


def speed(args) -> dict[str, float]:
    torch.manual_seed(0)
    config = shaped(vocab_size=2048, **SHAPES[args.shape] | {"n_layer": args.layers})
    model = CrystalCoderForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    naive = Naive(model).eval()
    ids = torch.randint(0, 2048, (1, 1501))
    with torch.inference_mode():
        ours, theirs = model(ids[:, :64]).logits, naive(ids[:, :64])[0]
        tolerance = 1e-3 if args.dtype == "float32" else 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)

    ratios = {}

    def compare(name: str, runs: int, first, second) -> None:
        mine, other = alternate(runs, first, second)
        print(f"{name}: ours {mine * 1e3:.2f} ms, naive {other * 1e3:.2f} ms")
        ratios[name] = other / mine

    with torch.inference_mode():
        attention(config, model, naive, compare, args.runs)
        # As the backend runs it.
        cpu.prepare(model, lambda *_: None)
        compare(
            "model prefill",
            args.runs,
            lambda: model(ids[:, :1024], use_cache=True, logits_to_keep=1),
            lambda: naive(ids[:, :1024]),
        )
        cache = growing_cache(config.n_layer)
        model(ids[:, :1500], past_key_values=cache, use_cache=True, logits_to_keep=1)
        past = naive(ids[:, :1500])[1]

        def step() -> None:
            model(ids[:, 1500:], past_key_values=cache, use_cache=True)
            forget(cache)

        compare("model decode", args.runs * 8, step, lambda: naive(ids[:, 1500:], past))
    return ratios


def attention(config, model, naive, compare, runs: int) -> None:
    """One block's attention with its projections taken out: hidden states are q, k and v."""
    ours = copy.deepcopy(model.model.layers[0].self_attn)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(ours, name, nn.Identity())
    theirs = naive.blocks[0]
    hidden = torch.randn(1, 1501, config.n_embd, dtype=model.dtype)

    def run(start: int, end: int, cache) -> torch.Tensor:
        positions = torch.arange(start, end)[None]
        angles = rotary_cos_sin(positions, config.rotary_dim, hidden.dtype)
        return ours(hidden[:, start:end], angles, past_key_values=cache)[0]

    def naive_run(start: int, end: int, past):
        part = hidden[:, start:end]
        return theirs.attend(part, part, part, past)

    compare(
        "prefill",
        runs * 4,
        lambda: run(0, 1024, growing_cache(config.n_layer)),
        lambda: naive_run(0, 1024, None),
    )
    cache = growing_cache(config.n_layer)
    run(0, 1500, cache)
    past = naive_run(0, 1500, None)[1]
    torch.testing.assert_close(
        run(1500, 1501, cache), naive_run(1500, 1501, past)[0], rtol=0, atol=0.02
    )
    forget(cache)

    def step() -> None:
        run(1500, 1501, cache)
        forget(cache)

    compare("decode", runs * 16, step, lambda: naive_run(1500, 1501, past))


def forget(cache: Cache) -> None:
    """Take the last step back."""
    for layer in cache.layers:
        layer.crop_to(1500)


# --- Loading --------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, shape: str) -> None:
    """A random text model of this shape in 16 bit, as published: Conv1D, shards of 2 GB."""
    config = shaped(vocab_size=32032, **SHAPES[shape])
    width, inner = config.n_embd, config.n_inner
    shapes = {"transformer.wte.weight": (config.vocab_size, width)}
    for layer in range(config.n_layer):
        for name, size in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_fc2": (width, inner),
            "mlp.c_proj": (inner, width),
        }.items():
            shapes[f"transformer.h.{layer}.{name}.weight"] = size
            shapes[f"transformer.h.{layer}.{name}.bias"] = size[1:]
        for name in ("ln_1", "ln_2"):
            shapes |= {
                f"transformer.h.{layer}.{name}.{kind}": (width,) for kind in ("weight", "bias")
            }
    shapes |= {f"transformer.ln_f.{kind}": (width,) for kind in ("weight", "bias")}
    shapes["lm_head.weight"] = (config.vocab_size, width)
    noise = torch.randn(1 << 24).mul_(0.02).bfloat16()

    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        files += 1
        file = f"model-{files:05}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, size in shapes.items():
        count = torch.Size(size).numel()
        shard[name] = noise.repeat(-(-count // noise.numel()))[:count].view(size).contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) > 2e9:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))
    tokenizer.save(str(folder / "tokenizer.json"))


def read_files(folder: Path) -> list[bytes]:
    """The files, in memory: what every loader has to do at least."""
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def evict(folder: Path) -> None:
    """Take the files out of the system's cache, so that they come from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_load(folder: str, quantization: str) -> None:
    """Runs in a process of its own, so that the peak is of this load alone."""
    before = peak_bytes()
    began = time.perf_counter()
    if quantization == "read":
        held = sum(len(content) for content in read_files(Path(folder)))
    else:
        model = load_model(folder, dtype=torch.bfloat16, quantization=quantization).model
        held = sum(parameter.nbytes for parameter in model.parameters())
    spent = time.perf_counter() - began
    print(json.dumps({"s": spent, "extra": peak_bytes() - before, "held": held}))


def peak_bytes() -> int:
    """The most memory this process has held, not counting what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def load(args) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="bench-crystal-", dir=args.folder))
    try:
        write_checkpoint(folder, args.load)
        seconds: dict[str, float] = {}
        for quantization in ("read", "none", *["4bit"] * args.quantised):
            evict(folder)
            command = [sys.executable, __file__, "--child", str(folder), quantization]
            result = json.loads(subprocess.run(command, check=True, stdout=-1).stdout)
            seconds[quantization] = result["s"]
            print(
                f"load {args.load} {quantization}: {result['s']:.2f} s; peak "
                f"{result['extra'] / 1e9:.2f} GB for {result['held'] / 1e9:.2f} GB kept "
                f"({result['extra'] / result['held']:.2f} x)"
            )
        return {"load": seconds["none"] / seconds["read"]}
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="width for the speed runs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1, help="for the speed runs")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--load", choices=[*SHAPES, "no"], default="1b")
    parser.add_argument("--quantised", action="store_true", help="also load in 4 bit")
    parser.add_argument("--folder", help="where the checkpoint is written for a while")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        timed_load(*args.child)
        return 0
    torch.set_num_threads(args.threads)
    ratios = speed(args) if args.runs else {}
    if args.load != "no":
        ratios |= load(args)
    missed = False
    for name, ratio in ratios.items():
        if name not in GOALS:
            print(f"{name}: {ratio:.2f} x")
            continue
        good = ratio <= GOALS[name] if name == "load" else ratio >= GOALS[name]
        missed |= not good
        sign = "at most" if name == "load" else "at least"
        print(f"{name}: {ratio:.2f} x (goal: {sign} {GOALS[name]}) {'ok' if good else 'MISSED'}")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
