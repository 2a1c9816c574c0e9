"""Switches, presets and files."""

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from treediff.cli import STAGES
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
    assert all(s.help and s.takes and s.stage in STAGES for s in SWITCHES.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "huge"}, "preset: there is no 'huge'"),
        ({"maskin": "ast"}, "maskin: there is no such switch; did you mean masking"),
        ({"zzzzzz": "ast"}, "zzzzzz: there is no such switch; `treediff switches` lists all of them."),
        ({"masking": "tree"}, "masking: 'tree' should be 'none', 'random', 'ast_span'"),
        ({"seed": "one"}, "seed: 'one' should be a valid integer"),
        ({"seed": 1.5}, "seed: 1.5 should be a valid integer"),
        ({"seed": "-1"}, "seed: '-1' should be greater than or equal to 0."),
        ({"lr": "nan"}, "lr: 'nan' should be a finite number"),
        ({"eos_suppression": "maybe"}, "eos_suppression: 'maybe' should be 'off', 'logits' or 'confidence'"),
        ({"lengths": "64,x"}, "lengths: 'x' should be a valid integer"),
        ({"lengths": [50]}, "block_length: must divide"),
        ({"lengths": []}, "lengths: List should have at least 1 item"),
        ({"pretrain": {"stepps": 3}}, "pretrain.stepps: there is no such switch; did you mean"),
        ({"pretrain": {"max_steps": "x"}}, "pretrain.max_steps: 'x' should be a valid integer"),
        ({"pretrain": {"masking": "ast"}}, "pretrain: must not hold preset, masking, seed"),
        ({"pretrain": {"seed": 3}}, "pretrain: must not hold"),
        ({"backbone_seed": -2}, "backbone_seed: -2 should be greater than or equal to -1"),
        ({"variant": "A/b"}, "variant: String should match pattern"),
        ({"pretrain": "{bad"}, "pretrain: '{bad' should be a valid dictionary"),
        ({"tier_weights": {"data": "much"}}, "tier_weights.data: 'much' should be a valid number"),
        ({"tier_weights": {"data": 2}}, "tier_weights.data: 2 should be less than or equal to 1"),
        ({"tier_weights": {"date": 0.1}}, "tier_weights.date: 'date' should be 'skeleton', 'data'"),
        ({"optimiser": "muon", "zero_stage": 2}, "muon needs whole matrices"),
        ({"benchmarks": ["humanevil"]}, "benchmarks: 'humanevil' should be 'humaneval'"),
    ],
)
def test_bad_switches_are_named(given, said):
    with pytest.raises(UserError, match=re.escape(said)):
        resolve(**{"preset": "tiny", **given})


def test_texts_are_read_by_the_switch_s_type():
    cfg = resolve(
        "tiny", seed="3", lr="1e-4", lengths="32,64", eos_suppression="logits", tier_weights='{"data": "0.5"}'
    )
    assert (cfg.seed, cfg.lr, cfg.lengths, cfg.eos_suppression) == (3, 1e-4, [32, 64], "logits")
    assert cfg.tier_weights == {"skeleton": 0.15, "data": 0.5, "condition": 0.58, "control": 0.60}
    assert resolve("tiny", pretrain={"max_steps": "7"}).pretrain["optimiser"] == "muon"


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_saved_record_is_a_config_and_is_checked(preset):
    saved = json.loads(json.dumps(resolve(preset).as_dict()))
    assert Config(**saved) == resolve(preset)
    with pytest.raises(UserError, match=r"^rows: -1 should be"):
        Config(**{**saved, "rows": -1})


RANGES = re.compile(r"(int|float)(?: >=? (\S+?))(?:, <=? (\S+?))?")
RANGED = {s.name: match.groups() for s in SWITCHES.values() if (match := RANGES.fullmatch(s.takes))}


def test_every_number_has_a_range():
    assert set(RANGED) == {s.name for s in SWITCHES.values() if s.takes.startswith(("int", "float"))}


@drawn(st.sampled_from(sorted(RANGED)), st.floats(1e-3, 1e6), st.booleans(), st.booleans())
def test_a_number_outside_its_range_is_refused_with_its_name(name, by, above, as_text):
    kind, low, high = RANGED[name]
    by = int(by) + 1 if kind == "int" else by
    value = float(high) + by if above and high else float(low) - by
    value = int(value) if kind == "int" else value
    with pytest.raises(UserError, match=f"^{name}: .* should be (less|greater) than"):
        Config(**{name: str(value) if as_text else value})


@drawn(st.sampled_from(sorted(s.name for s in SWITCHES.values() if "|" in s.takes)), st.text())
def test_no_other_choice_is_taken(name, text):
    truths = {"0", "1", "f", "t", "n", "y", "no", "on", "off", "yes", "true", "false"}
    choices = SWITCHES[name].takes.removeprefix("list of ").split("|")
    items = text.split(",") if name == "benchmarks" else [text]
    if {*items} <= {*choices} or ("true" in choices and text.lower() in truths):
        return
    with pytest.raises(UserError, match=f"^{name}: "):
        Config(**{name: text})


@pytest.mark.parametrize("name", sorted(SWITCHES))
@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_value_written_as_a_text_is_read_back(name, preset):
    value = getattr(resolve(preset), name)
    written = value if isinstance(value, str) else json.dumps(value)
    assert getattr(resolve(preset, **({} if name == "preset" else {name: written})), name) == value


@drawn(st.lists(st.integers(1, 40).map(lambda n: 32 * n), min_size=1))
def test_a_list_between_commas_is_a_list(lengths):
    assert resolve("paper", lengths=",".join(map(str, lengths))).lengths == lengths


def test_notebook_parameters():
    space = {"preset": "tiny", "masking": "random", "source": "x.py", "In": [], "_i": "", "exit": None}
    assert from_notebook(space, own=("source",)).masking == "random"
    with pytest.raises(UserError, match="maskng: this notebook has no such parameter; did you mean masking"):
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_a_backbone_is_shared_by_its_seed(runs):
    cfg = resolve("tiny", masking="ast", seed=4, backbone_seed=1, variant="upside_down")
    assert cfg.run_dir.name == "ast-upside_down-seed4"
    backbone = cfg.with_masking("none")
    assert backbone == resolve("tiny", masking="none", seed=1)  # the very run that anybody makes by hand
    assert resolve("tiny", seed=4).with_masking("none").seed == 4
    open_run(cfg, "data", "train")
    with pytest.raises(UserError, match="made with backbone_seed = 1, not -1"):
        open_run(cfg.but(backbone_seed=-1), "data", "train")


def test_a_trained_run_may_have_shared_its_rows_out_otherwise(runs):
    cfg = resolve("tiny", processes=2, accumulation=1)
    one = cfg.but(processes=1, accumulation=2)
    open_run(cfg, "data", "train")
    with pytest.raises(UserError, match="accumulation"):  # it may have checkpoints of two processes
        open_run(one, "data", "train")
    (cfg.run_dir / "adapter").mkdir()
    open_run(one, "data", "train")
    with pytest.raises(UserError, match="processes"):  # half the rows
        open_run(cfg.but(processes=1), "data", "train")
