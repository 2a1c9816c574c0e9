"""LLaDA-8B's shape on one GPU, random weights: milliseconds per denoising step against the floors of the hardware.

    python benchmarks/gpu_sample.py --out docs/results/gpu_sample.json       # bf16, about 20 GB of GPU memory and up
    python benchmarks/gpu_sample.py --scale tiny                             # the same on a CPU, in seconds
    python benchmarks/gpu_sample.py --compile                                # each block compiled by torch.compile

The floors are measured in the same run: the time that the step's FLOPs take at the rate of a large bf16 matmul, and
the time that its bytes (weights, kept keys and values) take at the rate of a large copy; the larger of the two is the
floor. Prompts have the lengths of HumanEval's in the chat template. In each mode one block is decoded unmeasured and
the next `--blocks` are measured; a step's time includes its share of a block's first pass over everything. With random
weights no proposal is ever sure: `threshold` commits one token a step here and shows what looking at the device at each
step costs; what it saves depends on the model (benchmarks/sampling.py measures it on a trained one).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import sampling
import torch

from treediff.model import forward, llada, lora
from treediff.runs import provenance
from treediff.sampling import decode

SCALES: dict[str, dict[str, int]] = {
    "llada": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464},
    "tiny": {"d_model": 64, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 160, "vocab_size": 1000},
}
PROMPTS = (120, 150, 180, 210, 240, 280, 330, 420)
MODES: dict[str, dict[str, Any]] = {
    "literal": {},  # LLaDA's published loop: logits of every position, softmax over the vocabulary in float64
    "exact, launched one by one": {},  # without CUDA graphs
    "exact": {},
    "exact, 4 a step": {"share": 4},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "dual cache, 4 a step": {"cache": "dual", "share": 4},
    "threshold + dual cache": {"cache": "dual", "threshold": 1.0},
}


class Enough(Exception):
    """Raised out of the sampler when all that is measured has been seen."""


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def best(work: Any, device: str, times: int = 10) -> float:
    """The shortest of several runs of `work` [s]."""
    seconds = []
    for _ in range(times + 2):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[2:])


def machine_rates(device: str, dtype: torch.dtype, scale: str) -> dict[str, float]:
    """FLOP/s of a large matmul and bytes/s of a large copy (read and written bytes), on this device, now."""
    n, size = (8192, 2**31) if scale == "llada" else (512, 2**24)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flop_per_s": 2 * n**3 / best(lambda: a @ b, device),
        "bytes_per_s": 2 * size / best(lambda: target.copy_(source), device),
    }


def floor(
    shape: dict[str, int], how: decode.Decoding, rows: int, width: int, rates: dict[str, float], size: int
) -> dict[str, float]:
    """FLOPs, bytes and the least time [ms] of one step, a mean over a block's steps.

    A pass over W of a canvas of L tokens: 2 FLOPs per weight of the blocks and token, 4 W L d per block for attention,
    and the head at the positions that are open; `size` is the bytes of a number.
    """
    d, layers = shape["d_model"], shape["n_layers"]
    weights = layers * (4 * d * d + 3 * d * shape["mlp_hidden_size"])
    head = d * shape["vocab_size"]
    start = width - how.gen_length
    blocks = how.gen_length // how.block_length
    steps = how.steps // blocks
    cached = {"none": width, "prefix": width - start - how.block_length, "dual": how.block_length}[how.cache]
    opened = sum(how.block_length - i * how.block_length // steps for i in range(steps)) / steps
    passes = [(width, 1), (cached, steps - 1)]
    flops = sum(n * rows * (2 * weights * w + 4 * layers * w * width * d) for w, n in passes) / steps
    flops += 2 * rows * opened * head
    kept = 0 if how.cache == "none" else 2 * layers * rows * width * d
    moved = size * (weights + head + kept)
    compute, memory = 1e3 * flops / rates["flop_per_s"], 1e3 * moved / rates["bytes_per_s"]
    return {"tflop": flops / 1e12, "gbyte": moved / 1e9, "compute_ms": compute, "memory_ms": memory}


def measure(
    net: torch.nn.Module, prompts: list[list[int]], how: decode.Decoding, mode: str, device: str, blocks: int
) -> tuple[float, int]:
    """Milliseconds per step over `blocks` blocks after the first, and the peak of memory [bytes]."""
    per_block = how.steps // (how.gen_length // how.block_length)
    marks: list[float] = []
    seen = 0

    def watch(_: torch.Tensor, __: float) -> None:
        nonlocal seen
        seen += 1
        if seen in (per_block, per_block * (1 + blocks)):
            synchronize(device)
            marks.append(time.perf_counter())
        if len(marks) == 2:
            raise Enough

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loop = sampling.literal if mode == "literal" else decode.decode
    with contextlib.ExitStack() as around:
        around.enter_context(contextlib.suppress(Enough))
        if mode.endswith("one by one"):
            plain = lambda replay, *given: forward.window_states(replay.model, *given)  # noqa: E731
            around.enter_context(mock.patch.object(forward.Replay, "__call__", plain))
        loop(net, prompts, how, watch=watch)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return 1e3 * (marks[1] - marks[0]) / (per_block * blocks), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="llada")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512], help="T")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts together")
    parser.add_argument("--block", type=int, default=32, help="block length [tokens]")
    parser.add_argument("--blocks", type=int, default=2, help="blocks to measure")
    parser.add_argument("--compile", action="store_true", help="compile each block; the literal loop is left out")
    parser.add_argument("--out", type=Path, help="write the records and their provenance here (JSON)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.scale == "llada" and device == "cpu":
        sys.exit("gpu_sample: LLaDA's shape needs a GPU; --scale tiny runs on a CPU.")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = SCALES[args.scale]
    net = llada.random_backbone(shape, dtype, device)
    if args.compile:
        lora.compile_blocks(net)
    rates = machine_rates(device, dtype, args.scale)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}: matmul {rates['flop_per_s'] / 1e12:.1f} TFLOP/s, copy {rates['bytes_per_s'] / 1e9:.0f} GB/s")
    print(f"{'T':>4} {'B':>3} {'mode':27} {'ms/step':>9} {'floor':>8} {'ratio':>6} {'tokens/s':>9} {'peak GB':>8}")
    mask, eos = shape["vocab_size"] - 1, shape["vocab_size"] - 2
    draw = torch.Generator().manual_seed(0)
    records = []
    for length in args.lengths:
        for rows in args.batches:
            sizes = (
                [PROMPTS[i * len(PROMPTS) // rows % len(PROMPTS)] for i in range(rows)] if rows > 1 else [PROMPTS[4]]
            )
            prompts = [torch.randint(0, eos, (n,), generator=draw).tolist() for n in sizes]
            for mode, change in MODES.items():
                if args.compile and mode == "literal":
                    continue
                switches = {k: v for k, v in change.items() if k != "share"}
                steps = length // change.get("share", 1)
                how = decode.Decoding(mask, (eos,), length, steps, args.block, early_exit=False, **switches)
                low = floor(shape, how, rows, max(sizes) + length, rates, dtype.itemsize)
                least = max(low["compute_ms"], low["memory_ms"])
                ms, peak = measure(net, prompts, how, mode, device, min(args.blocks, length // args.block - 1))
                speed = 1e3 * rows * change.get("share", 1) / ms
                record = {"T": length, "rows": rows, "mode": mode, "ms_per_step": ms, "floor_ms": least, **low}
                records.append(record | {"ratio": ms / least, "tokens_per_s": speed, "peak_bytes": peak})
                line = f"{length:4} {rows:3} {mode:27} {ms:9.2f} {least:8.2f} {ms / least:6.2f} {speed:9.1f}"
                print(f"{line} {peak / 1e9:8.1f}", flush=True)
    if args.out:
        facts = provenance(
            command=sys.argv[1:], device=name, rates=rates, prompts=PROMPTS, compiled=args.compile, records=records
        )
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
