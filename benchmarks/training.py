"""A training step against the obvious loop, in one run: python benchmarks/training.py

The obvious loop computes the logits of every position and takes transformers' masked-language-model loss; ours computes
them where a token is masked. The same LoRA model at LLaDA's vocabulary, the same batch: wall-clock ratio (the two
alternate, so that a machine whose speed drifts slows both), the largest difference of the gradients, and the peak
memory of each at 4,096 tokens, every one in a process of its own.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from treediff.config import resolve
from treediff.model import forward, llada, lora
from treediff.training import batch, loss

VOCABULARY, MASK, EOS = 126464, 126336, 126081


def network(args: argparse.Namespace) -> nn.Module:
    """A LoRA model with random weights at LLaDA's vocabulary."""
    cfg = resolve("tiny", d_model=args.d_model, n_layers=args.n_layers, mlp_hidden=3 * args.d_model, lora_dropout=0.0)
    net = lora.add_lora(llada.new_backbone(cfg, VOCABULARY, EOS, MASK), cfg)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.normal_(0, 0.02, generator=draw)  # LoRA's B starts at 0, where its partner has no gradient
    return net.train()


def example(rows: int, length: int, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and noisy ids int64, mask bool, (rows, length)."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 126_000, (rows, length), generator=draw)
    mask = torch.rand(rows, length, generator=draw) < share
    return ids, torch.where(mask, MASK, ids), mask


def obvious(net: nn.Module, ids: torch.Tensor, noisy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """All logits, then transformers' loss over the masked positions."""
    from transformers.loss.loss_utils import ForMaskedLMLoss

    logits = forward.lm_head(net)(forward.hidden_states(net, noisy))
    value = ForMaskedLMLoss(logits, ids.masked_fill(~mask, -100), VOCABULARY)
    value.backward()
    return value.detach()


def ours(net: nn.Module, ids: torch.Tensor, noisy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As train.py has it."""
    weight = mask / mask.sum()
    m = batch.micro(noisy, ids, mask, weight, torch.zeros(len(ids)).long(), mask.byte(), torch.ones_like(mask))
    value, _ = loss.Denoiser(net)(m.noisy, m.places, m.targets, m.weight, m.attention_mask)
    value.backward()
    return value.detach()


STEPS = {"obvious": obvious, "ours": ours}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each, their ratio, and how far loss and gradients differ."""
    net, data = network(args), example(args.rows, args.length, args.share)
    trained = [p for p in net.parameters() if p.requires_grad]
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    values, gradients = {}, {}
    for _ in range(args.runs + 1):  # the first warms up
        for name, step in STEPS.items():
            for p in trained:
                p.grad = None
            began = time.perf_counter()
            values[name] = step(net, *data)
            seconds[name].append(time.perf_counter() - began)
            gradients[name] = torch.cat([p.grad.flatten() for p in trained])
    ratios = [a / b for a, b in zip(seconds["obvious"][1:], seconds["ours"][1:], strict=True)]
    apart = (gradients["ours"] - gradients["obvious"]).abs().max() / gradients["obvious"].abs().max()
    return {
        "seconds": {name: round(statistics.median(v[1:]), 4) for name, v in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "loss_difference": float((values["ours"] - values["obvious"]).abs() / values["obvious"]),
        "gradient_difference": float(apart),
    }


def peak(name: str, args: argparse.Namespace) -> int:
    """Peak memory of one step above the memory before it [bytes], in this process."""

    def resident(what: str) -> int:
        return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    net, data = network(args), example(1, args.memory_length, args.share)
    before = resident("VmRSS")
    STEPS[name](net, *data)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {"d_model": 256, "n_layers": 4, "rows": 4, "length": 128, "memory_length": 4096, "runs": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.5, help="of the tokens that is masked")
    parser.add_argument("--peak", choices=[*STEPS], help="only print this step's peak memory (used by this script)")
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak, args))
        return
    print(
        f"d_model {args.d_model}, {args.n_layers} layers, LoRA, vocabulary {VOCABULARY:,}, {args.rows} x {args.length} "
        f"tokens, {args.share:.0%} masked, {torch.get_num_threads()} threads, float32"
    )
    found = compare(args)
    for name, value in found["seconds"].items():
        print(f"{name:8} {value:8.3f} s a step (median of {args.runs})")
    print(f"ratio    {found['ratio']:8.2f} (min {found['ratio_range'][0]}, max {found['ratio_range'][1]})")
    print(f"relative difference: loss {found['loss_difference']:.1e}, gradients {found['gradient_difference']:.1e}")
    # Small but for the vocabulary: what is compared is the logits' memory.
    small = [
        "--d_model",
        "64",
        "--n_layers",
        "1",
        "--memory_length",
        str(args.memory_length),
        "--share",
        str(args.share),
    ]
    peaks = {}
    for name in STEPS:
        argv = [sys.executable, __file__, "--peak", name, *small]
        peaks[name] = int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[-1])
        print(f"{name:8} {peaks[name] / 1e9:8.2f} GB peak at {args.memory_length:,} x {VOCABULARY:,}")
    print(f"saved    {(peaks['obvious'] - peaks['ours']) / 1e9:8.2f} GB")


if __name__ == "__main__":
    main()
