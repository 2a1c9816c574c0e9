"""What the documents name exists: tests, functions, switches and files."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest

from treediff.config import SWITCHES, Config

ROOT = Path(__file__).parents[1]
FIDELITY = (ROOT / "docs" / "fidelity.md").read_text()
CODE = sorted(set(re.findall(r"`([^`\n]+)`", FIDELITY)))


def kind(pattern: str) -> list[str]:
    return [c for c in CODE if re.fullmatch(pattern, c)]


@pytest.mark.parametrize("name", kind(r"test_\w+(\.test_\w+)?"))
def test_named_tests_exist(name):
    """`test_file`, `test_file.test_name`, or `test_name` of whichever file."""
    file, _, test = name.rpartition(".")
    texts = {p.stem: p.read_text() for p in (ROOT / "tests").glob("test_*.py")}
    if file:
        assert f"def {test}(" in texts[file]
    else:
        assert test in texts or any(f"def {test}(" in text for text in texts.values())


@pytest.mark.parametrize("name", kind(r"[a-z]+\.[A-Za-z_]+"))
def test_named_functions_and_files_exist(name):
    module, _, attribute = name.partition(".")
    if attribute in ("py", "md"):
        assert list(ROOT.glob(f"treediff/**/{name}")) + list(ROOT.glob(f"docs/{name}"))
    else:
        files = ROOT.glob(f"treediff/**/{module}.py")
        names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]
        assert any(hasattr(importlib.import_module(n), attribute) for n in names)


@pytest.mark.parametrize("name", kind(r"\w+ = \w+") + kind(r"[a-z]+_[a-z_]+"))
def test_named_switches_and_values_exist(name):
    switch, _, value = name.partition(" = ")
    if not switch.startswith("test_"):
        hints = typing.get_type_hints(Config)
        types = {k: str(hints[k]) + str(f.default) for k, f in SWITCHES.items()}
        assert switch in SWITCHES or any(switch in t for t in types.values())
        assert not value or value in types[switch]


def test_the_masking_rule_of_the_docs_works_as_it_stands(tmp_path):
    """The two blocks of docs/rules.md, put where it says, make a rule that corrupts by its name."""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "docs/rules.md").read_text(), re.S)
    function, record = (textwrap.dedent(b) for b in blocks)
    shutil.copytree(ROOT / "treediff", tmp_path / "treediff", ignore=shutil.ignore_patterns("__pycache__"))
    rules, strategies = tmp_path / "treediff/masking/rules.py", tmp_path / "treediff/strategies.py"
    rules.write_text(f"{rules.read_text()}\n\n{function}")
    head, end, rest = strategies.read_text().partition("    )\n}")
    assert end
    strategies.write_text(head + record + end + rest)
    code = (
        "import torch; from treediff.config import resolve; from treediff.masking import rules, tokens\n"
        "labels = torch.tensor([[tokens.PROMPT] + [tokens.CODE] * 8], dtype=torch.uint8)\n"
        "p = torch.tensor([0.4], dtype=torch.float64)\n"
        "mask = rules.corrupt(resolve('tiny', masking='last'), labels, None, torch.tensor([1]), 0, p)\n"
        "print(mask[0].nonzero()[:, 0].tolist())"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.strip() == "[6, 7, 8]", done.stderr
