"""Every formula against an independent computation: enumeration where there are few cases, simulation elsewhere."""

import itertools
import math
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treediff.errors import UserError
from treediff.scoring import stats


def vector(bits: str) -> dict[str, int]:
    return {f"t{i}": int(b) for i, b in enumerate(bits)}


def exact_sign_test(i: int, j: int) -> Fraction:
    """Two-sided: all splits of i + j that are no more likely than this one."""
    n = i + j
    return sum(
        (Fraction(math.comb(n, k), 2**n) for k in range(n + 1) if math.comb(n, k) <= math.comb(n, i)), Fraction(0)
    )


# --- one run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 164), (60, 164), (164, 164), (225, 378), (1, 2), (3, 7)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_ends_are_z_standard_errors_away(k, n, level):
    """Wilson's ends are the shares p with |k/n - p| = z sqrt(p (1 - p) / n)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    low, high = stats.wilson(k, n, level)
    assert low <= k / n <= high
    for end in (low, high):
        if 0 < end < 1:
            assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-9)
    assert (low == 0) == (k == 0)
    assert (high == 1) == (k == n)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(k):
    def share(n, c):
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        return sum(any(d) for d in draws) / len(draws)

    counted = dict(zip("abcde", [(0, 5), (1, 6), (3, 7), (8, 8), (4, 5)], strict=True))
    expected = {t: share(n, c) for t, (c, n) in counted.items()}
    assert stats.pass_at(counted, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(UserError, match="needs 6 samples"):
        stats.pass_at(counted, 6)


def test_pass_at_1_is_the_share_of_samples():
    counted = {"a": (2, 5), "b": (0, 5), "c": (5, 5)}
    assert stats.pass_at(counted, 1) == pytest.approx({"a": 0.4, "b": 0, "c": 1})


@given(st.lists(st.integers(0, 1), min_size=1, max_size=200), st.floats(1, 20))
@settings(max_examples=100, deadline=None)
def test_interval_of_samples_that_agree_is_wilson_over_tasks(values, most):
    """Whatever the number of samples: alike, they are one. Against scipy's own Wilson interval."""
    assert stats.interval(values, most) == pytest.approx(stats.wilson(sum(values), len(values)), abs=1e-9)


@given(st.integers(1, 20), st.integers(2, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_interval_lies_between_tasks_and_samples(tasks, n, data):
    """No narrower than if all samples were independent, no wider than if a task's samples were all alike."""
    c = data.draw(st.lists(st.integers(0, n), min_size=tasks, max_size=tasks))
    z = NormalDist().inv_cdf(0.975)
    p = sum(c) / n / tasks
    low, high = stats.interval([Fraction(k, n) for k in c], n)
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:  # the ends are z standard errors of an effective number of tasks away
            size = z**2 * end * (1 - end) / (p - end) ** 2
            assert tasks * (1 - 1e-9) <= size <= tasks * n * (1 + 1e-9)
    assert low <= p <= high


@pytest.mark.parametrize(("k", "n", "spread"), [(1, 5, 1.5), (1, 5, 0.0), (3, 6, 1.0), (5, 10, 3.0)])
def test_interval_of_several_samples_covers_the_truth(k, n, spread):
    """Tasks drawn with their own difficulty, samples within them: 95 % holds for further tasks, and is not idle."""
    rng, held, trials, tasks = np.random.default_rng(2), 0, 300, 80
    wide = 1 / (1 + np.exp(-rng.normal(-0.5, spread, 200_000)))
    truth = np.mean(1 - (1 - wide) ** k)
    naive = 0
    for _ in range(trials):
        chance = 1 / (1 + np.exp(-rng.normal(-0.5, spread, tasks)))
        counted = dict(enumerate((int(c), n) for c in rng.binomial(n, chance)))
        values = list(stats.pass_at(counted, k).values())
        low, high = stats.interval(values, n / k)
        held += low <= truth <= high
        if k == 1:  # what samples taken for tasks would give
            low, high = stats.wilson(sum(c for c, _ in counted.values()), tasks * n)
            naive += low <= truth <= high
    assert 0.92 * trials <= held
    if (k, spread) == (1, 1.5):
        assert naive < 0.9 * trials


def test_passed_reads_a_ledger():
    rows = {"a": ("pass", "pass"), "b": ("pass", "fail"), "c": ("fail", "pass"), "d": ("timeout", "timeout")}
    ledger = {"tasks": {t: {"base": b, "plus": p} for t, (b, p) in rows.items()}}
    assert stats.passed(ledger, "base") == {"a": 1, "b": 1, "c": 0, "d": 0}
    assert stats.passed(ledger, "plus") == {"a": 1, "b": 0, "c": 0, "d": 0}


def test_passed_reads_a_ledger_of_several_samples():
    right, half, wrong = ({"base": b, "plus": p} for b, p in (("pass", "pass"), ("pass", "fail"), ("fail", "fail")))
    ledger = {"tasks": {"a": [right, half, wrong], "b": [right] * 3, "c": [wrong, right, right]}}
    assert stats.counts(ledger, "base") == {"a": (2, 3), "b": (3, 3), "c": (2, 3)}
    assert stats.passed(ledger, "plus") == {"a": Fraction(1, 3), "b": 1, "c": Fraction(2, 3)}


# --- two runs -------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_exact_sign_test():
    for i, j in itertools.product(range(13), repeat=2):
        expected = float(exact_sign_test(i, j)) if i + j else 1.0
        assert stats.mcnemar(i, j) == pytest.approx(expected, abs=1e-12)


def test_compare_counts_the_four_kinds_of_tasks():
    a, b = vector("1100110000"), vector("1010000111")
    found = stats.compare(a, b)
    assert [found[k] for k in ("n", "both", "only_a", "only_b", "neither")] == [10, 1, 3, 4, 2]
    assert found["difference"] == pytest.approx(0.1)
    assert found["p"] == pytest.approx(float(exact_sign_test(3, 4)))
    assert found["low"] <= 0.1 <= found["high"]


def test_compare_of_several_samples_flips_tasks_not_samples():
    """Ten samples that agree are as good as one: p is McNemar's on tasks; and in general all signs of all tasks."""
    a, b = vector("1100110000"), vector("1011111111")
    many = [{t: Fraction(10 * v, 10) for t, v in run.items()} for run in (a, b)]
    assert stats.compare(*many) == stats.compare(a, b)
    assert stats.sign_flip(zip(a.values(), b.values(), strict=True)) == pytest.approx(stats.compare(a, b)["p"])
    rng = np.random.default_rng(3)
    x, y = ({f"t{i}": Fraction(int(c), 6) for i, c in enumerate(rng.integers(0, 7, 9))} for _ in range(2))
    d = [y[t] - x[t] for t in x]
    sums = [abs(sum(s * v for s, v in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=9)]
    found = stats.compare(x, y)
    assert found["p"] == pytest.approx(sum(s >= abs(sum(d)) for s in sums) / len(sums), abs=1e-12)
    assert found["difference"] == pytest.approx(float(sum(d)) / 9)
    assert found["only_b"] == sum(v > 0 for v in d)
    assert sum(found[k] for k in ("both", "neither", "only_a", "only_b")) == 9


def test_sign_flip_keeps_its_level_with_several_samples():
    """Two equal models, tasks of all difficulties, five samples each: p <= 0.05 in no more than 5 % of trials."""
    rng, low, trials = np.random.default_rng(4), 0, 600
    for _ in range(trials):
        chance = rng.beta(0.5, 0.5, 40)
        x, y = ([Fraction(int(c), 5) for c in rng.binomial(5, chance)] for _ in range(2))
        low += stats.sign_flip(zip(x, y, strict=True)) <= 0.05
    assert low <= 0.05 * trials + 2.5 * math.sqrt(0.05 * 0.95 * trials)


def test_runs_of_other_tasks_are_not_compared():
    with pytest.raises(UserError, match="t3: only one of the two ledgers has this task"):
        stats.compare(vector("101"), vector("1010"))


def test_bootstrap_against_all_resamples():
    a, b = vector("11000"), vector("10110")
    d = [b[t] - a[t] for t in a]
    every = sorted(sum(draw) / 5 for draw in itertools.product(d, repeat=5))
    low, high = stats.bootstrap(a, b, level=0.8, resamples=20_000)
    # Discrete: the ends must lie where the exact distribution's quantiles, one part in 200 off, lie.
    for end, q in ((low, 0.1), (high, 0.9)):
        near = {every[math.floor((q + off) * (len(every) - 1))] for off in (-0.005, 0, 0.005)}
        assert min(abs(end - v) for v in near) < 1e-9
    assert stats.bootstrap(a, b) == stats.bootstrap(a, b)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_holm_is_the_closure_of_bonferroni(p):
    """A hypothesis falls when every family that holds it falls by Bonferroni: Holm is a short cut to that."""
    families = [s for r in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), r)]
    for i, adjusted in enumerate(stats.holm(p)):
        expected = max(min(1.0, len(s) * min(p[j] for j in s)) for s in families if i in s)
        assert adjusted == pytest.approx(expected, abs=1e-12)


# --- several seeds --------------------------------------------------------------------------------------------------


def test_pooled_with_one_run_each_is_mcnemar():
    a, b = vector("11001100001111010"), vector("10100001110101111")
    one = stats.compare(a, b)
    both = stats.pooled([a], [b])
    assert both["p"] == pytest.approx(one["p"])
    assert both["difference"] == pytest.approx(one["difference"])
    assert (both["low"], both["high"]) == pytest.approx((one["low"], one["high"]), abs=0.06)


@pytest.mark.parametrize("runs", [(2, 2), (3, 2), (1, 3)])
def test_sign_flips_against_all_signs(runs):
    rng = np.random.default_rng(sum(runs))
    a, b = ([vector("".join(map(str, rng.integers(0, 2, 9)))) for _ in range(n)] for n in runs)
    d = [Fraction(sum(r[t] for r in b), len(b)) - Fraction(sum(r[t] for r in a), len(a)) for t in a[0]]
    sums = [abs(sum(s * v for s, v in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=9)]
    expected = sum(s >= abs(sum(d)) for s in sums) / len(sums)
    found = stats.pooled(a, b)
    assert found["p"] == pytest.approx(expected, abs=1e-12)
    assert found["difference"] == pytest.approx(float(sum(d)) / 9)


def test_p_over_seeds_is_welch():
    """Against the formula: t and Satterthwaite's degrees of freedom, the tail by numerical integration."""
    a, b = ([vector(f"{bits:012b}") for bits in runs] for runs in ((0xF0F, 0x70F, 0x307), (0xFFF, 0xF7F)))
    x, y = ([sum(r.values()) / 12 for r in runs] for runs in (a, b))
    var = [sum((v - sum(s) / len(s)) ** 2 for v in s) / (len(s) - 1) / len(s) for s in (x, y)]
    t = (sum(y) / 2 - sum(x) / 3) / math.sqrt(sum(var))
    df = sum(var) ** 2 / (var[0] ** 2 / 2 + var[1] ** 2 / 1)
    grid = np.linspace(0, abs(t), 200_001)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    expected = 1 - 2 * np.trapezoid(scale * (1 + grid**2 / df) ** (-(df + 1) / 2), grid)
    assert stats.pooled(a, b)["p_seeds"] == pytest.approx(expected, abs=1e-6)
    assert stats.pooled(a[:1], b)["p_seeds"] is None
    assert stats.pooled(a[:1] * 2, b[:1] * 2)["p_seeds"] is None


def test_pooled_rate():
    runs = [vector("1100"), vector("1110"), vector("1000")]
    found = stats.pooled_rate(runs, resamples=2000)
    assert found["rates"] == [0.5, 0.75, 0.25]
    assert (found["mean"], found["sd"]) == (0.5, 0.25)
    assert found["low"] < 0.5 < found["high"]
    assert stats.pooled_rate(runs[:1])["sd"] is None


def test_pooled_interval_against_all_resamples():
    """Every way to draw three tasks of three, two runs of two for the one strategy and two of two for the other."""
    a, b = [vector("100"), vector("110")], [vector("111"), vector("011")]
    every = []
    for tasks in itertools.product("012", repeat=3):
        for i, j in itertools.product(itertools.product((0, 1), repeat=2), repeat=2):
            means = [
                sum(r[f"t{t}"] for r in runs for t in tasks) / 6 for runs in ([a[k] for k in i], [b[k] for k in j])
            ]
            every.append(means[1] - means[0])
    every.sort()
    found = stats.pooled(a, b, level=0.8, resamples=40_000)
    for end, q in ((found["low"], 0.1), (found["high"], 0.9)):
        near = {every[math.floor((q + off) * (len(every) - 1))] for off in (-0.01, 0, 0.01)}
        assert min(abs(end - v) for v in near) < 1e-9


def test_pooled_interval_covers_the_truth():
    """Runs crossed with tasks, simulated: the 95 % interval holds the true difference at least as often as it says."""
    rng, held, trials = np.random.default_rng(1), 0, 120
    for _ in range(trials):
        difficulty = rng.normal(0, 1.5, 60)
        runs = []
        for shift in (0.0, 0.5):
            chance = 1 / (1 + np.exp(-(difficulty + shift + rng.normal(0, 0.2, (3, 1)))))
            runs.append([dict(enumerate(row)) for row in (rng.random((3, 60)) < chance).astype(int).tolist()])
        wide = rng.normal(0, 1.5, 4000)
        truth = np.mean(
            [np.diff([np.mean(1 / (1 + np.exp(-(wide + s + e)))) for s in (0.0, 0.5)]) for e in (-0.2, 0, 0.2)]
        )
        found = stats.pooled(*runs, resamples=600)
        held += found["low"] <= truth <= found["high"]
    assert held >= 0.93 * trials


# --- printed percentages --------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.data())
@settings(max_examples=200, deadline=None)
def test_recover_finds_what_was_printed(n, data):
    k = data.draw(st.integers(0, n))
    for rounding in (ROUND_HALF_EVEN, ROUND_HALF_UP):
        printed = (Decimal(100 * k) / n).quantize(Decimal("0.1"), rounding)
        found = stats.recover(str(printed), n)
        assert k in found
        for other in found:
            shown = {(Decimal(100 * other) / n).quantize(Decimal("0.1"), r) for r in (ROUND_HALF_EVEN, ROUND_HALF_UP)}
            assert printed in shown


def test_the_papers_figures():
    """Table 2 has MBPP+ 44.9 at T = 256, which no k of 378 gives, and Table 1 has 44.2 there: 167."""
    assert stats.recover("44.9", 378) == []
    assert stats.recover("44.2", 378) == [167]
    assert stats.recover("36.6", 164) == [60]
    assert stats.recover("32.3", 164) == [53]
    assert stats.recover(40, 10) == [4]
    assert stats.claim("44.9", "44.2", 378)["misprint"]
    found = stats.claim("32.3", "36.6", 164)
    assert found["counts"] == [[53], [60]]
    assert found["p_min"] == pytest.approx(2 / 2**7)  # all seven tasks one way
    assert stats.mcnemar_range(69, 65, 164)["p_min"] == pytest.approx(0.125)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_mcnemar_range_against_all_pairs_of_runs(n):
    runs = list(itertools.product((0, 1), repeat=n))
    seen: dict[tuple[int, int], set[float]] = {}
    for x, y in itertools.product(runs, repeat=2):
        only = (sum(i > j for i, j in zip(x, y, strict=True)), sum(i < j for i, j in zip(x, y, strict=True)))
        seen.setdefault((sum(x), sum(y)), set()).add(float(exact_sign_test(*only)) if any(only) else 1.0)
    for (a, b), p in seen.items():
        found = stats.mcnemar_range(a, b, n)
        assert (found["p_min"], found["p_max"]) == pytest.approx((min(p), max(p)))


# --- power ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "difference", "discordant"), [(12, 0.3, 0.5), (20, 0.2, 0.2), (9, 0.1, 0.9), (3, 0.1, 0.2)]
)
def test_power_against_all_outcomes(n, difference, discordant):
    """Every number of tasks won, lost and drawn, its chance, and whether the test finds it significant."""
    win, lose = (discordant + difference) / 2, (discordant - difference) / 2
    total = 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            if i + j and exact_sign_test(i, j) <= Fraction(1, 20):
                ways = math.comb(n, i) * math.comb(n - i, j)
                total += ways * win**i * lose**j * (1 - discordant) ** (n - i - j)
    assert stats.mcnemar_power(n, difference, discordant) == pytest.approx(total, abs=1e-9)
    assert stats.mcnemar_power(n, -difference, discordant) == pytest.approx(total, abs=1e-9)


def test_tasks_needed_is_where_the_power_begins_to_hold():
    for difference, discordant in ((0.05, 0.1), (0.1, 0.3), (0.05, 0.05)):
        n = stats.tasks_needed(difference, discordant)
        later = [stats.mcnemar_power(m, difference, discordant) for m in range(n, n + n // 10)]
        assert min(later) >= 0.8 - 0.005
        before = [stats.mcnemar_power(m, difference, discordant) for m in range(max(1, n - n // 10 - 3), n)]
        assert min(before) < 0.8
        # McNemar's usual formula, without the exact test's caution
        a, b = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8)
        rough = ((a * math.sqrt(discordant) + b * math.sqrt(discordant - difference**2)) / difference) ** 2
        assert rough <= n <= 1.35 * rough + 8
    with pytest.raises(UserError, match="must lie between"):
        stats.mcnemar_power(10, 0.3, 0.2)


def test_seeds_needed_by_simulation():
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    for difference, sd in ((2.0, 1.5), (3.0, 2.0)):
        runs = stats.seeds_needed(difference, sd)
        powers = []
        for n in (runs - 1, runs):
            x, y = rng.normal(0, sd, (2, n, 20_000))
            powers.append(np.mean(ttest_ind(x, y + difference, axis=0).pvalue <= 0.05))
        assert powers[0] < 0.805
        assert powers[1] > 0.795
    with pytest.raises(UserError, match="too small"):
        stats.seeds_needed(0.001, 2.0, most=50)


def test_power_table():
    rows = stats.power_table(points=(2, 5), discordant=(0.1,), run_sd=(1.0,))
    assert [r["points"] for r in rows] == [2, 5]
    assert rows[0]["tasks"][0.1] > 4 * rows[1]["tasks"][0.1]
    assert rows[0]["seeds"][1.0] > rows[1]["seeds"][1.0]
