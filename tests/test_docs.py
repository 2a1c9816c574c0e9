"""What the documents name exists: tests, functions, switches and files."""

import importlib
import re
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
