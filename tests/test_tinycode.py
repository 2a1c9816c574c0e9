"""TinyCode: the split holds by rule, the solutions pass their tests, and the tests catch one-token mistakes.

`python tests/test_tinycode.py` runs the mutants of all 600 benchmark problems and EvalPlus on them, and lists the
mutants that live (two minutes).
"""

from __future__ import annotations

import ast
import collections
import copy
import io
import itertools
import re
import time
import tokenize
from collections.abc import Iterator
from typing import Any

import pytest

from treediff import pipeline
from treediff.config import resolve
from treediff.data import examples, tinycode
from treediff.errors import UserError
from treediff.masking import tokens

BENCHMARK = tinycode.benchmark()


# --- running programs --------------------------------------------------------------------------------------------


class TooLong(Exception):
    pass


class _Guard(ast.NodeTransformer):
    """Every `while` calls `tick` once a turn, so that an endless mutant ends."""

    def visit_While(self, node: ast.While) -> ast.While:
        self.generic_visit(node)
        node.body.insert(0, ast.parse("tick()").body[0])
        return node


def solver(code: str) -> Any:
    """The function `solve` of a program; it raises TooLong after 2,000 turns of `while` in one call."""
    turns = 0

    def tick() -> None:
        nonlocal turns
        turns += 1
        if turns > 2000:
            raise TooLong

    names: dict[str, Any] = {"tick": tick}
    tree = ast.fix_missing_locations(_Guard().visit(ast.parse(code)))
    exec(compile(tree, "tiny", "exec"), names)

    def run(args: list[Any]) -> Any:
        nonlocal turns
        turns = 0
        return names["solve"](*copy.deepcopy(args))

    return run


def passes(code: str, inputs: list[list[Any]], expected: list[Any]) -> bool:
    run = solver(code)
    try:
        return all(run(args) == want for args, want in zip(inputs, expected, strict=True))
    except Exception:
        return False


def whole(task: dict[str, Any]) -> str:
    return task["prompt"] + task["canonical_solution"]


def inputs_of(task: dict[str, Any]) -> list[list[Any]]:
    return task["base_input"] + task["plus_input"]


# --- mutants -----------------------------------------------------------------------------------------------------

COMPARE = ["<", "<=", ">", ">=", "==", "!="]
SWAPS = {
    **{op: [other for other in COMPARE if other != op] for op in COMPARE},
    **{"+": ["-", "*"], "-": ["+", "*"], "*": ["+", "-"], "//": ["%", "*"], "%": ["//", "*"]},
    **{"+=": ["-=", "*="], "-=": ["+=", "//="], "*=": ["+="], "//=": ["-=", "%="]},
    **{"and": ["or"], "or": ["and"], "True": ["False"], "False": ["True"], "break": ["continue"]},
    **{"continue": ["break"], "max": ["min"], "min": ["max"], "upper": ["lower"], "isupper": ["islower"]},
}

EQUIVALENT = [
    # `a % k` is never negative for k > 0: nothing lies below 0, and of 0 and 1 nothing above 1
    (r"% \d+ (==|<=) 0", r"% \d+ (==|<=) 0"),
    (r"% \d+ (!=|>) 0", r"% \d+ (!=|>) 0"),
    (r"% 2 (==|>=) 1", r"% 2 (==|>=) 1"),
    # i climbs to len(nums) by ones, and the digits loop starts at n >= 0 and stays there
    (r"i (<|!=) len\(nums\)", r"i (<|!=) len\(nums\)"),
    (r"while n (>|!=) 0:\n        x = n % 10", r"while n (>|!=) 0:\n        x = n % 10"),
]
"""Patterns before and after a change which provably changes nothing; such mutants do not count."""


def mutants(code: str) -> Iterator[str]:
    """Programs that differ from `code` in one token and still compile, without the provably equivalent."""
    lines = code.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        new = SWAPS.get(token.string, [])
        if token.type == tokenize.NUMBER:
            new = [str(int(token.string) + 1), str(int(token.string) - 1)]
        (row, start), (_, end) = token.start, token.end
        for text in new:
            line = lines[row - 1][:start] + text + lines[row - 1][end:]
            mutant = "".join([*lines[: row - 1], line, *lines[row:]])
            try:
                compile(mutant, "tiny", "exec")
            except SyntaxError:
                continue
            if not equivalent(code, mutant):
                yield mutant


def equivalent(code: str, mutant: str) -> bool:
    return any(re.sub(a, "#", code) == re.sub(b, "#", mutant) for a, b in EQUIVALENT)


def kills(task: dict[str, Any]) -> tuple[int, list[str]]:
    """The number of a task's mutants, and those that pass all its tests."""
    inputs = inputs_of(task)
    run = solver(whole(task))
    expected = [run(args) for args in inputs]
    found = list(
        mutants("def solve(" + task["prompt"].split("(")[1].split("\n")[0] + "\n" + task["canonical_solution"])
    )
    return len(found), [m for m in found if passes(m, inputs, expected)]


def test_mutants_die():
    total, alive = 0, 0
    for task in BENCHMARK[::5]:
        n, left = kills(task)
        total, alive = total + n, alive + len(left)
    assert total > 1000
    assert 1 - alive / total >= 0.95


def test_the_mutator_itself():
    code = "def solve(n):\n    while n > 3:\n        n -= 2\n    return n % 2 == 0\n"
    found = list(mutants(code))
    assert len(found) == len(set(found)) == 5 + 2 + 2 + 2 + 2 + 2 + 4
    assert not any("<= 0" in m for m in found)


# --- the benchmark -----------------------------------------------------------------------------------------------


def test_the_form_of_the_benchmark():
    assert [t["task_id"] for t in BENCHMARK] == [f"TinyCode/{i}" for i in range(600)]
    assert [t["half"] for t in BENCHMARK] == ["constants"] * 300 + ["composition"] * 300
    for task in BENCHMARK:
        assert set(task) == {
            *("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input"),
            *("atol", "contract", "test", "half", "family"),
        }
        assert len(task["base_input"]) == 9
        assert len(task["plus_input"]) == 18
        assert len({repr(args) for args in inputs_of(task)}) == 27
        tree = ast.parse(whole(task))
        assert tree.body[0].name == task["entry_point"] == "solve"
        assert ast.get_docstring(tree.body[0])


def test_expected_results_vary():
    """A benchmark problem that a constant answers would measure nothing; only lists of 18 deny `any is not 18`."""
    for task in BENCHMARK:
        run = solver(whole(task))
        results = [repr(run(args)) for args in inputs_of(task)]
        assert max(collections.Counter(results).values()) <= 24, (task["task_id"], results)


def evalplus_passes(tasks: list[dict[str, Any]]) -> int:
    from evalplus.evaluate import check_correctness
    from evalplus.gen.util import trusted_exec

    good = 0
    for task in tasks:
        oracle: dict[str, Any] = {}
        for part in ("base", "plus"):
            results, seconds = trusted_exec(whole(task), task[f"{part}_input"], "solve", record_time=True)
            oracle |= {part: results, f"{part}_time": seconds}
        result = check_correctness("humaneval", 0, task, whole(task), oracle)
        good += result["base"][0] == result["plus"][0] == "pass"
    return good


def test_canonical_solutions_pass_evalplus():
    """In a clean process: EvalPlus limits the memory of the processes it forks from this one."""
    import subprocess
    import sys

    program = "import test_tinycode as t; print(t.evalplus_passes(t.BENCHMARK[::30]))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=__file__.rpartition("/")[0], capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == ["20"], done.stderr[-2000:]


# --- the split ---------------------------------------------------------------------------------------------------


def normal(text: str) -> str:
    return " ".join(text.lower().split())


def problem_of(row_id: str) -> tinycode.Problem:
    family, ops, constants = f"{row_id}/".split("/")[:3]
    values, names = iter(constants.split("-")), tuple(ops.split("-"))
    read = [next(values) if tinycode.OPS[op].values else None for op in names]
    return tinycode.Problem(family, names, tuple(int(k) if k and k.isdigit() else k for k in read))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_held_out_is_in_training(seed):
    rows = tinycode.training(20_000, seed)
    assert {tinycode.split_of(problem_of(r["id"])) for r in rows} == {"train"}
    held = [*BENCHMARK, *tinycode.benchmark(seed + 1)]
    code = {normal(t["canonical_solution"]) for t in held}
    assert not {normal(r["input"]) for r in rows} & {normal(t["prompt"]) for t in held}
    assert not {normal(r["solution"].split("\n", 1)[1]) for r in rows} & code


def test_code_and_text_name_the_problem():
    """No two combinations of operations share a text or code whatever the constants, so no split can leak."""
    texts, codes = {}, {}
    for family in tinycode.FAMILIES.values():
        for ops in itertools.product(*(tinycode.KINDS[s.kind] for s in family.slots)):
            problem = tinycode.Problem(family.name, ops, tuple(7000 + i for i in range(len(ops))))
            for seen, text in ((texts, problem.prompt), (codes, problem.code)):
                form = normal(re.sub(r"700\d", "#", text))
                assert form not in seen, (problem, seen[form])
                seen[form] = problem


def test_held_out_pairs_are_never_trained_on_and_every_operation_is():
    trained, pairs = set(), set()
    for pools in tinycode._pools("train").values():
        for pool in pools:
            trained |= {(pool.family, i, op) for i, op in enumerate(pool.ops)}
            pairs |= {frozenset(p) for p in itertools.combinations([o for o in pool.ops if o != "const"], 2)}
    for pools in tinycode._pools("composition").values():
        for pool in pools:
            assert any(frozenset(p) not in pairs for p in itertools.combinations(pool.ops, 2))
            assert all((pool.family, i, op) in trained for i, op in enumerate(pool.ops))
    for pools in tinycode._pools("constants").values():
        assert not any(tinycode._held_pair(tinycode.FAMILIES[p.family], p.ops) for p in pools)


def test_held_out_constants_are_never_trained_on_with_their_combination():
    for name, pools in tinycode._pools("train").items():
        for pool in pools:
            for axis, held in zip(pool.axes, tinycode._held_constants(name, pool.ops), strict=True):
                assert axis
                assert not set(axis) & set(held)


def test_the_split_of_the_benchmark():
    """The benchmark's tasks are of the split that their half names: looked up through all problems of a family."""
    for half in ("constants", "composition"):
        prompts = {t["prompt"] for t in BENCHMARK if t["half"] == half and t["family"] in ("sum", "keep_map")}
        for name in ("sum", "keep_map"):
            for pool in tinycode._pools(half).get(name, []):
                problems = [pool.problem(i) for i in range(pool.size)]
                assert {tinycode.split_of(p) for p in problems} == {half}
                prompts -= {p.prompt for p in problems}
        assert not prompts


# --- training ----------------------------------------------------------------------------------------------------


def test_training_rows():
    started = time.process_time()
    rows = tinycode.training(20_000, 3)
    assert time.process_time() - started < 3
    for key in ("id", "input", "solution"):
        assert len({r[key] for r in rows}) == 20_000
    for row in rows[::10]:
        problem = problem_of(row["id"])
        assert row["input"] == problem.prompt
        assert row["output"] == f"<think>\n{problem.reasoning}\n</think>\n\n```python\n{row['solution']}\n```"
        assert "\n" not in problem.reasoning
        assert row["solution"] == ast.unparse(ast.parse(row["solution"])).replace("'", '"')
    assert {r["input"].split('"""')[0] for r in rows} == {t["prompt"].split('"""')[0] for t in BENCHMARK}


def test_determinism():
    assert tinycode.training(500, 7) == tinycode.training(500, 7)
    assert tinycode.training(500, 7) != tinycode.training(500, 8)
    assert tinycode.benchmark(4) == tinycode.benchmark(4)
    assert tinycode.benchmark(4) != BENCHMARK


def test_training_code_passes_the_tests_of_its_problem():
    for row in tinycode.training(300, 5):
        problem = problem_of(row["id"])
        inputs = tinycode._inputs(problem)
        run = solver(problem.prompt + problem.body)
        assert passes(row["solution"], inputs, [run(args) for args in inputs])


def test_rows_have_a_limit():
    most = sum(tinycode.count().values())
    assert most > 100_000
    with pytest.raises(UserError, match=str(most)):
        tinycode.training(most + 1, 0)
    with pytest.raises(UserError, match="rows"):
        tinycode.training(0, 0)


@pytest.mark.parametrize("rows", [4000, 20_000])
def test_constructs(rows):
    """The tiers of the paper's Table 3 are there to be masked: shares of the programs that hold each construct."""
    counts: collections.Counter[str] = collections.Counter()
    for row in tinycode.training(rows, 0):
        kinds = {type(node).__name__ for node in ast.walk(ast.parse(row["solution"]))}
        counts["if"] += bool(kinds & {"If", "IfExp"})
        counts["for"] += bool(kinds & {"For", "ListComp"})
        counts["while"] += "While" in kinds
        counts["elif"] += "elif" in row["solution"]
        counts["else"] += " else" in row["solution"]
        counts["return"] += "Return" in kinds
    share = {name: n / rows for name, n in counts.items()}
    assert share["if"] > 0.70
    assert share["for"] > 0.60
    assert share["while"] > 0.15
    assert share["elif"] > 0.15
    assert share["else"] > 0.12
    assert share["return"] == 1


def test_families_share_the_rows():
    families = collections.Counter(r["id"].split("/")[0] for r in tinycode.training(4000, 0))
    assert set(families) == set(tinycode.FAMILIES)
    assert max(families.values()) < 120


def test_programs_stay_short(runs):
    """The tiny preset's tokenizer takes 53 tokens for an answer on average and 80 at most: T = 96 holds them all."""

    cfg = resolve("tiny", pretrain={"rows": 4000})
    tok = pipeline.tokenizer(cfg)
    encoded = [examples.encode(cfg, tok, examples.example(r)) for r in tinycode.training(2000, 0)]
    answers = [int((e["labels"] > tokens.PROMPT).sum()) for e in encoded]
    assert max(answers) <= 80
    assert sum(answers) / len(answers) < 56
    assert max(len(e["input_ids"]) for e in encoded) < cfg.max_length


def test_results_are_fixed_for_empty_inputs():
    for task in BENCHMARK:
        if task["prompt"].startswith("def solve(nums)"):
            solver(whole(task))([[]])


if __name__ == "__main__":
    total, alive = 0, []
    for task in BENCHMARK:
        n, left = kills(task)
        total, alive = total + n, alive + [(task["family"], task["prompt"], m) for m in left]
    print(f"mutants: {total}, killed {1 - len(alive) / total:.4f}; EvalPlus passes {evalplus_passes(BENCHMARK)} of 600")
    print(collections.Counter(family for family, _, _ in alive).most_common())
    for family, prompt, mutant in alive:
        print(f"--- {family}\n{prompt}{mutant}")
