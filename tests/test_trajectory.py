"""Trajectories: places, intervals, pairs, pictures and the animation show what was sampled."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sampling_run import tiny_tokenizer

from treediff.config import resolve
from treediff.errors import UserError
from treediff.figures import plots
from treediff.masking import tokens
from treediff.report import trajectory
from treediff.sampling.run import samples_path

CODE = "<think>\nhm\n</think>\n\n```python\ndef f(x):\n    if x:\n        y = 1\n    return y\n```"


@pytest.fixture
def cfg(runs, tmp_path):
    tok = tiny_tokenizer(tmp_path / "t")
    cfg = resolve("tiny", tokenizer=str(tmp_path / "t"), block_length=8, lengths=[256])
    ids = tokens.tokenize(tok, CODE)[0].tolist()
    for strategy, shift in (("random", 0), ("ast", 3)):
        path = samples_path(cfg.with_masking(strategy), "tinycode", 256)
        path.parent.mkdir(parents=True)
        at = [max(0, len(ids) - i - shift) for i in range(len(ids))]  # written backwards, the second a little earlier
        record = {"task_id": "TinyCode/0", "solution": "", "ids": [*ids, tok.eos_token_id], "committed_at": [*at, 99]}
        path.write_text(json.dumps(record) + "\n")
    return cfg


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 12))
def test_places_rank_each_block_from_first_to_last(at, block):
    place = trajectory.places(np.array(at), block)
    for first in range(0, len(at), block):
        steps, ranks = at[first : first + block], place[first : first + block]
        assert ranks.mean() == pytest.approx(0.5)
        for i, a in enumerate(steps):
            for j, b in enumerate(steps):
                assert (a < b) == (ranks[i] < ranks[j])
        if len(set(steps)) == len(steps) > 1:
            assert (min(ranks), max(ranks)) == (0, 1)


def test_an_interval_holds_the_mean_and_covers(cfg):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        mean, low, high = trajectory.interval(rng.normal(2.0, 1.0, 60), resamples=400)
        assert low <= mean <= high
        hits += low <= 2.0 <= high
    assert 0.88 < hits / 200 < 0.99
    assert np.isnan(trajectory.interval([1.0])[1])
    assert np.isnan(trajectory.interval([])[0])


def test_commitments_are_counted_by_tier(cfg):
    found = trajectory.commitments(cfg, "tinycode", 256, ["random", "ast"])
    shown = trajectory.load(cfg.with_masking("random"), "tinycode", 256, "TinyCode/0")
    assert shown.text == CODE
    for i, tier in enumerate(trajectory.TIERS, start=tokens.CODE):
        there = shown.labels == i
        assert bool(found["random"][tier]) == there.any()
        if there.any():
            assert found["random"][tier]["TinyCode/0"][0] == shown.at[there].min()
    # The return statement comes last in the text, so it was written first.
    assert found["random"]["control"]["TinyCode/0"][0] < found["random"]["condition"]["TinyCode/0"][0]
    with pytest.raises(UserError, match="there is no answer to TinyCode/7"):
        trajectory.load(cfg, "tinycode", 256, "TinyCode/7")


def test_a_comparison_pairs_tasks_and_tells_what_its_intervals_bear():
    def tasks(values):
        return {t: {f"T/{i}": (v, 0.5) for i, v in enumerate(values)} for t in trajectory.TIERS}

    rng = np.random.default_rng(0)
    a = rng.normal(20, 9, 50)
    found = {"random": tasks(a), "ast": tasks(a - 2 + rng.normal(0, 0.5, 50)), "ast_span": tasks(a[:30])}
    assert trajectory.comparison(found, "random", "ast").count("first commitment earlier") == len(trajectory.TIERS)
    same = trajectory.comparison(found, "random", "ast_span")
    assert same.count("no difference told") == len(trajectory.TIERS)
    assert "| 30 |" in same


def test_pictures(cfg):
    shown = trajectory.load(cfg.with_masking("ast"), "tinycode", 256, "TinyCode/0")
    figure = plots.trajectory(shown.text, shown.boxes, shown.at, "T")
    left, right = figure.axes[:2]
    assert [t.get_text() for t in left.texts] == [t.get_text() for t in right.texts]
    shades = [p.get_facecolor() for p in left.patches]
    assert shades[0] != shades[-1]
    states = trajectory.states(cfg, "tinycode", 256, "TinyCode/0", ["random", "ast"], share=10 / 256)
    hidden = [sum(p.get_facecolor()[:3] == pytest.approx((0.2, 0.2, 0.2)) for p in ax.patches) for ax in states.axes]
    assert hidden[0] == hidden[1] + 3  # the second is three tokens ahead


def test_the_order_figure_shows_every_mean(cfg):
    found = trajectory.commitments(cfg, "tinycode", 256, ["random", "ast"])
    for strategy in found:  # a second task, so that there are intervals
        for by_task in found[strategy].values():
            by_task |= {"TinyCode/1": (3.0, 0.25)}
    first, place = trajectory.summary(found)
    figure = plots.order(first, place)
    for ax, values in zip(figure.axes, (first, place), strict=True):
        for container, strategy in zip(ax.containers, found, strict=True):
            drawn = container.lines[0].get_xdata()
            assert drawn == pytest.approx([values[strategy][t][0] for t in trajectory.TIERS])


def test_the_animation_ends_with_the_whole_answer(cfg, tmp_path):
    from PIL import Image

    shown = trajectory.load(cfg.with_masking("ast"), "tinycode", 256, "TinyCode/0")
    path = trajectory.animation(shown, "T", tmp_path / "a.gif", every=8)
    assert path.stat().st_size < 400_000

    def dark(n: int) -> int:
        gif.seek(n)
        return int((np.asarray(gif.convert("L")) < 70).sum())

    with Image.open(path) as gif:
        counts = [dark(n) for n in range(gif.n_frames)]
        assert gif.info["duration"] == 3000
    assert counts[0] > 3 * counts[-1]
    assert all(a >= b - 1500 for a, b in itertools.pairwise(counts))  # frames of new tokens come and go
