"""How fast a batch is corrupted, beside the pseudo-code taken literally. One core, one run; what counts are the ratios.

    OMP_NUM_THREADS=1 python benchmarks/corruption.py [--rows 8] [--length 4096]

The batch is made of standard-library files: half of each row is reasoning, half code with its tiers and spans. The
reference draws Algorithm 1's tokens one after the other, as it is written down, with numpy's own weighted draw.
"""

import argparse
import json
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from treediff.config import resolve
from treediff.masking import rules, tiers
from treediff.masking.tokens import CODE, REASONING
from treediff.runs import provenance


def batch(rows: int, length: int) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Labels and spans of `rows` samples; a token stands for four bytes of a standard-library file."""
    files = iter(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    half, labels, spans = length // 2, [], []
    while len(labels) < rows:
        source = next(files).read_bytes()
        if len(source) < 4 * half:
            continue
        parsed = tiers.parse(source[: 4 * half])
        code = CODE + tiers.byte_tiers(parsed)[::4]
        labels.append(np.concatenate([np.full(length - half, REASONING, np.uint8), code.astype(np.uint8)]))
        span = tiers.node_spans(parsed)
        span[:, :2] = -(-span[:, :2] // 4) + length - half
        spans.append(span[span[:, 1] > span[:, 0]])
    return torch.from_numpy(np.array(labels)), spans


def literal(weights: np.ndarray, labels: np.ndarray, p: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Algorithm 1, one draw after another: a token by weight, its weight set to 0, until the budget is reached."""
    mask = (labels == REASONING) & (draw.random(labels.shape) < p[:, None])
    for row, level in enumerate(p):
        weight = weights[labels[row]]
        for _ in range(int(level * (labels[row] >= CODE).sum())):
            pick = np.searchsorted(np.cumsum(weight), draw.random() * weight.sum())
            mask[row, pick], weight[pick] = True, 0.0
    return mask


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of `repeats` calls [s]."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(1)
    labels, spans = batch(args.rows, args.length)
    uid = torch.arange(args.rows)
    count = labels.numel()
    cfg = resolve("paper", masking="ast")
    p = rules.noise_level(cfg, uid, 0, 1)
    draw = np.random.default_rng(0)
    slow = seconds(lambda: literal(np.array(cfg.weights()), labels.numpy(), p.numpy(), draw), 3)
    result = {"literal Algorithm 1": {"tokens_per_s": round(count / slow), "ratio": 1.0}}
    for name in ("random", "ast", "ast_span"):
        run = cfg.but(masking=name)
        fast = seconds(lambda run=run: rules.corrupt(run, labels, spans, uid, 0, p), 200)
        result[name] = {"tokens_per_s": round(count / fast), "ratio": round(slow / fast, 1)}
    for name, line in result.items():
        print(f"{name:20} {line['tokens_per_s'] / 1e6:8.2f} M tokens/s   {line['ratio']:9.1f} x the literal loop")
    print(json.dumps({"corruption": result, "provenance": provenance(rows=args.rows, length=args.length)}))


if __name__ == "__main__":
    main()
