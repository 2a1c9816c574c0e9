"""Figures of a training run: what they show is what the logs hold."""

import numpy as np
import pytest

from treediff.figures import curves
from treediff.training.batch import NOISE_BUCKETS


def test_smoothing_ignores_what_is_missing():
    values = np.array([np.nan, 1.0, 3.0, np.nan, 5.0])
    got = curves.smooth(values, 2)
    assert np.isnan(got[0])
    assert got[1:].tolist() == [1.0, 2.0, 3.0, 5.0]


LOG = [
    {
        "step": i,
        "loss": 2.0 - i / 10,
        "loss_by_noise": [1.0, None, 2.0, 3.0, 4.0],
        "lr": 1e-3,
        "tokens_per_s": 1000.0 * (i + 1),
        "seconds": 2.0,
        "data_wait_s": 0.5,
    }
    for i in range(8)
]


def test_the_loss_is_drawn_raw_and_by_bucket():
    left, right = curves.loss(LOG, NOISE_BUCKETS, "t").axes
    assert left.lines[0].get_ydata().tolist() == [r["loss"] for r in LOG]
    assert len(right.lines) == len(NOISE_BUCKETS) - 1
    assert np.isnan(right.lines[1].get_ydata()).all()
    assert right.lines[3].get_ydata().tolist() == [3.0] * 8


def test_the_timeline_says_how_much_is_spent_waiting():
    figure = curves.machine(LOG)
    assert "25.0 % of the time" in figure.axes[2].get_title("left")
    assert figure.axes[1].lines[0].get_ydata().tolist() == [float(i + 1) for i in range(8)]


def test_held_out_accuracy_has_a_panel_a_tier_and_a_line_a_masking():
    log = [
        {"step": s, "accuracy_by_label": {"reasoning": a, "control": a / 2}, "tokens": {"reasoning": 90, "control": 9}}
        for s, a in ((0, 0.2), (50, 0.6))
    ]
    figure = curves.heldout({"random": log, "ast": log})
    assert [ax.get_title("left") for ax in figure.axes] == ["reasoning (90 tokens)", "control (9 tokens)", ""]
    for ax, most in zip(figure.axes[:2], (60.0, 30.0), strict=True):
        assert len(ax.lines) == 2
        assert ax.lines[1].get_ydata()[-1] == pytest.approx(most)
