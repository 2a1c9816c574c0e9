"""`prepare` against the tokenizer alone, with as many processes, on the same rows: python benchmarks/prepare.py

    python benchmarks/prepare.py --tokenizer FOLDER --traces FILE.jsonl [--rows 4000] [--runs 3] [--bytes 48000]
    python benchmarks/prepare.py --tokenizer FOLDER --traces FILE.jsonl --rows 150000 --runs 0 --folder DIR

With `--runs 0` it only prepares, once, at 4,096, and leaves rows and data set in DIR; killed, it goes on when called
again.

The rows are generated: TinyCode's problems and programs, with reasoning cut from the traces (a JSONL file in
OpenCodeReasoning's columns), in log-normal lengths of the given mean and with a spread like the real ones' (half of
them below 0.7 of the mean). Three figures, alternating in one run: the tokenizer on every row whole; `prepare` on
every row whole (max_length without bound, so that nothing is refused); `prepare` at max_length 4,096, which stops
early at rows that are too long. Throughput counts the bytes of all rows, wall-clock, with the start of the processes;
on a machine that others use too, the ratio of processor times is the one to read. Peak memory is the resident set of
this process and of each child, sampled (pages of mapped files, and those shared, count in each).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from treediff import pipeline
from treediff.config import Config, resolve
from treediff.data import prepare, tinycode
from treediff.files import read_jsonl, read_row, whole


def generate(path: Path, traces: Path, rows: int, mean: int) -> np.ndarray:
    """Write the rows to `path`; their lengths [bytes]."""
    rng, draw = random.Random(0), np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(mean) - 0.8**2 / 2, 0.8, rows), 500, 20 * mean).astype(int)
    text = "".join(r["output"].partition("</think>")[0].removeprefix("<think>") for r in read_jsonl(traces))
    pieces = text.split("\n\n")
    problems = tinycode.training(4000, 0)
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths.tolist()):
            problem = rng.choice(problems)
            said, at = [], rng.randrange(len(pieces))
            size = len(problem["output"])
            while size < length:
                said.append(pieces[at % len(pieces)])
                size += len(said[-1]) + 2
                at = rng.randrange(len(pieces)) if rng.random() < 0.1 else at + 1
            cut = "\n\n".join(said)[: max(0, length - len(problem["output"]))]
            output = problem["output"].replace("<think>\n", f"<think>\n{cut}\n", 1)
            file.write(json.dumps({**problem, "id": str(number), "output": output}) + "\n")
    return lengths


def tokenize(cfg: Config, rows: list[tuple[int, Any]]) -> int:
    """The tokenizer alone on a chunk of rows: how many tokens."""
    tok = prepare._tokenizer(cfg.tokenizer, cfg.revision).backend_tokenizer
    tok.encode_special_tokens = True
    read = (read_row("", n, row) for n, row in rows)
    return sum(len(tok.encode(r["input"] + r["output"], add_special_tokens=False).ids) for r in read)


def tokenizer_alone(cfg: Config) -> int:
    return sum(prepare.spread(cfg, tokenize, ((cfg, rows) for rows in prepare._chunks(cfg))))


class Memory(threading.Thread):
    """Largest resident sets seen [MB]: of this process, of any child, and of all together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"parent": 0.0, "child": 0.0, "all": 0.0}

    def run(self) -> None:
        me = psutil.Process()
        while True:
            sizes = []
            for process in (me, *me.children(recursive=True)):
                with suppress(psutil.Error):
                    sizes.append(process.memory_info().rss / 1e6)
            now = {"parent": sizes[0], "child": max([0, *sizes[1:]]), "all": sum(sizes)}
            self.peak = {k: max(v, now[k]) for k, v in self.peak.items()}
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--traces", type=Path, required=True)
    for name, default in (("rows", 4000), ("bytes", 48_000), ("runs", 3), ("workers", 0), ("keep", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("humaneval", "mbpp", "folder"):
        parser.add_argument(f"--{name}", default="")
    args = parser.parse_args()
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        os.environ["TREEDIFF_RUNS"] = folder
        if not Path(folder, "rows.jsonl").exists():
            with whole(Path(folder, "rows.jsonl")) as spot:
                lengths = generate(spot, args.traces, args.rows, args.bytes)
            deciles = np.percentile(lengths, (0, 10, 25, 50, 75, 90, 100)).astype(int).tolist()
            print(f"bytes a row: {deciles} (0, 10, 25, 50, 75, 90, 100 %)", flush=True)
        total = Path(folder, "rows.jsonl").stat().st_size
        print(f"{args.rows} rows, {total / 1e6:.0f} MB", flush=True)
        files = {k: getattr(args, k) for k in ("humaneval", "mbpp") if getattr(args, k)}
        switches = {"data": f"{folder}/rows.jsonl", "tokenizer": args.tokenizer, "rows": args.keep}
        switches |= {"workers": args.workers, "benchmarks": list(files) or ["tinycode"], "benchmark_files": files}
        cfg = resolve("paper", **switches)
        cases = {
            "tokenizer alone": lambda: tokenizer_alone(cfg),
            "prepare, rows whole": lambda: pipeline.statistics(cfg.but(max_length=10_000_000), Path(folder, "whole")),
            "prepare at 4,096": lambda: pipeline.statistics(cfg, Path(folder, "out")),
        }
        if not args.runs:
            cases = {"prepare at 4,096": cases["prepare at 4,096"]}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        cpu: dict[str, list[float]] = {name: [] for name in cases}
        memory = Memory()
        memory.start()
        for _ in range(max(1, args.runs)):
            for name, case in cases.items():
                begin, used = time.perf_counter(), sum(os.times()[:4])
                result = case()
                seconds[name].append(time.perf_counter() - begin)
                cpu[name].append(sum(os.times()[:4]) - used)
                if name == "tokenizer alone":
                    print(f"{result / 1e6:.1f} M tokens; {total / result:.2f} bytes a token")
                for made in ("whole", "out") if args.runs else ():
                    shutil.rmtree(Path(folder, made), ignore_errors=True)
        for name, values in seconds.items():
            print(f"{name:20} {total / 1e6 / statistics.median(values):7.2f} MB/s   {[round(v, 1) for v in values]} s")
            for what, of in (("wall-clock", seconds), ("processor time", cpu)) if args.runs else ():
                ratios = [a / b for a, b in zip(of["tokenizer alone"], of[name], strict=True)]
                print(f"{'':20} {statistics.median(ratios):7.2f} of the tokenizer's by {what} (min {min(ratios):.2f})")
        print(f"rows: {result['rows']}; longest {result['longest']}")
        print(f"peak memory [MB]: {', '.join(f'{k} {v:.0f}' for k, v in memory.peak.items())}")


if __name__ == "__main__":
    main()
