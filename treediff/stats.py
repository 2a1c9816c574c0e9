"""The error bars: intervals and tests for pass counts, for our ledgers and for the paper's printed percentages.

    wilson(60, 164)                                   # (0.296, 0.442)
    compare(passed(ledger_a, "plus"), passed(ledger_b, "plus"))["p"]
    recover("36.6", 164)                              # [60]; none: a misprint
    mcnemar_range(60, 53, 164)["p_min"]               # the least p that those marginal counts allow

scipy does the mathematics, these functions arrange it. Pass vectors are `{task id: 0 or 1}`; every difference is
second minus first. A test's p is two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from treediff.config import UserError

LEVEL = 0.95
"""Confidence level of every interval."""


# --- one run --------------------------------------------------------------------------------------------------------


def wilson(k: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval for the share behind `k` of `n`, without continuity correction."""
    from scipy.stats import binomtest

    ci = binomtest(k, n).proportion_ci(level, method="wilson")
    return float(ci.low), float(ci.high)


def rate(k: int, n: int) -> dict[str, Any]:
    """A table's cell: counts, percentage, and its Wilson interval in percent."""
    low, high = wilson(k, n)
    return {"k": k, "n": n, "percent": 100 * k / n, "low": 100 * low, "high": 100 * high}


def pass_at_k(samples: Sequence[int], correct: Sequence[int], k: int) -> float:
    """The unbiased pass@k, mean over tasks: the chance that `k` of a task's samples drawn at random hold a correct one.

    Chen et al. 2021: 1 - C(n-c, k) / C(n, k), here as the hypergeometric distribution's chance of at least one.
    """
    import numpy as np
    from scipy.stats import hypergeom

    n, c = np.asarray(samples), np.asarray(correct)
    if (n < k).any():
        raise UserError(f"k: pass@{k} needs {k} samples of each task; one has {n.min()}.")
    return float(np.mean(hypergeom.sf(0, n, c, k)))


def passed(ledger: Mapping[str, Any], part: str) -> dict[str, int]:
    """The pass vector of a ledger: `base`, or `plus` (passes both, as EvalPlus counts it)."""
    parts = ("base",) if part == "base" else ("base", "plus")
    return {task: int(all(row[p] == "pass" for p in parts)) for task, row in ledger["tasks"].items()}


# --- two runs -------------------------------------------------------------------------------------------------------


def paired(a: Mapping[str, int], b: Mapping[str, int]) -> list[tuple[int, int]]:
    """The two runs' results task by task. Raises UserError if they are not of the same tasks."""
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise UserError(
            f"{odd[0]}: only one of the two ledgers has this task ({len(odd)} in all); score the same tasks."
        )
    return [(a[task], b[task]) for task in a]


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: are the tasks that only one run passes split evenly between the two?"""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def compare(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, Any]:
    """Two runs task by task: the counts, the difference of the pass rates, its interval and McNemar's p."""
    pairs = paired(a, b)
    low, high = bootstrap(a, b)
    only_a, only_b = pairs.count((1, 0)), pairs.count((0, 1))
    return {
        "n": len(pairs),
        "both": pairs.count((1, 1)),
        "only_a": only_a,
        "only_b": only_b,
        "neither": pairs.count((0, 0)),
        "difference": (only_b - only_a) / len(pairs),
        "low": low,
        "high": high,
        "p": mcnemar(only_a, only_b),
    }


def bootstrap(
    a: Mapping[str, int], b: Mapping[str, int], level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the difference of pass rates: percentile bootstrap over tasks, each with both its results."""
    import numpy as np
    from scipy.stats import bootstrap

    d = np.array([y - x for x, y in paired(a, b)], dtype=float)
    ci = bootstrap(
        (d,), np.mean, confidence_level=level, n_resamples=resamples, method="percentile", rng=seed, batch=1000
    ).confidence_interval
    return float(ci.low), float(ci.high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject where the result is <= alpha, and the family's error stays <= alpha."""
    adjusted, highest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


# --- several seeds --------------------------------------------------------------------------------------------------

POOLING = (
    "Runs crossed with tasks: a result is the task's difficulty, the strategy, the run's seed and chance. The "
    "difference is that of the means over runs and tasks. Its interval resamples tasks (the same ones for both "
    "strategies) and, independently, the runs of each strategy (Owen's pigeonhole bootstrap, which errs on the wide "
    "side). Its p is the exact sign-flip test on the tasks' mean differences, which are the independent units: it "
    "speaks of these runs on further tasks, and equals McNemar's with one run each. With one run of a strategy its "
    "seed's share of the variance is unknown and not in the interval."
)
"""The model behind `pooled`, to print beside its figures."""


def pooled(
    a: Sequence[Mapping[str, int]],
    b: Sequence[Mapping[str, int]],
    level: float = LEVEL,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """The difference between two strategies with one or more runs (seeds) each; `POOLING` is the model."""
    import numpy as np

    tasks = list(a[0])
    for run in [*a, *b]:
        paired(a[0], run)
    x, y = (np.array([[run[t] for t in tasks] for run in runs], dtype=float) for runs in (a, b))
    rng, n = np.random.default_rng(seed), len(tasks)
    task_weights = rng.multinomial(n, [1 / n] * n, size=resamples) / n
    means = []
    for runs in (x, y):
        run_weights = rng.multinomial(len(runs), [1 / len(runs)] * len(runs), size=resamples) / len(runs)
        means.append(np.einsum("rs,st,rt->r", run_weights, runs, task_weights, optimize=True))
    low, high = np.quantile(means[1] - means[0], [(1 - level) / 2, (1 + level) / 2])
    # The tasks' differences as whole numbers, in units of 1 / (runs of a x runs of b).
    steps = np.rint(y.sum(0) * len(x) - x.sum(0) * len(y)).astype(int)
    return {
        "runs": [len(x), len(y)],
        "n": n,
        "difference": float(y.mean() - x.mean()),
        "low": float(low),
        "high": float(high),
        "p": _sign_flip(steps.tolist()),
    }


def _sign_flip(steps: Iterable[int]) -> float:
    """P(|sum of steps under random signs| >= |their sum|), exactly: the sum's distribution, one step after another."""
    import numpy as np

    steps = [abs(s) * (1 if s > 0 else -1) for s in steps if s]
    reach = sum(map(abs, steps))
    chance = np.zeros(2 * reach + 1)  # of the sum being index - reach
    chance[reach] = 1.0
    for s in map(abs, steps):
        chance = (np.roll(chance, s) + np.roll(chance, -s)) / 2  # never wraps: the reach is not passed
    values = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chance[values >= abs(sum(steps))].sum()))


# --- printed percentages, without ledgers ---------------------------------------------------------------------------


def recover(percent: str | float, n: int) -> list[int]:
    """Every k for which k/n prints as this percentage, to as many decimals as it has. None: a misprint.

    A half may have been rounded either way.
    """
    printed = Decimal(str(percent))
    half = Decimal(1).scaleb(printed.as_tuple().exponent) / 2
    return [k for k in range(n + 1) if abs(100 * k - printed * n) <= half * n]


def mcnemar_range(a: int, b: int, n: int) -> dict[str, Any]:
    """The least and greatest exact McNemar p that `a` and `b` passes of the same `n` tasks allow.

    Unknown is how many tasks both pass; the least p is where that is greatest, and none but the winner's tasks differ.
    """
    splits = [(a - both, b - both) for both in range(max(0, a + b - n), min(a, b) + 1)]
    p = {split: mcnemar(*split) for split in splits}
    least, most = min(splits, key=p.__getitem__), max(splits, key=p.__getitem__)
    return {"p_min": p[least], "p_max": p[most], "split_min": least, "split_max": most}


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
