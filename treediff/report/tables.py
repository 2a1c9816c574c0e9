"""The table of the report as text: Markdown, CSV and LaTeX from the records that report.table counts.

markdown(table(cfg, ("none", "random", "ast")))     # a row per strategy, a column per T and benchmark
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import Any

from treediff.strategies import STRATEGIES


def markdown(records: list[dict[str, Any]]) -> str:
    """A table in the paper's layout: a row per strategy, a column per T and benchmark, ours with its interval.

    Below each row, what the paper prints, where it prints something.
    """
    columns, by_cell = _columns(records)
    lines = ["| | " + " | ".join(f"{name}, T = {t}" for t, name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for strategy in dict.fromkeys(r["strategy"] for r in records):
        row = [by_cell[strategy, *c] for c in columns]
        lines.append(f"| {STRATEGIES[strategy].title} | " + " | ".join(map(cell, row)) + " |")
        if any("paper" in r for r in row):
            lines.append(f"| {STRATEGIES[strategy].title}, the paper | " + " | ".join(map(printed, row)) + " |")
    return "\n".join(lines)


def _columns(records: list[dict[str, Any]]) -> tuple[list[tuple[int, str]], dict[tuple[str, int, str], dict[str, Any]]]:
    """(T, benchmark) of each column, and the records by strategy and column."""
    columns = list(dict.fromkeys((r["T"], r["benchmark"]) for r in records))
    return columns, {(r["strategy"], r["T"], r["benchmark"]): r for r in records}


def cell(r: dict[str, Any]) -> str:
    """A record in percent with its 95 % interval and the counts behind it, for a table."""
    if "rate" not in r:
        return "not run"
    counts = f"{r['passed']}/{r['tasks']}"
    if r["samples"] > 1:
        counts = f"{r['passed']} of {r['tasks']} x {r['samples']}"
    return f"{r['rate']:.1f} [{r['low']:.1f}, {r['high']:.1f}] ({counts})"


def printed(r: dict[str, Any]) -> str:
    """What the paper prints for a record."""
    return f"{r['paper']:.1f}" if "paper" in r else ""


def pass_at_markdown(records: list[dict[str, Any]]) -> str:
    """pass@k of runs with several samples per task: a row per strategy, benchmark and T, a column per k; or nothing."""
    if not records:
        return ""
    ks = sorted({r["k"] for r in records})
    lines = ["| | tests | T | tasks | samples | " + " | ".join(f"pass@{k}" for k in ks) + " |"]
    lines.append("|---" * (len(ks) + 5) + "|")
    rows: dict[tuple, dict[int, dict[str, Any]]] = {}
    for r in records:
        head = (STRATEGIES[r["strategy"]].title, r["benchmark"], r["T"], r["tasks"], r["samples"])
        rows.setdefault(head, {})[r["k"]] = r
    for head, by_k in rows.items():
        cells = [f"{r['rate']:.1f} [{r['low']:.1f}, {r['high']:.1f}]" if (r := by_k.get(k)) else "" for k in ks]
        lines.append("| " + " | ".join(map(str, [*head, *cells])) + " |")
    return "\n".join(lines)


def as_csv(records: list[dict[str, Any]]) -> str:
    names = ["strategy", "T", "benchmark", "passed", "tasks", "samples", "rate", "low", "high", "paper_T", "paper"]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*names, "ledger"], restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def latex(records: list[dict[str, Any]]) -> str:
    """A table in the paper's layout for booktabs: ours with its interval, below it the paper's percentages."""
    columns, by_cell = _columns(records)
    strategies = list(dict.fromkeys(r["strategy"] for r in records))
    lengths = Counter(t for t, _ in columns)
    spans, rules, at = [], [], 2
    for length, width in lengths.items():
        spans.append(rf"\multicolumn{{{width}}}{{c}}{{$T={length}$}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    rows = [" & ".join(["", *spans]), " & ".join(["", *(_tex(b) for _, b in columns)])]
    ours, theirs = [], []
    for strategy in strategies:
        cells, printed = [_tex(STRATEGIES[strategy].title)], [_tex(f"{STRATEGIES[strategy].title}, paper")]
        for c in columns:
            r = by_cell[strategy, *c]
            cells.append(
                f"{r['rate']:.1f} {{\\scriptsize [{r['low']:.1f}, {r['high']:.1f}]}}" if "rate" in r else "not run"
            )
            printed.append(f"{r['paper']:.1f} {{\\scriptsize ($T={r['paper_T']}$)}}" if "paper" in r else "--")
        ours.append(" & ".join(cells) + r" \\")
        theirs.append(" & ".join(printed) + r" \\")
    if not any("paper" in r for r in records):
        theirs = []
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'c' * len(columns)}}}",
            r"\toprule",
            rows[0] + r" \\",
            "".join(rules),
            rows[1] + r" \\",
            r"\midrule",
            *ours,
            *([r"\midrule", *theirs] if theirs else []),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


_TEX = {c: "\\" + c for c in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _tex(text: str) -> str:
    """`text` with LaTeX's special characters escaped."""
    return "".join(_TEX.get(c, c) for c in text)
