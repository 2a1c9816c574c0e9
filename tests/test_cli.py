"""The commands as a user types them."""

import json
import os
import subprocess
import sys

import pytest

from treediff import cli
from treediff.config import SWITCHES
from treediff.masking import tiers


def run(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "treediff.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
    )


def test_annotate_prints_the_source_in_colour(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("if x:\n    return 'é'\n")
    done = run("annotate", path)
    assert done.returncode == 0, done.stderr
    import re

    assert re.sub(r"\x1b\[\d+m", "", done.stdout) == path.read_text()
    assert "\x1b[33mif" in done.stdout
    assert "\x1b[31mreturn" in done.stdout


def test_annotate_knows_a_language_by_suffix_or_switch(tmp_path):

    if "go" not in tiers.installed():
        pytest.skip("the grammar of go is not installed (pip install 'treediff[languages]')")
    code = "package p\nfunc f() { defer g() }\n"
    for name, args in (("a.go", ()), ("a.txt", ("--language", "go")), ("a.py", ("--language=go",))):
        (tmp_path / name).write_text(code)
        done = run("annotate", tmp_path / name, *args)
        assert done.returncode == 0, done.stderr
        assert "\x1b[31mdefer" in done.stdout
        assert "do not parse" not in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("annotate", "{tmp}/bad.py"), "bad.py: byte 0 is not valid UTF-8"),
        (("annotate", "{tmp}/none.py"), "none.py: cannot be read"),
        (("annotate", "{tmp}/notes.txt"), "notes.txt: its suffix is none of .py"),
        (("annotate", "{tmp}/notes.txt", "--language", "cobol"), "language: there is no 'cobol'"),
        (("train", "--preset", "huge"), "preset: there is no 'huge'"),
        (("train", "--masking", "tree"), "masking: 'tree' is not one of"),
        (("train", "--maskin", "ast"), "maskin: there is no such switch"),
        (("train", "--seed"), "seed: no value is given"),
        (("train", "seed"), "seed: not understood"),
        (("score", "--benchmark", "mbpp"), "--samples: needed together"),
        (("prepare", "--data", "{tmp}/none.jsonl", "--tokenizer", "train"), "none.jsonl: cannot be read"),
        (("train", "--preset", "paper", "--tokenizer", "{tmp}"), "neither a tokenizer folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, args, said):
    (tmp_path / "bad.py").write_bytes(b"\xff")
    (tmp_path / "notes.txt").write_text("x")
    done = run(*(a.format(tmp=tmp_path) for a in args), TREEDIFF_RUNS=str(tmp_path / "runs"), HF_HUB_OFFLINE="1")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_broken_code_is_annotated_all_the_same(tmp_path):
    (tmp_path / "b.py").write_text("def f(:\n  x = = 3\n")
    done = run("annotate", tmp_path / "b.py")
    assert done.returncode == 0
    assert "do not parse" in done.stderr


def test_prepare_reports_what_it_dropped(shared, tmp_path):
    done = run(
        "prepare",
        "--data",
        shared / "data/think_code/can_ai_code_full.jsonl",
        "--tokenizer",
        shared / "tokenizers/llada_standin_8k",
        "--out",
        tmp_path / "d",
        TREEDIFF_RUNS=str(tmp_path / "runs"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["dropped"]["no code block"] == 1
    import datasets

    assert len(datasets.load_from_disk(str(tmp_path / "d"))) == json.loads(done.stdout)["rows"]["kept"]


def test_switches_lists_every_switch():

    done = run("switches", "--preset", "paper")
    assert all(f"--{name} " in done.stdout for name in SWITCHES)


def test_entries_of_a_mapping_are_set_by_dots():
    args, extra = cli.parser().parse_known_args(["train", "--pretrain.max_steps", "5", "--tier-weights.data=0.1"])
    cfg = cli.switches(args, extra)
    assert cfg.pretrain["max_steps"] == 5
    assert cfg.tier_weights["data"] == 0.1
