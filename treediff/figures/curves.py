"""Figures of a training run, from its log.jsonl and evals.jsonl: loss, speed, held-out accuracy.

Each function takes records (steplog.read_log) and returns a matplotlib Figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from treediff.figures import plots
from treediff.masking.tokens import LABELS
from treediff.scoring import stats
from treediff.strategies import STRATEGIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Log = Sequence[Mapping[str, Any]]

_SHADES = ["#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00"]  # from little noise to much


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values that are there (nan where none is)."""
    known = ~np.isnan(values)
    total, count = np.cumsum(np.where(known, values, 0)), np.cumsum(known)
    total[width:] -= total[:-width].copy()
    count[width:] -= count[:-width].copy()
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def loss(log: Log, buckets: Sequence[float], title: str = "") -> Figure:
    """The loss over training: raw, as it is logged, and by noise bucket (smoothed)."""
    figure, (left, right) = plots._axes(5.2, 3.6, 2, sharey=True)
    steps = np.array([r["step"] for r in log])
    left.plot(steps, [r["loss"] for r in log], color="#777777", lw=0.8)
    left.set_title(f"{title}: raw", fontsize=10, loc="left")
    left.set_ylabel("cross-entropy [nats per masked token]")
    width = max(5, len(steps) // 25)
    for i in range(len(buckets) - 1):
        values = np.array([r["loss_by_noise"][i] for r in log], float)
        label = f"P in {buckets[i]:g} to {buckets[i + 1]:g}"
        right.plot(steps, smooth(values, width), color=_SHADES[i], lw=1.8, label=label)
    right.set_title(f"by noise level, mean over {width} steps", fontsize=10, loc="left")
    right.legend(frameon=False, fontsize=8, ncols=2)
    for ax in (left, right):
        ax.set_yscale("log")
        ax.set_xlabel("optimiser step")
    return figure


def machine(log: Log) -> Figure:
    """Learning rate, throughput, and where each step's time went: computing, or waiting for data."""
    figure, (rate, speed, time) = plots._axes(3.7, 3.2, 3)
    steps = np.array([r["step"] for r in log])
    rate.plot(steps, [r["lr"] for r in log], color=STRATEGIES["random"].colour)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    speed.plot(steps, np.array([r["tokens_per_s"] for r in log]) / 1000, color=STRATEGIES["random"].colour, lw=0.8)
    speed.set_ylabel("thousand tokens per second")
    speed.set_ylim(bottom=0)
    waited = np.array([r["data_wait_s"] for r in log])
    whole = np.array([r["seconds"] for r in log])
    time.fill_between(steps, waited, whole, color="#9BD3F5", lw=0, label="computing")
    time.fill_between(steps, 0, waited, color=STRATEGIES["ast"].colour, lw=0, label="waiting for data")
    time.set_ylabel("seconds per step")
    share = 100 * waited.sum() / max(1e-9, whole.sum())
    time.set_title(f"{share:.1f} % of the time spent waiting for data", fontsize=9, loc="left")
    time.set_ylim(0, 1.3 * float(np.quantile(whole, 0.98)))
    time.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    for ax in (rate, speed, time):
        ax.set_xlabel("optimiser step")
    return figure


def heldout(runs: Mapping[str, Log]) -> Figure:
    """Share of masked held-out tokens restored, over training: one panel per tier, one line per masking.

    Each panel has its own axis. The band is a 95 % Wilson interval of each share as if tokens were independent, which
    within a program they are not.
    """
    from matplotlib.figure import Figure

    labels = [x for x in LABELS if any(x in r["accuracy_by_label"] for log in runs.values() for r in log)]
    figure = Figure(figsize=(9.6, 2.5 * -(-len(labels) // 3) + 0.4), layout="constrained")
    panels = figure.subplots(-(-len(labels) // 3), 3, squeeze=False).flatten()
    for ax, label in itertools.zip_longest(panels, labels):
        if label is None:
            ax.set_axis_off()
            continue
        for name, log in runs.items():
            steps = np.array([r["step"] for r in log])
            p = np.array([r["accuracy_by_label"][label] for r in log])
            count = log[0]["tokens"][label]
            low, high = 100 * np.array([stats.wilson(round(share * count), count) for share in p]).T
            ax.plot(
                steps,
                100 * p,
                color=STRATEGIES[name].colour,
                marker=STRATEGIES[name].marker,
                ms=4,
                lw=1.4,
                label=STRATEGIES[name].title,
            )
            ax.fill_between(steps, low, high, color=STRATEGIES[name].colour, alpha=0.12, lw=0)
        ax.set_title(f"{label} ({count} tokens)", fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#EEEEEE", lw=0.8)
    figure.supxlabel("optimiser step", fontsize=10)
    figure.supylabel("held-out tokens restored [%]", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure
