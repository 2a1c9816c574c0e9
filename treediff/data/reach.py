"""How far a masking rule reaches: on how many tokens two rules differ, and the effect of each that the paper implies.

    found = reach(cfg, prepare.load(cfg))      # {"code_share": ..., "pairs": {"random, ast": {"per_step": ...}}}
    print(text(found))

Two runs of one seed see the same rows in the same order at the same noise levels, and draw from the same random
numbers. They differ on a token if one of them masks it and the other does not: the symmetric difference of their masks.
Its expected size is estimated from rows of the data set and draws over the noise schedule (Monte Carlo, with standard
error). AST (span) has random numbers of its own, so that its masks differ from the others' by chance as well.
Rules differ on code alone, so that nothing of it lies in the reasoning.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from treediff.config import Config
from treediff.masking import rules
from treediff.masking.tokens import CODE, PROMPT
from treediff.strategies import MASKINGS, STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Sequence

CLAIM = 2.5
"""The paper's largest difference between AST and random masking on HumanEval [points]: 42.1 against 39.6 at T = 256."""
PAPER_STEPS, PAPER_ROWS = 3516, 128
"""Its optimiser steps (150,000 rows, three epochs) and the rows of each."""

_ROWS = 200  # rows that are looked at, spread evenly over the data set
_DRAWS = 24  # masks of each, at noise levels of a training of as many steps


def differing(one: Config, two: Config, records: Sequence[dict[str, Any]], draws: int = _DRAWS) -> np.ndarray:
    """Tokens of each record that `one` masks and `two` does not, or the other way round, mean over `draws` steps:
    float64 (rows,). Records as in the data set: uid, labels, and what the rules read, int32 (flat triples)."""
    width = max(len(r["labels"]) for r in records)
    labels = torch.zeros((len(records), width), dtype=torch.uint8)  # padded with prompt, which is never masked
    for row, record in enumerate(records):
        labels[row, : len(record["labels"])] = torch.from_numpy(np.array(record["labels"], np.uint8))
    uid = torch.tensor([int(r["uid"]) for r in records])
    found = np.zeros(len(records))
    for step in range(draws):
        masks = []
        for cfg in (one, two):
            column = STRATEGIES[cfg.masking].reads
            groups = [np.array(r[column], np.int32).reshape(-1, 3) for r in records] if column else None
            masks.append(rules.corrupt(cfg, labels, groups, uid, step, rules.noise_level(cfg, uid, step, draws)))
        found += (masks[0] ^ masks[1]).sum(1).numpy()
    return found / draws


def reach(cfg: Config, data: Any, rows: int = _ROWS, draws: int = _DRAWS) -> dict[str, Any]:
    """What is known of `data` (sized, records by number) under the switches of `cfg`:

    rows looked at, their answer and code tokens and code's share; and for each pair of the paper's rules the expected
    number of differing tokens per row (with standard error, rows being drawn) and per step, and the points per million
    differing tokens that CLAIM implies if such rows are the paper's and its steps are trained.
    """
    chosen = [data[int(i)] for i in np.unique(np.linspace(0, len(data) - 1, rows).astype(int))]
    labels = np.concatenate([np.asarray(r["labels"]) for r in chosen])
    answer, code = int((labels != PROMPT).sum()), int((labels >= CODE).sum())
    pairs = {}
    for one, two in combinations(MASKINGS, 2):
        each = differing(cfg.with_masking(one), cfg.with_masking(two), chosen, draws)
        mean = float(each.mean())
        implied = CLAIM / (mean * PAPER_ROWS * PAPER_STEPS / 1e6) if mean else None
        pairs[f"{one}, {two}"] = {
            "per_row": round(mean, 3),
            "per_row_error": round(float(each.std(ddof=1) / len(each) ** 0.5), 3) if len(each) > 1 else None,
            "per_step": round(mean * cfg.rows_per_step, 1),
            "points_per_million": None if implied is None else float(f"{implied:.3g}"),
        }
    known: dict[str, Any] = {"rows": len(chosen), "of_rows": len(data), "rows_per_step": cfg.rows_per_step}
    known |= {"answer_tokens": answer, "code_tokens": code, "code_share": round(code / max(1, answer), 4)}
    return known | {"pairs": pairs}


def text(found: dict[str, Any]) -> str:
    """`reach`'s findings to read."""
    few = " (too few for more than a hint)" if found["rows"] < 100 else ""
    lines = [
        f"reach of the rules, from {found['rows']:,} of {found['of_rows']:,} rows{few}: code is "
        f"{found['code_tokens']:,} of {found['answer_tokens']:,} answer tokens ({found['code_share']:.1%})"
    ]
    for names, pair in found["pairs"].items():
        error = "" if pair["per_row_error"] is None else f" ± {pair['per_row_error']:.2g}"
        said = f"  {names.replace(', ', ' and ')} differ on {pair['per_row']:.4g}{error} tokens a row, "
        said += f"{pair['per_step']:,.0f} a step of {found['rows_per_step']} rows"
        if implied := pair["points_per_million"]:
            said += f"; {CLAIM} points over the paper's training: {implied:g} points per million of them"
        lines.append(said)
    return "\n".join(lines)
