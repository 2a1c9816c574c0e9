"""Shared by the tests: the folder of public files that some checks need, and a fresh root for runs."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small to share: threads only wait

ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = [os.environ.get("TREEDIFF_ORACLES", ""), ROOT / ".oracles", ROOT.parent / "shared"]
SHARED = next((Path(f) for f in _FOLDERS if f and Path(f).is_dir()), ROOT / ".oracles")
"""Public files that some checks need: see `make oracles`."""


@pytest.fixture
def shared() -> Path:
    """The folder of public files; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs public benchmark data: make oracles FROM=FOLDER")
    return SHARED


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A fresh root for runs."""
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"
