"""Runs all that waits for a GPU, piece by piece: python benchmarks/gpu.py [--out docs/results] [--list] [--only NAME]

    make gpu

Each piece takes less than ten minutes and writes its result to OUT/gpu/NAME.json before the next begins; a piece whose
result is there is not run again, so a call goes on where the last one stopped. A piece that fails or takes longer is
recorded with its last words and the others go on. At the end OUT/gpu.json holds all results and OUT/gpu.md says which
piece did what. Without a GPU nothing is run. `--cpu` runs the same at a scale that means nothing, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from treediff.files import read_json, write_json
from treediff.runs import provenance

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 590.0  # seconds


class Piece(NamedTuple):
    """A command; `{json}` in it is the file to which it writes its own figures, `{scratch}` a folder that stays."""

    what: str
    command: tuple[str, ...]
    small: tuple[str, ...] = ()  # what `--cpu` puts in place of the last words


TRAIN, SAMPLE = "benchmarks/gpu_train.py", "benchmarks/gpu_sample.py"
VARIANTS = (
    *("all", "compile", "trainer", "recomputation", "trainer_recomputation"),
    *("all_logits", "attention_mask", "boolean_index", "plain_adamw"),
)
MARKED = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/test_*.py") if "mark.gpu" in p.read_text())
"""The files with tests for a GPU; the others may need what such a machine lacks."""
PIECES: dict[str, Piece] = {
    "tests": Piece("tests marked `gpu`", ("-m", "pytest", "-q", "-m", "gpu", *MARKED)),
    **{
        f"train-{variant}": Piece(
            f"a training step of LLaDA-8B's shape: {variant}",
            (TRAIN, "--variants", variant, "--out", "{json}", "--scale", "8b"),
            ("tiny", "--steps", "1"),
        )
        for variant in VARIANTS
    },
    **{
        f"sample-{length}-{rows}": Piece(
            f"sampling at LLaDA-8B's shape: T = {length}, {rows} prompts",
            (SAMPLE, "--lengths", str(length), "--batches", str(rows), "--out", "{json}", "--scale", "llada"),
            ("tiny",),
        )
        for length in (256, 512)
        for rows in (1, 8)
    },
    "sample-compiled": Piece(
        "sampling at LLaDA-8B's shape, each block compiled: T = 256, 1 prompt",
        (SAMPLE, *["--compile", "--lengths", "256", "--batches", "1", "--out", "{json}", "--scale", "llada"]),
        ("tiny",),
    ),
    "rehearsal": Piece("the paper's preset at small width on the device", ("benchmarks/rehearse.py", "--short")),
    "tiny-backbone": Piece(
        "the tiny preset's backbone, trained on the device", ("-m", "treediff.cli", "train", "--masking", "none")
    ),
    "tiny-ast": Piece(
        "the tiny preset's AST run; its held-out figures beside a CPU's",
        ("-m", "treediff.cli", "train", "--masking", "ast"),
    ),
}


def run(name: str, piece: Piece, out: Path, cpu: bool) -> dict[str, Any]:
    """The piece's result: how it ended, its time, its last words, its own figures."""
    import os

    figures, scratch = out / f"{name}-figures.json", out / "runs"
    words = [w.format(json=figures, scratch=scratch) for w in piece.command]
    if cpu and piece.small:
        words = [*words[:-1], *piece.small]
    if cpu and words[:2] == ["-m", "treediff.cli"]:
        words += ["--rows", "64", "--max_steps", "4", "--pretrain.rows", "64", "--pretrain.max_steps", "4"]
    own = ["--processes", "1"] if words[:2] == ["-m", "treediff.cli"] else []
    env = {**os.environ, "TREEDIFF_RUNS": str(scratch.resolve())}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words, *own],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
        ended = f"exit {process.returncode}" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        process.terminate()  # a training stops behind a checkpoint, and the next call goes on with it
        said, _ = process.communicate()
        ended = "took too long"
    result = {"what": piece.what, "ended": ended, "seconds": round(time.monotonic() - began, 1)}
    result["said"] = said.strip().splitlines()[-12:]
    if figures.is_file():
        result["figures"] = read_json(figures)
    if name == "tiny-ast" and ended == "done":
        found = sorted(scratch.glob("tiny/ast-seed*/evals.jsonl"))
        result["heldout"] = json.loads(found[0].read_text().splitlines()[-1]) if found else None
    return result


def text(results: dict[str, dict[str, Any]]) -> str:
    """What was run, as a table."""
    lines = [
        "# On a GPU",
        "",
        "Written by `make gpu`.",
        "",
        "| piece | what | ended | s |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {name} | {r['what']} | {r['ended']} | {r['seconds']:.0f} |" for name, r in results.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--list", action="store_true", help="only name the pieces, and what they left")
    parser.add_argument("--only", action="append", choices=[*PIECES], help="this piece alone, anew")
    parser.add_argument("--cpu", action="store_true", help="without a GPU, at a scale that means nothing")
    args = parser.parse_args()
    folder = (args.out / "gpu").resolve()
    there = {name: folder / f"{name}.json" for name in PIECES}
    if args.list:
        for name, piece in PIECES.items():
            print(f"{name:22} {read_json(there[name])['ended'] if there[name].exists() else '-':14} {piece.what}")
        return
    if not torch.cuda.is_available() and not args.cpu:
        sys.exit("gpu: torch sees no GPU here (--cpu runs the pieces at a scale that means nothing).")
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.only or PIECES:
        if there[name].exists() and not args.only and read_json(there[name])["ended"] != "took too long":
            continue
        print(f"{name}: {PIECES[name].what}", flush=True)
        result = run(name, PIECES[name], folder, args.cpu)
        write_json(there[name], result)
        print(f"  {result['ended']}, {result['seconds']:.0f} s", flush=True)
        print(*(f"    {line}" for line in result["said"]), sep="\n", flush=True)
        results = {name: read_json(path) for name, path in there.items() if path.exists()}
        write_json(args.out / "gpu.json", provenance(pieces=results))
        (args.out / "gpu.md").write_text(text(results))
    results = [path for path in there.values() if path.exists()]
    print(f"{args.out / 'gpu.md'}: {len(results)} of {len(PIECES)} pieces")


if __name__ == "__main__":
    main()
