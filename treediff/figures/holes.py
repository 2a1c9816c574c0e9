"""How well holes are filled: by tier and by size, for each strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from treediff.strategies import STRATEGIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy(panels: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "") -> Figure:
    """Rates with their intervals: a panel per grouping, a place per group in it, a mark per strategy.

    `panels`: by the grouping's name records with group, strategy, rate, low, high (shares) and holes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (name, records) in zip(axes, panels.items(), strict=True):
        groups = list(dict.fromkeys(r["group"] for r in records))
        strategies = [s for s in STRATEGIES if any(r["strategy"] == s for r in records)]
        for number, strategy in enumerate(strategies):
            mine = {r["group"]: r for r in records if r["strategy"] == strategy}
            x = np.array([groups.index(g) for g in mine]) + (number - (len(strategies) - 1) / 2) * 0.13
            rate, low, high = (100 * np.array([r[k] for r in mine.values()]) for k in ("rate", "low", "high"))
            # A percentile interval need not hold the rate itself where there are few programs.
            bars = np.maximum(0, [rate - low, high - rate])
            style = {"color": STRATEGIES[strategy].colour, "fmt": STRATEGIES[strategy].marker}
            ax.errorbar(x, rate, yerr=bars, ms=5, capsize=2.5, lw=1.4, label=STRATEGIES[strategy].title, **style)
        count = {g: next(r["holes"] for r in records if r["group"] == g) for g in groups}
        ax.set_xticks(range(len(groups)), [f"{g}\n({count[g]})" for g in groups], fontsize=8)
        ax.set_xlim(-0.6, len(groups) - 0.4)
        ax.set_xlabel(f"{name} (number of holes)")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 100)
    axes[0].set_ylabel("holes whose program passes [%]\nwith 95 % intervals over programs")
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure
