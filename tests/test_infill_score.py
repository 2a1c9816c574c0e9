"""Filled holes in the sandbox: HumanEval-Infilling's own solutions pass, empty holes pass as often as is known."""

import json

import pytest

from treediff.config import resolve
from treediff.data import holes
from treediff.scoring import infill, stats

FLOORS = {"single-line": (1033, 27), "multi-line": (5815, 55), "random-span": (1640, 30), "random-span-light": (164, 0)}


def load(shared, name):
    return holes.infilling(name, shared / f"data/benchmarks/infilling/HumanEval-{holes._FILES[name][0]}.jsonl.gz")


def passing(every, fill):
    jobs = {(h.id, 0): (h, h.program(fill(h))) for h in every}
    verdicts, _ = infill.checked(jobs, 2, "check")
    return {key[0] for key, v in verdicts.items() if v["base"] == "pass"}


@pytest.mark.parametrize("name", FLOORS)
def test_a_sample_of_canonical_completions_passes_and_a_syntax_error_does_not(shared, name):
    every = load(shared, name)
    assert len(every) == FLOORS[name][0]
    some = every[:: len(every) // 6]
    assert passing(some, lambda h: h.text) == {h.id for h in some}
    assert not passing(some[:2], lambda h: "((")


def test_a_program_that_ends_its_process_or_replaces_the_check_has_not_passed(shared):
    hole = load(shared, "single-line")[3]
    cheats = (
        "    import os; os._exit(0)\n",
        "    raise SystemExit\n",
        f"    return 0\n\ndef {holes.CHECK}(): return True\n",
    )
    cheats += ("    pass\nimport os; os._exit(0)\n", "    pass\ndef check(f): pass\n")
    verdicts, _ = infill.checked({("a", i): (hole, hole.program(c)) for i, c in enumerate(cheats)}, 1, "cheats")
    assert [v["base"] for v in verdicts.values()] == ["fail"] * len(cheats)


@pytest.mark.slow
def test_every_canonical_completion_passes_and_the_floors_are_the_known_ones(shared):
    sets = {name: load(shared, name) for name in FLOORS}
    every = [h for of in sets.values() for h in of]
    assert passing(every, lambda h: h.text) == {h.id for h in every}  # 8,652 of them
    empty = passing(every, lambda h: "")
    assert {name: (len(of), sum(h.id in empty for h in of)) for name, of in sets.items()} == FLOORS


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["humaneval", "mbpp"])
def test_programs_pass_without_the_docstrings_that_state_their_problem(shared, tmp_path, benchmark):
    from treediff.data import benchmarks
    from treediff.scoring import score

    file = {"humaneval": "HumanEvalPlus-v0.1.10", "mbpp": "MbppPlus-v0.2.0"}[benchmark]
    data = shared / f"data/benchmarks/{file}.jsonl.gz"
    problems, _ = benchmarks.load_benchmark(benchmark, data)
    lines = []
    for task, p in problems.items():
        program = holes.without_docstring(p["prompt"] + p["canonical_solution"], p["entry_point"])
        lines.append(json.dumps({"task_id": task, "solution": program}) + "\n")
    (tmp_path / "s.jsonl").write_text("".join(lines))
    ledger = score.score(benchmark, data, tmp_path / "s.jsonl", tmp_path / "l.json")
    assert score.passes(ledger) == {"n": len(problems), "base": len(problems), "plus": len(problems)}


def test_a_ledger_of_holes_counts_each_hole_of_its_program(shared, runs, tmp_path):
    file = shared / "data/benchmarks/infilling/HumanEval-SingleLineInfilling.jsonl.gz"
    cfg = resolve("paper", holes="single-line", benchmark_files={"single-line": str(file)}, limit=2, workers=2)
    by_key = infill.numbered(holes.load(cfg, "single-line"))
    assert len({task for task, _ in by_key}) == 2
    lines = [
        json.dumps({"task_id": t, "sample": k, "solution": h.program(h.text if k else "x x")}) + "\n"
        for (t, k), h in by_key.items()
    ]
    (tmp_path / "s.jsonl").write_text("".join(lines))
    ledger = infill.judge(cfg, "single-line", tmp_path / "s.jsonl", tmp_path / "l.json")
    counted = stats.counts(ledger, "base")
    assert {t: n for t, (_, n) in counted.items()} == {t: sum(u == t for u, _ in by_key) for t, _ in by_key}
    assert all(n - c == 1 for c, n in counted.values())
