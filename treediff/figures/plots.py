"""Every figure: each function takes data and returns a matplotlib Figure (or, for `ansi`, text for a terminal).

Code is drawn as it is written, on a grid of characters, so that token edges, tiers and masks can be seen on it. The
colours are Okabe and Ito's, which the colour-blind tell apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treediff.files import whole
from treediff.masking.tiers import TIERS, Parsed
from treediff.masking.tokens import CODE, LABELS
from treediff.strategies import STRATEGIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = {
    "prompt": "#FFFFFF",
    "reasoning": "#EDEDED",
    "default": "#DDDDDD",
    "skeleton": "#9BD3F5",
    "data": "#7FD1B9",
    "condition": "#F5C767",
    "control": "#F0956B",
}
"""Background of each label, light enough for black text; the hues are Okabe and Ito's."""

MASKED = "#333333"

_ANSI = {"default": "0", "skeleton": "36", "data": "32", "condition": "33", "control": "31"}
_CELL = (0.0627, 0.145)  # width and height of a character at 7.5 points [inch]


def ansi(source: bytes, tiers: np.ndarray) -> str:
    """`source` with ANSI colours by tier (uint8 per byte): cyan skeleton, green data, yellow condition, red control."""
    names = LABELS[CODE:]
    cuts = np.flatnonzero(np.diff(tiers, prepend=255, append=255))
    out = []
    for start, end in itertools.pairwise(cuts):
        text = source[start:end].decode(errors="replace")
        code = _ANSI[names[tiers[start]]]
        # Colour line by line, so that a pager that cuts the text keeps the colours right.
        out.append("\n".join(f"\x1b[{code}m{part}\x1b[0m" if part.strip() else part for part in text.split("\n")))
    return "".join(out)


def _panels(texts: Sequence[Sequence[str]], titled: bool = True, right: float = 0.0) -> tuple[Figure, list[list[Axes]]]:
    """A grid of axes for code, each exactly as large as its text [inch], so that characters and boxes agree.

    `texts` is the grid; `right` leaves room at the right [inch]. The legend's room is at the bottom.
    """
    from matplotlib.figure import Figure

    gap, top, legend = 0.3, 0.28 if titled else 0.05, 0.4
    widths = [max(_columns(row[i]) for row in texts) * _CELL[0] for i in range(len(texts[0]))]
    heights = [max(len(t.split("\n")) for t in row) * _CELL[1] for row in texts]
    width = max(6.4, sum(widths) + gap * (len(widths) + 1) + right)
    height = sum(heights) + (top + 0.1) * len(heights) + legend
    figure = Figure(figsize=(width, height))
    axes, y = [], height
    for row, h in zip(texts, heights, strict=True):
        x, y = gap, y - top - h
        axes.append([])
        for _, w in zip(row, widths, strict=True):
            axes[-1].append(figure.add_axes((x / width, y / height, w / width, h / height)))
            x += w + gap
        y -= 0.1
    return figure, axes


def _columns(text: str) -> int:
    return max(34, max(len(x) for x in text.split("\n")) + 1)


def _code(ax: Axes, text: str, runs: Sequence[tuple[int, int, str]], masked: Sequence[bool] = ()) -> None:
    """Draw `text` on a grid of characters, each run (character start, end, colour) as a box; masked ones are hidden.

    Each box's text is drawn for itself, because a line's would drift: fonts round the width of a character.
    """
    from matplotlib.patches import Rectangle

    box = ax.get_position()
    ax.set_xlim(0, box.width * ax.figure.get_figwidth() / _CELL[0])
    ax.set_ylim(box.height * ax.figure.get_figheight() / _CELL[1], 0)
    ax.set_axis_off()
    lines = text.split("\n")
    starts = np.cumsum([0] + [len(x) + 1 for x in lines])

    def write(column: int, row: int, part: str) -> None:
        if part.strip():
            ax.text(column, row + 0.52, part.replace("\t", " "), family="monospace", fontsize=7.5, va="center")

    for number, (start, end, colour) in enumerate(runs):
        hidden = bool(len(masked)) and bool(masked[number])
        row = int(np.searchsorted(starts, start, "right")) - 1
        while start < end and row < len(lines):
            column, width = start - int(starts[row]), min(end - start, int(starts[row]) + len(lines[row]) - start)
            if width > 0:
                fill = MASKED if hidden else colour
                ax.add_patch(Rectangle((column, row), width, 1, facecolor=fill, edgecolor="white", lw=0.6))
                if not hidden:
                    write(column, row, lines[row][column : column + width])
            row, start = row + 1, int(starts[row + 1])
    if not runs:
        for row, line in enumerate(lines):
            write(0, row, line)


def token_runs(text: str, starts: np.ndarray, labels: np.ndarray) -> list[tuple[int, int, str]]:
    """Token boxes for `_code`: byte offsets of tokens -> characters (a token inside a character shares its box)."""
    at = np.cumsum([0] + [len(c.encode()) for c in text])  # byte offset of each character
    first = np.searchsorted(at, starts, "right") - 1
    ends = np.append(first, len(text))[1:]
    return [(int(a), int(b), COLOURS[LABELS[label]]) for a, b, label in zip(first, ends, labels, strict=True)]


def _tier_legend(figure: Figure, labels: Sequence[str] = LABELS[CODE:], masked: bool = False) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=COLOURS[x], edgecolor="#888888", label=x) for x in labels]
    if masked:
        patches.append(Patch(facecolor=MASKED, label="masked"))
    close = {"columnspacing": 1.1, "handlelength": 1.3, "handletextpad": 0.5}
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False, fontsize=9, **close)


def source(text: str, starts: np.ndarray, labels: np.ndarray, title: str = "") -> Figure:
    """Code with one box per token, coloured by the token's label. `starts` are byte offsets, `labels` codes."""
    figure, [[ax]] = _panels([[text]])
    _code(ax, text, token_runs(text, starts, labels))
    ax.set_title(title, fontsize=10, loc="left")
    _tier_legend(figure)
    return figure


def tree(parsed: Parsed, node: Any = None, most: int = 90, deepest: int = 24, hole: tuple[int, int] = (0, 0)) -> Figure:
    """The syntax tree of `node` (the whole source by default) drawn as a tree, nodes coloured by their own tier: the
    first `most` nodes down to the level `deepest`. A node that has more below it than is drawn ends in an ellipsis.
    What lies in the bytes `hole` is dark."""
    from matplotlib.figure import Figure

    g = parsed.grammar
    places: dict[int, tuple[float, int]] = {}
    drawn: list[tuple[Any, int | None]] = []
    cut: set[int] = set()  # nodes of which not all is drawn
    right = 0.0  # how far the picture reaches so far [inch]

    def whole(n: Any) -> bool:
        """Whether a node is drawn as its text."""
        return n.child_count == 0 or "string" in n.type or "comment" in n.type

    def label(n: Any) -> str:
        if not whole(n):
            return n.type.replace("_", "\n") + ("\n…" if n.id in cut else "")
        text = n.text.decode(errors="replace").split("\n")[0]
        return text if len(text) < 14 else text[:12] + "…"

    def place(n: Any, depth: int, above: int | None) -> float:
        nonlocal right
        first, left = len(drawn) + 1, right
        drawn.append((n, above))
        # Punctuation belongs to the tree that tree-sitter builds, but not to a picture of it.
        inner = [] if whole(n) else [c for c in n.children if c.is_named or c.text[:1].isalpha()]
        # One after the other, because each draws what is below it.
        below = [place(c, depth + 1, n.id) for c in inner if len(drawn) < most and depth < deepest]
        if len(below) < len(inner):
            cut.add(n.id)
        half = 0.035 * max(map(len, label(n).split("\n"))) + 0.12  # of the box
        x = float(np.mean(below)) if below else left + half
        if (shift := left + half - x) > 0:  # a box that is wider than what is below it
            x, right = x + shift, right + shift
            places.update({m.id: (places[m.id][0] + shift, places[m.id][1]) for m, _ in drawn[first:]})
        right = max(right, x + half)
        places[n.id] = (x, depth)
        return x

    tier_of: dict[int, int] = {}
    place(node or parsed.tree.root_node, 0, None)
    depth = max(d for _, d in places.values())
    figure = Figure(figsize=(max(6, right), (depth + 1) * 0.6 + 0.6), layout="constrained")
    ax = figure.subplots()
    for n, above in drawn:
        x, d = places[n.id]
        if above is not None:
            px, pd = places[above]
            ax.plot([px, x], [-pd, -d], color="#BBBBBB", lw=0.8, zorder=1)
        tier = int(g.tier_of_kind[n.kind_id]) if n.is_named and not n.is_error else 0
        if not n.is_named and above is not None:  # a keyword takes the tier of the node that it begins
            tier = tier_of[above]
        tier_of[n.id] = tier
        hidden = hole[0] <= n.start_byte < n.end_byte <= hole[1]
        fill = MASKED if hidden else COLOURS[TIERS[tier]]
        ax.text(
            x,
            -d,
            label(n),
            ha="center",
            va="center",
            fontsize=8,
            family="monospace" if n.child_count == 0 else "sans-serif",
            color="white" if hidden else "black",
            bbox={"boxstyle": "round,pad=0.25", "fc": fill, "ec": "#888888", "lw": 0.5},
            zorder=2,
        )
    ax.set_xlim(min(0, (right - 6) / 2), max(right, (right + 6) / 2))
    ax.set_ylim(-depth - 0.6, 0.6)
    ax.set_axis_off()
    _tier_legend(figure)
    return figure


def tier_shares(labels: np.ndarray, weights: Sequence[float]) -> Figure:
    """Each tier's share of the code tokens, and its share of the sampling weight (both in percent)."""
    figure, (ax,) = _axes(6.0, 2.8)
    tiers = LABELS[CODE:]
    count = np.array([(labels == CODE + i).sum() for i in range(len(tiers))], float)
    weight = count * np.array(weights[CODE:])
    y = np.arange(len(tiers))
    for shift, values, alpha, name in ((-0.2, count, 0.45, "of the tokens"), (0.2, weight, 1.0, "of the weight")):
        share = 100 * values / max(1e-9, values.sum())
        bars = ax.barh(y + shift, share, 0.36, color=[_LINE[t] for t in tiers], alpha=alpha)
        ax.bar_label(bars, [f"{v:.0f} % {name}" for v in share], fontsize=7.5, padding=3)
    ax.set_yticks(y, tiers)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("share [%]")
    return figure


def reasons(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Why programs fail: for each run (title) how many programs pass or fail for which reason."""
    names = list(dict.fromkeys(r for by in counts.values() for r in by))
    names.sort(key=lambda r: (r != "pass", -sum(by.get(r, 0) for by in counts.values())))
    shades = ["#009E73", "#D55E00", "#E69F00", "#0072B2", "#CC79A7", "#56B4E9", "#F0E442", "#999999"]
    figure, (ax,) = _axes(8.0, 0.42 * len(counts) + 1.4)
    left = np.zeros(len(counts))
    for name, shade in zip(names, [*shades, *["#BBBBBB"] * len(names)], strict=False):
        values = np.array([by.get(name, 0) for by in counts.values()])
        ax.barh(list(counts), values, left=left, color=shade, label=name, edgecolor="white", lw=0.5)
        left += values
    ax.invert_yaxis()
    ax.set_xlabel("programs")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def maskings(
    text: str,
    starts: np.ndarray,
    labels: np.ndarray,
    masks: Mapping[str, Sequence[np.ndarray]],
    levels: Sequence[float],
) -> Figure:
    """The same code under each masking (columns) at each noise level (rows); masks are bool per token."""
    figure, axes = _panels([[text] * len(masks)] * len(levels))
    runs = token_runs(text, starts, labels)
    for column, (strategy, by_level) in enumerate(masks.items()):
        for row, (level, mask) in enumerate(zip(levels, by_level, strict=True)):
            _code(axes[row][column], text, runs, mask)
            axes[row][column].set_title(
                f"{STRATEGIES[strategy].title}, P = {level:g}: {int(np.sum(mask))} of {len(mask)} tokens",
                fontsize=9,
                loc="left",
            )
    _tier_legend(figure, masked=True)
    return figure


def _axes(width: float = 6.0, height: float = 3.6, columns: int = 1, **kwargs: Any) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **kwargs)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#EEEEEE", lw=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def style(strategy: str) -> dict[str, str]:
    """matplotlib's colour, marker and label of a strategy, the same in every figure."""
    record = STRATEGIES[strategy]
    return {"color": record.colour, "marker": record.marker, "label": record.title}


_LINE = {"default": "#777777", "skeleton": "#0072B2", "data": "#009E73", "condition": "#B8860B", "control": "#D55E00"}
_STYLE = {"default": ":", "skeleton": "-", "data": "--", "condition": "-.", "control": (0, (5, 1))}


def inclusion(
    levels: np.ndarray,
    shares: Mapping[str, Mapping[str, np.ndarray]],
    theory: Mapping[str, Mapping[str, np.ndarray]],
) -> Figure:
    """Share of each tier's tokens that is masked (y) at each noise level (x): draws as marks, theory as lines."""
    figure, axes = _axes(3.6, 3.6, len(shares), sharey=True)
    marks = dict(zip(_LINE, "x.vs^", strict=True))
    for ax, (strategy, by_tier) in zip(axes, shares.items(), strict=True):
        expected = theory.get(strategy, {})
        for tier, share in by_tier.items():
            line = {} if tier in expected else {"ls": ":", "lw": 0.8}
            ax.plot(levels, share, color=_LINE[tier], marker=marks[tier], ms=4, **{"ls": "", **line}, label=tier)
        for tier, share in expected.items():
            ax.plot(levels, share, color=_LINE[tier], lw=1)
        ax.plot([0, 1], [0, 1], color="#CCCCCC", lw=1, zorder=0)
        ax.set_title(f"{STRATEGIES[strategy].title}{'' if expected else ' (no closed form)'}", fontsize=10)
        ax.set_xlabel("noise level P")
    axes[0].set_ylabel("share of tokens masked\n(marks: drawn; lines: theory)")
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def slider(draw: Callable[[float], Figure], label: str, value: float) -> Any:
    """The figure that `draw` makes of a number from 0 to 1, under a slider that draws it anew.

    Where no front end is live (papermill, an exported page) the figure at `value` stays. Returns the slider.
    """
    import ipywidgets
    from IPython.display import display

    control = ipywidgets.FloatSlider(value, min=0, max=1, step=0.01, description=label, continuous_update=False)
    display(control)
    shown = display(draw(value), display_id=True)
    control.observe(lambda change: shown.update(draw(change["new"])), names="value")
    return control


def noise_schedule(steps: np.ndarray, eps: np.ndarray, drawn: np.ndarray) -> Figure:
    """eps_t over training and the noise levels P drawn above it (one per sample)."""
    figure, (ax,) = _axes()
    ax.plot(steps, drawn, ".", color=STRATEGIES["random"].colour, ms=3, alpha=0.6, label="P of one sample")
    ax.plot(steps, eps, color=STRATEGIES["ast"].colour, lw=2, label="floor eps_t")
    ax.set_xlabel("optimiser step")
    ax.set_ylabel("noise level")
    ax.legend(frameon=True, fontsize=8, loc="upper right")
    return figure


def run_lengths(lengths: Mapping[str, Sequence[int]], level: float) -> Figure:
    """How long the runs of adjacent masked code tokens are, per masking: share of masked tokens in runs >= x."""
    figure, (ax,) = _axes()
    for strategy, values in lengths.items():
        runs = np.sort(np.asarray(values))
        at_least = 1 - np.concatenate([[0], np.cumsum(runs)[:-1]]) / max(1, runs.sum())
        ax.step(
            runs, at_least, where="pre", color=STRATEGIES[strategy].colour, label=STRATEGIES[strategy].title, lw=1.6
        )
    ax.set_xscale("log")
    ax.set_xlabel(f"length of a run of masked code tokens, at P = {level:g}")
    ax.set_ylabel("share of masked tokens in\nruns at least this long")
    ax.legend(frameon=False, fontsize=8)
    return figure


def trajectory(text: str, boxes: Sequence[tuple[int, int, str]], committed_at: np.ndarray, title: str) -> Figure:
    """An answer twice: each token's box by the step at which it was committed, and (as `boxes` says) by its tier."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    figure, [axes] = _panels([[text, text]], right=0.9)
    # Viridis, lightened: black text must stay readable on it.
    light = ListedColormap([[0.45 + 0.55 * v for v in colormaps["viridis"](i / 255)[:3]] for i in range(256)])
    steps = Normalize(0, max(1, int(np.max(committed_at, initial=1))))
    by_step = [(a, b, light(steps(max(0, at)))) for (a, b, _), at in zip(boxes, committed_at, strict=True)]
    for ax, runs, about in zip(axes, (by_step, boxes), (f"{title}: by step", "by tier"), strict=True):
        _code(ax, text, runs)
        ax.set_title(about, fontsize=9, loc="left")
    wide = figure.get_figwidth()
    bar = figure.colorbar(ScalarMappable(steps, light), cax=figure.add_axes((1 - 0.75 / wide, 0.2, 0.12 / wide, 0.65)))
    bar.set_label("denoising step", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _tier_legend(figure, LABELS[1:])
    return figure


def frame(text: str, boxes: Sequence[tuple[int, int, str]], masked: np.ndarray, new: np.ndarray, title: str) -> Figure:
    """One moment of an answer's denoising: masked tokens dark, the newest framed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patches import Rectangle

    figure, [[ax]] = _panels([[text]], right=max(0.0, 6.2 - _columns(text) * _CELL[0]))  # the legend is wider
    figure.set_dpi(100)
    FigureCanvasAgg(figure)
    _code(ax, text, boxes, masked)
    starts = np.cumsum([0] + [len(x) + 1 for x in text.split("\n")])
    for (start, end, _), lit in zip(boxes, new, strict=True):
        if lit:
            row = int(np.searchsorted(starts, start, "right")) - 1
            width = min(end, int(starts[row + 1]) - 1) - start
            if width > 0:
                ax.add_patch(Rectangle((start - int(starts[row]), row), width, 1, fill=False, lw=1.6))
    ax.set_title(title, fontsize=9, loc="left")
    _tier_legend(figure, masked=True)
    return figure


Interval = tuple[float, float, float]


def order(
    first: Mapping[str, Mapping[str, Interval]], place: Mapping[str, Mapping[str, Interval]], level: str = "95 %"
) -> Figure:
    """When each strategy commits each tier: step of the first commitment, and place in the block's order.

    Both by strategy and tier: mean, low, high.
    """
    figure, axes = _axes(4.6, 3.6, 2)
    tiers = LABELS[CODE:]
    for ax, found, label in zip(
        axes,
        (first, place),
        ("step of the tier's first commitment", "mean place in the order of its block\n(0: first, 1: last)"),
        strict=True,
    ):
        for number, (strategy, by_tier) in enumerate(found.items()):
            y = np.arange(len(tiers)) + (number - (len(found) - 1) / 2) * 0.18
            mean, low, high = np.array([by_tier[t] for t in tiers]).T
            bars = [mean - low, high - mean]
            ax.errorbar(mean, y, xerr=bars, ls="", ms=5, capsize=2.5, elinewidth=1.4, **style(strategy))
        ax.set_yticks(range(len(tiers)), tiers)
        ax.set_ylim(len(tiers) - 0.5, -0.5)
        ax.set_xlabel(f"{label}, with {level} intervals" if ax is axes[0] else label)
    axes[1].tick_params(labelleft=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def states(panels: Sequence[tuple[str, str, Sequence[tuple[int, int, str]], np.ndarray]]) -> Figure:
    """Answers in the middle of decoding, side by side (the paper's figure 3): (title, text, runs, masked) each."""
    figure, axes = _panels([[p[1] for p in panels]])
    for ax, (title, text, runs, masked) in zip(axes[0], panels, strict=True):
        _code(ax, text, runs, masked)
        ax.set_title(title, fontsize=9, loc="left")
    _tier_legend(figure, LABELS[1:], masked=True)
    return figure


def programs(panels: Sequence[tuple[str, str]]) -> Figure:
    """Programs side by side (the paper's figure 2): (title, text) each."""
    figure, axes = _panels([[p[1] for p in panels]])
    for ax, (title, text) in zip(axes[0], panels, strict=True):
        _code(ax, text, [])
        ax.set_title(title, fontsize=9, loc="left")
    return figure


def robustness(scores: Mapping[str, Mapping[int, tuple[float, float, float]]], ylabel: str) -> Figure:
    """Pass rates over T (the paper's figure 4): strategy -> T -> (rate, low, high), all in percent."""
    figure, (ax,) = _axes()
    lengths = sorted({t for by_t in scores.values() for t in by_t})
    for number, (strategy, by_t) in enumerate(scores.items()):
        shift = (number - (len(scores) - 1) / 2) * 0.06  # side by side, so that intervals do not cover each other
        x = [lengths.index(t) + shift for t in by_t]
        y = np.array([v[0] for v in by_t.values()])
        bars = np.abs(np.array([[v[1], v[2]] for v in by_t.values()]).T - y)
        ax.errorbar(x, y, yerr=bars, ms=6, capsize=3, lw=1.6, **style(strategy))
    ax.set_xticks(range(len(lengths)), [f"T = {t}" for t in lengths])
    ax.set_xlim(-0.4, len(lengths) - 0.6)
    ax.set_ylabel(ylabel)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def differences(rows: Sequence[tuple[str, float, float, float]], unit: str = "points") -> Figure:
    """Differences with their intervals beside zero, from the top: (name, difference, low, high) each."""
    figure, (ax,) = _axes(7.6, 0.3 * len(rows) + 0.8)
    names, values, low, high = zip(*rows, strict=True)
    y, (values, low, high) = range(len(rows)), np.array([values, low, high])
    ax.axvline(0, color="#777777", lw=1)
    ax.errorbar(values, y, xerr=[values - low, high - values], fmt="o", color="#0072B2", ms=5, capsize=3, lw=1.6)
    ax.set_yticks(y, names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(f"difference [{unit}]")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as PNG, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return path
