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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from treediff.files import read_json, write_json
from treediff.report.tables import Table
from treediff.runs import provenance
from treediff.training import plan

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


def text(results: dict[str, dict[str, Any]], calls: list[dict[str, Any]]) -> str:
    """The page: what was run and where, the tables, and each goal beside what was measured."""
    lines = [
        "# On a GPU",
        "",
        "Written by `benchmarks/gpu.py` from the figures in gpu.json; nothing here is typed.",
        "",
    ]
    for call in calls:
        versions = ", ".join(f"{k} {v}" for k, v in call["versions"].items())
        gpu = ", ".join(call["machine"]["gpus"]) or call["machine"]["cpu"]
        lines.append(
            f"- {call['time'][:10]}, commit {call['commit'][:7]}, {gpu}: {', '.join(call['ran'])} ({versions})"
        )
    ended = [[name, r["what"], r["ended"], f"{r['seconds']:.0f}"] for name, r in results.items()]
    ended += [[name, piece.what, "not run", ""] for name, piece in PIECES.items() if name not in results]
    lines += ["", "## Pieces", "", *Table(["piece", "what", "ended", "s"], ended).markdown().splitlines()]
    trained, sampled = _trained(results), _sampled(results)
    if trained:
        lines += ["", "## A training step of LLaDA-8B's shape (LoRA r 64, 4,096 tokens, bf16, random weights)", ""]
        head = [
            "variant",
            "tokens/s",
            "of a large matmul, same run [%]",
            "of the data sheet [%]",
            "peak [GB]",
            "planned [GB]",
        ]
        rows = []
        for name, v in trained.items():
            shares = [f"{100 * x:.1f}" if x else "-" for x in (v["mfu"], v["sheet"])]
            memory = [f"{x / 1e9:.1f}" if x else "-" for x in (v["peak_memory"], v["planned_memory"])]
            rows.append([name, f"{v['tokens_per_s']:,.0f}", *shares, *memory])
        lines += Table(head, rows).markdown().splitlines()
    if sampled:
        lines += ["", "## Sampling at LLaDA-8B's shape (bf16, random weights)", ""]
        lines += [
            "The floor: the step's FLOPs at a large matmul's rate or its bytes at a large copy's, the larger one.",
            "",
        ]
        head = [
            "T",
            "prompts",
            "mode",
            "ms a step",
            "floor [ms]",
            "ratio",
            "tokens/s",
            "times the literal loop's tokens/s",
        ]
        rows = []
        for r in sampled:
            times = (f"{r[k]:.2f}" for k in ("ms_per_step", "floor_ms", "ratio"))
            faster = f"{r['faster']:.1f}" if r["faster"] else "-"
            rows.append([r["T"], r["rows"], r["mode"], *times, f"{r['tokens_per_s']:.0f}", faster])
        lines += Table(head, rows).markdown().splitlines()
    if rows := _goals(trained, sampled):
        lines += ["", "## Goals", "", *Table(["goal", "measured", ""], rows).markdown().splitlines()]
    return "\n".join(lines) + "\n"


def _trained(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each training variant's figures, with its share of the data sheet."""
    found = {}
    for r in results.values():
        for name, v in r.get("figures", {}).get("variants", {}).items():
            gpu = next(iter(r["figures"]["machine"]["gpus"]), "")
            known = plan.device(gpu)
            found[name] = v | {"sheet": v["mfu"] * v["matrix_flops"] / known.flops if known else None}
    return found


def _sampled(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sampling mode's figures, with how many times faster it is than the literal loop at that T and batch."""
    found = []
    for r in results.values():
        for record in r.get("figures", {}).get("records", []):
            compiled = r["figures"].get("compiled", False)
            found.append(record | {"mode": record["mode"] + ", compiled" * compiled})
    literal = {(r["T"], r["rows"]): r["tokens_per_s"] for r in found if r["mode"] == "literal"}
    for r in found:
        at = literal.get((r["T"], r["rows"]))
        r["faster"] = r["tokens_per_s"] / at if at else None
    return found


def _goals(trained: dict[str, dict[str, Any]], sampled: list[dict[str, Any]]) -> list[list[str]]:
    """What was aimed at, the best that was measured, and whether that is enough."""
    rows = []

    def goal(what: str, values: dict[str, float], enough: float, least: bool = True, unit: str = "") -> None:
        if values:
            name = (max if least else min)(values, key=values.__getitem__)
            held = values[name] >= enough if least else values[name] <= enough
            rows.append([what, f"{values[name]:.2f}{unit} ({name})", "held" if held else "missed"])

    ours = {n: v for n, v in trained.items() if not n.startswith("trainer")}
    sheets = {n: 100 * v["sheet"] for n, v in ours.items() if v["sheet"]}
    goal("training: at least 40 % of the data sheet", sheets, 40, unit=" %")
    if "trainer" in trained:
        base = trained["trainer"]["tokens_per_s"]
        ratios = {n: v["tokens_per_s"] / base for n, v in ours.items()}
        goal(
            "training: at least 2 times transformers' Trainer with PEFT, without recomputation",
            ratios,
            2,
            unit=" times",
        )
    fastest = {
        n: v["peak_memory"] / 1e9 for n, v in ours.items() if v == max(ours.values(), key=lambda v: v["tokens_per_s"])
    }
    goal("training: the fastest variant under 60 GB", fastest, 60, least=False, unit=" GB")

    def of(key: str, want: Callable[[str], bool]) -> dict[str, float]:
        return {f"T {r['T']}, {r['rows']} prompts, {r['mode']}": r[key] for r in sampled if want(r["mode"]) and r[key]}

    goal("sampling: exact mode within 1.5 times the floor", of("ratio", lambda m: m.startswith("exact")), 1.5, False)
    goal(
        "sampling: dual cache with threshold within 2 times", of("ratio", lambda m: m.startswith("threshold")), 2, False
    )
    exact = of("faster", lambda m: m in ("exact", "exact, compiled"))
    goal("sampling: exact mode at least 3 times the literal loop", exact, 3, unit=" times")
    goal(
        "sampling: dual cache, 4 tokens a step, at least 15 times",
        of("faster", lambda m: m.startswith("dual cache, 4")),
        15,
        unit=" times",
    )
    return rows


def publish(folders: list[Path], out: Path) -> None:
    """gpu.json and gpu.md in `out`, from the gpu.json files of earlier calls; of a piece run twice, the later one."""
    calls, results = [], {}
    for folder in folders:
        found = read_json(folder / "gpu.json")
        for call in found.get("calls", [{**found, "ran": [*found["pieces"]]}]):
            calls.append({k: v for k, v in call.items() if k != "pieces"})
        results |= found["pieces"]
    results = {name: results[name] for name in PIECES if name in results}
    for r in results.values():  # the last words of a piece that did not end well stay; they may name folders
        r.pop("said", None) if r["ended"] == "done" else None
        r.get("figures", {}).pop("command", None)
    write_json(out / "gpu.json", {"calls": calls, "pieces": results})
    (out / "gpu.md").write_text(text(results, calls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--list", action="store_true", help="only name the pieces, and what they left")
    parser.add_argument("--only", action="append", choices=[*PIECES], help="this piece alone, anew")
    parser.add_argument("--cpu", action="store_true", help="without a GPU, at a scale that means nothing")
    parser.add_argument(
        "--publish", type=Path, nargs="+", metavar="OUT", help="only put together what calls left there"
    )
    args = parser.parse_args()
    if args.publish:
        publish(args.publish, args.out)
        return
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
        publish([args.out], args.out)
    results = [path for path in there.values() if path.exists()]
    print(f"{args.out / 'gpu.md'}: {len(results)} of {len(PIECES)} pieces")


if __name__ == "__main__":
    main()
