"""Filled holes -> verdicts: by the benchmark's own check, in the sandbox; and what is counted from them.

    path = score(cfg, "ast-tinycode")               # runs/.../scores/ast-tinycode-any-Horacle.json
    rows = outcomes(cfg, "ast-tinycode")            # {hole: {"task", "tier", "size", "passed", "exact"}}
    floor(cfg, "ast-tinycode")                      # holes whose program passes with the hole left empty

Holes of a program are no independent cases: stats.clustered and stats.clustered_difference resample programs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from treediff.config import Config
from treediff.data import benchmarks, holes
from treediff.errors import UserError
from treediff.files import read_json, read_jsonl, write_json
from treediff.sampling.run import name, numbered, samples_path
from treediff.sandbox.runner import MEMORY
from treediff.scoring import score as scoring
from treediff.scoring import stats
from treediff.scoring.run import read
from treediff.scoring.verdicts import decided

SECONDS = 3.0
"""What HumanEval-Infilling's own evaluation gives a program."""


def ledger_path(cfg: Config, hole_set: str) -> Path:
    """runs/<preset>/<run>/scores/<hole set>-<tier>-H<hole_length>.json."""
    return cfg.run_dir / "scores" / f"{name(cfg, hole_set, None)}.json"


def score(cfg: Config, hole_set: str) -> Path:
    """Score the run's completions of a hole set; the ledger's path. Raises UserError if they are not there."""
    judge(cfg, hole_set, samples_path(cfg, hole_set, None), ledger_path(cfg, hole_set))
    return ledger_path(cfg, hole_set)


def judge(cfg: Config, hole_set: str, samples: Path, out: Path) -> dict[str, Any]:
    """The ledger of the programs (`solution`) in `samples`, a task's in the order of its holes, written to `out`.

    AST holes are judged by the benchmark's inputs, as its samples are; HumanEval-Infilling by its own check alone,
    which gives a verdict on `base` only.
    """
    if hole_set.startswith("ast-"):
        benchmark = hole_set.removeprefix("ast-")
        wanted = benchmarks.benchmark_problems(cfg, benchmark)
        there = {row["task_id"] for row in read_jsonl(samples)}
        data = benchmarks.benchmark_file(cfg, benchmark)
        limit_to = [task for task in wanted if task in there]  # a program without a node of the tier has no hole
        workers, label = cfg.workers, cfg.label
        return scoring.score(benchmark, data, samples, out, workers=workers, limit_to=limit_to, label=label)
    by_key = numbered(holes.load(cfg, hole_set))
    programs = {(r["task_id"], r.get("sample", 0)): r["solution"] for r in read_jsonl(samples)}
    rules = {"python": ".".join(map(str, sys.version_info[:3])), "seconds": SECONDS, "memory_bytes": MEMORY}
    settings = {"samples_sha256": hashlib.sha256(samples.read_bytes()).hexdigest(), "holes": len(by_key)}
    settings |= rules | cfg.label
    earlier: dict[str, Any] = read_json(out) if out.exists() else {}
    if earlier.get("settings") == settings:
        return earlier
    verdicts, sandbox = checked({k: (h, programs[k]) for k, h in by_key.items()}, cfg.workers, f"score {hole_set}")
    tasks: dict[str, list[dict[str, Any]]] = {}
    for (task, _), verdict in verdicts.items():
        tasks.setdefault(task, []).append(verdict)
    ledger = {"benchmark": hole_set, "settings": settings, "sandbox": sandbox, "tasks": tasks}
    write_json(out, ledger)
    return ledger


def checked(
    programs: Mapping[tuple[str, int], tuple[holes.Hole, str]], workers: int, title: str
) -> tuple[dict[tuple[str, int], dict[str, Any]], dict[str, str]]:
    """Verdicts by key on programs that bring their own check, and the sandbox's layers.

    As in HumanEval-Infilling's evaluation: prefix + completion + suffix, the tests, check(entry_point), within 3 s. The
    check is called by a function that comes last and answers when nothing was raised, so that a program that ends its
    process has not passed.
    """
    limit = {"inputs": [[]], "expected": [True], "times": [SECONDS / 4], "extras": [0.0]}
    line = json.dumps({"kind": "check", "entry": holes.CHECK, "atol": 0, "base": limit}).encode()
    texts = {key: program + hole.test for key, (hole, program) in programs.items()}
    found, sandbox = {}, {}  # by program: those that are the same are judged once
    jobs = [(text, {"program": text}, line) for text in dict.fromkeys(texts.values())]
    for text, result in decided(jobs, workers or len(os.sched_getaffinity(0)), [], title, 0):
        if text is None:
            sandbox = result
        else:
            found[text] = {k: v for k, v in result.items() if k != "plus"}
    return {key: found[text] for key, text in texts.items()}, sandbox


def floor(cfg: Config, hole_set: str, only: Container[str] | None = None) -> set[str]:
    """The holes (`only` these) whose program passes when they are left empty: what no model deserves credit for.

    Judged once.
    """
    by_key = numbered(holes.load(cfg, hole_set))
    by_key = {key: hole for key, hole in by_key.items() if only is None or hole.id in only}
    texts = [
        json.dumps({"task_id": task, **({"sample": k} if k else {}), "hole": h.id, "solution": h.program("")}) + "\n"
        for (task, k), h in by_key.items()
    ]
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:12]
    out = cfg.preset_dir / "holes" / f"{hole_set}-empty-{digest}.json"
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "empty.jsonl"
        samples.write_text("".join(texts))
        ledger = judge(cfg, hole_set, samples, out)
    return {hole.id for key, hole in by_key.items() if _passed(ledger, key)}


def _passed(ledger: Mapping[str, Any], key: tuple[str, int]) -> bool:
    verdict = stats.samples(ledger["tasks"][key[0]])[key[1]]
    return bool(verdict["base"] == "pass" and verdict.get("plus", "pass") == "pass")


def outcomes(cfg: Config, hole_set: str) -> dict[str, dict[str, Any]] | None:
    """By hole what became of it in this run: task, tier, node, size [tokens], length taken, passed, exact, completion.

    None if it was not scored. Raises UserError if the ledger is not that of the samples that are there.
    """
    path, samples = ledger_path(cfg, hole_set), samples_path(cfg, hole_set, None)
    if not path.exists() or not samples.exists():
        return None
    ledger = read(path, cfg.verdicts) if hole_set.startswith("ast-") else read_json(path)
    if ledger["settings"]["samples_sha256"] != hashlib.sha256(samples.read_bytes()).hexdigest():
        raise UserError(f"{path}: it is the ledger of other completions than {samples} holds now; score them again.")
    out = {}
    for row in read_jsonl(samples):
        key = row["task_id"], row.get("sample", 0)
        kept = ("tier", "node", "size", "length", "exact", "completion", "settings")
        verdict = stats.samples(ledger["tasks"][key[0]])[key[1]]
        out[row["hole"]] = {
            "task": key[0],
            **{k: row[k] for k in kept},
            "passed": _passed(ledger, key),
            "reason": verdict["reason"],
        }
    return out
