"""Infilling against ordinary sampling of as many tokens on a canvas of the same size, in one run.

    python benchmarks/infill.py                      # random weights; seconds on two cores
    python benchmarks/infill.py --out infill.json

For each mode the same number of rows decodes the same number of tokens: as answers behind a prompt, and as holes with a
prefix and a suffix that are together as long as that prompt. The two take turns, and the ratio is the median over the
rounds of ordinary seconds / infilling seconds: 1 means as many rows a second (`by CPU`: of the time that the process
had a processor).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from treediff.config import resolve
from treediff.model import llada
from treediff.runs import provenance
from treediff.sampling import decode, infill

MASK, EOS = 2046, 2045
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "threshold": {"threshold": 0.9},
    "guidance": {"guidance": 1.0},
}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per mode: rows a second of both, and the ratio (above 1: infilling is the faster)."""
    cfg = resolve("tiny", d_model=args.d_model, n_layers=args.n_layers, mlp_hidden=3 * args.d_model)
    net = llada.new_backbone(cfg, 2048, EOS, MASK)
    known = torch.randint(0, 2000, (args.batch, args.known), generator=torch.Generator().manual_seed(0)).tolist()
    half = args.known // 2
    holes = [infill.Gapped([row[:half], row[half:]], [args.length]) for row in known]
    for mode, changes in MODES.items():
        plain = decode.Decoding(MASK, (EOS,), args.length, args.length, args.block, early_exit=False, **changes)
        how = dataclasses.replace(plain, holes=1)
        seconds: dict[str, list[float]] = {"ordinary": [], "infilling": []}
        cpu: dict[str, list[float]] = {"ordinary": [], "infilling": []}
        for turn in range(args.rounds + 1):  # the first warms up
            for name in seconds:
                begin, used = time.perf_counter(), time.process_time()
                if name == "ordinary":
                    decode.decode(net, known, plain)
                else:
                    infill.fill(net, holes, how)
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
                    cpu[name].append(time.process_time() - used)
        ratios, by_cpu = ([a / b for a, b in zip(t["ordinary"], t["infilling"], strict=True)] for t in (seconds, cpu))
        rows = {name: args.batch / statistics.median(s) for name, s in seconds.items()}
        record = {"mode": mode, "rows_per_s": rows, "ratio": statistics.median(ratios), "ratios": ratios}
        yield record | {"ratio_cpu": statistics.median(by_cpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("d_model", 128), ("n_layers", 4), ("known", 96), ("length", 32), ("block", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=16, help="rows together")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the records and their provenance here (JSON)")
    args = parser.parse_args()
    print(f"{args.batch} rows, {args.length} tokens each, {args.known} known tokens")
    records = []
    for r in measure(args):
        records.append(r)
        rows = r["rows_per_s"]
        print(
            f"{r['mode']:14} ordinary {rows['ordinary']:7.1f} rows/s, infilling {rows['infilling']:7.1f} rows/s, "
            f"ratio {r['ratio']:.3f} ({min(r['ratios']):.2f} to {max(r['ratios']):.2f}), by CPU {r['ratio_cpu']:.3f}",
            flush=True,
        )
    if args.out:
        facts = provenance(command=sys.argv[1:], threads=torch.get_num_threads(), records=records)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
