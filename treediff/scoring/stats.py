"""The error bars: intervals and tests for pass counts, for our ledgers and for the paper's printed percentages.

    wilson(60, 164)                                   # (0.296, 0.442)
    compare(passed(ledger_a, "plus"), passed(ledger_b, "plus"))["p"]
    recover("36.6", 164)                              # [60]; none: a misprint
    mcnemar_range(60, 53, 164)["p_min"]               # the least p that those marginal counts allow

scipy does the mathematics, these functions arrange it. Pass vectors are `{task id: 0 or 1}`, or the share of a task's
samples that pass (a Fraction) where it has several; every difference is second minus first. A test's p is two-sided.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from treediff.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


LEVEL = 0.95
"""Confidence level of every interval."""


# --- one run --------------------------------------------------------------------------------------------------------
def wilson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval for the share behind `k` of `n`, without continuity correction."""
    from scipy.stats import binomtest

    ci = binomtest(k, n).proportion_ci(level, method="wilson")
    return float(ci.low), float(ci.high)


def samples(entry: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The verdicts of a task's samples from its entry in a ledger: one verdict, or a list of them."""
    return [entry] if isinstance(entry, Mapping) else entry


def counts(ledger: Mapping[str, Any], part: str) -> dict[str, tuple[int, int]]:
    """By task, how many of its samples pass, and how many it has. `part`: `base`, or `plus` (passes both, as EvalPlus
    counts it)."""
    parts = ("base",) if part == "base" else ("base", "plus")
    passes = {task: [all(v[p] == "pass" for p in parts) for v in samples(e)] for task, e in ledger["tasks"].items()}
    return {task: (sum(p), len(p)) for task, p in passes.items()}


def passed(ledger: Mapping[str, Any], part: str) -> dict[str, int | Fraction]:
    """The pass vector of a ledger for `counts`: 0 or 1 by task, or the share of its samples where it has several."""
    return {task: c if n == 1 else Fraction(c, n) for task, (c, n) in counts(ledger, part).items()}


SAMPLES = (
    "Each task has several samples. They are no further tasks: a task counts with the share of its samples that pass "
    "(for pass@k with the unbiased estimate from them), and tasks are the independent units. The interval is Wilson's "
    "for as many tasks as would give the same standard error: no fewer than there are, as if a task's samples were all "
    "alike, and no more than samples / k. Two runs are compared by the tasks' differences: the test is the exact "
    "sign-flip test (were both equally likely to solve each task, each difference were as likely with either sign), "
    "which is McNemar's where there is one sample."
)
"""The model behind figures of several samples per task, to print beside them."""


def pass_at(counted: Mapping[str, tuple[int, int]], k: int) -> dict[str, float]:
    """The unbiased pass@k by task: the chance that `k` of its samples, drawn at random, hold a correct one.

    Chen et al. 2021: 1 - C(n-c, k) / C(n, k), here as the hypergeometric distribution's chance of at least one.
    """
    from scipy.stats import hypergeom

    few = min(n for _, n in counted.values())
    if few < k:
        raise UserError(f"k: pass@{k} needs {k} samples of each task; one has {few}.")
    c, n = zip(*counted.values(), strict=True)
    return dict(zip(counted, hypergeom.sf(0, n, c, k).tolist(), strict=True))


def interval(values: Iterable[float | Fraction], most: float = 1.0, level: float = LEVEL) -> tuple[float, float]:
    """Interval of the mean of tasks' values in 0..1, each from several samples; `SAMPLES` is the model.

    `most`: independent draws that a task's value rests on at most (samples / k for pass@k). With 0s and 1s alone it is
    Wilson's interval.
    """
    from scipy.stats import norm

    x = [float(v) for v in values]
    n, p = len(x), sum(x) / len(x)
    spread = sum((v - p) ** 2 for v in x) / max(1, n - 1)
    if spread > 0:
        size = n * min(max(p * (1 - p) / spread, 1.0), max(most, 1.0))
    else:  # all alike: at 0 or 1 nothing shows that a task's samples differ
        size = n * (max(most, 1.0) if 0 < p < 1 else 1.0)
    z2 = float(norm.ppf((1 + level) / 2)) ** 2
    middle, half = p + z2 / (2 * size), math.sqrt(z2 * p * (1 - p) / size + (z2 / (2 * size)) ** 2)
    return max(0.0, (middle - half) / (1 + z2 / size)), min(1.0, (middle + half) / (1 + z2 / size))


def rated(counted: Mapping[str, tuple[int, int]], k: int = 1) -> dict[str, Any]:
    """A table's cell from `counts`: samples that pass, tasks, samples per task (the fewest), pass@k and its interval in
    percent: Wilson's, or that of `SAMPLES`."""
    values, most = pass_at(counted, k).values(), min(n for _, n in counted.values())
    low, high = interval(values, most / k)
    record = {"passed": sum(c for c, _ in counted.values()), "tasks": len(counted), "samples": most, "k": k}
    return record | {"rate": 100 * sum(values) / len(values), "low": 100 * low, "high": 100 * high}


# --- two runs -------------------------------------------------------------------------------------------------------
Passes = Mapping[str, int | float | Fraction]


def paired(a: Passes, b: Passes) -> list[tuple[int | float | Fraction, int | float | Fraction]]:
    """The two runs' results task by task. Raises UserError if they are not of the same tasks."""
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise UserError(
            f"{odd[0]}: only one of the two ledgers has this task ({len(odd)} in all); score the same tasks."
        )
    return [(a[task], b[task]) for task in a]


def mcnemar(only_a: ArrayLike, only_b: ArrayLike) -> np.ndarray:
    """McNemar's exact two-sided p: are the tasks that only one run passes split evenly? Numbers or arrays of them."""
    import numpy as np
    from scipy.stats import binom

    return np.asarray(np.minimum(1.0, 2 * binom.cdf(np.minimum(only_a, only_b), np.add(only_a, only_b), 0.5)))


def compare(a: Passes, b: Passes) -> dict[str, Any]:
    """Two runs task by task: the counts, the difference of the pass rates, its interval and the exact test's p.

    `only_a`, `only_b`: tasks that only this run passes, or of which it passes the greater share; `both` and `neither`:
    those on which they agree, on more than nothing and on nothing. p: McNemar's, or the sign-flip test of `SAMPLES`.
    """
    pairs = paired(a, b)
    low, high = bootstrap(y - x for x, y in pairs)
    only_a, only_b = sum(x > y for x, y in pairs), sum(y > x for x, y in pairs)
    return {
        "n": len(pairs),
        "both": sum(x == y > 0 for x, y in pairs),
        "only_a": only_a,
        "only_b": only_b,
        "neither": sum(x == y == 0 for x, y in pairs),
        "difference": float(sum(y - x for x, y in pairs) / len(pairs)),
        "low": low,
        "high": high,
        "p": float(mcnemar(only_a, only_b)) if all(v in (0, 1) for pair in pairs for v in pair) else sign_flip(pairs),
    }


def bootstrap(
    values: Iterable[float | Fraction], level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of one value per task: percentile bootstrap over tasks, the same for the same values."""
    import numpy as np
    from scipy.stats import bootstrap

    x = np.array([float(v) for v in values])
    ci = bootstrap(
        (x,), np.mean, confidence_level=level, n_resamples=resamples, method="percentile", rng=seed, batch=1000
    ).confidence_interval
    return float(ci.low), float(ci.high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject where the result is <= alpha, and the family's error stays <= alpha."""
    adjusted, highest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


# --- several runs ---------------------------------------------------------------------------------------------------
POOLING = (
    "Runs crossed with tasks: a result is the task's difficulty, the strategy, what the strategy does to this task, "
    "the run, and chance. The difference is that of the means over runs and tasks. Its variance is what the runs' "
    "scores show (at least what chance alone gives) and what the strategies' difference shows from task to task, less "
    "the chance that is in both. Interval and p are those of a t-test with Satterthwaite's degrees of freedom: the "
    "analysis of studies with several readers and cases (Obuchowski and Rockette 1995, Hillis 2007), with runs for "
    "readers and tasks for cases. They speak of further runs on further tasks. Runs that start from one backbone in "
    "both strategies are compared in pairs. A difference is claimed where p, adjusted by Holm's procedure for all "
    "comparisons, is below 0.05. Several samples of a task are averaged first."
)
"""The model behind `pooled`, to print beside its figures."""


def pooled(a: Sequence[Passes], b: Sequence[Passes], paired_runs: bool = False, level: float = LEVEL) -> dict[str, Any]:
    """The difference between two strategies over their runs and the tasks; `POOLING` is the model.

    `a`, `b`: the pass vectors of each strategy's runs (or any value per task), two runs of each at least.
    `paired_runs`: run i of `a` and run i of `b` start from the same backbone. Gives `runs` (of each), `n` tasks,
    `difference` (b minus a), its standard error `se`, `low`, `high` and two-sided `p`, all shares; the last four are
    None with one run of a strategy, one task, or runs that are copies of one another: there chance is unknown.
    Raises UserError where the runs are not of the same tasks or cannot be paired.

    Simulated with equal means, 2 to 10 runs of each, 120 and 600 tasks, runs that deviate by 0 to 4 points: at most
    6 % of the studies have p < 0.05 (tests/test_stats.py).
    """
    import numpy as np
    from scipy.stats import t

    x, y = (_matrix(runs, a[0]) for runs in (a, b))
    if paired_runs and len(x) != len(y):
        raise UserError(f"paired_runs: {len(x)} and {len(y)} runs cannot be compared in pairs.")
    by_task = y.mean(0) - x.mean(0)
    difference = float(by_task.mean())
    found = {"runs": [len(x), len(y)], "n": len(by_task), "difference": difference}
    se, df = _standard_error([y - x] if paired_runs else [x, y], by_task)
    if not se:
        return found | dict.fromkeys(("se", "low", "high", "p"))
    half = se * t.ppf((1 + level) / 2, df)
    ends = {"low": float(max(-1, difference - half)), "high": float(min(1, difference + half))}
    return found | {"se": float(se), **ends, "p": float(2 * t.sf(np.abs(difference) / se, df))}


def pooled_rate(runs: Sequence[Passes], level: float = LEVEL) -> dict[str, Any]:
    """The pass rate of one strategy over its runs: each run's, their mean, its interval, and their sd (all shares).

    The interval holds chance between runs and between tasks as in `POOLING`; of one run (sd None) it is `interval`.
    """
    from scipy.stats import t

    x = _matrix(runs, runs[0])
    each, mean = x.mean(1), float(x.mean())
    se, df = _standard_error([x], x.mean(0))
    half = se * float(t.ppf((1 + level) / 2, df)) if se else 0.0
    low, high = (max(0.0, mean - half), min(1.0, mean + half)) if se else interval(x.mean(0), level=level)
    sd = float(each.std(ddof=1)) if len(each) > 1 else None
    return {"rates": each.tolist(), "mean": mean, "low": low, "high": high, "sd": sd}


def _matrix(runs: Sequence[Passes], like: Passes) -> np.ndarray:
    """The runs' results, float (runs, tasks), tasks in the order of `like`."""
    import numpy as np

    for run in runs:
        paired(like, run)
    return np.array([[float(run[task]) for task in like] for run in runs])


def _standard_error(groups: Sequence[np.ndarray], by_task: np.ndarray) -> tuple[float, float]:
    """Of a difference (or mean) over runs and tasks, with its degrees of freedom; (0, 0) where it cannot be known.

    `groups`: results (runs, tasks) whose runs are independent. `by_task` (tasks,): what is averaged over tasks.
    """
    n = len(by_task)
    if n < 2 or min(map(len, groups)) < 2:
        return 0.0, 0.0
    parts, chance = [], 0.0
    for x in groups:
        rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
        within = float((rest**2).sum()) / ((len(x) - 1) * (n - 1)) / (len(x) * n)
        parts.append((max(float(x.mean(1).var(ddof=1)) / len(x), within), len(x) - 1))
        chance += within
    if max(v for v, _ in parts) < 1e-24:  # the runs are copies of one another
        return 0.0, 0.0
    parts.append((max(float(by_task.var(ddof=1)) / n - chance, 0.0), n - 1))
    variance = sum(v for v, _ in parts)
    return math.sqrt(variance), variance**2 / sum(v**2 / df for v, df in parts)


def sign_flip(pairs: Iterable[tuple[int | float | Fraction, int | float | Fraction]]) -> float:
    """The exact sign-flip test: P(|sum of differences under random signs| >= |their sum|).

    The sum's distribution is built one difference after another, in whole multiples of their common unit.
    """
    import numpy as np

    differences = [d for x, y in pairs if (d := Fraction(y) - Fraction(x))]
    unit = math.lcm(*(d.denominator for d in differences))
    steps = [int(d * unit) for d in differences]
    if steps:
        divisor = math.gcd(*steps)
        steps = [s // divisor for s in steps]
    reach = sum(map(abs, steps))
    chance = np.zeros(2 * reach + 1)  # of the sum being index - reach
    chance[reach] = 1.0
    for s in map(abs, steps):
        chance = (np.roll(chance, s) + np.roll(chance, -s)) / 2  # never wraps: the reach is not passed
    values = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chance[values >= abs(sum(steps))].sum()))


# --- several holes of a program -----------------------------------------------------------------------------------
CLUSTERS = (
    "The holes of one program are no independent cases: programs are. A rate is the share of holes that pass. With one "
    "run its interval, and that of a difference, resamples programs with all their holes (the same ones for both "
    "strategies; where all holes pass or none does, it is Wilson's for as many cases as there are programs), and p is "
    "the exact sign-flip test on the programs' differences: they speak of these very models. With two runs or more of "
    "each strategy interval and p are those of runs crossed with programs, and speak of further runs."
)
"""The model behind `clustered` and `clustered_difference`, to print beside their figures; see `POOLING`."""


def clustered(runs: Sequence[Passes], program: Mapping[str, str]) -> dict[str, Any]:
    """The share of holes that pass, over one or more runs, and its interval; `program` says which each is cut from.

    Gives `holes`, `programs`, `rates` (of each run), `rate` (their mean), `low` and `high`, all shares.
    """
    sizes = _sizes(runs[0], program)
    values = [_by_program(_like(runs[0], run), program, sizes) for run in runs]
    found = pooled_rate(values)
    if len(runs) == 1 and 0 < found["mean"] < 1:
        low, high = bootstrap(values[0].values())
    elif len(runs) == 1:
        low, high = wilson(round(found["mean"]) * len(sizes), len(sizes))
    else:
        low, high = found["low"], found["high"]
    head = {"holes": sum(sizes.values()), "programs": len(sizes), "rates": found["rates"], "rate": found["mean"]}
    return head | {"low": max(0.0, low), "high": min(1.0, high)}


def clustered_difference(
    a: Sequence[Passes], b: Sequence[Passes], program: Mapping[str, str], paired_runs: bool = False
) -> dict[str, Any]:
    """The difference between two strategies on the same holes; `CLUSTERS` is the model.

    Gives `runs`, `holes`, `programs`, `difference` (b minus a), `low`, `high`, `p`, `over` (what these speak of: `runs
    and programs`, or `programs` where a strategy has one run) and `p_programs`, the sign-flip test over programs.
    """
    sizes = _sizes(a[0], program)
    one, two = ([_by_program(_like(a[0], run), program, sizes) for run in runs] for runs in (a, b))
    found = pooled(one, two, paired_runs)
    means = [{p: sum(v[p] for v in of) / len(of) for p in sizes} for of in (one, two)]
    sums = [{p: Fraction(0) for p in sizes} for _ in (a, b)]
    for total, runs in zip(sums, (a, b), strict=True):
        for run in runs:
            for hole, passes in run.items():
                total[program[hole]] += Fraction(passes) / len(runs)
    out = {"runs": found["runs"], "holes": sum(sizes.values()), "programs": len(sizes)}
    out |= {"difference": found["difference"], "p_programs": sign_flip((sums[0][p], sums[1][p]) for p in sizes)}
    if found["p"] is not None:
        return out | {k: found[k] for k in ("low", "high", "p")} | {"over": "runs and programs"}
    low, high = bootstrap(means[1][p] - means[0][p] for p in sizes)
    return out | {"low": low, "high": high, "p": out["p_programs"], "over": "programs"}


def _like(like: Passes, run: Passes) -> Passes:
    """`run`, in the order of `like`. Raises UserError if they are not of the same cases."""
    paired(like, run)
    return {case: run[case] for case in like}


def _sizes(run: Passes, program: Mapping[str, str]) -> dict[str, int]:
    """Holes by program, in the order in which programs appear."""
    sizes: dict[str, int] = {}
    for hole in run:
        sizes[program[hole]] = sizes.get(program[hole], 0) + 1
    return sizes


def _by_program(run: Passes, program: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, float]:
    """One value per program whose mean is the share of holes that pass, and whose spread is that of this ratio.

    Programs have different numbers of holes, so the share is a ratio of two sums: the value is its linearisation.
    """
    rate = float(sum(run.values())) / len(run)
    left = dict.fromkeys(sizes, 0.0)
    for hole, passes in run.items():
        left[program[hole]] += float(passes) - rate
    return {p: rate + v * len(sizes) / len(run) for p, v in left.items()}


# --- printed percentages, without ledgers ---------------------------------------------------------------------------
def recover(percent: str | float, n: int) -> list[int]:
    """Every k for which k/n prints as this percentage, to as many decimals as it has. None: a misprint.

    A half may have been rounded either way.
    """
    printed = Decimal(str(percent))
    half = Decimal(1).scaleb(int(printed.as_tuple().exponent)) / 2
    return [k for k in range(n + 1) if abs(100 * k - printed * n) <= half * n]


def mcnemar_range(a: int, b: int, n: int) -> dict[str, Any]:
    """The least and greatest exact McNemar p that `a` and `b` passes of the same `n` tasks allow.

    Unknown is how many tasks both pass; the least p is where that is greatest, and none but the winner's tasks differ.
    """
    import numpy as np

    both = np.arange(max(0, a + b - n), min(a, b) + 1)
    p = mcnemar(a - both, b - both)
    least, most = int(both[p.argmin()]), int(both[p.argmax()])
    splits = {"split_min": (a - least, b - least), "split_max": (a - most, b - most)}
    return {"p_min": float(p.min()), "p_max": float(p.max()), **splits}


def claim(percent_a: str, percent_b: str, n: int) -> dict[str, Any]:
    """A printed comparison: the counts behind it, and the range of p over all of them; `misprint` if there are none."""
    counts = [recover(percent_a, n), recover(percent_b, n)]
    if not all(counts):
        return {"counts": counts, "misprint": True, "p_min": None, "p_max": None}
    ranges = [mcnemar_range(a, b, n) for a in counts[0] for b in counts[1]]
    return {
        "counts": counts,
        "misprint": False,
        "p_min": min(r["p_min"] for r in ranges),
        "p_max": max(r["p_max"] for r in ranges),
    }


# --- how much would be needed ---------------------------------------------------------------------------------------
def mcnemar_power(n: int, difference: float, discordant: float, alpha: float = 0.05) -> float:
    """The chance that McNemar's exact test on `n` tasks finds a true `difference` (both as shares).

    `discordant`: the share of tasks that only one of the two passes; the closer the two runs, the smaller.
    """
    import numpy as np
    from scipy.stats import binom

    if not 0 < abs(difference) <= discordant <= 1:
        raise UserError(f"discordant: {discordant} must lie between the difference {abs(difference)} and 1.")
    mean, spread = n * discordant, 9 * math.sqrt(n * discordant * (1 - discordant)) + 9
    d = np.arange(max(0, math.floor(mean - spread)), min(n, math.ceil(mean + spread)) + 1)
    # Of d discordant tasks the test rejects if at most `most` fall on one side (binomial tail <= alpha / 2).
    most = binom.ppf(alpha / 2, d, 0.5)
    most = np.where(binom.cdf(most, d, 0.5) > alpha / 2, most - 1, most)
    share = (discordant + abs(difference)) / (2 * discordant)
    reject = binom.cdf(most, d, share) + binom.sf(d - most - 1, d, share)
    return float(np.sum(binom.pmf(d, n, discordant) * np.where(most < 0, 0.0, reject)))


@functools.cache
def tasks_needed(difference: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """The least number of tasks from which McNemar's exact test has this power (and keeps it for the next 10 %).

    An exact test's power wavers as n grows, hence the second condition.
    """

    def enough(n: int) -> bool:
        ahead = {n, n + 1, n + 2, *(n + n * i // 50 for i in range(1, 6))}
        return all(mcnemar_power(m, difference, discordant, alpha) >= power for m in sorted(ahead))

    high = 8
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@functools.cache
def seeds_needed(difference: float, run_sd: float, power: float = 0.8, alpha: float = 0.05, most: int = 10_000) -> int:
    """Runs of each strategy that a two-sample t-test on the runs' scores needs to find a true `difference`.

    `run_sd`: standard deviation of a strategy's score from seed to seed, in the units of `difference`. It speaks of
    this one benchmark: tasks are fixed, seeds are drawn.
    """
    from scipy.stats import nct, t

    for runs in range(2, most + 1):
        df, shift = 2 * runs - 2, abs(difference) / run_sd * math.sqrt(runs / 2)
        bound = t.ppf(1 - alpha / 2, df)
        if nct.sf(bound, df, shift) + nct.cdf(-bound, df, shift) >= power:
            return runs
    raise UserError(f"difference: {difference} is too small beside run_sd {run_sd} for {most} runs.")


def resolved(runs: int, run_sd: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The least difference that so many runs of each strategy find: `seeds_needed` the other way round."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    df, bound = 2 * runs - 2, t.ppf(1 - alpha / 2, 2 * runs - 2)
    shift = brentq(lambda s: nct.sf(bound, df, s) - power, 0, 20)  # the other tail is below 1e-4 there
    return float(shift * run_sd / math.sqrt(runs / 2))


def power_table(
    points: Sequence[float] = (1, 2, 3, 4, 5),
    discordant: Sequence[float] = (0.1, 0.15, 0.2, 0.3),
    run_sd: Sequence[float] = (1.0, 1.5, 2.0),
    power: float = 0.8,
    alpha: float = 0.05,
) -> list[dict[str, Any]]:
    """For each true difference [points]: tasks needed by discordant share, seeds needed by the runs' sd [points]."""
    return [
        {
            "points": d,
            "tasks": {share: tasks_needed(d / 100, share, power, alpha) for share in discordant},
            "seeds": {sd: seeds_needed(d, sd, power, alpha) for sd in run_sd},
        }
        for d in points
    ]
