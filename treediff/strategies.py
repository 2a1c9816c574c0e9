"""The masking rules: one record each. Whatever chooses, draws, counts or names a rule takes it from here.

A new rule is a function like those in masking/rules.py and a record here: docs/rules.md shows one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """A masking rule, or `none`: the backbone without fine-tuning."""

    name: str  # the value of the switch `masking`
    title: str
    colour: str  # colour-blind-safe, by Okabe and Ito
    marker: str  # matplotlib's
    rule: str = ""  # "module:function", found when the rule is applied: the settings load no torch
    reads: str = ""  # the data column (examples.COLUMNS) that it reads besides the labels
    paper: bool = False  # whether its results stand in the paper's tables


_RULES = "treediff.masking.rules:"
STRATEGIES = {
    s.name: s
    for s in (
        Strategy("none", "Backbone", "#777777", "s"),
        Strategy("random", "Random masking", "#0072B2", "o", f"{_RULES}random_mask", paper=True),
        Strategy("ast_span", "AST (span)", "#CC79A7", "^", f"{_RULES}span_mask", "spans", paper=True),
        Strategy("ast", "AST (TreeDiff)", "#D55E00", "D", f"{_RULES}ast_mask", paper=True),
        Strategy("identifier", "Whole names", "#009E73", "v", f"{_RULES}group_mask", "names"),
        Strategy("line", "Whole lines", "#E69F00", "P", f"{_RULES}group_mask", "lines"),
        Strategy("ast_hole", "One node", "#56B4E9", "*", f"{_RULES}node_mask", "spans"),
    )
}
"""By name, in the order of tables and figures."""

MASKINGS = tuple(s.name for s in STRATEGIES.values() if s.paper)
"""The paper's rules, in the order of its Table 2."""
BEYOND = tuple(s.name for s in STRATEGIES.values() if s.rule and not s.paper)
"""Rules that are not the paper's: reported where they were run."""
