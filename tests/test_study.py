"""A study: what it runs, what it refuses, what it says, and that it goes on after kill -9 with nothing doubled."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import markupsafe
import numpy as np
import pytest

from treediff import cli, jobs
from treediff.config import resolve
from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.files import read_json, write_json
from treediff.report import report, study
from treediff.report.study import Study, arms
from treediff.runs import open_run
from treediff.sampling import run as sampling
from treediff.scoring import stats

UPSIDE_DOWN = 'ast/upside_down: tier_weights={"skeleton": 0.6, "control": 0.15}; default_weight=0.6'


def made(cfg, share, rng, commit="abc"):
    """A finished run, made by nobody: its programs pass with this probability."""
    open_run(cfg, "data", "train")
    (cfg.run_dir / "adapter").mkdir(exist_ok=True)
    about = {"commit": commit, "data": "none", "machine": {"cores": 2}, "versions": {"torch": "1"}}
    write_json(cfg.run_dir / "provenance.json", about)
    write_json(cfg.run_dir / "seconds.json", {"train": 60.0, "sample": 20.0, "score": 10.0})
    if "tinycode" in cfg.benchmarks:
        benchmarks.write_tinycode(cfg)
    for name, path in study.ledgers(cfg).items():
        benchmark, length = study._key(name)
        tasks = list(benchmarks.benchmark_problems(cfg, benchmark))
        samples = sampling.samples_path(cfg, benchmark, length)
        samples.parent.mkdir(parents=True, exist_ok=True)
        samples.write_text(
            "".join(json.dumps({"task_id": t, "settings": sampling.settings(cfg, length)}) + "\n" for t in tasks)
        )
        verdicts = {
            t: {"base": "pass", "plus": "pass" if rng.random() < share else "fail", "reason": "", "seconds": 0.1}
            for t in tasks
        }
        told = {"samples_sha256": hashlib.sha256(samples.read_bytes()).hexdigest(), "data_sha256": "d"}
        write_json(path, {"benchmark": benchmark, "settings": told, "sandbox": {}, "tasks": verdicts})


def small(**switches):
    return resolve("tiny", **{"lengths": [64, 96], "limit": 60, **switches})


def all_made(of, shares):
    rng = np.random.default_rng(0)
    for cfg in of.runs().values():
        made(cfg, shares.get(cfg.masking, 0.5), rng)


# --- what is run ----------------------------------------------------------------------------------------------------
def test_runs_share_a_backbone_and_each_is_one_command(runs):
    cfg = small()
    found = Study(cfg, arms(cfg, ["random", "ast"], [UPSIDE_DOWN]), seeds=3).runs()
    assert list(found)[:4] == ["none-seed0", "random-seed0", "ast-seed0", "ast-upside_down-seed0"]
    assert len(found) == 1 + 3 * 3
    for name, run in found.items():
        assert run.with_masking("none").run_dir.name == "none-seed0"
        assert run.run_dir.name == name
        words = study.command(run).split(" ", 2)
        assert words[:2] == ["treediff", "train"]
    upside_down = found["ast-upside_down-seed2"]
    assert upside_down.tier_weights == {"skeleton": 0.6, "data": 0.42, "condition": 0.58, "control": 0.15}
    assert found["ast-seed2"].tier_weights == cfg.tier_weights


@pytest.mark.parametrize("name", ["none-seed0", "ast-seed2", "random-seed0", "ast-upside_down-seed1"])
def test_the_command_gives_the_same_switches(runs, name):
    import shlex

    cfg = small(lr=1e-3)
    run = Study(cfg, arms(cfg, ["random", "ast"], [UPSIDE_DOWN]), seeds=3, backbones=2).runs()[name]
    words = shlex.split(study.command(run))[1:]
    again = cli.switches(*cli.parser("train", "tiny").parse_known_args(words))
    assert again.as_dict("data", "train") == run.as_dict("data", "train")
    assert again.run_dir == run.run_dir


def test_several_backbones_take_turns(runs):
    cfg = small(seed=10)
    found = Study(cfg, arms(cfg, ["ast"]), seeds=5, backbones=2).runs()
    assert [n for n in found if n.startswith("none")] == ["none-seed10", "none-seed11"]
    backbones = {n: run.with_masking("none").seed for n, run in found.items() if n.startswith("ast")}
    assert backbones == {"ast-seed10": 10, "ast-seed11": 11, "ast-seed12": 10, "ast-seed13": 11, "ast-seed14": 10}


def test_a_switch_is_crossed_with_every_strategy(runs):
    cfg = small()
    found = arms(cfg, ["random", "ast"], cross=["lr=1e-3,5e-3"])
    assert [a.name for a in found] == ["random-lr_1e_3", "random", "ast-lr_1e_3", "ast"]
    assert found[0].switches == {"lr": 1e-3}


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"strategies": ["tree"]}, "'tree' is no masking"),
        ({"strategies": ["none"]}, "'none' is no masking"),
        ({"strategies": []}, "strategies: name one"),
        ({"strategies": ["ast", "ast"]}, "ast is there twice"),
        ({"more": ["ast: lr=1"]}, "is not MASKING/VARIANT"),
        ({"more": ["ast/x: lr"]}, "'lr' is not switch=value"),
        ({"more": ["ast/x: lrr=1"]}, "'lrr=1' is not switch=value"),
        ({"more": ["ast/x: lr=much"]}, "lr: 'much' should be a valid number"),
        ({"more": ["ast/X: lr=1"]}, "variant: String should match"),
        ({"more": ["ast/x: seed=1"]}, "seed cannot differ"),
        ({"more": ["ast/x: temperature=1"]}, "temperature does not change the training"),
        ({"more": ["ast/x: noise=constant"]}, "sets noise, which changes the backbone that all share"),
        ({"cross": ["lr"]}, "cross: 'lr' is not"),
    ],
)
def test_arms_that_cannot_be_are_refused(runs, kwargs, said):
    cfg = small()
    with pytest.raises(UserError, match=said):
        Study(cfg, arms(cfg, **kwargs))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"seeds": 0}, "seeds: must be at least 1"),
        ({"seeds": 2, "backbones": 3}, r"backbones: must lie in \[1, 2\]"),
        ({"seeds": 2, "backbones": 0}, "backbones: must lie"),
    ],
)
def test_numbers_that_cannot_be_are_refused(runs, kwargs, said):
    cfg = small()
    with pytest.raises(UserError, match=said):
        Study(cfg, arms(cfg, ["ast"]), **kwargs)


# --- bad input ------------------------------------------------------------------------------------------------------
def test_runs_of_other_switches_are_refused_with_the_switch_named(runs):
    cfg = small()
    of = Study(cfg, arms(cfg, ["random", "ast"]), seeds=2)
    all_made(of, {})
    study.write(of)
    made(of.runs()["ast-seed1"], 0.5, np.random.default_rng(1))
    path = of.runs()["ast-seed1"].run_dir / "config.json"
    write_json(path, read_json(path) | {"lr": 0.125})
    before = (cfg.preset_dir / "study" / "results.json").read_bytes()
    for call in (study.write, jobs.run, jobs.plan):
        with pytest.raises(UserError, match=r"ast-seed1: this run was made with lr = 0\.125"):
            call(of)
    assert (cfg.preset_dir / "study" / "results.json").read_bytes() == before


def test_samples_and_ledgers_of_other_settings_are_refused(runs):
    cfg = small(lengths=[64])
    of = Study(cfg, arms(cfg, ["random", "ast"]), seeds=2)
    all_made(of, {})
    run = of.runs()["ast-seed1"]
    path = run.run_dir / "scores" / "tinycode-T64.json"
    good = read_json(path)
    write_json(path, good | {"settings": good["settings"] | {"data_sha256": "e"}})
    with pytest.raises(UserError, match="none-seed0 and ast-seed1 differ in data_sha256"):
        study.collect(of)
    write_json(path, good)
    made(run.but(temperature=0.5), 0.5, np.random.default_rng(1))
    with pytest.raises(UserError, match=r"sampled with temperature = 0\.5, the study.s is 0\.0"):
        study.collect(of)


def test_studies_of_two_decodings_of_the_same_runs_stand_side_by_side(runs):
    cfg = small(lengths=[64])
    for decoding, shares in (("", (0.2, 0.8)), ("fast", (0.8, 0.2))):
        of = Study(cfg.but(decoding=decoding, threshold=0.9 * bool(decoding)), arms(cfg, ["random", "ast"]), seeds=4)
        all_made(of, dict(zip(("random", "ast"), shares, strict=True)))
        study.write(of)
    first, second = (study.load(cfg.preset_dir / name / "results.json") for name in ("study", "study-fast"))
    assert (list(first["ledgers"]), list(second["ledgers"])) == (["tinycode-T64"], ["tinycode-T64-fast"])
    assert not first["missing"]
    assert not second["missing"]
    signs = [study.analysed(r)["comparisons"][0]["difference"] > 0 for r in (first, second)]
    assert signs == [True, False]


def test_results_that_were_edited_or_cut_are_refused(runs):
    cfg = small(lengths=[64])
    of = Study(cfg, arms(cfg, ["random", "ast"]), seeds=2)
    all_made(of, {})
    study.write(of)
    path = cfg.preset_dir / "study" / "results.json"
    good = path.read_text()
    assert study.load(path)["runs"]
    assert study.summary(cfg)["answer"].startswith("Fine-tunings of one backbone")
    flipped = json.loads(good)
    text = flipped["runs"][1]["verdicts"]["tinycode-T64"]["plus"]
    flipped["runs"][1]["verdicts"]["tinycode-T64"]["plus"] = ("0" if text[0] == "1" else "1") + text[1:]
    for bad in (
        good[:-40],
        good[: len(good) // 2],
        "",
        "[]",
        json.dumps(flipped),
        good.replace('"seed": 1', '"seed": 3'),
    ):
        path.write_text(bad)
        for call in (
            study.load,
            lambda _: study.summary(cfg),
            lambda _: jobs.run(of),
            lambda _: study.publish(cfg, runs),
        ):
            with pytest.raises(UserError, match=r"results\.json: .*edited or cut"):
                call(path)
    path.write_text(json.dumps(json.loads(good)))  # only its blanks differ
    assert study.load(path)


def test_a_damaged_gz_is_refused(tmp_path):
    (tmp_path / "study-tiny.json.gz").write_bytes(gzip.compress(b'{"format": 1}')[:-4])
    with pytest.raises(UserError, match="edited or cut"):
        study.load(tmp_path / "study-tiny.json.gz")
    with pytest.raises(UserError, match="there is no such file; run `treediff study` first"):
        study.load(tmp_path / "results.json")


# --- what is said ---------------------------------------------------------------------------------------------------
def test_results_hold_every_verdict_and_the_analysis_is_that_of_stats(runs):
    cfg = small()
    of = Study(cfg, arms(cfg, ["random", "ast", "ast_span"], [UPSIDE_DOWN]), seeds=4)
    all_made(of, {"random": 0.2, "ast": 0.8, "ast_span": 0.5})
    facts = study.write(of)
    results = study.load(cfg.preset_dir / "study" / "results.json")
    assert len(results["runs"]) == 17
    assert not results["missing"]
    for run in results["runs"]:
        ledger = read_json(of.runs()[run["run"]].run_dir / "scores" / "tinycode-T64.json")
        said = run["verdicts"]["tinycode-T64"]["plus"]
        items = results["ledgers"]["tinycode-T64"]["items"]
        assert {t: int(c) for t, c in zip(items, said, strict=True)} == stats.passed(ledger, "plus")
    first = facts["comparisons"][0]
    assert (first["outcome"], first["from"], first["to"], first["primary"]) == (
        "Tiny+ at T = 96",
        "random",
        "ast",
        True,
    )
    sides = [
        [
            stats.passed(read_json(of.runs()[f"{s}-seed{k}"].run_dir / "scores" / "tinycode-T96.json"), "plus")
            for k in range(4)
        ]
        for s in ("random", "ast")
    ]
    again = stats.pooled(*sides)
    assert first["difference"] == pytest.approx(100 * again["difference"])
    assert first["p"] == pytest.approx(again["p"])
    assert first["claimed"]
    assert "AST (TreeDiff) is better than Random masking" in facts["answer"]
    said = {(r["from"], r["to"]) for r in facts["comparisons"]}
    assert said == {("random", "ast"), ("random", "ast_span"), ("ast_span", "ast"), ("ast-upside_down", "ast")}
    assert "AST (TreeDiff), upside down" in (cfg.preset_dir / "study" / "study.md").read_text()
    assert (cfg.preset_dir / "study" / "forest.png").read_bytes()[:4] == b"\x89PNG"
    # The report opens with the study's answer and picture, whose data hold every run.
    page = report.write(cfg)
    header, _, rest = page.read_text().partition("</header>")
    assert str(markupsafe.escape(facts["answer"])) in header
    assert rest.index('download="study.csv"') < rest.index('download="differences.csv"')
    rows = (page.parent / "study.csv").read_text().splitlines()
    assert sum(r.startswith("run,AST (TreeDiff),") for r in rows) == 4 * sum(r["arm"] == "ast" for r in facts["rates"])


def comparison(**changed):
    r = {"from": "random", "to": "ast", "runs": [5, 5], "difference": 0.4, "low": -1.0, "high": 1.8, "p": 0.5}
    return r | {"sd": 1.5, "claimed": False} | changed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"claimed": True, "p": 0.001, "low": 0.2}, "AST (TreeDiff) is better than Random masking"),
        ({"claimed": True, "p": 0.001, "difference": -2.0, "low": -3, "high": -1}, "Random masking is better than AST"),
        ({}, "one of the paper's size (+2.5) is not there"),
        ({"high": 3.0, "sd": 3.0}, "cannot be told: the interval holds both no difference and one of the paper's size"),
        ({"p": 0.03, "low": 0.1}, "does not outlast the adjustment"),
        ({"p": None, "low": None, "high": None}, "how much of it is chance is unknown"),
    ],
)
def test_each_case_has_the_words_of_the_plan(changed, said):
    assert said in study.sentence(comparison(**changed))


def test_runs_of_one_backbone_count_as_one_where_there_are_several(runs):
    """Four backbones that differ much and runs on each that hardly do: the backbones are the sample."""
    cfg = small(lengths=[64])
    of = Study(cfg, arms(cfg, ["random", "ast"]), seeds=8, backbones=4)
    rng = np.random.default_rng(3)
    for run in of.runs().values():
        made(run, 0.2 + 0.2 * run.with_masking("none").seed, rng)
    [first, *_] = study.write(of)["comparisons"]
    assert first["paired"]
    assert first["runs"] == [8, 8]
    assert first["low"] <= 0 <= first["high"]


def nodes_results(rng, effect, programs=40, each=50, runs=5, between=0.0):
    """Results of a study of nodes: those of one program are restored together or not at all."""
    names = [f"p{i}" for i in range(programs) for _ in range(each)]
    head = {"items": [f"n{i}" for i in range(len(names))], "samples": 1, "parts": {"pass": "AST nodes restored whole"}}
    head |= {"programs": names, "tiers": ["data", "control"] * (len(names) // 2)}
    made = []
    for arm, share in (("random", 0.5), ("ast", 0.5 + effect)):
        for k in range(runs):
            whole = rng.random(programs) < share + rng.normal(0, between)
            text = "".join(str(int(w)) for w in np.repeat(whole, each))
            about = {"commit": "c", "machine": {}, "versions": {}, "seconds": {"train": 1.0}, "command": "x", "seed": k}
            about["timeouts"] = 0
            made.append(
                {"run": f"{arm}-seed{k}", "arm": arm, "backbone": 0, "verdicts": {"nodes": {"pass": text}}} | about
            )
    arms_ = [{"name": a, "masking": a, "variant": "", "switches": {}} for a in ("random", "ast")]
    about = {"preset": "stdlib", "arms": arms_, "seeds": runs, "backbones": 1, "first_seed": 0, "switches": {}}
    return {"format": 1, "study": about, "ledgers": {"nodes": head}, "runs": made, "missing": [], "sha256": "x"}


def test_nodes_of_one_program_are_no_independent_items():
    """With 2,000 nodes in 40 programs, taken for 2,000 items, half of all studies of equal strategies would claim."""
    rng = np.random.default_rng(0)
    claims = 0
    for _ in range(40):
        [first, *_] = study.pooled(nodes_results(rng, 0.0))["comparisons"]
        assert (first["items"], first["units"]) == (2000, 40)
        claims += first["claimed"]
    assert claims <= 6
    found = study.pooled(nodes_results(rng, 0.4))
    assert found["comparisons"][0]["claimed"]
    assert {r["outcome"] for r in found["comparisons"]} == {
        "AST nodes restored whole",
        "AST nodes restored whole: data",
        "AST nodes restored whole: control",
    }


def test_the_share_over_programs_is_the_share_of_nodes():
    results = nodes_results(np.random.default_rng(1), 0.1, programs=7, each=6)
    run = results["runs"][0]
    results["ledgers"]["nodes"]["programs"] = ["a"] * 2 + ["b"] * 30 + ["c"] * 10
    for o in study.outcomes(results):
        values = study.passes(results, run, o)
        text = run["verdicts"]["nodes"]["pass"]
        kept = [int(c) for c, t in zip(text, results["ledgers"]["nodes"]["tiers"], strict=True) if o.tier in ("", t)]
        assert sum(values.values()) / len(values) == pytest.approx(np.mean(kept))


# --- publishing -----------------------------------------------------------------------------------------------------
def test_published_results_are_made_from_the_compressed_ones_alone(runs, tmp_path):
    cfg = small(lengths=[64])
    of = Study(cfg, arms(cfg, ["random", "ast"]), seeds=2)
    all_made(of, {})
    study.write(of)
    out = study.publish(cfg, tmp_path / "results")
    assert sorted(p.name for p in out.parent.iterdir()) == ["study-tiny.json.gz", "study-tiny.png", "study.md"]
    again = study.load(out.parent / "study-tiny.json.gz")
    assert again == study.load(cfg.preset_dir / "study" / "results.json")
    assert again["sha256"] in out.read_text()
    assert study.summary(cfg)["answer"] in out.read_text()


def test_no_study_is_no_summary(runs):
    assert study.summary(small()) is None


# --- the plan -------------------------------------------------------------------------------------------------------
def test_the_plan_says_hours_and_power_before_anything_runs(runs):
    cfg = small(lengths=[64])
    of = Study(cfg, arms(cfg, ["random", "ast"]), seeds=5)
    said = jobs.text(jobs.plan(of, deviation=1.5))
    assert "11 runs, 0 of them finished" in said
    assert "hours to go" in said
    assert "by the plan" in said
    assert "2.5 points with 80 % power takes 7 runs" in said
    assert "5 of each resolve 3.0 points" in said
    assert "not known yet" in jobs.text(jobs.plan(of))
    assert not list(cfg.preset_dir.glob("*-seed*"))
    all_made(of, {})
    found = jobs.plan(of)
    assert found["hours"] == 0
    assert found["from"].startswith("measured")
    assert found["seconds"]["fine-tuning"] == 90
    assert found["deviation"] > 0


def test_one_process_takes_the_same_rows(runs):
    cfg = small(processes=2, accumulation=3)
    one = jobs._one_process(cfg)
    assert (one.processes, one.accumulation, one.rows_per_step) == (1, 6, cfg.rows_per_step)
    assert one.with_masking("none").rows_per_step == cfg.with_masking("none").rows_per_step
    own = cfg.but(pretrain={**cfg.pretrain, "accumulation": 4})
    assert jobs._one_process(own).with_masking("none").rows_per_step == own.with_masking("none").rows_per_step
    assert jobs._one_process(own).with_masking("none").processes == 1


# --- running, with children that make runs without training --------------------------------------------------------
CHILD = """
import json, os, sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from treediff.training import heartbeat
heartbeat.follow(os.environ["TREEDIFF_STARTER"])
import numpy as np
from test_study import made
from treediff.config import Config
for task in json.loads(sys.argv[1]):
    cfg = Config(**next(iter(task.values())))
    name = cfg.run_dir.name if "run" in task else "prepare"
    with open({log!r}, "a") as file:
        file.write(f"start {{name}}\\n")
    time.sleep({seconds})
    if name in {failing!r}:
        sys.exit(f"{{name}}: no luck today.")
    if "run" in task:
        made(cfg, 0.5, np.random.default_rng(cfg.seed))
    with open({log!r}, "a") as file:
        file.write(f"end {{name}}\\n")
"""


def fake(tmp_path, failing=(), seconds=0.0):
    """Replaces the children; returns the file in which they note what they do."""
    script, noted = tmp_path / "child.py", tmp_path / "noted"
    tests = str(Path(__file__).parent)
    script.write_text(CHILD.format(tests=tests, log=str(noted), failing=tuple(failing), seconds=seconds))
    noted.touch()

    def command(tasks):
        return [sys.executable, str(script), json.dumps(tasks)]

    jobs._command = command
    return noted


@pytest.fixture
def children(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_command", jobs._command)
    return lambda *args, **kwargs: fake(tmp_path, *args, **kwargs)


def test_every_run_is_made_once_and_what_is_there_is_kept(runs, children):
    noted = children()
    cfg = small(lengths=[64])
    facts = jobs.run(Study(cfg, arms(cfg, ["random", "ast"]), seeds=1), at_once=2)
    assert facts["runs"] == 3
    assert not facts["missing"]
    first = noted.read_text().splitlines()
    assert [x for x in first if "none" in x] == ["start none-seed0", "end none-seed0"]
    assert first.index("end none-seed0") < first.index("start ast-seed0")
    facts = jobs.run(Study(cfg, arms(cfg, ["random", "ast"]), seeds=2), at_once=2)
    assert facts["runs"] == 5
    later = noted.read_text().splitlines()[len(first) :]
    assert {x for x in later if "prepare" not in x} == {
        f"{what} {name}" for what in ("start", "end") for name in ("random-seed1", "ast-seed1")
    }


def test_a_failed_run_does_not_stop_the_others_and_is_named(runs, children, monkeypatch, capsys):
    children(failing=["ast-seed0"])
    cfg = small(lengths=[64])
    facts = jobs.run(Study(cfg, arms(cfg, ["random", "ast"]), seeds=2), at_once=2)
    assert facts["runs"] == 4
    [missing] = facts["missing"]
    assert missing["run"] == "ast-seed0"
    assert missing["why"] == "ast-seed0: no luck today."
    assert "1 of the planned runs are missing" in facts["answer"] or "No two strategies" in facts["answer"]
    assert "ast-seed0: ast-seed0: no luck today." in (cfg.preset_dir / "study" / "study.md").read_text()
    with pytest.raises(SystemExit) as end:
        cli.main(["study", "--strategies", "random,ast", "--lengths", "64", "--limit", "60", "--at_once", "1"])
    assert end.value.code == 1
    children()  # better luck
    assert not jobs.run(Study(cfg, arms(cfg, ["random", "ast"]), seeds=2))["missing"]


def test_without_its_backbone_no_run_is_started(runs, children):
    noted = children(failing=["none-seed0"])
    cfg = small(lengths=[64])
    facts = jobs.run(Study(cfg, arms(cfg, ["random", "ast"]), seeds=1))
    assert {m["run"]: m["why"] for m in facts["missing"]} == {
        "none-seed0": "none-seed0: no luck today.",
        "random-seed0": "its backbone none-seed0 is missing",
        "ast-seed0": "its backbone none-seed0 is missing",
    }
    assert "start ast-seed0" not in noted.read_text()


def test_two_studies_in_one_folder(runs, children):
    children()
    cfg = small(lengths=[64])
    with (
        jobs._alone(cfg.preset_dir / "study"),
        pytest.raises(UserError, match=rf"another study runs here \(process {os.getpid()}, since 2"),
    ):
        jobs.run(Study(cfg, arms(cfg, ["ast"]), seeds=1))
    jobs.run(Study(cfg, arms(cfg, ["ast"]), seeds=1))


PARENT = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_study import fake, small
from treediff import jobs
from treediff.report.study import Study, arms
fake(Path({tmp!r}), seconds={seconds})
cfg = small(lengths=[64])
jobs.run(Study(cfg, arms(cfg, ["random", "ast"]), seeds=2), at_once=2)
"""


def test_a_killed_study_leaves_no_child_and_goes_on(runs, tmp_path):
    tests = str(Path(__file__).parent)
    noted = tmp_path / "noted"
    command = [sys.executable, "-c", PARENT.format(tests=tests, tmp=str(tmp_path), seconds=2.0)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (noted.exists() and "start ast-seed0" in noted.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3.5)  # a child that lived on would have noted its end by now
    before = noted.read_text().splitlines()
    assert "end none-seed0" in before
    assert "end ast-seed0" not in before
    subprocess.run([*command[:2], command[2].replace("seconds=2.0", "seconds=0.0")], check=True, timeout=240)
    after = noted.read_text().splitlines()
    assert [x for x in after if x.startswith("end") and "prepare" not in x] == sorted(
        {x for x in after if x.startswith("end") and "prepare" not in x}, key=after.index
    )  # nothing twice
    results = study.load(runs / "tiny" / "study" / "results.json")
    assert len(results["runs"]) == 5
    assert not results["missing"]


@pytest.mark.slow
def test_a_real_study_end_to_end_with_a_kill(runs):
    """Real children: trained, sampled, scored; killed while one trains; started again; every run once."""
    words = ["--rows", "60", "--max_steps", "30", "--micro_batch", "2", "--lengths", "64", "--limit", "6"]
    words += [
        "--eval_every",
        "0",
        "--checkpoint_every",
        "5",
        "--d_model",
        "32",
        "--n_layers",
        "2",
        "--mlp_hidden",
        "48",
    ]
    words += ["--pretrain", json.dumps({"rows": 60, "max_steps": 3, "micro_batch": 2, "checkpoint_every": 5})]
    command = [sys.executable, "-m", "treediff.cli", "study", "--strategies", "random,ast", "--seeds", "2", *words]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 900
    while not list(runs.glob("tiny/ast-seed0/checkpoints/step-5/complete")) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    results = study.load(runs / "tiny" / "study" / "results.json")
    assert len(results["runs"]) == 5
    assert not results["missing"]
    for run in results["runs"]:
        steps = [json.loads(x)["step"] for x in (runs / "tiny" / run["run"] / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(len(steps)))
        assert run["commit"]
        assert run["seconds"]["train"] > 0
        assert len(run["verdicts"]["tinycode-T64"]["plus"]) == 6
