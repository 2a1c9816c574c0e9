"""The forest plot of a study: each run a point, and each comparison's pooled difference with its interval.

plot("Tiny+ at T = 96", arms, differences, {"the paper's HumanEval, T = 256: +2.5": 2.5})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Arm:
    """A strategy's runs [percent], their mean and its 95 % interval."""

    title: str
    colour: str
    marker: str
    filled: bool
    runs: Sequence[float]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A comparison [points] with its 95 % interval."""

    title: str
    outcome: str
    colour: str
    marker: str
    filled: bool
    difference: float
    low: float
    high: float
    primary: bool


def plot(outcome: str, arms: Sequence[Arm], rows: Sequence[Difference], lines: Mapping[str, float]) -> Figure:
    """Left the runs of each arm by the primary outcome, right the differences of all outcomes; `lines` by label."""
    from matplotlib.figure import Figure

    height = 1.6 + 0.3 * max(2 * len(arms), len(rows) + len({r.title for r in rows}))
    figure = Figure(figsize=(11.5, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for ax in (left, right):
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="#EEEEEE", lw=0.8)
        ax.set_axisbelow(True)
    for y, arm in enumerate(arms):
        fill = arm.colour if arm.filled else "none"
        spread = np.linspace(-0.18, 0.18, len(arm.runs)) if len(arm.runs) > 1 else [0.0]
        style = {"marker": arm.marker, "facecolor": fill, "edgecolor": arm.colour}
        left.scatter(arm.runs, y + np.array(spread), s=26, alpha=0.65, lw=1.0, **style)
        bar = [[arm.mean - arm.low], [arm.high - arm.mean]]
        left.errorbar(arm.mean, y + 0.36, xerr=bar, color=arm.colour, marker="|", ms=11, capsize=3, lw=1.6)
    left.set_yticks(range(len(arms)), [f"{a.title}\n{len(a.runs)} run{'s' * (len(a.runs) != 1)}" for a in arms])
    left.set_ylim(len(arms) - 0.3, -0.6)
    left.set_xlabel(f"{outcome} [%]: runs, and mean with 95 % interval", fontsize=9)
    y, ticks, before = 0.0, [], None
    for row in rows:
        if row.title != before:
            y += 1.0 if before else 0.0
            ticks.append((y, row.title, "bold"))
            before, y = row.title, y + 1.0
        bar = [[row.difference - row.low], [row.high - row.difference]]
        right.errorbar(
            row.difference,
            y,
            xerr=bar,
            color=row.colour,
            marker=row.marker,
            ms=8 if row.primary else 5,
            mfc=row.colour if row.filled else "white",
            lw=2.2 if row.primary else 1.1,
            capsize=3,
            alpha=1.0 if row.primary else 0.7,
        )
        ticks.append((y, f"{row.outcome}: {row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]", "normal"))
        y += 1.0
    right.axvline(0, color="#444444", lw=1.0)
    for dash, (label, value) in zip(("--", ":", "-."), lines.items(), strict=False):
        right.axvline(value, color="#882255", lw=1.3, ls=dash, label=label)
    right.set_yticks([t[0] for t in ticks], [t[1] for t in ticks], fontsize=8)
    for label, (_, _, weight) in zip(right.get_yticklabels(), ticks, strict=True):
        label.set_fontweight(weight)
    right.set_ylim(max(y, 1.0) - 0.3, -0.7)
    right.set_xlabel("difference [points] with 95 % interval", fontsize=9)
    if lines:
        figure.legend(frameon=False, fontsize=8, loc="outside lower right", ncols=len(lines))
    return figure
