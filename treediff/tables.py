"""The table of the report as text: Markdown, CSV and LaTeX from the records that report.table counts.

markdown(table(cfg, ("base", "random", "ast")))     # a row per strategy, a column per T and benchmark
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import Any

from treediff import plots, stats


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
    return rate(r["passed"], r["tasks"]) if "passed" in r else "not run"


def rate(k: int, n: int) -> str:
    """k of n in percent with its 95 % interval, for a table."""
    if not n:
        return "not run"
    low, high = stats.wilson(k, n)
    return f"{100 * k / n:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({k}/{n})"


def as_csv(records: list[dict[str, Any]]) -> str:
    names = ["strategy", "T", "benchmark", "passed", "tasks", "rate", "low", "high", "paper_T", "paper"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def latex(records: list[dict[str, Any]]) -> str:
    """A table in the paper's layout for booktabs: ours with its interval, below it the paper's percentages."""
    columns = list(dict.fromkeys((r["T"], r["benchmark"]) for r in records))
    by_cell = {(r["strategy"], r["T"], r["benchmark"]): r for r in records}
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
        cells, printed = [_tex(plots.NAMES[strategy])], [_tex(f"{plots.NAMES[strategy]}, paper")]
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
