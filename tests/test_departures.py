"""Both counts: ours, and EvalPlus's where it fails right programs."""

import json

import pytest
from test_score import FILES, OFFICIAL, official

from treediff.cli import main
from treediff.config import resolve
from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.files import read_json, write_json
from treediff.report import report
from treediff.sampling.run import samples_path, settings
from treediff.scoring import departures, score, stats
from treediff.scoring.run import ledger_path, read

LOOP = "def sum_digits(n):\n    s = 0\n    while n: n, s = n // 10, s + n % 10\n    return s\n"
RECURSIVE = "def sum_digits(n):\n    return n if n < 10 else n % 10 + sum_digits(n // 10)\n"


def verdict(base="pass", plus="pass", seconds=0.1, reason=""):
    return {"base": base, "plus": plus, "reason": reason, "seconds": seconds}


def ledger(tasks):
    return {"benchmark": "mbpp", "settings": {}, "sandbox": {}, "tasks": tasks}


@pytest.mark.parametrize(
    ("task", "program", "given", "differs"),
    [
        ("HumanEval/32", "", verdict(), {"base": "fail", "plus": "fail"}),
        ("HumanEval/32", "", verdict(plus="fail"), {"base": "fail"}),
        ("HumanEval/32", "", verdict("timeout", "fail"), None),
        ("HumanEval/33", "", verdict(), None),
        ("Mbpp/566", RECURSIVE, verdict(), {"plus": "fail"}),
        ("Mbpp/566", RECURSIVE, verdict(plus="timeout"), None),
        ("Mbpp/566", LOOP, verdict(), None),
        ("Mbpp/566", "(" * 10_000, verdict(), None),
        ("Mbpp/566", "\0", verdict(), None),
        ("Mbpp/255", "", verdict(), {"plus": "fail"}),
        ("Mbpp/599", "for i in x: pass", verdict(seconds=42.0), {"plus": "fail"}),
        ("Mbpp/599", "for i in x: pass", verdict(seconds=0.4), None),
        ("Mbpp/599", "sum(range(n))", verdict(seconds=9.0), None),
    ],
)
def test_a_right_program_that_evalplus_fails_is_marked_and_no_other(task, program, given, differs):
    plain = ledger({task: given, "Mbpp/2": verdict("fail", "fail")})
    made = departures.marked(plain, {task: [program]})
    assert made["tasks"][task].get("evalplus") == differs
    assert list(made["departures"]) == ([task] if differs else [])
    assert departures.marked(made, {task: [program]}) == made
    theirs = departures.counted(made, "evalplus")
    for part in ("base", "plus"):
        assert theirs["tasks"][task][part] == (differs or {}).get(part, given[part])
    assert departures.other(theirs)["tasks"] == made["tasks"]
    assert departures.other(made)["tasks"] == theirs["tasks"]
    assert departures.counted(made, "own") == made


def test_each_sample_has_its_own_mark():
    plain = ledger({"Mbpp/566": [verdict(), verdict(), verdict("fail", "fail")]})
    made = departures.marked(plain, {"Mbpp/566": [LOOP, RECURSIVE, RECURSIVE]})
    assert ["evalplus" in v for v in made["tasks"]["Mbpp/566"]] == [False, True, False]
    assert stats.counts(made, "plus")["Mbpp/566"] == (2, 3)
    assert stats.counts(departures.counted(made, "evalplus"), "plus")["Mbpp/566"] == (1, 3)


def test_a_ledger_without_marks_is_not_counted_as_evalplus_does(tmp_path):
    path = tmp_path / "old.json"
    write_json(path, ledger({"HumanEval/32": verdict()}))
    assert read(path, "own")["tasks"]
    with pytest.raises(UserError, match=r"old\.json: verdicts: .*score its samples again"):
        read(path, "evalplus")


def test_tables_give_both_counts_where_they_differ(runs):
    cfg = resolve("paper", lengths=[256], benchmarks=["humaneval"])
    tasks = {f"HumanEval/{i}": verdict() if i < 40 else verdict("fail", "fail") for i in range(164)}
    made = departures.marked(ledger(tasks) | {"benchmark": "humaneval"}, {t: [""] for t in tasks})
    write_json(ledger_path(cfg, "humaneval", 256), made)
    path = samples_path(cfg, "humaneval", 256)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"task_id": "HumanEval/0", "settings": settings(cfg, 256)}) + "\n")
    texts = {v: report.rates_table(report.pass_rates(cfg.but(verdicts=v), ("ast",))).csv() for v in ("own", "evalplus")}
    assert "(40/164; EvalPlus: 39)" in texts["own"]
    assert "(39/164; own: 40)" in texts["evalplus"]


@pytest.mark.parametrize(
    ("benchmark", "where"),
    [
        ("humaneval", ["HumanEval/31", "HumanEval/32"]),
        ("mbpp", ["Mbpp/566", "Mbpp/567"]),
        pytest.param("mbpp", ["Mbpp/566", "Mbpp/567", "Mbpp/599"], marks=pytest.mark.slow),
    ],
)
def test_the_real_programs_that_depart_are_counted_as_the_published_verdicts_do(
    benchmark, where, shared, tmp_path, runs, capsys
):
    """Those of the three tasks, run; all other tasks' verdicts are the published ones."""
    source = shared / "data/benchmarks" / FILES[benchmark]
    rows = [r for r in benchmarks.unpack(source).splitlines() if json.loads(r)["task_id"] in where]
    data, out, status = tmp_path / "data.jsonl", tmp_path / "ledger.json", official(shared, benchmark)
    data.write_bytes(b"\n".join(rows))
    samples = shared / f"data/completions/{benchmark}-qwen2.5-coder-1.5b.jsonl"
    command = ["score", "--benchmark", benchmark, "--problems", str(data), "--samples", str(samples), "--out", str(out)]
    main([*command, "--verdicts", "evalplus"])
    said = capsys.readouterr().out
    found = read_json(out)
    theirs = departures.counted(found, "evalplus")
    assert {t: [v[p] == "pass" for p in ("base", "plus")] for t, v in theirs["tasks"].items()} == {
        t: [s == "pass" for s in status[t]] for t in where
    }
    odd = [
        t
        for t, v in found["tasks"].items()
        if [v["base"] == "pass", v["plus"] == "pass"] != [s == "pass" for s in status[t]]
    ]
    assert odd == list(found["departures"]) == [t for t in where if t in ("Mbpp/566", "Mbpp/599")]
    assert (f"our own verdicts: base {len(where)}/{len(where)}" in said) == (benchmark == "mbpp")
    # With the others' published verdicts, the published count.
    rest = {t: verdict(*s) for t, s in status.items() if t not in where}
    whole = departures.marked(
        {**found, "tasks": found["tasks"] | rest}, {t: [""] for t in status} | programs(samples, data, benchmark)
    )
    counts = score.passes(departures.counted(whole, "evalplus"))
    assert (counts["n"], counts["base"], counts["plus"]) == OFFICIAL[benchmark]


def programs(samples, data, benchmark):
    return score.read_samples(samples, benchmarks.load_benchmark(benchmark, data)[0])[0]


def test_the_benchmark_s_own_solution_of_humaneval_32_departs(shared, tmp_path, runs):
    benchmark = "humaneval"
    source = shared / "data/benchmarks" / FILES[benchmark]
    row = next(r for r in benchmarks.unpack(source).splitlines() if json.loads(r)["task_id"] == "HumanEval/32")
    problem = json.loads(row)
    data, samples = tmp_path / "data.jsonl", tmp_path / "samples.jsonl"
    data.write_bytes(row)
    samples.write_text(json.dumps({"task_id": problem["task_id"], "completion": problem["canonical_solution"]}))
    made = score.score(benchmark, data, samples, tmp_path / "ledger.json")
    assert score.passes(made) == {"n": 1, "base": 1, "plus": 1}
    assert score.passes(departures.counted(made, "evalplus")) == {"n": 1, "base": 0, "plus": 0}
    assert score.score(benchmark, data, samples, tmp_path / "ledger.json") == made
