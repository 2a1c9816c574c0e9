"""The commands as a user types them."""

import json
import os
import subprocess
import sys

import pytest

from treediff import cli
from treediff.config import SWITCHES, resolve
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
        (("train", "--masking", "tree"), "masking: 'tree' should be 'none', 'random'"),
        (("train", "--maskin", "ast"), "maskin: there is no such switch; did you mean masking"),
        (("train", "--seed"), "train: argument --seed: expected one argument"),
        (("train", "--pretrain.max_steps"), "pretrain.max_steps: no value is given"),
        (("train", "--pretrain", "{{}}", "--pretrain.max_steps", "3"), "pretrain: give it whole or by its entries"),
        (("trian",), "trian: argument COMMAND: invalid choice"),
        ((), "treediff: the following arguments are required: COMMAND"),
        (("train", "seed"), "seed: not understood"),
        (("score", "--benchmark", "mbpp"), "--samples: needed together"),
        (("score", "--problems", "a.jsonl"), "--benchmark: needed together"),
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


def test_a_missing_token_is_told_with_its_line(tmp_path):
    if "javascript" not in tiers.installed():
        pytest.skip("the grammar of javascript is not installed (pip install 'treediff[languages]')")
    (tmp_path / "c.js").write_text("let y = 2;\nlet x = (1;\n")
    (tmp_path / "d.js").write_text("let x = (1);\n")
    done = run("annotate", tmp_path / "c.js")
    assert done.returncode == 0
    assert "c.js: line 2: ')' is missing" in done.stderr
    assert "missing" not in run("annotate", tmp_path / "d.js").stderr


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
    assert all(f"--{name} " in done.stdout for name in SWITCHES if name != "preset")  # which every command has


def settings(monkeypatch, *argv):
    """The switches that `treediff train` would run with."""
    taken = []
    monkeypatch.setitem(cli.COMMANDS, "train", lambda args, cfg: taken.append(cfg))
    cli.main(["train", *argv])
    return taken[0]


def test_switches_are_given_in_any_of_their_forms(monkeypatch):
    given = [
        "--pretrain.max-steps",
        "5",
        "--tier-weights.data=0.1",
        "--max-steps",
        "7",
        "--lora_rank=3",
        "--data=a-b=c",
    ]
    cfg = settings(monkeypatch, *given)
    assert (cfg.pretrain["max_steps"], cfg.pretrain["optimiser"]) == (5, "muon")
    assert (cfg.tier_weights["data"], cfg.max_steps, cfg.lora_rank, cfg.data) == (0.1, 7, 3, "a-b=c")
    assert settings(monkeypatch, "--preset", "paper", "--seed", "4") == resolve("paper", seed=4)


@pytest.mark.parametrize("command", [c for c in cli.COMMANDS if c != "switches"])
def test_help_lists_what_switches_lists_of_a_command_s_stages(command, capsys):
    cli.main(["switches", "--preset", "paper"])
    listed = capsys.readouterr().out
    told = told_by_help(capsys, command, "--preset", "paper")
    for stage in cli.LISTED.get(command, cli.STAGES):
        title = f"switches: {cli.STAGES[stage]}:"
        section = listed[listed.index(title) :].partition("\n\n")[0].strip()
        assert section in told
    assert ("--lora_rank" in told) == ("train" in cli.LISTED.get(command, cli.STAGES))


def told_by_help(capsys, *argv):
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*argv, "--help"])
    return capsys.readouterr().out


def test_the_help_tells_default_choices_and_the_paper_s_section(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    told = told_by_help(capsys, "train")
    assert "--optimiser adamw|muon\n" in told
    assert "[tiny: 0.005; paper: 4.1]" in told
    assert "[paper: 5e-05; paper: 4.1]" in told_by_help(capsys, "train", "--preset=paper")


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("infill f.py --line 3 --masking none", "f.py"),
        ("infill --line 3 --masking none f.py", "f.py"),
        ("infill --pretrain.max-steps 8 --line 3 f.py", "f.py"),
        ("infill --pretrain.max_steps 8 --holes ast", None),
    ],
)
def test_a_hole_s_file_is_no_switch_s_value(line, file):
    args, extra = cli.parser("infill", "tiny").parse_known_args(cli.underscored(line.split()))
    cfg = cli.switches(args, extra)
    assert (str(args.file) if args.file else None) == file
    assert cfg.pretrain["max_steps"] == (8 if "max" in line else resolve("tiny").pretrain["max_steps"])


def test_a_decoding_is_named_by_as_too():
    args, extra = cli.parser("sample").parse_known_args(["sample", "--as", "fast", "--threshold", "0.9"])
    assert cli.switches(args, extra).decoding == "fast"


def test_a_protocol_fills_no_holes(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["infill", "--preset", "paper", "--protocol", "llada"])
    assert e.value.code == 2
    assert "protocol: the published evaluations fill no holes" in capsys.readouterr().err
