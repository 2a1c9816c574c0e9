"""The corruption operators: exact budgets, right probabilities, Algorithm 2 to the letter, pure in their arguments."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from treediff.config import resolve
from treediff.masking import rules
from treediff.masking.tokens import CODE, PROMPT, REASONING

CFG = {m: resolve("paper", masking=m) for m in ("random", "ast", "ast_span")}
EXACT = CFG["random"].but(random_budget="exact")


def labels_of(codes: list[int]) -> torch.Tensor:
    return torch.tensor([codes], dtype=torch.uint8)


def tree_spans(n: int, start: int, seed: int) -> np.ndarray:
    """Random nested spans over [start, start + n): a tree, as a parser would give it."""
    draw, out, todo = np.random.default_rng(seed), [], [(start, start + n)]
    while todo:
        a, b = todo.pop()
        if b - a > 1:
            cut = int(draw.integers(a + 1, b))
            todo += [(a, cut), (cut, b)]
        out.append((a, b, int(draw.integers(0, 5))))
    return np.array(out, np.int32)


rows = st.lists(st.integers(0, 6), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(rows, st.floats(0, 1), st.integers(-(2**63), 2**63 - 1), st.integers(0, 10_000), st.sampled_from(list(CFG)))
def test_budget_is_exact_and_prompt_is_never_masked(codes, p, uid, step, name):
    labels = labels_of(sorted(codes))  # prompt, reasoning, code: as in a sample
    code = int((labels >= CODE).sum())
    spans = [tree_spans(code, labels.shape[1] - code, 0)] if code else [np.zeros((0, 3), np.int32)]
    cfg = EXACT if name == "random" else CFG[name]
    level = torch.tensor([p], dtype=torch.float64)
    mask = rules.corrupt(cfg, labels, spans, torch.tensor([uid]), step, level)
    assert not mask[labels == PROMPT].any()
    masked, budget = int(mask[labels >= CODE].sum()), math.floor(p * code)
    if name == "ast_span":  # the last span may pass the budget
        assert masked >= budget
        assert budget > 0 or masked == 0
    else:
        assert masked == budget


@pytest.mark.parametrize("name", list(CFG))
def test_a_mask_depends_on_seed_sample_and_step_alone(name):
    cfg = CFG[name]
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 7, (6, 50), generator=draw, dtype=torch.uint8).sort(1).values
    spans = [tree_spans(int((r >= CODE).sum()), int((r < CODE).sum()), i) for i, r in enumerate(labels)]
    uid = torch.tensor([7, -3, 2**62, 0, 1, 99])
    p = rules.noise_level(cfg, uid, 5, 100)
    together = rules.corrupt(cfg, labels, spans, uid, 5, p)
    wider = torch.cat([labels, torch.full((6, 9), PROMPT, dtype=torch.uint8)], 1)
    assert torch.equal(rules.corrupt(cfg, wider, spans, uid, 5, p)[:, :50], together)
    for i in (3, 0, 5):
        one = slice(i, i + 1)
        assert torch.equal(rules.corrupt(cfg, labels[one], [spans[i]], uid[one], 5, p[one]), together[one])
        assert torch.equal(rules.noise_level(cfg, uid[one], 5, 100), p[one])
    assert not torch.equal(rules.corrupt(cfg, labels, spans, uid, 6, p), together)
    assert not torch.equal(rules.corrupt(cfg.but(seed=1), labels, spans, uid, 5, p), together)


def test_strategies_share_noise_levels_and_reasoning_masks():
    labels = labels_of([0] * 5 + [1] * 40 + [2, 3, 4, 5, 6] * 8)
    spans, uid = [tree_spans(40, 45, 0)], torch.tensor([42])
    levels = {m: rules.noise_level(c, uid, 9, 50) for m, c in CFG.items()}
    assert len({float(p) for p in levels.values()}) == 1
    masks = [rules.corrupt(c, labels, spans, uid, 9, levels[m])[labels == REASONING] for m, c in CFG.items()]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def exact_inclusion(weights: list[float], n: int) -> np.ndarray:
    """Inclusion probabilities of successive weighted draws without replacement, by enumerating every sequence."""
    out = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), n):
        left, prob = sum(weights), 1.0
        for i in order:
            prob *= weights[i] / left
            left -= weights[i]
        out[list(order)] += prob
    return out


def frequencies(cfg, codes, p, draws=40_000, spans=None):
    labels = labels_of(codes).expand(draws, -1)
    level = torch.full((draws,), p, dtype=torch.float64)
    every = None if spans is None else [spans] * draws
    return rules.corrupt(cfg, labels, every, torch.arange(draws), 0, level).double().mean(0).numpy()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_weighted_sampling_has_the_enumerated_inclusion_probabilities(n):
    codes = [6, 5, 4, 3, 2]
    weights = [CFG["ast"].weights()[c] for c in codes]
    got = frequencies(CFG["ast"], codes, n / 5 + 1e-9)
    assert np.abs(got - exact_inclusion(weights, n)).max() < 4 * 0.5 / math.sqrt(40_000)


def test_inclusion_of_many_tokens_follows_theory_and_keeps_the_order_of_the_weights():
    codes = [2] * 200 + [3] * 300 + [4] * 200 + [5] * 100 + [6] * 100
    weights = np.array([CFG["ast"].weights()[c] for c in codes])
    for p in (0.05, 0.3, 0.7, 0.95):
        got = frequencies(CFG["ast"], codes, p, 3_000)
        theory = rules.expected_inclusion(weights, math.floor(p * len(codes)))
        assert theory.sum() == pytest.approx(math.floor(p * len(codes)))
        for w in set(weights):  # 3,000 draws of at least 100 tokens each
            assert abs(got[weights == w].mean() - theory[weights == w].mean()) < 0.006


def test_theory_fills_weight_zero_last():
    weights = np.array([0.0, 0.0, 0.5, 1.0])
    assert rules.expected_inclusion(weights, 3).tolist() == [0.5, 0.5, 1, 1]
    assert rules.expected_inclusion(weights, 0).tolist() == [0, 0, 0, 0]
    few = rules.expected_inclusion(weights, 1)
    assert few[:2].tolist() == [0, 0]
    assert few.sum() == pytest.approx(1)


@given(rows, st.floats(0, 1), st.integers(-(2**63), 2**63 - 1))
def test_with_equal_weights_ast_masking_is_exact_random_masking(codes, p, uid):
    """The strategies draw from one stream: what differs between two runs is the weights' doing and not chance's."""
    flat = CFG["ast"].but(tier_weights=dict.fromkeys(CFG["ast"].tier_weights, 0.3), default_weight=0.3)
    level, ids = torch.tensor([p], dtype=torch.float64), torch.tensor([uid])
    masks = [rules.corrupt(c, labels_of(codes), None, ids, 3, level) for c in (flat, EXACT)]
    assert torch.equal(*masks)


def test_weight_zero_comes_last_and_then_uniformly():
    cfg = CFG["ast"].but(tier_weights={"skeleton": 0.0, "data": 0.42, "condition": 0.58, "control": 0.6})
    got = frequencies(cfg, [3, 3, 3, 4, 6], 0.61)  # 3 tokens: both weighted ones, and one of three
    assert np.allclose(got[3:], 1)
    assert np.abs(got[:3] - 1 / 3).max() < 0.02


def test_bernoulli_budget_has_the_right_expectation():
    codes = [3] * 6 + [4] * 4 + [5] * 3 + [6] * 3
    for p in (0.1, 0.5, 0.9):
        got = frequencies(CFG["ast"].but(budget="bernoulli"), codes, p, 20_000)
        assert abs(got.sum() - p * len(codes)) < 0.05
        assert got[0] < got[6] < got[-1] + 0.02


def test_random_masking_and_reasoning_are_bernoulli():
    got = frequencies(CFG["random"], [0, 1, 1, 3, 6], 0.3)
    assert got[0] == 0
    assert np.abs(got[1:] - 0.3).max() < 0.01


def algorithm_2(spans, weights, n, order, accepts):
    """The pseudo-code of Algorithm 2, line for line (phase 1); `order` is the shuffle, `accepts` the coin flips."""
    m, c = {}, 0
    for k in order:
        s, e, tier = spans[k]
        if accepts[k] < weights[tier] and not any(m.get(i) for i in range(s, e)):
            for i in range(s, e):
                m[i] = 1
            c += e - s
            if c >= n:
                break
    return set(m)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.05, 0.95), st.integers(0, 10**6))
def test_spans_are_chosen_as_the_pseudo_code_says(size, p, uid):
    cfg, spans, budget = CFG["ast_span"], tree_spans(size, 3, uid), math.floor(p * size)
    labels = labels_of([0, 1, 1] + [4] * size)
    ids = torch.tensor([uid])
    order = np.argsort(rules.uniform(0, ids, 7, rules.SHUFFLE, len(spans))[0].numpy(), kind="stable")
    accepts = rules.uniform(0, ids, 7, rules.ACCEPT, len(spans))[0].numpy()
    want = algorithm_2(spans.tolist(), cfg.weights()[CODE:], budget, order, accepts) if budget else set()
    level = torch.tensor([p], dtype=torch.float64)
    draw = rules.Draw(labels, [spans], ids, 7, level, None, torch.tensor([budget]))
    got = set(np.flatnonzero(rules.span_mask(cfg, draw)[0].numpy()))
    assert want <= got
    assert len(got) == max(len(want), budget)
    assert {i for i in np.flatnonzero(rules.corrupt(cfg, labels, [spans], ids, 7, level)[0].numpy()) if i >= 3} == got


def greedy_groups(groups, order, budget):
    """Groups in the given order, each whole if it fits: token positions, by a plain loop."""
    taken = set()
    for number in order:
        tokens = {i for start, end, n in groups if n == number for i in range(start, end)}
        if len(taken) + len(tokens) <= budget:
            taken |= tokens
    return taken


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 10**6), st.booleans())
def test_groups_are_masked_whole_while_they_fit_and_the_budget_is_exact(names, p, uid, lines):
    cfg = CFG["random"].but(masking="line" if lines else "identifier")
    labels = labels_of([0, 1] + [3] * (2 * len(names)))
    groups = np.array([(2 + 2 * i, 3 + 2 * i, n) for i, n in enumerate(names)], np.int32)  # every other token
    ids, level = torch.tensor([uid]), torch.tensor([p], dtype=torch.float64)
    got = set(np.flatnonzero(rules.corrupt(cfg, labels, [groups], ids, 4, level)[0].numpy())) - {0, 1}
    budget = math.floor(p * 2 * len(names))
    present = sorted(set(names))
    draws = rules.uniform(0, ids, 4, rules.SHUFFLE, len(groups))[0, : len(present)].numpy()
    want = greedy_groups(groups.tolist(), [present[i] for i in np.argsort(draws, kind="stable")], budget)
    assert want <= got
    assert len(got) == budget


def test_a_sample_without_groups_is_filled_uniformly():
    cfg, labels = CFG["random"].but(masking="identifier"), labels_of([0, 1, 3, 3, 3, 3])
    level, none = torch.tensor([0.5], dtype=torch.float64), np.zeros((0, 3), np.int32)
    assert rules.corrupt(cfg, labels, [none], torch.tensor([1]), 0, level)[0, 2:].sum() == 2


def test_random_numbers_are_uniform_and_independent():
    u = rules.uniform(3, torch.arange(300), 17, 2, 400).numpy()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:, 1:].ravel(), u[:, :-1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(u[1:].ravel(), u[:-1].ravel())[0, 1]) < 0.01
    assert ((u > 0) & (u < 1)).all()


def test_the_hash_is_splitmix64():
    def reference(x):
        x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        return x ^ (x >> 31)

    values = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    got = rules._mix(torch.tensor([rules._wrap(v + rules._GOLDEN) for v in values]))
    assert [g % 2**64 for g in got.tolist()] == [reference(v % 2**64) for v in values]


def test_noise_schedule():
    cfg = CFG["ast"]
    eps = [rules.eps_at(cfg, s, 100) for s in range(100)]
    assert eps[0] == pytest.approx(0.1)
    assert eps[-1] == pytest.approx(0.001)
    assert all(a > b for a, b in itertools.pairwise(eps))
    assert eps[50] == pytest.approx(0.001 + 0.099 * 0.5 * (1 + math.cos(math.pi * 50 / 99)))
    p = rules.noise_level(cfg, torch.arange(20_000), 0, 100)
    assert p.min() >= 0.1
    assert stats.kstest(((p - 0.1) / 0.9).numpy(), "uniform").pvalue > 1e-3
    assert rules.eps_at(cfg.but(noise="constant"), 0, 100) == 0.001


FLOATS = [-torch.inf, -1.5, -0.0, 1e-40, 0.5, 0.50000006, 2.0, torch.inf]


@given(st.lists(st.sampled_from(FLOATS), min_size=1), st.data())
def test_take_is_a_stable_sort_of_float32_keys(values, data):
    """Whatever their sign, however close or equal: the smallest first, ties by position."""
    keys = torch.tensor([values])
    n = data.draw(st.integers(0, len(values)))
    want = torch.zeros(len(values), dtype=torch.bool)
    want[torch.sort(keys[0], stable=True).indices[:n]] = True
    assert torch.equal(rules.take(keys, torch.tensor([n]))[0], want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CFG))
def test_masks_are_the_same_on_a_gpu(name):
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 7, (64, 900), generator=draw, dtype=torch.uint8).sort(1).values
    spans = [tree_spans(int((r >= CODE).sum()), int((r < CODE).sum()), i) for i, r in enumerate(labels)]
    uid = torch.arange(64)
    for step in range(20):
        p = rules.noise_level(CFG[name], uid, step, 20)
        here = rules.corrupt(CFG[name], labels, spans, uid, step, p)
        there = rules.corrupt(CFG[name], labels.cuda(), spans, uid.cuda(), step, p.cuda())
        assert torch.equal(here, there.cpu())


@settings(max_examples=200, deadline=None)
@given(
    codes=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    weights=st.lists(st.sampled_from([0.0, 0.15, 0.6, 1.0]), min_size=5, max_size=5),
    p=st.floats(0.001, 1),
)
def test_bernoulli_probabilities_sum_to_the_target_and_follow_the_weights(codes, weights, p):
    """`budget = bernoulli`: min(1, c w) of one c, tokens of weight 0 only when all others are certain; by bisection."""
    labels = labels_of(codes)
    by_label = torch.tensor([0.0, 0.0, *weights], dtype=torch.float64)
    code = labels >= CODE
    target = p * code.sum(1)
    got = rules._scaled(by_label[labels.int()], code, target)[0].numpy()
    held = code[0].numpy()
    w = by_label[labels.int()][0].numpy() * held
    assert got[~held].sum() == 0
    assert (got >= 0).all()
    assert (got <= 1).all()
    assert got.sum() == pytest.approx(target.item(), abs=1e-9)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * w).sum() < target.item() else (low, middle)
    want = np.minimum(1, high * w)
    idle = held & (w == 0)
    want[idle] = max(0.0, target.item() - want.sum()) / max(1, idle.sum())
    assert got == pytest.approx(want, abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(rows, st.floats(0, 1), st.integers(-(2**63), 2**63 - 1), st.integers(0, 10_000))
def test_one_node_and_no_other_code_is_masked_the_one_nearest_to_the_budget(codes, p, uid, step):
    labels = labels_of(sorted(codes))
    code, before = int((labels >= CODE).sum()), int((labels < CODE).sum())
    spans = [tree_spans(code, before, 0)] if code else [np.zeros((0, 3), np.int32)]
    cfg, level = resolve("paper", masking="ast_hole"), torch.tensor([p], dtype=torch.float64)
    mask = rules.corrupt(cfg, labels, spans, torch.tensor([uid]), step, level)
    assert not mask[labels == PROMPT].any()
    same = rules.corrupt(CFG["random"], labels, None, torch.tensor([uid]), step, level)
    assert torch.equal(mask[labels == REASONING], same[labels == REASONING])
    at = (mask[0] & (labels[0] >= CODE)).nonzero()[:, 0].tolist()
    if not code:
        assert not at
        return
    assert at == list(range(at[0], at[-1] + 1))
    assert (at[0], at[-1] + 1) in {(a, b) for a, b, _ in spans[0].tolist()}
    sizes = spans[0][:, 1] - spans[0][:, 0]
    assert abs(len(at) - math.floor(p * code)) == np.abs(sizes - math.floor(p * code)).min()


def test_of_nodes_of_one_size_each_is_drawn_as_often():
    spans = np.array([(0, 2, 0), (2, 4, 1), (4, 6, 2), (0, 6, 3)], np.int32)
    got = frequencies(resolve("paper", masking="ast_hole"), [4] * 6, 2 / 6 + 1e-9, spans=spans)
    assert np.abs(got - 1 / 3).max() < 0.02
