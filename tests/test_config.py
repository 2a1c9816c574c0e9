"""Switches, presets and files."""

import json
import os
import subprocess
import sys
import time

import pytest

from treediff.config import PRESETS, SWITCHES, Config, from_notebook, resolve
from treediff.errors import UserError
from treediff.files import read_json, whole
from treediff.runs import open_run, provenance


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_resolves_and_survives_json(preset):
    cfg = resolve(preset)
    saved = json.loads(json.dumps(cfg.as_dict()))
    assert resolve(**saved) == cfg
    assert resolve(**json.loads(json.dumps(cfg.with_masking("none").as_dict()))) == cfg.with_masking("none")


def test_the_paper_preset_is_the_paper():
    cfg = resolve("paper")
    assert cfg.tier_weights == {"skeleton": 0.15, "data": 0.42, "condition": 0.58, "control": 0.60}
    assert (cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout) == (64, 128, 0.1)
    assert (cfg.lr, cfg.betas, cfg.epochs, cfg.warmup) == (5e-5, [0.9, 0.999], 3, 0.1)
    assert (cfg.micro_batch, cfg.accumulation, cfg.processes, cfg.rows_per_step) == (1, 16, 8, 128)
    assert (cfg.eps_max, cfg.eps_min, cfg.max_length, cfg.rows) == (0.1, 0.001, 4096, 150_000)


def test_every_switch_says_what_it_means():
    assert all(f.metadata["help"] and f.metadata["stage"] for f in SWITCHES.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "huge"}, "preset: there is no 'huge'"),
        ({"maskin": "ast"}, "maskin: there is no such switch"),
        ({"masking": "tree"}, "masking: 'tree' is not one of"),
        ({"seed": "one"}, "seed: 'one' is not a whole number"),
        ({"seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"seed": "-1"}, "seed: must not be negative"),
        ({"eos_suppression": "maybe"}, "eos_suppression: 'maybe' is not one of off, logits, confidence"),
        ({"lengths": "64,x"}, "lengths: '64,x' is not a list of whole numbers"),
        ({"lengths": [50]}, "block_length: must divide"),
        ({"pretrain": {"stepps": 3}}, "pretrain: holds 'stepps'"),
        ({"pretrain": "{bad"}, "pretrain: '{bad' is not"),
        ({"tier_weights": {"data": "much"}}, "tier_weights.data: 'much' is not a number"),
        ({"tier_weights": {"data": 2}}, "must lie in"),
        ({"optimiser": "muon", "zero_stage": 2}, "muon needs whole matrices"),
        ({"benchmarks": ["humanevil"]}, "benchmarks: knows"),
    ],
)
def test_bad_switches_are_named(given, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        resolve(**{"preset": "tiny", **given})


def test_texts_are_read_by_the_switch_s_type():
    cfg = resolve(
        "tiny", seed="3", lr="1e-4", lengths="32,64", eos_suppression="logits", tier_weights='{"data": "0.5"}'
    )
    assert (cfg.seed, cfg.lr, cfg.lengths, cfg.eos_suppression) == (3, 1e-4, [32, 64], "logits")
    assert cfg.tier_weights == {"skeleton": 0.15, "data": 0.5, "condition": 0.58, "control": 0.60}
    assert resolve("tiny", pretrain={"max_steps": "7"}).pretrain["optimiser"] == "muon"


def test_notebook_parameters():
    space = {"preset": "tiny", "masking": "random", "source": "x.py", "In": [], "_i": "", "exit": None}
    assert from_notebook(space, own=("source",)).masking == "random"
    with pytest.raises(
        UserError, match="maskng: this notebook has no such parameter; the valid ones are source, preset"
    ):
        from_notebook({**space, "maskng": "ast"}, own=("source",))
    again = {**space, "cfg": resolve("tiny"), "a_name_made_since": 3}
    assert isinstance(from_notebook(again, own=("source",)), Config)


def test_of_a_backbone_s_own_switches_only_those_that_change_it_count(runs):
    cfg = resolve("tiny")
    open_run(cfg, "data", "train")
    open_run(cfg.but(pretrain={**cfg.pretrain, "checkpoint_every": 7, "eval_every": 3}), "data", "train")
    with pytest.raises(UserError, match="pretrain"):
        open_run(cfg.but(pretrain={**cfg.pretrain, "lr": 1.0}), "data", "train")


def test_a_run_of_other_switches_is_refused(runs):
    open_run(resolve("tiny"), "data", "train")
    open_run(resolve("tiny", limit=7), "data", "train")  # sampling does not concern training
    with pytest.raises(UserError, match=r"ast-seed0: this run was made with lr = 0\.\d+, not 0\.5"):
        open_run(resolve("tiny", lr=0.5), "data", "train")


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "file.txt"

    def fail():
        with whole(path) as spot:
            spot.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.rglob("*.txt")) == []
    with whole(path) as spot:
        spot.write_text("all")
    assert path.read_text() == "all"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path):
    code = "import sys,time\nfrom pathlib import Path\nfrom treediff.files import whole\n"
    code += "with whole(Path(sys.argv[1])) as p:\n  p.write_text('half'); print('x', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "f")], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.wait()
    assert not (tmp_path / "f").exists()


def test_provenance_needs_no_git(monkeypatch):

    assert provenance(fact=1)["fact"] == 1
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("TREEDIFF_COMMIT", raising=False)
    facts = provenance()
    assert facts["commit"] is None
    assert facts["changed_files"] is None


def test_damaged_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json: there is no such file"):
        read_json(tmp_path / "b.json")


def test_help_loads_nothing_heavy():
    code = "import sys, treediff.cli as c; c.parser().format_help(); print([m for m in sys.modules if m in " + (
        "('torch', 'numpy', 'transformers', 'matplotlib', 'datasets')])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5
