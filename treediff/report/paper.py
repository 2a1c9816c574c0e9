"""What the paper prints, and what its figures can bear: the tasks behind each percentage, and what a test could say.

    checked()     # every printed percentage with the whole numbers of tasks that give it; none of them: a misprint
    claims()      # every comparison of the paper: the range of exact McNemar p-values that its margins allow
    misprints()   # the former's misprints, in sentences

The paper prints percentages only. Nothing here is a finding written down: all of it is computed from what it prints.
"""

from __future__ import annotations

from typing import Any

from treediff.scoring import stats
from treediff.strategies import STRATEGIES

HALVES = {"humaneval": ("HE", "HE+"), "mbpp": ("MBPP", "MBPP+"), "tinycode": ("Tiny", "Tiny+")}
"""Column titles of a benchmark: EvalPlus's base tests, and base and plus tests."""
TASKS = {"humaneval": 164, "mbpp": 378}

PAPER = {  # percent of tasks, by strategy, benchmark, tests and T: Tables 1 and 2
    "none": {"humaneval": {256: (39.6, 34.8), 512: (36.6, 31.7)}, "mbpp": {256: (51.9, 43.1), 512: (39.4, 31.7)}},
    "random": {"humaneval": {256: (39.6, 35.4), 512: (38.4, 32.3)}, "mbpp": {256: (52.9, 43.9), 512: (41.5, 32.8)}},
    "ast_span": {"humaneval": {256: (40.9, 36.6), 512: (40.2, 36.6)}, "mbpp": {256: (51.6, 42.9), 512: (39.7, 31.5)}},
    "ast": {"humaneval": {256: (42.1, 37.2), 512: (40.2, 36.6)}, "mbpp": {256: (52.9, 44.2), 512: (42.3, 33.3)}},
}
TABLE_2_PRINTS = {("ast", "mbpp", 256): (52.9, 44.9)}
"""Where Table 2 does not print what Table 1 prints."""
PAPER_AUTOREGRESSIVE = {
    "DeepSeek-Coder-33B": (50.6, 44.5, 80.4, 70.1),
    "CodeQwen1.5-7B": (51.8, 45.7, 73.5, 60.8),
    "CodeLlama-7B": (37.8, 35.4, 59.5, 46.8),
    "CodeLlama-13B": (42.7, 38.4, 63.5, 52.6),
}
"""Quoted in Table 1 from the EvalPlus leaderboard: HE, HE+, MBPP, MBPP+."""
IN_TABLE = {1: ("none", "random", "ast"), 2: ("random", "ast_span", "ast")}
PAIRS = [("random", "ast"), ("random", "ast_span"), ("ast_span", "ast"), ("none", "random"), ("none", "ast")]
"""Every pair that is compared, in the paper's data and in ours."""


def printed(number: int, strategy: str, benchmark: str, length: int) -> tuple[float, float]:
    """What table `number` prints: percent on the base tests, and on base and plus."""
    own = TABLE_2_PRINTS.get((strategy, benchmark, length)) if number == 2 else None
    return own or PAPER[strategy][benchmark][length]


def paper_markdown(strategies: tuple[str, ...], autoregressive: bool = False) -> str:
    """The paper's own table of these strategies, as printed [% of tasks] (Table 2 if the span masking is in it)."""
    number = 2 if "ast_span" in strategies else 1
    columns = [(t, b, i) for t in (256, 512) for b in ("humaneval", "mbpp") for i in (0, 1)]
    lines = ["| | " + " | ".join(f"{HALVES[b][i]}, T = {t}" for t, b, i in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    if autoregressive:
        for name, values in PAPER_AUTOREGRESSIVE.items():
            lines.append(f"| {name} (quoted) | " + " | ".join(f"{v:.1f}" for v in values * 2) + " |")
    for s in strategies:
        cells = [f"{printed(number, s, b, t)[i]:.1f}" for t, b, i in columns]
        lines.append(f"| {STRATEGIES[s].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def checked() -> list[dict[str, Any]]:
    """Each percentage that Tables 1 and 2 print for a diffusion model, with the counts of tasks that round to it."""
    return [
        {
            "table": number,
            "strategy": strategy,
            "benchmark": HALVES[benchmark][part],
            "T": length,
            "printed": percent,
            "tasks": TASKS[benchmark],
            "counts": stats.recover(percent, TASKS[benchmark]),
        }
        for number, strategies in IN_TABLE.items()
        for strategy in strategies
        for benchmark in TASKS
        for length in (256, 512)
        for part, percent in enumerate(printed(number, strategy, benchmark, length))
    ]


def misprints() -> list[str]:
    """The printed percentages that no whole number of tasks gives, in sentences."""
    rows = checked()
    out = []
    for row in (r for r in rows if not r["counts"]):
        where = [row[k] for k in ("strategy", "benchmark", "T")]
        other = [r for r in rows if [r[k] for k in ("strategy", "benchmark", "T")] == where and r["counts"]]
        says = "".join(f" Table {r['table']} says {r['printed']} ({r['counts'][0]} of {r['tasks']})." for r in other)
        title = STRATEGIES[row["strategy"]].title
        out.append(
            f"Table {row['table']} prints {row['printed']} for {title} on {row['benchmark']} at "
            f"T = {row['T']}, which no whole number of {row['tasks']} tasks gives.{says}"
        )
    return out


def claims() -> list[dict[str, Any]]:
    """Every comparison in the paper's tables: its counts and the least and greatest exact McNemar p they allow.

    `holm_min`: the least p adjusted for all these comparisons, each taken at its most favourable. Where it is not
    below 0.05, no reading of the paper's counts makes the difference significant.
    """
    out = []
    for one, two in PAIRS:
        number = 2 if "ast_span" in (one, two) else 1
        for benchmark, n in TASKS.items():
            for length in (256, 512):
                both = (printed(number, s, benchmark, length) for s in (one, two))
                for part, (a, b) in enumerate(zip(*both, strict=True)):
                    head = {"table": number, "from": one, "to": two, "benchmark": HALVES[benchmark][part], "T": length}
                    out.append(head | {"difference": round(b - a, 1), "tasks": n, **stats.claim(str(a), str(b), n)})
    bearable = [r for r in out if not r["misprint"]]
    for row, p in zip(bearable, stats.holm([r["p_min"] for r in bearable]), strict=True):
        row["holm_min"] = p
    return out


def claims_said(records: list[dict[str, Any]], level: float = 0.05) -> str:
    """What the paper's own counts allow, in one paragraph."""
    bearable = [r for r in records if not r["misprint"]]
    raw, family = ([r for r in bearable if r[k] < level] for k in ("p_min", "holm_min"))
    sure = [r for r in bearable if r["p_max"] < level]
    ahead = [r for r in bearable if (r["from"], r["to"]) == ("random", "ast")]
    return (
        f"Of the {len(bearable)} comparisons whose counts can be recovered, {len(raw)} could lie below p = {level:g} "
        "if nearly every task that one model solves were also solved by the other (the case most favourable to a "
        f"difference); {len(family)} of them when adjusted for the family (Holm); {len(sure)} must, whatever the "
        f"overlap. Between random and AST masking, {sum(r['p_min'] < level for r in ahead)} of {len(ahead)} could."
    )
