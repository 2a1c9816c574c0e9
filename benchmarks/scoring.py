"""Scoring against EvalPlus's own command, in one run: python benchmarks/scoring.py DATA.jsonl.gz SAMPLES.jsonl

Both score the same samples with the same number of workers, first with nothing known (each computes the expected
outputs), then again with those at hand, our ledger and EvalPlus's result file removed in between. EvalPlus's command
sleeps in steps of 20 s until its work is done; `to its result` leaves that sleep out. Verdicts of both are compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from treediff.data import benchmarks

CODE = "import sys; from evalplus.evaluate import main; sys.exit(main())"


def theirs(args: argparse.Namespace, data: Path, samples: Path, cache: Path) -> tuple[float, float, dict]:
    """Seconds of EvalPlus's command, seconds until its result was there, and its (base, plus) passes by task."""
    result = samples.with_name(samples.name.replace(".jsonl", "_eval_results.json"))
    result.unlink(missing_ok=True)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), f"{args.benchmark.upper()}_OVERRIDE_PATH": str(data)}
    command = [sys.executable, "-c", CODE, "--dataset", args.benchmark, "--samples", str(samples)]
    began, clock = time.perf_counter(), time.time()
    subprocess.run(
        [*command, "--parallel", str(args.workers)], env=environment, check=True, stdout=2, stdin=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - began
    rows = json.loads(result.read_text())["eval"]
    verdicts = {t: (r[0]["base_status"] == "pass", r[0]["plus_status"] == "pass") for t, r in rows.items()}
    return seconds, result.stat().st_mtime - clock, verdicts


def ours(args: argparse.Namespace, data: Path, samples: Path, out: Path) -> tuple[float, dict]:
    """Seconds of our command, and its (base, plus) passes by task."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "treediff.cli", "score", "--benchmark", args.benchmark, "--problems", str(data)]
    command += ["--samples", str(samples), "--out", str(out), "--workers", str(args.workers)]
    environment = os.environ | {"TREEDIFF_RUNS": str(out.parent / "runs")}
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=2, stdin=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    rows = json.loads(out.read_text())["tasks"]
    return seconds, {t: (r["base"] == "pass", r["plus"] == "pass") for t, r in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--benchmark", choices=("humaneval", "mbpp"), default="humaneval")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        samples, data = root / "samples.jsonl", root / "data.jsonl"
        shutil.copy(args.samples, samples)
        raw = args.data.read_bytes()
        data.write_bytes(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        problems, _ = benchmarks.load_benchmark(args.benchmark, data)
        print(f"{args.benchmark}, {len(problems)} tasks, {args.workers} workers")
        for state in ("expected outputs computed", "expected outputs at hand"):
            seconds, to_result, them = theirs(args, data, samples, root / "cache")
            mine, us = ours(args, data, samples, root / "ledger.json")
            print(f"{state}: EvalPlus {seconds:.1f} s ({to_result:.1f} s to its result), ours {mine:.1f} s")
            print(f"  ratio {mine / seconds:.2f}, to EvalPlus's result {mine / to_result:.2f}")
            odd = sorted(t for t in us if us[t] != them[t])
            print(f"  verdicts that differ: {len(odd)} of {len(us)} tasks: {', '.join(odd) or 'none'}", flush=True)


if __name__ == "__main__":
    main()
