"""Figures: what they show is what they were given."""

import io
import itertools
import re

import numpy as np
import pytest

from treediff.config import resolve
from treediff.figures import plots, views
from treediff.masking import tiers, tokens

CODE = 'def f(x):\n\tif x:  # é😀\n        return "a"\n'


def test_ansi_text_is_the_source():
    parsed = tiers.parse(CODE.encode())
    text = plots.ansi(parsed.source, tiers.byte_tiers(parsed))
    assert re.sub(r"\x1b\[\d+m", "", text) == CODE
    assert plots.ansi(b"", np.zeros(0, np.uint8)) == ""


def test_boxes_cover_the_text_once(tmp_path):
    tokens.train_tokenizer([CODE], 300, tmp_path / "t")
    tok = tokens.load_tokenizer(str(tmp_path / "t"))
    view = views.view(resolve("tiny"), tok, CODE)
    runs = plots.token_runs(CODE, view.starts, view.labels)
    cover = np.zeros(len(CODE), int)
    for start, end, _ in runs:
        cover[start:end] += 1
    assert (cover == 1).all()


def test_masked_characters_are_hidden():
    text = "ab cd"
    runs = [(0, 2, "#ffffff"), (2, 5, "#eeeeee")]
    figure = plots.states([("t", text, runs, np.array([False, True]))])
    shown = [t.get_text() for t in figure.axes[0].texts]
    assert shown == ["ab"]
    assert [tuple(round(c, 2) for c in p.get_facecolor()[:3]) for p in figure.axes[0].patches] == [
        (1.0, 1.0, 1.0),
        (0.2, 0.2, 0.2),
    ]


def test_text_stands_in_its_box():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    text = "ab cdef\n    g(x)"
    runs = [(0, 2, "#fff"), (2, 7, "#eee"), (7, 12, "#fff"), (12, 16, "#eee")]
    figure = plots.states([("t", text, runs, np.zeros(4, bool))])
    renderer = FigureCanvasAgg(figure).get_renderer()
    ax = figure.axes[0]
    boxes = [p.get_window_extent(renderer) for p in ax.patches if p.get_width() > 0]
    for drawn in ax.texts:
        extent = drawn.get_window_extent(renderer)
        x, y = extent.x0 + 1, (extent.y0 + extent.y1) / 2
        [box] = [b for b in boxes if b.contains(x, y)]
        assert extent.x1 <= box.x1 + 1.5


def test_the_legend_fits_the_narrowest_figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plots.states([("t", "ab", [(0, 2, "#fff")], np.zeros(1, bool))])
    extent = figure.legends[0].get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width


def test_intervals_are_drawn_where_they_are():
    figure = plots.robustness({"none": {64: (50.0, 40.0, 62.0)}, "ast": {64: (70.0, 60.0, 80.0)}}, "pass@1")
    segments = [s for c in figure.axes[0].collections for s in c.get_segments()]
    assert sorted((round(s[0][1], 6), round(s[1][1], 6)) for s in segments) == [(40.0, 62.0), (60.0, 80.0)]


def test_the_tree_shows_every_named_node():
    parsed = tiers.parse(b"def f(a):\n    return a\n")
    figure = plots.tree(parsed)
    shown = [t.get_text().replace("\n", "_") for t in figure.axes[0].texts]
    assert {"module", "function_definition", "parameters", "block", "return_statement", "def", "return"} <= set(shown)
    assert shown.count("a") == 2


def test_the_slider_redraws_its_figure_in_a_kernel_and_stays_without_one(tmp_path):
    """Moving it, as a front end does, replaces the figure of the cell that made it."""
    import nbformat
    from nbclient import NotebookClient

    made = (
        "%matplotlib inline\n"
        "from matplotlib.figure import Figure\n"
        "from treediff.figures import plots\n"
        "def draw(x):\n"
        "    figure = Figure()\n"
        "    figure.subplots().set_title(x)\n"
        "    return figure\n"
        "slider = plots.slider(draw, 'P', 0.25)"
    )

    def picture(*cells: str) -> str:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        NotebookClient(notebook, kernel_name="python3", timeout=100).execute()
        (shown,) = [o for o in notebook.cells[0].outputs if "image/png" in o.get("data", {})]
        return shown["data"]["image/png"]

    assert picture(made, "slider.value = 0.75") == picture(made.replace("0.25", "0.75")) != picture(made)


@pytest.mark.parametrize(
    "code", ["(" * 10_000 + ")" * 10_000, f"x = [{'1, ' * 10_000}]\n", "def f(a): return a\n" * 2000]
)
def test_a_large_tree_is_drawn_in_part_and_says_so(code):
    figure = plots.tree(tiers.parse(code.encode()))
    assert max(figure.get_size_inches()) < 70
    words = [t.get_text() for t in figure.axes[0].texts]
    assert len(words) <= 90
    assert any(w.endswith("\n…") for w in words)
    small = plots.tree(tiers.parse(b"def f(a):\n    return 'x'\n"))
    assert not any(t.get_text().endswith("\n…") for t in small.axes[0].texts)


def test_the_boxes_of_a_tree_do_not_overlap():
    code = "def a_rather_long_name(x):\n    return [f(1), not y, not z], lambda: x\n# comment one\n# comment two\n"
    figure = plots.tree(tiers.parse(code.encode()))
    figure.savefig(io.BytesIO())  # which lays it out
    boxes = [t.get_bbox_patch().get_window_extent() for t in figure.axes[0].texts]
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
