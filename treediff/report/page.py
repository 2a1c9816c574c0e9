"""The report's page: one HTML file with tables, figures, a task explorer and a trajectory explorer. No server.

    tasks = explorer(cfg, ledgers(cfg), tok) # what the explorers show: programs, verdicts, token by token answers
    text = build(summary, tasks)             # the page, from the template page.html

What a model wrote is hostile: it reaches the page only as JSON in which no tag can begin, and from there only as text.
The page's policy forbids every request and every script but its own (by hash).
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treediff.config import Config
from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.figures import plots, views
from treediff.files import read_jsonl
from treediff.masking import tokens
from treediff.report.comparisons import ledger_name
from treediff.sampling.run import samples_path
from treediff.scoring import stats
from treediff.strategies import STRATEGIES

if TYPE_CHECKING:
    from jinja2 import Environment
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

NEVER = 0xFFFF
"""Step of a token that was never committed, in a packed trajectory."""
SHOWN = 10
"""Samples of a task that the page shows; all are counted."""


# --- what the explorers show ---------------------------------------------------------------------------------------
def explorer(
    cfg: Config, found: dict[str, dict[tuple[str, int], dict[str, Any]]], tok: PreTrainedTokenizerFast | None
) -> dict[str, Any]:
    """All answers of all runs: {"runs", "vocab", "tasks"}, a task's answers by the number of the run.

    Without a tokenizer there are no trajectories. Token texts are kept once, in `vocab`; a trajectory is packed (see
    `_packed`) and unpacked in the browser.
    """
    runs, tasks, vocab = [], {}, {}
    problems = {b: _problems(cfg, b) for b in cfg.benchmarks}
    for benchmark, length in cfg.jobs:
        for strategy, by_key in found.items():
            ledger = by_key.get((benchmark, length))
            if not ledger:
                continue
            rows = _rows(samples_path(cfg.with_masking(strategy), benchmark, length))
            for task, judged in ledger["tasks"].items():
                problem, of = problems[benchmark].get(task, {}), rows.get(task, [])
                entry = tasks.setdefault(
                    (benchmark, task),
                    {
                        "id": task,
                        "benchmark": benchmark,
                        "half": problem.get("half", ""),
                        "prompt": problem.get("prompt", ""),
                        "answers": {},
                    },
                )
                entry["answers"][len(runs)] = _answer(stats.samples(judged), of) | {
                    "tokens": _packed(cfg, tok, of[0] if of else {}, vocab)
                }
            run = {"strategy": strategy, "name": STRATEGIES[strategy].title, "benchmark": benchmark, "T": length}
            run["ledger"] = ledger_name(cfg.with_masking(strategy), benchmark, length)
            runs.append(run | {"steps": length // cfg.tokens_per_step})
    return {"runs": runs, "vocab": list(vocab), "tasks": list(tasks.values())}


def _rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The samples of a file by task, in the order of their numbers."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in read_jsonl(path):
        rows.setdefault(record["task_id"], []).append(record)
    return {task: sorted(of, key=lambda r: r.get("sample", 0)) for task, of in rows.items()}


def _answer(verdicts: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A task's answer of one run: its first sample; where there are several, how many pass, and those after it."""
    programs = [r.get("solution", "") for r in rows] + [""] * len(verdicts)
    each = [
        {"verdict": verdict(v), "why": str(v["reason"]), "seconds": v["seconds"], "program": program}
        for v, program in zip(verdicts, programs, strict=False)
    ]
    if len(each) == 1:
        return each[0]
    passes = sum(x["verdict"] == "pass" for x in each)
    total = {"passes": passes, "of": len(each), "first": each[0]["verdict"], "more": each[1:SHOWN]}
    return each[0] | total | {"verdict": "some pass" if 0 < passes < len(each) else each[0]["verdict"]}


def _problems(cfg: Config, benchmark: str) -> dict[str, dict[str, Any]]:
    """The benchmark's problems; none where their file is not at hand, which leaves the page without prompts."""
    try:
        return benchmarks.benchmark_problems(cfg, benchmark)
    except UserError as e:
        log.warning("The page shows no prompts of %s: %s", benchmark, e)
        return {}


def verdict(row: dict[str, Any]) -> str:
    """pass, `base only` (fails the plus tests), fail or timeout."""
    if row["base"] != "pass":
        return row["base"]
    return "pass" if row["plus"] == "pass" else "base only"


def _packed(cfg: Config, tok: PreTrainedTokenizerFast | None, row: dict[str, Any], vocab: dict[str, int]) -> str:
    """An answer's tokens up to its end: uint32 entry of `vocab`, uint16 step and uint8 label of each; zlib, base64."""
    if tok is None or "committed_at" not in row:
        return ""
    text, runs, at, labels = views.answer_tokens(cfg, tok, np.array(row["ids"]), np.array(row["committed_at"]))
    which = [vocab.setdefault(text[a:b], len(vocab)) for a, b in runs]
    raw = np.array(which, "<u4").tobytes() + np.where(at < 0, NEVER, at).astype("<u2").tobytes()
    return base64.b64encode(zlib.compress(raw + labels.astype("u1").tobytes(), 9)).decode()


def pairs(tasks: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks that some strategies pass and others do not, at one T, with every strategy's program and reason."""
    out = []
    for task in tasks["tasks"]:
        for length in sorted({tasks["runs"][i]["T"] for i in task["answers"]}):
            answers = [
                {"strategy": tasks["runs"][i]["strategy"], **{k: a[k] for k in ("verdict", "why", "program")}}
                for i, a in task["answers"].items()
                if tasks["runs"][i]["T"] == length
            ]
            if len({a["verdict"] in ("pass", "some pass") for a in answers}) == 2:
                out.append({"task": task["id"], "T": length, "prompt": task["prompt"], "answers": answers})
    return out


def pairs_markdown(records: list[dict[str, Any]], most: int = 20) -> str:
    """The first of those tasks, spread evenly, for reading."""
    shown = [records[i * len(records) // most] for i in range(most)] if len(records) > most else records
    parts = [
        f"# Tasks that the strategies answer differently\n\n{len(shown)} of {len(records)}; all are in pairs.json "
        "and in report.html. Base and plus tests.\n"
    ]
    for r in shown:
        parts.append(f"## {r['task']}, T = {r['T']}\n\n{_fenced(r['prompt'])}")
        for a in r["answers"]:
            why = f"\n\n{_fenced(a['why'])}" if a["why"] else ""
            parts.append(
                f"{STRATEGIES[a['strategy']].title}: **{a['verdict']}**{why}\n\n{_fenced(a['program'], 'python')}"
            )
    return "\n\n".join(parts) + "\n"


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in `text`."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}{language}\n{text}\n{fence}"


# --- the page ------------------------------------------------------------------------------------------------------
def build(summary: dict[str, Any], tasks: dict[str, Any]) -> str:
    """The page as one text. `summary` is what report.write put together, `tasks` what `explorer` gives."""
    template = _environment().get_template("page.html")
    script = re.search(r"<script>(.*?)</script>", Path(template.filename).read_text(encoding="utf-8"), re.DOTALL)[1]
    data = tasks | {
        "labels": tokens.LABELS,
        "colours": [plots.COLOURS[x] for x in tokens.LABELS],
        "masked": plots.MASKED,
        "strategies": {s.name: s.colour for s in STRATEGIES.values()},
    }
    policy = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    models = {"samples_model": stats.SAMPLES, "pooling_model": stats.POOLING}
    return template.render(summary, policy=policy, masked=plots.MASKED, explorer=data, **models)


def _environment() -> Environment:
    """The templates beside this module. Every text is escaped, and a name that is missing is an error."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # ASCII and without tags: neither half a surrogate pair nor a </script> in a program can spoil the file.
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    found.filters["indented"] = lambda value: json.dumps(value, indent=1)
    found.filters["embedded"] = lambda content: base64.b64encode(content).decode()
    return found
