"""On how many tokens two rules differ: against a count by hand and a loop over sets, and what is said of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treediff import cli
from treediff.config import resolve
from treediff.data import prepare, reach, tinycode
from treediff.masking import rules
from treediff.masking.tokens import CODE
from treediff.report.paper import PAPER

CFG = resolve("paper")
RANDOM, AST = CFG.with_masking("random"), CFG.with_masking("ast")
FLAT = AST.but(tier_weights=dict.fromkeys(AST.tier_weights, 0.3), default_weight=0.3)
EXACT = RANDOM.but(random_budget="exact")


def record(uid: int, codes: list[int]) -> dict:
    return {"uid": uid, "labels": np.array(codes, np.uint8), "spans": np.zeros(0, np.int32)}


def test_rules_that_are_the_same_differ_nowhere():
    rows = [record(i, [0, 1, 1, *np.random.default_rng(i).integers(2, 7, 30).tolist()]) for i in range(20)]
    assert not reach.differing(FLAT, EXACT, rows).any()
    assert not reach.differing(AST, AST.but(seed=0), rows).any()
    assert reach.differing(AST, EXACT, rows).sum() > 1
    prose = [record(i, [0, 0, 1, 1, 1]) for i in range(5)]
    assert not reach.differing(AST, RANDOM, prose).any()  # they differ on code alone


def test_two_code_tokens_differ_as_often_as_a_count_by_hand_says():
    """Exact against Bernoulli, equal weights: below P = 1/2 the budget is 0, above it 1. So the masks differ on as many
    tokens as are drawn (2 P on average), or on one token where none or both are drawn ((1 - P)^2 + P^2)."""
    rows, draws = [record(i, [0, 1, 4, 4]) for i in range(4000)], 6
    found = reach.differing(FLAT, RANDOM, rows, draws)
    levels = [
        rules.eps_at(CFG, step, draws) + (1 - rules.eps_at(CFG, step, draws)) * np.linspace(0, 1, 2001)
        for step in range(draws)
    ]
    expected = np.mean([np.where(p < 0.5, 2 * p, (1 - p) ** 2 + p**2).mean() for p in levels])
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / len(rows) ** 0.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(0, 2**40))
def test_a_loop_over_rows_and_sets_counts_the_same(codes, uid):
    rows = [record(uid + i, sorted(c)) for i, c in enumerate(codes)]
    expected = []
    for r in rows:
        ids, labels = torch.tensor([r["uid"]]), torch.from_numpy(r["labels"])[None]
        count = 0
        for step in range(5):
            p = rules.noise_level(CFG, ids, step, 5)
            sets = [
                {i for i, on in enumerate(rules.corrupt(c, labels, None, ids, step, p)[0].tolist()) if on}
                for c in (RANDOM, AST)
            ]
            count += len((sets[0] | sets[1]) - (sets[0] & sets[1]))
        expected.append(count / 5)
    assert reach.differing(RANDOM, AST, rows, 5).tolist() == pytest.approx(expected)


def test_the_paper_s_largest_claim():
    ast, random = PAPER["ast"]["humaneval"], PAPER["random"]["humaneval"]
    assert max(a[0] - b[0] for a, b in zip(ast.values(), random.values(), strict=True)) == pytest.approx(reach.CLAIM)


def test_shares_and_implied_effect_are_those_of_the_rows():
    rows = [record(i, [0] * 5 + [1] * 6 + [4] * 3 + [5] * 1) for i in range(40)]
    found = reach.reach(CFG, rows)
    assert found["code_share"] == 0.4
    assert (found["rows"], found["answer_tokens"], found["code_tokens"]) == (40, 400, 160)
    pair = found["pairs"]["random, ast"]
    assert pair["per_step"] == pytest.approx(128 * pair["per_row"], rel=0.01)
    assert pair["points_per_million"] == pytest.approx(2.5 / (pair["per_row"] * 128 * 3516 / 1e6), rel=0.01)
    assert "too few for more than a hint" in reach.text(found)
    assert "code is 160 of 400 answer tokens (40.0%)" in reach.text(found)


def test_the_plan_says_it_once_the_data_is_there(runs, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in tinycode.training(30, 0)))
    switches = ["--preset", "tiny", "--data", str(path), "--rows", "30"]
    cli.main(["train", *switches, "--plan"])
    assert "known once the data is prepared" in capsys.readouterr().out
    cli.main(["prepare", *switches])
    said = capsys.readouterr().out
    stats = json.loads(said[: said.rindex("}") + 1])
    code, rest = (
        sum(stats["tokens"][t] for t in ("default", "skeleton", "data", "condition", "control")),
        stats["tokens"],
    )
    assert stats["reach"]["code_share"] == pytest.approx(code / (code + rest["reasoning"]), abs=1e-4)
    cli.main(["train", *switches, "--plan"])
    assert "random and ast differ on" in capsys.readouterr().out


def test_the_figure_of_fidelity_is_that_of_the_rows(runs, shared):
    path, tokenizer = shared / "data/think_code/can_ai_code_full.jsonl", shared / "tokenizers/llada_standin_8k"
    cfg = resolve("paper", data=str(path), tokenizer=str(tokenizer), rows=0, workers=1, benchmarks=[])
    found = reach.reach(cfg, prepare.prepare(cfg))
    pair = found["pairs"]["random, ast"]
    text = (Path(__file__).parents[1] / "docs" / "fidelity.md").read_text()
    share = f"{100 * found['code_share']:.1f} %"
    said = f"code is {found['code_tokens']:,} of {found['answer_tokens']:,} answer tokens ({share})"
    assert f"In the {found['rows']} rows at hand" in text
    assert said in text
    assert f"differ on {pair['per_row']:.1f} ± {pair['per_row_error']:.1f} tokens a row" in text
    assert f"{pair['points_per_million']:.2f} points per million" in text


assert CODE == 2  # what the codes above mean
