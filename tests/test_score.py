"""Verdicts, ledgers, bad input and what is left after a kill."""

import gzip
import hashlib
import http.server
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.sandbox.values import pack, unpack
from treediff.scoring import score, verdicts
from treediff.scoring.verdicts import agrees

ADD = {
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "base_input": [[1, 2], [3, 4]],
    "plus_input": [[-1, 1], ["a", "b"]],
    "atol": 0,
}
RIGHT, WRONG = "    return a + b\n", "    return a - b\n"


@pytest.fixture
def bench(tmp_path, runs):
    """A benchmark of ten tasks, and a function that scores programs on it."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**ADD, "task_id": f"TinyCode/{i}"}) + "\n" for i in range(10)))

    def run(rows, out="ledger.json", **options):
        samples = tmp_path / "samples.jsonl"
        if isinstance(rows, dict):
            rows = [{"task_id": f"TinyCode/{i}", "completion": program} for i, program in rows.items()]
        samples.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return score.score("tinycode", data, samples, tmp_path / out, workers=2, **options)

    run.data, run.out, run.samples = data, tmp_path / "ledger.json", tmp_path / "samples.jsonl"
    return run


# --- verdicts -------------------------------------------------------------------------------------------------------

FILES = {"humaneval": "HumanEvalPlus-v0.1.10.jsonl.gz", "mbpp": "MbppPlus-v0.2.0.jsonl.gz"}
OFFICIAL = {"humaneval": (164, 72, 60), "mbpp": (378, 267, 225)}
# EvalPlus fails this right program where its own process has grown past its limit of 4 GiB of address space: the
# program's 101 nested calls then die with `SystemError: error return without exception set`. Alone, it passes there.
STARVED = "Mbpp/566"


def official(shared: Path, benchmark: str) -> dict[str, list[str]]:
    verdicts = json.loads((shared / "data/completions/verdicts.json").read_text())
    return verdicts[f"{benchmark}-qwen2.5-coder-1.5b-base"]["status"]


def differing(ledger: dict, status: dict[str, list[str]]) -> list[str]:
    """Tasks with another verdict than the official one, but for time-outs, which depend on the machine."""
    odd = [
        t
        for t, row in ledger["tasks"].items()
        if [row["base"] == "pass", row["plus"] == "pass"] != [s == "pass" for s in status[t]]
    ]
    slow = [t for t in odd if ledger["tasks"][t]["reason"].startswith("time-out") or ledger["tasks"][t]["seconds"] > 20]
    return sorted(set(odd) - set(slow) - {STARVED})


@pytest.mark.parametrize("benchmark", FILES)
def test_verdicts_of_some_real_programs(benchmark, shared, tmp_path, runs):
    """Every eighth task that is quick; the slow tests take all."""
    slow = {"Mbpp/255", "Mbpp/599", "Mbpp/392", "Mbpp/271", "Mbpp/603", "HumanEval/139", "HumanEval/15"}
    rows = gzip.decompress((shared / "data/benchmarks" / FILES[benchmark]).read_bytes()).splitlines()
    rows = [r for r in rows[::8] if json.loads(r)["task_id"] not in slow]
    data, out = tmp_path / "data.jsonl.gz", tmp_path / "ledger.json"
    data.write_bytes(gzip.compress(b"\n".join(rows)))
    samples = shared / f"data/completions/{benchmark}-qwen2.5-coder-1.5b.jsonl"
    ledger = score.score(benchmark, data, samples, out)
    assert len(ledger["tasks"]) == len(rows)
    assert differing(ledger, official(shared, benchmark)) == []


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", FILES)
def test_verdicts_of_all_real_programs_twice(benchmark, shared, tmp_path, runs):
    data = shared / "data/benchmarks" / FILES[benchmark]
    samples = shared / f"data/completions/{benchmark}-qwen2.5-coder-1.5b.jsonl"
    ledgers = [score.score(benchmark, data, samples, tmp_path / f"{i}.json") for i in range(2)]
    for ledger in ledgers:
        counts = score.passes(ledger)
        n, base, plus = OFFICIAL[benchmark]
        assert (counts["n"], counts["base"]) == (n, base)
        assert plus <= counts["plus"] <= plus + 2
        assert differing(ledger, official(shared, benchmark)) == []
        assert ledger["settings"]["data_release"] == FILES[benchmark].replace("-", " ").removesuffix(".jsonl.gz")
    kinds = [{t: (r["base"], r["plus"], r["reason"]) for t, r in ledger["tasks"].items()} for ledger in ledgers]
    odd = [t for t in kinds[0] if kinds[0][t] != kinds[1][t] and "time-out" not in kinds[0][t][2] + kinds[1][t][2]]
    assert odd == []


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", FILES)
def test_all_canonical_solutions_pass(benchmark, shared, tmp_path, runs):
    data = shared / "data/benchmarks" / FILES[benchmark]
    problems, _ = benchmarks.load_benchmark(benchmark, data)
    samples = tmp_path / "samples.jsonl"
    with samples.open("w") as file:
        for task, p in problems.items():
            file.write(json.dumps({"task_id": task, "solution": p["prompt"] + p["canonical_solution"]}) + "\n")
    ledger = score.score(benchmark, data, samples, tmp_path / "ledger.json")
    assert {t: r for t, r in ledger["tasks"].items() if (r["base"], r["plus"]) != ("pass", "pass")} == {}


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0, 1 + 1e-7, 1 + 1e-4, 2.0, float("nan"), float("inf")]),
)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["", "a", "1"]), lambda s: st.lists(s, max_size=3) | st.tuples(s, s), max_leaves=4
)
ENTRIES = [
    ("humaneval", "f"),
    ("humaneval", "find_zero"),
    ("mbpp", "f"),
    ("mbpp", "are_equivalent"),
    ("mbpp", "sum_div"),
    ("mbpp", "surface_Area"),
    ("mbpp", "digit_distance_nums"),
    ("mbpp", "similar_elements"),
    ("mbpp", "check_str"),
]


def form(x):
    """Nested lengths."""
    return [form(i) for i in x] if isinstance(x, (list, tuple)) else ()


def spreads(out, exp) -> bool:
    """Whether numpy would make values of different shapes alike before it compares them."""
    import numpy as np

    try:
        return np.broadcast(np.asarray(out), np.asarray(exp)) is not None
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("out", "exp", "same"),
    [
        ([[np.empty((0, 1))]] * 2, [0.0, 1.0], False),
        ([np.empty((0, 2))], [[0.0, 1.0]], False),
        (np.empty((0, 2)), np.zeros((1, 2)), False),
        ([[]], [[0.0]], False),
        ([[1.0]], [1.0], False),
        ([1.0 + 1e-9], [1.0], True),
        ([1 + 1e-9, 2.0], [1.0, 2], True),
        ([(1 + 1e-9, 2.0)], [[1.0, 2]], True),
        ([np.float64(1 + 1e-9)], [1.0], True),
        ([np.array([1 + 1e-9, 2])], [[1.0, 2.0]], False),  # as in EvalPlus, for whom an array is not yes or no
        (np.array([1 + 1e-9, 2]), np.array([1.0, 2.0]), False),
        ([True], [1.0], True),
        ([None], [1.0], False),
        (["1"], [1.0], False),
        ([[0.0] * 3] * 2, [[0.0] * 3] * 3, False),
    ],
)
def test_nothing_is_spread_to_the_shape_of_what_is_expected(out, exp, same):
    """numpy.allclose finds an array of no numbers close to every array it can be spread to."""
    crossed = unpack(json.loads(json.dumps(pack(out))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert agrees("mbpp", "f", [], crossed, unpack(pack(exp)), 1e-6)[0] is same


@pytest.mark.parametrize("out", [range(10**12), np.zeros((1 << 21, 1)), [np.zeros((1 << 21, 1))]])
@pytest.mark.parametrize("entry", ["f", "similar_elements"])
def test_a_small_answer_takes_no_memory_to_compare(out, entry):
    """A range of 10^12 in place of a set, an array that grows to rows times columns beside a list."""
    exp = list(range(1 << 12))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert agrees("mbpp", entry, [], unpack(pack(out)), exp if entry == "f" else tuple(exp), 1e-6)[0] is False
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # KiB; the answer itself has 16 MiB


@given(
    st.sampled_from(ENTRIES),
    st.lists(st.tuples(VALUES, VALUES) | VALUES.map(lambda v: (v, v)), min_size=1, max_size=3),
    st.sampled_from([0, 1e-6, 1e-4]),
)
@settings(max_examples=400, deadline=None)
def test_comparison_is_evalplus_own(which, pairs, atol):
    """Against EvalPlus's own `unsafe_execute`, its guard and folders put aside."""
    import builtins

    import evalplus.eval as theirs

    kind, entry = which
    inputs = [[3, 4]] * len(pairs) if entry in ("surface_Area", "digit_distance_nums") else [[[1, 2]]] * len(pairs)
    builtins.outputs = iter([out for out, _ in pairs])
    status, done, progress = SimpleNamespace(value=3), [False] * len(pairs), SimpleNamespace(value=0)
    code = f"import builtins\ndef {entry}(*a): return next(builtins.outputs)"
    guard, folder = theirs.reliability_guard, theirs.create_tempdir
    theirs.reliability_guard, theirs.create_tempdir = lambda **_: None, nullcontext
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = [exp for _, exp in pairs]
            theirs.unsafe_execute(
                kind, entry, code, inputs, expected, [5] * len(pairs), atol, True, status, done, progress
            )
            ours = []
            for (out, exp), inp in zip(pairs, inputs, strict=True):
                same, atol = agrees(kind, entry, inp, out, exp, atol)
                ours.append(same)
                if not same:
                    assume(form(out) == form(exp) or not spreads(out, exp))  # the departure, which has its own test
                    break
    finally:
        theirs.reliability_guard, theirs.create_tempdir = guard, folder
        del builtins.outputs
    if entry == "find_zero":  # EvalPlus runs through, but counts no test of it as passed
        assert (status.value == theirs._SUCCESS) == all(ours)
    else:
        assert [bool(d) for d in done[: progress.value]] == ours


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        (RIGHT, "pass", ""),
        (WRONG, "fail", "wrong answer: base test 0: add(1, 2) gave -1, expected 3"),
        ("    return [a + b]\n", "fail", "wrong answer: base test 0: add(1, 2) gave [3], expected 3"),
        ("    return (\n", "fail", "syntax: SyntaxError: "),
        ("  return a\n return b\n", "fail", "syntax: IndentationError: "),
        ("    return a / 0\n", "fail", "exception: ZeroDivisionError: division by zero, in base test 0: add(1, 2)"),
        ("    return a + c\n", "fail", "exception: NameError: name 'c' is not defined, in base test 0"),
        ("    pass\nraise ValueError('no')\n", "fail", "exception: ValueError: no, in the definition"),
        ("    pass\ndel add\n", "fail", "exception: KeyError: 'add', in the definition"),
        (
            "    if a > 2:\n     while True: pass\n    return a + b\n",
            "fail",
            "time-out: base test 1: add(3, 4) took more than 1 s",
        ),
        ("    return [0] * (1 << 40)\n", "fail", "memory: in base test 0: add(1, 2)"),
        ("    import os; os._exit(3)\n", "fail", "killed: the program ended its own process (exit code 3)"),
        ("    import ctypes; ctypes.string_at(0)\n", "fail", "killed: by SIGSEGV, in base test 0"),
        ("    import sys; sys.exit()\n", "fail", "exception: SystemExit: "),
        ("    return '\\ud800{}'\n", "fail", "wrong answer: base test 0: add(1, 2) gave '\\ud800{}', expected 3"),
    ],
)
def test_reasons(program, status, reason, bench):
    row = bench({0: program})["tasks"]["TinyCode/0"]
    assert (row["base"], row["plus"]) == (status, status)
    assert row["reason"].startswith(reason)
    assert row["seconds"] >= 0


def test_plus_has_its_own_verdict(bench):
    ledger = bench({0: "    return b + a\n", 1: RIGHT, 2: WRONG})
    row = ledger["tasks"]["TinyCode/0"]
    assert (row["base"], row["plus"]) == ("pass", "fail")
    assert row["reason"] == "wrong answer: plus test 1: add('a', 'b') gave 'ba', expected 'ab'"
    assert score.passes(ledger) == {"n": 3, "base": 2, "plus": 1}


def test_the_ledger(bench):
    ledger = bench([{"task_id": "TinyCode/3", "solution": "def add(a, b): return a + b"}])
    assert json.loads(bench.out.read_text()) == ledger
    assert ledger["benchmark"] == "tinycode"
    wanted = {"samples": 1, "tasks_in_benchmark": 10, "limited": False, "data_release": None, "evalplus": "0.3.1"}
    assert wanted.items() <= ledger["settings"].items()
    assert set(ledger["sandbox"]) == {"processes", "network", "files", "user", "landlock", "seccomp"}
    assert not list(bench.out.parent.glob(".*"))


def test_limit_to(bench):
    ledger = bench(dict.fromkeys(range(5), RIGHT), limit_to=["TinyCode/4", "TinyCode/1"])
    assert list(ledger["tasks"]) == ["TinyCode/1", "TinyCode/4"]
    with pytest.raises(UserError, match="no task 'TinyCode/77'"):
        bench({0: RIGHT}, limit_to=["TinyCode/77"])


def test_a_task_without_tests(bench):
    """As Mbpp/793's plus tests: a program that is not even defined fails, with its own reason."""
    rows = [{**json.loads(row), "plus_input": []} for row in bench.data.read_text().splitlines()]
    bench.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = bench({0: RIGHT, 1: WRONG, 2: "    return (\n", 3: "    pass\nwhile True: pass\n"})["tasks"]
    assert [(r["base"], r["plus"]) for r in found.values()][:3] == [
        ("pass", "pass"),
        ("fail", "pass"),
        ("fail", "fail"),
    ]
    assert found["TinyCode/2"]["reason"].startswith("syntax: SyntaxError: ")
    assert found["TinyCode/3"]["reason"].startswith("time-out: the definition")


def test_a_multi_threaded_endless_loop_is_a_time_out(bench):
    waste = (
        "    import ctypes, threading\n    libc, spin = ctypes.CDLL(None), bytes(1 << 24)\n    def go():\n"
        "        while True: libc.memchr(spin, 1, len(spin))\n"
        "    for _ in range(8): threading.Thread(target=go, daemon=True).start()\n"
    )
    for end in ("    go()\n", "    try: go()\n    except BaseException: go()\n"):
        row = bench({0: waste + end})["tasks"]["TinyCode/0"]
        assert row["base"] != "pass"
        assert row["reason"].startswith("time-out: "), row


@pytest.mark.parametrize("limits", ["-Hs 8192", "-d 4000000; ulimit -v 6000000", "-Hs 8192; umask 077"])
def test_hard_limits_and_masks_of_the_caller_fail_nobody(limits, bench, tmp_path):
    """As on clusters; EvalPlus's guard would raise a limit that is lower, and can not."""
    bench({0: RIGHT}, out="other.json")  # the expected outputs
    bench.out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "treediff.cli", "score", "--benchmark", "tinycode", "--problems", str(bench.data)]
    command += ["--samples", str(bench.samples), "--out", str(bench.out), "--workers", "1"]
    root = str(Path(score.__file__).parents[2])
    done = subprocess.run(
        ["sh", "-c", f'ulimit {limits}; exec "$@"', "sh", *command],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "base 1/1, plus 1/1" in done.stdout, done.stderr


def test_where_no_program_runs_scoring_stops_with_a_sentence(bench, monkeypatch):
    bench({0: RIGHT}, out="other.json")
    real, said = subprocess.Popen, json.dumps({"broken": "even without isolation a plain program does not run"})
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: real([sys.executable, "-c", f"print({said!r})"], **how))
    with pytest.raises(UserError, match=r"sandbox: no program can be run on this machine \(even without isolation"):
        bench({0: RIGHT, 1: WRONG})
    assert not bench.out.exists()


def test_the_ledger_tells_the_weakest_sandbox(bench, monkeypatch):
    """A worker that had a layer less is not hidden by one that had it; nor is what a killed scoring had."""
    real = score.decided

    def two(jobs, *args):
        for name, result in real(jobs, *args):
            yield name, result
            if name is None:
                yield None, {**result, "landlock": "absent: it was lost"}
                yield None, result

    monkeypatch.setattr(score, "decided", two)
    told = bench({0: RIGHT})["sandbox"]
    assert told["landlock"].startswith("absent: it was lost; ")
    assert all(len(how) > 30 for how in told.values())  # words


def test_a_big_process_scores_as_a_small_one(bench):
    """EvalPlus limits the address space of a fork of its caller: from a training process right programs fail."""
    import mmap

    with mmap.mmap(-1, 6 << 30):
        assert bench({0: RIGHT})["tasks"]["TinyCode/0"]["plus"] == "pass"


# --- reuse and resume -----------------------------------------------------------------------------------------------


@pytest.fixture
def decided(monkeypatch):
    """The tasks of each call to the workers."""
    calls = []
    real = verdicts.decided

    def spy(jobs, *args):
        calls.append(sorted(job[0] for job in jobs if not job[1].get("record")))
        yield from real(jobs, *args)

    monkeypatch.setattr(score, "decided", spy)
    return calls


def test_a_finished_ledger_is_reused_only_for_the_same_samples(bench, decided):
    first = bench({0: RIGHT, 1: WRONG})
    decided.clear()
    assert bench({0: RIGHT, 1: WRONG}) == first
    assert decided == []
    assert bench({0: RIGHT, 1: RIGHT})["tasks"]["TinyCode/1"]["base"] == "pass"
    assert decided == [["TinyCode/0", "TinyCode/1"]]
    rows = bench.data.read_text().replace("return a + b", "return b + a", 1)
    bench.data.write_text(rows)
    decided.clear()
    bench({0: RIGHT, 1: RIGHT})
    assert decided[-1] == ["TinyCode/0", "TinyCode/1"]


def test_killed_scoring_goes_on(bench, decided, tmp_path):
    """After kill -9 nothing is lost, nothing is scored twice, no process and no half ledger is left."""
    slow = {i: f"    import time; time.sleep(0.15)\n    return a + b + {i} * 0\n" for i in range(10)}
    bench({0: RIGHT}, out="other.json")  # the expected outputs
    rows = [json.dumps({"task_id": f"TinyCode/{i}", "completion": p}) for i, p in slow.items()]
    bench.samples.write_text("\n".join(rows))
    code = "import sys, pathlib as p; from treediff.scoring import score; a = [p.Path(x) for x in sys.argv[1:]]\n"
    code += "score.score('tinycode', *a, workers=2)"
    root = str(Path(score.__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", code, bench.data, bench.samples, bench.out], env={**os.environ, "PYTHONPATH": root}
    )
    journal = bench.out.with_name(".ledger.json.journal")
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not bench.out.exists()
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join(lines[:-1]) + b"\n" + lines[-1][:20])  # the last line cut short
    kept = len([line for line in lines[:-1] if b'"base"' in line])
    decided.clear()
    ledger = bench(slow)
    assert [r["plus"] for r in ledger["tasks"].values()] == ["fail"] * 10  # strings have no + 0
    assert len(decided[0]) == 10 - kept
    assert not journal.exists()


def several(programs):
    """Samples of tasks as rows, mixed up: {task number: [program, ...]}."""
    rows = [
        {"task_id": f"TinyCode/{i}", "completion": program, **({"sample": k} if k else {})}
        for i, of in programs.items()
        for k, program in enumerate(of)
    ]
    return sorted(rows, key=lambda r: (-r.get("sample", 0), r["task_id"]))


BASE_ONLY = "    return b + a\n"


def test_several_samples_of_a_task(bench, decided):
    """A verdict per task and sample, in their order; a program that a task has twice is run once."""
    ledger = bench(several({3: [WRONG, RIGHT, BASE_ONLY], 1: [RIGHT, RIGHT, WRONG]}))
    kinds = {t: [(v["base"], v["plus"]) for v in of] for t, of in ledger["tasks"].items()}
    assert kinds == {
        "TinyCode/1": [("pass", "pass"), ("pass", "pass"), ("fail", "fail")],
        "TinyCode/3": [("fail", "fail"), ("pass", "pass"), ("pass", "fail")],
    }
    assert decided[-1] == [
        "TinyCode/1",
        "TinyCode/1 sample 2",
        "TinyCode/3",
        "TinyCode/3 sample 1",
        "TinyCode/3 sample 2",
    ]
    assert score.passes(ledger) == {"n": 6, "base": 4, "plus": 3}
    assert ledger["settings"]["samples"] == 6
    assert json.loads(bench.out.read_text()) == ledger
    [line] = score.passes_at(ledger)  # tasks that differ less than six draws would: Wilson's intervals of 4/6 and 3/6
    assert line == "pass@1 over 2 tasks, in percent: base 66.7 [30.0, 90.3], plus 50.0 [18.8, 81.2]"
    decided.clear()
    assert bench(several({3: [WRONG, RIGHT, BASE_ONLY], 1: [RIGHT, RIGHT, WRONG]})) == ledger
    assert decided == []  # reused
    assert list(score.passes_at(bench({0: RIGHT}, out="one.json"))) == []


def test_killed_scoring_of_several_samples_goes_on(bench, decided):
    """What the journal of a killed scoring holds, sample by sample, is not run again; the ledger is the same."""
    rows = several({i: [RIGHT, WRONG, BASE_ONLY, f"    return a + b * {i + 2}\n"] for i in range(4)})
    whole = bench(rows, out="whole.json")
    real, stop = score.decided, iter(range(6))

    def cut(jobs, *args):
        for result in real(jobs, *args):
            yield result
            if next(stop, None) is None:
                raise KeyboardInterrupt

    score.decided = cut
    try:
        with pytest.raises(KeyboardInterrupt):
            bench(rows)
    finally:
        score.decided = real
    assert not bench.out.exists()
    kept = bench.out.with_name(".ledger.json.journal").read_bytes().count(b'"base"')
    decided.clear()
    ledger = bench(rows)
    assert len(decided[0]) == 16 - kept < 16
    strip = lambda x: {t: [{**v, "seconds": 0} for v in of] for t, of in x["tasks"].items()}  # noqa: E731
    assert strip(ledger) == strip(whole)


def test_two_scorings_of_one_ledger(bench):
    import fcntl

    bench({0: RIGHT}, out="other.json")
    with bench.out.with_name(".ledger.json.journal").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another scoring is writing this ledger"):
            bench({0: RIGHT})


def test_interrupt_ends_at_once(bench, monkeypatch):
    bench({0: RIGHT}, out="other.json")
    handler = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            bench(dict.fromkeys(range(4), "    pass\nimport time; time.sleep(50)\n"))
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert time.monotonic() - start < 8
    assert not bench.out.exists()
    assert not multiprocessing.active_children()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["[1]", "7", "null", '{"a": 1}', '{"tasks": {}}', "", "{", "\0", '{"task_id": "x"}\n' * 2]
)
def test_a_file_that_is_no_ledger_is_not_overwritten(content, bench):
    bench.out.write_text(content)
    with pytest.raises(UserError, match=r"ledger.json: there is something that is no ledger; name another file"):
        bench({0: RIGHT})
    assert bench.out.read_text() == content
    with pytest.raises(UserError, match=r"samples.jsonl: there is something that is no ledger"):
        bench({0: RIGHT}, out="samples.jsonl")
    assert json.loads(bench.samples.read_text())["completion"] == RIGHT
    with pytest.raises(UserError, match="there is something that is no ledger"):
        bench({0: RIGHT}, out=".")
    assert not [p for p in bench.out.parent.iterdir() if "journal" in p.name]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"samples.jsonl, row 1: not a line of JSON"),
        (["[1]"], r"samples.jsonl, row 1: not a JSON object"),
        (["", '{"completion": "x"}'], r"samples.jsonl, row 2: the benchmark has no task None"),
        ([{"task_id": "HumanEval/1", "completion": "x"}], r"row 1: the benchmark has no task 'HumanEval/1'"),
        ([{"task_id": "TinyCode/1"}], r"row 1: completion is missing"),
        ([{"task_id": "TinyCode/1", "solution": ["x"]}], r"row 1: solution is missing or no text"),
        ([{"task_id": "TinyCode/1", "completion": "x"}] * 2, r"row 2: task TinyCode/1 has a sample 0 already"),
        ([{"task_id": "TinyCode/1", "completion": "x", "sample": -1}], r"row 1: sample is -1; number"),
        ([{"task_id": "TinyCode/1", "completion": "x", "sample": True}], r"row 1: sample is True; number"),
        ([{"task_id": "TinyCode/1", "completion": "x", "sample": 2}], r"has a sample 2 but no 0"),
        ([{"task_id": "TinyCode/1", "completion": "x", "sample": 10**9}], r"has a sample 1000000000 but no 0"),
        ([], r"there is no sample"),
        ([{"task_id": "TinyCode/99", "completion": "x"}], r"there is no sample of this benchmark"),
    ],
)
def test_bad_samples(rows, message, bench):
    with pytest.raises(UserError, match=message):
        bench(rows)
    assert not bench.out.exists()


def test_tasks_that_a_release_has_dropped_are_left_out(bench):
    ledger = bench([{"task_id": "TinyCode/99", "completion": "x"}, {"task_id": "TinyCode/1", "completion": RIGHT}])
    assert list(ledger["tasks"]) == ["TinyCode/1"]
    assert ledger["settings"]["samples_of_unknown_tasks"] == 1


def test_samples_not_in_utf8(bench):
    bench({0: RIGHT})
    bench.samples.write_bytes(b'{"task_id": "TinyCode/1", "completion": "\xff"}\n')
    with pytest.raises(UserError, match="row 1: not a line of JSON"):
        score.score("tinycode", bench.data, bench.samples, bench.out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_input": []}, "row 1: base_input is empty"),
        ({"entry_point": None}, "row 1: entry_point is missing"),
        ({"canonical_solution": "    return 1 / 0\n"}, "task TinyCode/0: its own solution fails .*ZeroDivisionError"),
        ({"canonical_solution": "    return (\n"}, "task TinyCode/0: its own solution fails .*SyntaxError"),
    ],
)
def test_bad_data(change, message, bench):
    bench.data.write_text(json.dumps({**ADD, "task_id": "TinyCode/0", **change}))
    with pytest.raises(UserError, match=message):
        bench({0: RIGHT})
    assert not bench.out.exists()


def test_missing_files(tmp_path, bench):
    with pytest.raises(UserError, match=r"nothing.jsonl: cannot be read"):
        benchmarks.load_benchmark("tinycode", tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match=r"cannot be read"):
        benchmarks.load_benchmark("tinycode", tmp_path)
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"{}" * 100)[:15])
    with pytest.raises(UserError, match=r"broken.gz: cannot be read"):
        benchmarks.load_benchmark("humaneval", tmp_path / "broken.gz")
    damaged = bytearray(gzip.compress(b"{}" * 1000))
    damaged[12:16] = b"\xff" * 4
    (tmp_path / "damaged.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.gz: cannot be read"):
        benchmarks.load_benchmark("humaneval", tmp_path / "damaged.gz")
    with pytest.raises(UserError, match="tinycode has no download"):
        benchmarks.load_benchmark("tinycode")
    with pytest.raises(UserError, match="no 'codeforces'; choose"):
        benchmarks.load_benchmark("codeforces")


def test_no_network(monkeypatch):
    from evalplus.data import humaneval

    def fail():
        raise OSError("Name or service not known")

    monkeypatch.setattr(humaneval, "_ready_human_eval_plus_path", fail)
    with pytest.raises(UserError, match=r"humaneval: EvalPlus could not download it .*give its file with --problems"):
        benchmarks.load_benchmark("humaneval")


@pytest.fixture
def released(tmp_path, monkeypatch):
    """EvalPlus's own download of a benchmark of two tasks, from a server on this machine: (name of the cached file,
    SHA-256 of its content, what was asked for)."""
    from evalplus.data import humaneval

    content = "".join(json.dumps({**ADD, "task_id": f"HumanEval/{i}"}) + "\n" for i in range(2)).encode()
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = gzip.compress(content)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, cached = f"http://127.0.0.1:{server.server_port}/HumanEvalPlus.jsonl.gz", tmp_path / "HumanEvalPlus.jsonl"
    monkeypatch.setattr(humaneval, "HUMANEVAL_OVERRIDE_PATH", None)
    monkeypatch.setattr(humaneval, "get_dataset_metadata", lambda *_: (url, str(cached)))
    monkeypatch.delenv("HUMANEVAL_OVERRIDE_PATH", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(benchmarks.RELEASES, digest, "HumanEvalPlus v0.1.10")
    yield cached, digest, asked
    server.shutdown()
    server.server_close()


def test_data_by_evalplus_own_download(released, bench, tmp_path, runs, monkeypatch):
    """Downloaded once, its hash checked and recorded; cut short, it is refused with the file named."""
    cached, digest, asked = released
    problems, found = benchmarks.load_benchmark("humaneval")
    assert (list(problems), found) == (["HumanEval/0", "HumanEval/1"], digest)
    bench.samples.write_text(json.dumps({"task_id": "HumanEval/1", "completion": RIGHT}))
    ledger = score.score("humaneval", None, bench.samples, bench.out)
    assert ledger["tasks"]["HumanEval/1"]["plus"] == "pass"
    assert ledger["settings"]["data_sha256"] == digest
    assert ledger["settings"]["data_release"] == "HumanEvalPlus v0.1.10"
    assert len(asked) == 1
    cached.write_bytes(cached.read_bytes()[:-20])  # as a kill would leave EvalPlus's cache
    with pytest.raises(UserError, match=r"HumanEvalPlus.jsonl: EvalPlus's download is no release .*delete the file"):
        benchmarks.load_benchmark("humaneval")
    cached.unlink()
    assert benchmarks.load_benchmark("humaneval")[1] == digest
    assert len(asked) == 2


def test_given_data_are_hashed_and_an_unknown_release_is_told(released, bench, tmp_path, caplog):
    cached, digest, _ = released
    benchmarks.load_benchmark("humaneval")
    given = tmp_path / "given.jsonl.gz"
    given.write_bytes(gzip.compress(cached.read_bytes()))  # packed or not, the hash is the content's
    bench.samples.write_text(json.dumps({"task_id": "HumanEval/0", "completion": RIGHT}))
    settings = score.score("humaneval", given, bench.samples, bench.out)["settings"]
    assert (settings["data_sha256"], settings["data_release"]) == (digest, "HumanEvalPlus v0.1.10")
    assert "not comparable" not in caplog.text
    given.write_bytes(cached.read_bytes().replace(b"a + b", b"b + a"))
    settings = score.score("humaneval", given, bench.samples, bench.out)["settings"]
    assert settings["data_release"] is None
    assert settings["data_sha256"] == hashlib.sha256(given.read_bytes()).hexdigest()
    assert "figures are not comparable with published ones" in caplog.text
