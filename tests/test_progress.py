"""Progress bars: a widget for a person at a notebook, one line at the end where nobody sits."""

import io
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from treediff import progress
from treediff.cli import QUIET, _kernel
from treediff.config import from_notebook
from treediff.strategies import MASKINGS, STRATEGIES


def test_where_nobody_sits_one_line_stays(monkeypatch):
    to = io.StringIO()
    monkeypatch.setattr(sys, "stderr", to)
    with progress.bar(total=50, desc="train ast", mininterval=0) as bar:
        for _ in range(50):
            bar.update()
    assert to.getvalue().count("\n") == 1
    assert to.getvalue().startswith("train ast: 100%")
    assert "\r" not in to.getvalue()


def test_what_takes_long_says_so_meanwhile(monkeypatch):
    to = io.StringIO()
    monkeypatch.setattr(sys, "stderr", to)
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress.bar(total=3, mininterval=0) as bar:
        for _ in range(3):
            bar.update()
    assert to.getvalue().count("\n") >= 3


@pytest.mark.parametrize(("asks", "kind"), [(True, "tqdm.notebook"), (False, "tqdm.std")])
def test_a_notebook_at_which_a_person_may_be_asked_has_a_widget(monkeypatch, asks, kind):
    import IPython

    kernel = type("Kernel", (), {"_allow_stdin": asks})()
    monkeypatch.setattr(IPython, "get_ipython", lambda: type("Shell", (), {"kernel": kernel})())
    assert progress.attended() is asks
    shown = progress.bar(total=1, display=False) if asks else progress.bar(total=1)
    assert type(shown).__module__ == kind
    shown.close()


def test_papermill_leaves_one_line_of_a_bar_and_no_warning(tmp_path, capfd):
    code = "from treediff import progress\nfor _ in progress.bar(range(30), desc='x', mininterval=0): pass"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "a.ipynb")
    ways = {
        "kernel_name": _kernel(),
        "progress_bar": False,
        "extra_arguments": QUIET,
        "cwd": str(Path(__file__).parents[1]),
    }
    done = papermill.execute_notebook(str(tmp_path / "a.ipynb"), str(tmp_path / "b.ipynb"), **ways)
    assert "WARNING" not in capfd.readouterr().err
    said = "".join(o["text"] for o in done.cells[0]["outputs"])
    assert said.startswith("x: 100%")
    assert said.count("\n") == 1


def test_imported_constants_are_no_parameters():
    assert from_notebook({"seed": 3, "STRATEGIES": STRATEGIES, "MASKINGS": MASKINGS}).seed == 3
