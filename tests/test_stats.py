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
    low, high = stats.bootstrap(d, level=0.8, resamples=20_000)
    # Discrete: the ends must lie where the exact distribution's quantiles, one part in 200 off, lie.
    for end, q in ((low, 0.1), (high, 0.9)):
        near = {every[math.floor((q + off) * (len(every) - 1))] for off in (-0.005, 0, 0.005)}
        assert min(abs(end - v) for v in near) < 1e-9
    assert stats.bootstrap(d) == stats.bootstrap(d)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_holm_is_the_closure_of_bonferroni(p):
    """A hypothesis falls when every family that holds it falls by Bonferroni: Holm is a short cut to that."""
    families = [s for r in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), r)]
    for i, adjusted in enumerate(stats.holm(p)):
        expected = max(min(1.0, len(s) * min(p[j] for j in s)) for s in families if i in s)
        assert adjusted == pytest.approx(expected, abs=1e-12)


# --- several runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [(2, 2), (3, 2), (1, 3)])
def test_sign_flips_against_all_signs(runs):
    rng = np.random.default_rng(sum(runs))
    a, b = ([vector("".join(map(str, rng.integers(0, 2, 9)))) for _ in range(n)] for n in runs)
    pairs = [tuple(Fraction(sum(r[t] for r in side), len(side)) for side in (a, b)) for t in a[0]]
    d = [y - x for x, y in pairs]
    sums = [abs(sum(s * v for s, v in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=9)]
    expected = sum(s >= abs(sum(d)) for s in sums) / len(sums)
    assert stats.sign_flip(pairs) == pytest.approx(expected, abs=1e-12)
    assert stats.pooled(a, b)["difference"] == pytest.approx(float(sum(d)) / 9)


def test_pooled_is_welch_where_tasks_are_alike():
    """Runs that shift every task by the same amount: all chance is between runs, and p is that of Welch's t-test."""
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(2)
    difficulty, x, y = rng.normal(0, 1, 30), rng.normal(0, 0.1, 4), rng.normal(0.1, 0.2, 6)
    a, b = ([dict(enumerate(difficulty + shift)) for shift in shifts] for shifts in (x, y))
    found = stats.pooled(a, b)
    assert found["p"] == pytest.approx(ttest_ind(x, y, equal_var=False).pvalue, rel=1e-6)
    assert found["difference"] == pytest.approx(y.mean() - x.mean())
    paired = stats.pooled(a, b[:4], paired_runs=True)
    d = y[:4] - x
    assert paired["p"] == pytest.approx(ttest_ind(d, np.zeros(4), equal_var=False).pvalue, rel=1e-6)
    with pytest.raises(UserError, match="4 and 6 runs cannot be compared in pairs"):
        stats.pooled(a, b, paired_runs=True)


def test_pooled_is_the_paired_t_test_where_runs_are_alike():
    """Runs of no deviation and hardly any chance: what is left is the strategies' difference from task to task."""
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(3)
    x, y = rng.normal(0, 1, 40), rng.normal(0.3, 1, 40)
    a, b = ([dict(enumerate(v + rng.normal(0, 1e-6, 40))) for _ in range(5)] for v in (x, y))
    assert stats.pooled(a, b)["p"] == pytest.approx(ttest_rel(x, y).pvalue, rel=1e-3)


def test_pooled_says_nothing_where_chance_is_unknown():
    a, b = [vector("110010"), vector("110100")], [vector("010111"), vector("110111")]
    assert stats.pooled(a, b)["p"] is not None
    for one, two in ((a[:1], b), (a, b[:1]), (a[:1] * 3, b[:1] * 3), ([vector("1")] * 2, [vector("0")] * 2)):
        found = stats.pooled(one, two)
        assert (found["p"], found["low"], found["high"], found["se"]) == (None,) * 4
    with pytest.raises(UserError, match="only one of the two ledgers has this task"):
        stats.pooled(a, [vector("01011"), *b[1:]])


@given(st.integers(2, 4), st.integers(2, 4), st.integers(5, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_pooled_is_no_surer_than_runs_or_tasks_alone(runs_a, runs_b, tasks, seed):
    """Chance of either kind only adds; the ends agree with p; the sides may be exchanged."""
    rng = np.random.default_rng(seed)
    a, b = ([dict(enumerate(rng.integers(0, 2, tasks).tolist())) for _ in range(n)] for n in (runs_a, runs_b))
    x, y = (np.array([list(r.values()) for r in runs]) for runs in (a, b))
    found, back = stats.pooled(a, b), stats.pooled(b, a)
    if found["se"] is None:
        return
    assert found["se"] ** 2 >= x.mean(1).var(ddof=1) / runs_a + y.mean(1).var(ddof=1) / runs_b - 1e-12
    assert found["se"] ** 2 >= (y.mean(0) - x.mean(0)).var(ddof=1) / tasks - 1e-12
    assert (found["p"] < 0.05) == (not found["low"] <= 0 <= found["high"])
    assert (back["difference"], back["p"]) == pytest.approx((-found["difference"], found["p"]))


def simulated(rng, tasks, sd, gap=0.0, own=0.0, backbone=0.0, runs=5):
    """Two strategies' runs: tasks of all difficulties, a run's rate off by `sd`, `gap` between the strategies.

    `own`: what a strategy does to single tasks [logit]; `backbone`: deviation that run i of both share.
    """
    wide, shared, sides = rng.normal(0.5, 1.5, tasks), rng.normal(0, backbone, (runs, 1)), []
    for shift in (0.0, gap):
        chance = 1 / (1 + np.exp(-wide - rng.normal(0, own, tasks)))
        chance = np.clip(chance + shift + shared + rng.normal(0, sd, (runs, 1)), 0, 1)
        sides.append([dict(enumerate(row)) for row in (rng.random((runs, tasks)) < chance).astype(int).tolist()])
    return sides


@pytest.mark.parametrize(
    ("sd", "own", "backbone", "runs"), [(0.04, 0, 0, 5), (0.04, 1, 0, 5), (0.0, 1, 0, 10), (0.02, 1, 0.06, 5)]
)
def test_equal_strategies_are_seldom_told_apart(sd, own, backbone, runs):
    """1,000 studies of two strategies of equal mean whose runs deviate: at most 6 % claim a difference."""
    rng = np.random.default_rng(0)
    studies = (simulated(rng, 120, sd, 0, own, backbone, runs) for _ in range(1000))
    assert sum(stats.pooled(*sides, paired_runs=backbone > 0)["p"] < 0.05 for sides in studies) <= 60


def test_a_great_difference_is_found_and_its_interval_covers():
    rng, found = np.random.default_rng(1), []
    for _ in range(300):
        found.append(stats.pooled(*simulated(rng, 300, 0.02, 0.06)))
    assert sum(f["p"] < 0.05 for f in found) > 200
    # Clipped chances make the true gap a little smaller; the interval must hold what a long series finds.
    truth = np.mean([f["difference"] for f in found])
    assert np.mean([f["low"] <= truth <= f["high"] for f in found]) >= 0.94


def test_pooled_rate():
    runs = [vector("1100"), vector("1110"), vector("1000")]
    found = stats.pooled_rate(runs)
    assert found["rates"] == [0.5, 0.75, 0.25]
    assert (found["mean"], found["sd"]) == (0.5, 0.25)
    assert found["low"] < 0.5 < found["high"]
    one = stats.pooled_rate(runs[:1])
    assert one["sd"] is None
    assert (one["low"], one["high"]) == pytest.approx(stats.wilson(2, 4))


def test_pooled_rate_covers_the_truth():
    rng, held = np.random.default_rng(4), 0
    wide = 1 / (1 + np.exp(-rng.normal(0.5, 1.5, 200_000)))
    for _ in range(300):
        found = stats.pooled_rate(simulated(rng, 120, 0.04)[0])
        held += found["low"] <= wide.mean() <= found["high"]
    assert held >= 0.93 * 300


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


# --- several holes of a program -----------------------------------------------------------------------------------
def cases(n_programs, holes_each, seed, rate=0.5):
    """Holes of programs that pass or fail together, and which program each is of."""
    draw = np.random.default_rng(seed)
    program, run = {}, {}
    for p in range(n_programs):
        outcome = int(draw.random() < rate)
        for h in range(holes_each):
            program[f"{p}/{h}"], run[f"{p}/{h}"] = f"p{p}", outcome
    return run, program


def test_holes_that_pass_or_fail_with_their_program_are_no_further_cases():
    one, of_one = cases(80, 1, 0)
    many, of_many = cases(80, 6, 0)
    a, b = stats.clustered([one], of_one), stats.clustered([many], of_many)
    assert (b["holes"], b["programs"]) == (480, 80)
    assert [b[k] for k in ("rate", "low", "high")] == pytest.approx([a[k] for k in ("rate", "low", "high")])
    low, high = stats.wilson(sum(many.values()), 480)
    assert high - low < 0.6 * (b["high"] - b["low"])  # what counting holes as cases would claim


def test_one_hole_a_program_is_the_paired_test_of_tasks():
    a, program = cases(60, 1, 1)
    b, _ = cases(60, 1, 2, 0.7)
    got, want = stats.clustered_difference([a], [b], program), stats.compare(a, b)
    assert got["over"] == "programs"
    assert [got[k] for k in ("difference", "low", "high", "p")] == pytest.approx(
        [want[k] for k in ("difference", "low", "high", "p")], abs=1e-9
    )


def test_the_rate_is_over_holes_and_the_interval_over_programs_of_any_sizes():
    """Against a bootstrap of the ratio itself, which shares no code with the linearisation."""
    draw = np.random.default_rng(3)
    sizes = draw.integers(1, 9, 150)
    ease = draw.random(150)
    program = {f"{p}/{h}": f"p{p}" for p, n in enumerate(sizes) for h in range(n)}
    run = {h: int(draw.random() < ease[int(h.split("/")[0])]) for h in program}
    got = stats.clustered([run], program)
    assert got["rate"] == pytest.approx(sum(run.values()) / len(run))
    passes = np.array([sum(run[f"{p}/{h}"] for h in range(n)) for p, n in enumerate(sizes)])
    w = draw.multinomial(150, [1 / 150] * 150, 20_000)
    low, high = np.quantile((w @ passes) / (w @ sizes), [0.025, 0.975])
    assert [got["low"], got["high"]] == pytest.approx([low, high], abs=0.006)


def test_programs_without_spread_have_wilson_s_interval_of_programs():
    run, program = cases(20, 5, 0, rate=1.1)
    got = stats.clustered([run], program)
    assert (got["low"], got["high"]) == pytest.approx(stats.wilson(20, 20))


def test_several_runs_of_holes_speak_of_further_runs():
    runs = [cases(40, 3, seed) for seed in range(6)]
    program = runs[0][1]
    got = stats.clustered_difference([r for r, _ in runs[:3]], [r for r, _ in runs[3:]], program)
    assert got["over"] == "runs and programs"
    means = [np.mean([sum(r.values()) / 120 for r, _ in part]) for part in (runs[:3], runs[3:])]
    assert got["difference"] == pytest.approx(means[1] - means[0])
    assert got["low"] <= got["difference"] <= got["high"]
    few = stats.clustered_difference([runs[0][0]], [r for r, _ in runs[3:]], program)
    assert (few["over"], few["runs"], few["p"]) == ("programs", [1, 3], few["p_programs"])


def test_runs_of_other_holes_are_refused():
    a, program = cases(5, 2, 0)
    with pytest.raises(UserError, match="only one of the two"):
        stats.clustered_difference([a], [{k: v for k, v in a.items() if k != "0/0"}], program)
