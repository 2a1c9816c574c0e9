"""The paper's tables and ours side by side, and the paper's figures in our data, from the ledgers of all runs.

    ledger = scored(cfg, "tinycode", 64)     # runs/.../scores/tinycode-T64.json
    page = write(cfg)                        # runs/<preset>/report/: tables, figures, report.html

Every number is counted from ledger lines; each of ours carries its 95 % interval. What was not run shows as missing.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treediff import corpus, plots, sample, stats, tokens
from treediff.config import MASKINGS, Config, UserError, provenance, read_json, whole, write_json

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

ROWS = ("base", *MASKINGS)
HALVES = {"humaneval": ("HE", "HE+"), "mbpp": ("MBPP", "MBPP+"), "tinycode": ("Tiny", "Tiny+")}
"""Column titles of a benchmark: EvalPlus's base tests, and base and plus tests."""
TASKS = {"humaneval": 164, "mbpp": 378}

PAPER = {  # percent of tasks, by strategy, benchmark, tests and T: Tables 1 and 2
    "base": {"humaneval": {256: (39.6, 34.8), 512: (36.6, 31.7)}, "mbpp": {256: (51.9, 43.1), 512: (39.4, 31.7)}},
    "random": {"humaneval": {256: (39.6, 35.4), 512: (38.4, 32.3)}, "mbpp": {256: (52.9, 43.9), 512: (41.5, 32.8)}},
    "ast_span": {"humaneval": {256: (40.9, 36.6), 512: (40.2, 36.6)}, "mbpp": {256: (51.6, 42.9), 512: (39.7, 31.5)}},
    "ast": {"humaneval": {256: (42.1, 37.2), 512: (40.2, 36.6)}, "mbpp": {256: (52.9, 44.2), 512: (42.3, 33.3)}},
}
MISPRINT = (
    "Table 2 prints 44.9 for AST on MBPP+ at T = 256, which no whole number of 378 tasks gives; Table 1 says 44.2."
)
PAPER_AUTOREGRESSIVE = {
    "DeepSeek-Coder-33B": (50.6, 44.5, 80.4, 70.1),
    "CodeQwen1.5-7B": (51.8, 45.7, 73.5, 60.8),
    "CodeLlama-7B": (37.8, 35.4, 59.5, 46.8),
    "CodeLlama-13B": (42.7, 38.4, 63.5, 52.6),
}
"""Quoted in Table 1 from the EvalPlus leaderboard: HE, HE+, MBPP, MBPP+."""


# --- ledgers -------------------------------------------------------------------------------------------------------


def ledger_path(cfg: Config, benchmark: str, length: int) -> Path:
    return cfg.run_dir / "scores" / f"{benchmark}-T{length}.json"


def scored(cfg: Config, benchmark: str, length: int) -> Path:
    """The ledger of one run on one benchmark; trains, samples and scores whatever is missing."""
    from treediff import score

    samples = sample.sampled(cfg, benchmark, length)
    out = ledger_path(cfg, benchmark, length)
    wanted = list(sample.benchmark_problems(cfg, benchmark))
    score.score(benchmark, corpus.benchmark_file(cfg, benchmark), samples, out, workers=cfg.workers, limit_to=wanted)
    return out


def ledgers(cfg: Config) -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
    """The ledgers that are there, by strategy and (benchmark, T).

    Raises UserError if two runs were sampled or scored under different settings: they could not be compared.
    """
    found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for strategy in ROWS:
        run = cfg.with_masking(strategy)
        for benchmark in cfg.benchmarks:
            for length in cfg.lengths:
                path = ledger_path(run, benchmark, length)
                if path.exists():
                    found.setdefault(strategy, {})[benchmark, length] = read_json(path)
    _same_settings(cfg, found)
    return found


def _same_settings(cfg: Config, found: dict[str, dict[tuple[str, int], dict[str, Any]]]) -> None:
    for key in {k for by_key in found.values() for k in by_key}:
        settings: dict[str, Any] = {}
        first = ""
        for strategy, by_key in found.items():
            if key not in by_key:
                continue
            mine = {k: v for k, v in by_key[key]["settings"].items() if "samples" not in k}
            lines = corpus.read_jsonl(sample.samples_path(cfg.with_masking(strategy), *key))
            mine |= {f"sampling {k}": v for k, v in next(iter(lines))["settings"].items()}
            mine["tasks"] = sorted(by_key[key]["tasks"])
            for name, value in mine.items():
                if settings.setdefault(name, value) != value:
                    raise UserError(
                        f"{key[0]} at T = {key[1]}: {first} and {strategy} differ in {name}, so they cannot be "
                        "compared; sample and score one of them again."
                    )
            first = first or strategy


def _counts(ledger: dict[str, Any]) -> tuple[int, int, int]:
    """Tasks that pass the base tests, that pass base and plus, and tasks."""
    base, plus = stats.passed(ledger, "base"), stats.passed(ledger, "plus")
    return sum(base.values()), sum(plus.values()), len(base)


# --- tables --------------------------------------------------------------------------------------------------------


def table(cfg: Config, strategies: tuple[str, ...]) -> list[dict[str, Any]]:
    """One record per strategy, benchmark, tests and T: our k of n with its interval, and the paper's percentage.

    The paper's T (256, 512) stand beside ours in order: the first length beside 256, the second beside 512.
    """
    found = ledgers(cfg)
    out = []
    for strategy in strategies:
        for place, length in enumerate(cfg.lengths):
            for benchmark in cfg.benchmarks:
                ledger = found.get(strategy, {}).get((benchmark, length))
                for column, name in enumerate(HALVES[benchmark]):
                    record: dict[str, Any] = {"strategy": strategy, "T": length, "benchmark": name}
                    if ledger:
                        *k, n = _counts(ledger)
                        low, high = stats.wilson(k[column], n)
                        rate = 100 * k[column] / n
                        record |= {"passed": k[column], "tasks": n, "rate": rate, "low": 100 * low, "high": 100 * high}
                    paper = list(PAPER[strategy].get(benchmark, {}).items())
                    if place < len(paper):
                        record |= {"paper_T": paper[place][0], "paper": paper[place][1][column]}
                    out.append(record)
    return out


def markdown(records: list[dict[str, Any]]) -> str:
    """A table in the paper's layout: a row per strategy, a column per T and benchmark, ours with its interval."""
    columns = list(dict.fromkeys((r["T"], r["benchmark"]) for r in records))
    by_cell = {(r["strategy"], r["T"], r["benchmark"]): r for r in records}
    lines = ["| | " + " | ".join(f"{name}, T = {t}" for t, name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for strategy in dict.fromkeys(r["strategy"] for r in records):
        cells = [_cell(by_cell[strategy, *c]) for c in columns]
        lines.append(f"| {plots.NAMES[strategy]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(r: dict[str, Any]) -> str:
    if "passed" not in r:
        return "not run"
    return _rate(r["passed"], r["tasks"])


def paper_markdown(strategies: tuple[str, ...], autoregressive: bool = False) -> str:
    """The paper's own table of these strategies, as printed [% of tasks]."""
    columns = [(t, b, i) for t in (256, 512) for b in ("humaneval", "mbpp") for i in (0, 1)]
    lines = ["| | " + " | ".join(f"{HALVES[b][i]}, T = {t}" for t, b, i in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    if autoregressive:
        for name, values in PAPER_AUTOREGRESSIVE.items():
            lines.append(f"| {name} (quoted) | " + " | ".join(f"{v:.1f}" for v in values * 2) + " |")
    for s in strategies:
        lines.append(f"| {plots.NAMES[s]} | " + " | ".join(f"{PAPER[s][b][t][i]:.1f}" for t, b, i in columns) + " |")
    return "\n".join(lines)


def halves_markdown(cfg: Config, strategies: tuple[str, ...]) -> str:
    """Pass rates on TinyCode's two halves, base and plus tests, as a Markdown table; empty without TinyCode."""
    if "tinycode" not in cfg.benchmarks:
        return ""
    found, half = ledgers(cfg), {i: p["half"] for i, p in sample.benchmark_problems(cfg, "tinycode").items()}
    names = list(dict.fromkeys(half.values()))
    columns = [(t, h) for t in cfg.lengths for h in names]
    lines = ["| | " + " | ".join(f"{h}, T = {t}" for t, h in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for strategy in strategies:
        cells = []
        for length, name in columns:
            ledger = found.get(strategy, {}).get(("tinycode", length), {"tasks": {}})
            passed = [v for i, v in stats.passed(ledger, "plus").items() if half[i] == name]
            cells.append(_rate(sum(passed), len(passed)))
        lines.append(f"| {plots.NAMES[strategy]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate(k: int, n: int) -> str:
    """k of n in percent with its 95 % interval, for a table."""
    if not n:
        return "not run"
    low, high = stats.wilson(k, n)
    return f"{100 * k / n:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({k}/{n})"


def reasons(cfg: Config, strategies: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """How many programs of each run pass or fail for which kind of reason, by a title of the run."""
    found = ledgers(cfg)
    out = {}
    for strategy in strategies:
        for (benchmark, length), ledger in found.get(strategy, {}).items():
            passed = stats.passed(ledger, "plus")
            kinds = Counter(
                "pass" if passed[i] else str(v["reason"]).partition(":")[0].strip() for i, v in ledger["tasks"].items()
            )
            out[f"{plots.NAMES[strategy]}, {benchmark}, T = {length}"] = dict(kinds)
    return out


def sandbox_layers(cfg: Config) -> dict[str, Any]:
    """The sandbox that the ledgers name (all runs of a preset are scored on one machine, or say so)."""
    layers = [ledger["sandbox"] for by_key in ledgers(cfg).values() for ledger in by_key.values()]
    return layers[0] if all(x == layers[0] for x in layers) else {"differs between runs": layers}


def comparisons(cfg: Config) -> list[dict[str, Any]]:
    """Every pair of strategies on every benchmark and T: difference, discordant tasks, exact McNemar p (plus tests)."""
    found = ledgers(cfg)
    out = []
    pairs = [("random", "ast"), ("random", "ast_span"), ("ast_span", "ast"), ("base", "random"), ("base", "ast")]
    for one, two in pairs:
        for key in found.get(one, {}):
            if key not in found.get(two, {}):
                continue
            both = stats.paired(*(stats.passed(found[s][key], "plus") for s in (one, two)))
            only_one, only_two = both.count((1, 0)), both.count((0, 1))
            out.append(
                {
                    "benchmark": HALVES[key[0]][1],
                    "T": key[1],
                    "from": one,
                    "to": two,
                    "difference": 100 * (only_two - only_one) / len(both),
                    "only_from": only_one,
                    "only_to": only_two,
                    "tasks": len(both),
                    "p": stats.mcnemar(only_one, only_two),
                }
            )
    return out


def verdicts(records: list[dict[str, Any]], level: float = 0.05) -> str:
    """What the comparisons allow to be said, in sentences: an order only where McNemar's p, Holm-adjusted, says so."""
    if not records:
        return "No two runs can be compared yet."
    adjusted = stats.holm([r["p"] for r in records])
    lines = []
    for r, p in zip(records, adjusted, strict=True):
        names = f"{plots.NAMES[r['to']]} against {plots.NAMES[r['from']]}, {r['benchmark']} at T = {r['T']}"
        counts = f"{r['difference']:+.1f} points ({r['only_to']} tasks to {r['only_from']} of {r['tasks']})"
        said = f"a difference at p = {p:.2g}" if p < level else f"no difference can be told (p = {p:.2g})"
        lines.append(f"- {names}: {counts}: {said}.")
    return "\n".join(lines)


# --- figures -------------------------------------------------------------------------------------------------------


def masking_figure(cfg: Config, code: str, levels: tuple[float, ...] = (0.3, 0.7)) -> Figure:
    """Figure 1 in our data: one program under the maskings, each at the same noise levels."""
    tok = tokens.load_tokenizer(corpus.tokenizer_folder(cfg), cfg.revision)
    view = corpus.view(cfg, tok, code)
    masks = {m: [corpus.view_masks(cfg.with_masking(m), view, level)[0] for level in levels] for m in MASKINGS}
    return plots.maskings(code, view.starts, view.labels, masks, levels)


def differing_task(cfg: Config, benchmark: str, length: int, one: str = "random", two: str = "ast") -> str:
    """A task that `two` passes and `one` fails, if there is one; else any task that they answer differently."""
    found = ledgers(cfg)
    a, b = (found[s][benchmark, length]["tasks"] for s in (one, two))
    for want in (
        lambda i: b[i]["plus"] == "pass" != a[i]["plus"],
        lambda i: a[i]["plus"] != b[i]["plus"],
        lambda i: True,
    ):
        for task in sorted(a):
            if want(task):
                return task
    raise UserError(f"{benchmark}: no task was scored for both {one} and {two}.")


def program_figure(cfg: Config, benchmark: str, length: int, task: str) -> Figure:
    """Figure 2 in our data: what random masking and AST masking answer to one task."""
    found = ledgers(cfg)
    panels = []
    for strategy in ("random", "ast"):
        rows = sample.read_samples(sample.samples_path(cfg.with_masking(strategy), benchmark, length))
        verdict = found[strategy][benchmark, length]["tasks"][task]
        why = verdict["plus"] if verdict["base"] == "pass" else verdict["base"]
        panels.append((f"{plots.NAMES[strategy]}: {why}", rows[task]["solution"]))
    return plots.programs(panels)


def answer_view(cfg: Config, record: dict[str, Any]) -> tuple[str, list[tuple[int, int, str]], np.ndarray, np.ndarray]:
    """An answer for drawing: its text, a box per token coloured by tier, the step of each token, label of each."""
    tok = tokens.load_tokenizer(corpus.tokenizer_folder(cfg), cfg.revision)
    text, runs, at, labels = corpus.answer_tokens(cfg, tok, record["ids"], record["committed_at"])
    boxes = [(a, b, plots.COLOURS[tokens.LABELS[i]]) for (a, b), i in zip(runs, labels, strict=True)]
    return text, boxes, at, labels


def state_figure(cfg: Config, benchmark: str, length: int, task: str, share: float = 110 / 256) -> Figure:
    """Figure 3 in our data: the answers of random and AST masking part of the way (the paper: step 110 of 256)."""
    step = round(share * length / cfg.tokens_per_step)
    panels = []
    for strategy in ("random", "ast"):
        run = cfg.with_masking(strategy)
        record = sample.read_samples(sample.samples_path(run, benchmark, length))[task]
        text, boxes, at, _ = answer_view(run, record)
        title = f"{plots.NAMES[strategy]}, before step {step} of {length // cfg.tokens_per_step}"
        panels.append((title, text, boxes, at >= step))
    return plots.states(panels)


def robustness_figure(cfg: Config) -> Figure:
    """Figure 4 in our data: the pass rate on the plus tests over T, all benchmarks pooled, with Wilson intervals."""
    found = ledgers(cfg)
    scores: dict[str, dict[int, tuple[float, float, float]]] = {}
    for strategy, by_key in found.items():
        for length in cfg.lengths:
            parts = [_counts(by_key[b, length]) for b in cfg.benchmarks if (b, length) in by_key]
            if parts:
                k, n = sum(p[1] for p in parts), sum(p[2] for p in parts)
                low, high = stats.wilson(k, n)
                scores.setdefault(strategy, {})[length] = (100 * k / n, 100 * low, 100 * high)
    return plots.robustness(scores, "pass@1, base and plus tests [%]\nwith 95 % intervals")


EXAMPLE = '''def depth(text):
    """Deepest nesting of parentheses."""
    deepest = level = 0
    for char in text:
        if char == "(":
            level += 1
            deepest = max(deepest, level)
        elif char == ")":
            level -= 1
    return deepest'''
"""The task of the paper's figures 1 to 3 (HumanEval/6), in a few lines of ours."""


# --- the report ----------------------------------------------------------------------------------------------------


def write(cfg: Config) -> Path:
    """Write runs/<preset>/report/: table1, table2 (md, csv, json), figures, report.html. What is missing shows so."""
    folder = cfg.preset_dir / "report"
    found = ledgers(cfg)
    tables = {"table1": table(cfg, ("base", "random", "ast")), "table2": table(cfg, MASKINGS)}
    compared = comparisons(cfg)
    for name, records in tables.items():
        _write_text(folder / f"{name}.md", markdown(records) + "\n")
        _write_text(folder / f"{name}.csv", _csv(records))
        write_json(folder / f"{name}.json", records)
    write_json(folder / "comparisons.json", compared)
    figures = {"figure1": ("The three maskings on one program.", masking_figure(cfg, EXAMPLE))}
    key = (cfg.benchmarks[0], cfg.lengths[-1])
    if key in found.get("random", {}) and key in found.get("ast", {}):
        task = differing_task(cfg, *key)
        figures["figure2"] = (f"{task}: two answers.", program_figure(cfg, *key, task))
        figures["figure3"] = (f"{task}: the same answers part of the way.", state_figure(cfg, *key, task))
    if found:
        figures["figure4"] = ("Robustness over T.", robustness_figure(cfg))
    for name, (_, figure) in figures.items():
        plots.save(figure, folder / f"{name}.png")
    write_json(folder / "provenance.json", provenance(switches=cfg.as_dict()))
    _write_text(folder / "report.html", _page(cfg, tables, compared, {n: c for n, (c, _) in figures.items()}, folder))
    return folder / "report.html"


def _write_text(path: Path, text: str) -> None:
    with whole(path) as spot:
        spot.write_text(text, encoding="utf-8")


def _csv(records: list[dict[str, Any]]) -> str:
    names = ["strategy", "T", "benchmark", "passed", "tasks", "rate", "low", "high", "paper_T", "paper"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _page(
    cfg: Config, tables: dict[str, Any], compared: list[dict[str, Any]], captions: dict[str, str], folder: Path
) -> str:
    """One self-contained page: no script, no external request."""
    parts = [f"<h1>TreeDiff, reproduced: preset {html.escape(cfg.preset)}, seed {cfg.seed}</h1>"]
    parts.append(
        "<p>Pass@1 in percent of tasks, with 95 % Wilson intervals and counts. A difference between two strategies is "
        "claimed only where the exact McNemar test on the same tasks, Holm-adjusted, allows it.</p>"
    )
    for number, (name, strategies) in enumerate((("table1", ("base", "random", "ast")), ("table2", MASKINGS)), start=1):
        parts.append(f"<h2>Table {number}, ours</h2>{_html_table(markdown(tables[name]))}")
        parts.append(f"<h2>Table {number}, the paper's</h2>{_html_table(paper_markdown(strategies, name == 'table1'))}")
        if name == "table2":
            parts.append(f"<p>{html.escape(MISPRINT)}</p>")
    said = "".join(f"<li>{html.escape(x.removeprefix('- '))}</li>" for x in verdicts(compared).splitlines())
    parts.append(f"<h2>What the intervals allow to be said</h2><ul>{said}</ul>")
    for name, caption in captions.items():
        data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        parts.append(
            f"<h2>{name.replace('figure', 'Figure ')}</h2>"
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    settings = json.dumps(cfg.as_dict(), indent=1)
    parts.append(
        f"<h2>Settings</h2><details><summary>every switch</summary><pre>{html.escape(settings)}</pre></details>"
    )
    style = (
        "body{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}.wide{overflow-x:auto}img{max-width:100%}"
        "figure{margin:0}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TreeDiff, reproduced</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{style}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _html_table(text: str) -> str:
    rows = [[html.escape(c.strip()) for c in line.strip("|").split("|")] for line in text.splitlines()]
    head = "".join(f"<th>{c}</th>" for c in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows[2:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
