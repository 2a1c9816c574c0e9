"""Shared by the tests: the folder of the checks' material, which a checkout may lack."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small to share: threads only wait

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real benchmark data and tokenizers is not beside this checkout")
    return SHARED


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A fresh root for runs."""
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"
