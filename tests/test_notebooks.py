"""The notebooks as files: parameters, kernel, no outputs, and that they refuse a misspelt parameter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_eight():
    assert [p.stem[:3] for p in NOTEBOOKS] == [f"0{i}_" for i in range(1, 9)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_shape(path):
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)
    assert [i for i, c in enumerate(code) if "parameters" in c["metadata"].get("tags", [])] == [0]
    assert "from_notebook(globals()" in "".join(code[1]["source"])
    assert cells[0]["cell_type"] == "markdown"


@pytest.mark.parametrize("path", NOTEBOOKS[2:3], ids=lambda p: p.stem)
def test_a_misspelt_parameter_is_an_error_that_names_the_nearest(path, tmp_path):
    papermill = [sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb"), "-k", "python3"]
    environment = {**os.environ, "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter")}
    done = subprocess.run(
        [*papermill, "-p", "maskng", "ast"], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 1
    assert "maskng: this notebook has no such parameter; did you mean masking" in done.stderr
