"""The masking rules: one record each. Whatever names, draws or counts a rule takes it from here."""

from __future__ import annotations

MASKINGS = ("random", "ast_span", "ast")
"""The paper's corruption strategies, in the order of its Table 2."""


BEYOND = ("identifier", "line")
"""Strategies that are not the paper's: reported where they were run."""


READS = {"ast_span": "spans", "identifier": "names", "line": "lines"}
"""The column of the encoded samples that a rule reads besides the labels."""


STRATEGY = {"base": "#777777", "random": "#0072B2", "ast_span": "#CC79A7", "ast": "#D55E00"}


MARKER = {"base": "s", "random": "o", "ast_span": "^", "ast": "D", "identifier": "v", "line": "P"}


NAMES = {"base": "Backbone", "random": "Random masking", "ast_span": "AST (span)", "ast": "AST (TreeDiff)"}
