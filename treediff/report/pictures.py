"""The report's pictures, each with its caption, what it shows in words, and its data as a table.

for name, picture in pictures(cfg, ledgers(cfg), findings(cfg), None, tok).items(): picture.figure, picture.data
python -m treediff.report.pictures docs/maskings.png     # the README's, once the tiny preset's data is prepared
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from treediff.config import Config, resolve
from treediff.data import sources
from treediff.errors import UserError
from treediff.figures import plots, views
from treediff.masking import tokens
from treediff.report import page, study, trajectory
from treediff.report.comparisons import ledgers
from treediff.report.tables import Table, estimate
from treediff.sampling.run import read_samples, samples_path
from treediff.scoring import stats
from treediff.strategies import MASKINGS, STRATEGIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerFast


class Picture(NamedTuple):
    """A figure of the report with its caption, what it shows for those who cannot see it, and its data."""

    figure: Figure
    caption: str
    alt: str
    data: Table


def masking_picture(
    cfg: Config, tok: PreTrainedTokenizerFast, code: str, levels: tuple[float, ...] = (0.3, 0.7)
) -> Picture:
    """Figure 1 in our data: one program under the maskings, each at the same noise levels."""
    view = views.view(cfg, tok, code)
    masks = {m: [views.view_masks(cfg.with_masking(m), view, level)[0] for level in levels] for m in MASKINGS}
    names = [tokens.LABELS[i] for i in view.labels]
    rows = [
        [masking, level, i, tok.decode([token]), name, int(mask[i])]
        for masking, by_level in masks.items()
        for level, mask in zip(levels, by_level, strict=True)
        for i, (token, name) in enumerate(zip(view.ids, names, strict=True))
    ]
    caption = (
        "The three maskings on one program at two noise levels P: coloured by tier, masked tokens black. The last "
        "subtree that AST (span) takes may pass its budget, as Algorithm 2 has it."
    )
    shares = (f"{STRATEGIES[m].title} {' and '.join(str(int(x.sum())) for x in by)}" for m, by in masks.items())
    levels_named = " and ".join(f"P = {level:g}" for level in levels)
    alt = f"A program of {len(names)} tokens, six times. Masked at {levels_named}: {'; '.join(shares)}."
    data = Table(["masking", "P", "token", "text", "tier", "masked"], rows)
    return Picture(plots.maskings(code, view.starts, view.labels, masks, levels), caption, alt, data)


def differing_task(cfg: Config, benchmark: str, length: int, one: str = "random", two: str = "ast") -> str:
    """A task that `two` passes and `one` fails, if there is one; else any task that they answer differently."""
    found = ledgers(cfg)
    a, b = (
        {i: stats.samples(entry)[0] for i, entry in found[s][benchmark, length]["tasks"].items()} for s in (one, two)
    )
    for want in (
        lambda i: b[i]["plus"] == "pass" != a[i]["plus"],
        lambda i: a[i]["plus"] != b[i]["plus"],
        lambda i: True,
    ):
        for task in sorted(a):
            if want(task):
                return task
    raise UserError(f"{benchmark}: no task was scored for both {one} and {two}.")


def program_pictures(cfg: Config, benchmark: str, length: int) -> dict[str, Picture]:
    """Figures 2 and 3 in our data: what random and AST masking answer to a task, whole and part of the way."""
    found, pair, key = ledgers(cfg), ("random", "ast"), (benchmark, length)
    task = differing_task(cfg, *key)
    rows = {s: read_samples(samples_path(cfg.with_masking(s), *key)) for s in pair}
    if not all(task in of for of in rows.values()):
        return {}
    panels = []
    for s in pair:
        verdict = stats.samples(found[s][key]["tasks"][task])[0]
        panels.append((STRATEGIES[s].title, page.verdict(verdict), str(verdict["reason"]), rows[s][task]["solution"]))
    both = stats.compare(*(stats.passed(found[s][key], "plus") for s in pair))
    why = (
        f"{task} at T = {length}, chosen because the two differ there: of {both['n']} tasks AST masking alone "
        f"passes {both['only_b']}, random masking alone {both['only_a']}."
    )
    verdicts = "; ".join(f"{title}: {verdict}" for title, verdict, _, _ in panels)
    whole_answers = Picture(
        plots.programs([(f"{title}: {verdict}", text) for title, verdict, _, text in panels]),
        f"Two answers to one task. {why}",
        f"Two programs side by side. {verdicts}.",
        Table(["strategy", "verdict", "reason", "program"], panels),
    )
    step, steps = trajectory.part_way(cfg, length)
    answers = {STRATEGIES[s].title: trajectory.load(cfg.with_masking(s), *key, task) for s in pair}
    data = [
        [name, shown.text[a:b], tokens.LABELS[label], int(at)]
        for name, shown in answers.items()
        for (a, b, _), label, at in zip(shown.boxes, shown.labels, shown.at, strict=True)
    ]
    left = (f"{name} {int((shown.at >= step).sum())} of {len(shown.at)}" for name, shown in answers.items())
    half_way = Picture(
        trajectory.states(cfg, *key, task, pair),
        f"The same answers before step {step} of {steps}. {why}",
        f"Two answers, tokens coloured by tier. Still masked: {'; '.join(left)}.",
        Table(["strategy", "text", "tier", "step committed"], data),
    )
    return {"figure2": whole_answers, "figure3": half_way}


def robustness_picture(cfg: Config) -> Picture:
    """Figure 4 in our data: the pass rate on the plus tests over T, all benchmarks pooled, with Wilson intervals."""
    scores: dict[str, dict[int, tuple[float, float, float]]] = {}
    for strategy, by_key in ledgers(cfg).items():
        for length in sorted({t for _, t in cfg.jobs}):
            parts = [stats.counts(by_key[b, length], "plus") for b in cfg.benchmarks if (b, length) in by_key]
            if parts:
                r = stats.rated({task: v for counted in parts for task, v in counted.items()})
                scores.setdefault(strategy, {})[length] = (r["rate"], r["low"], r["high"])
    rows = [[STRATEGIES[s].title, t, *map(_round, v)] for s, by_t in scores.items() for t, v in by_t.items()]
    caption = (
        f"Robustness over T: pass@1 on base and plus tests of {' and '.join(cfg.benchmarks)}, with 95 % intervals "
        "of each rate. Overlapping intervals say nothing of a difference on the same tasks: see Comparisons."
    )
    alt = "; ".join(f"{name}, T = {t}: {estimate(*v)} percent" for name, t, *v in rows) + "."
    figure = plots.robustness(scores, "pass@1, base and plus tests [%]\nwith 95 % intervals")
    return Picture(figure, caption, alt, Table(["strategy", "T", "rate", "low", "high"], rows))


def differences_picture(records: list[dict[str, Any]]) -> Picture:
    """What comparisons.findings found: the difference of each pair with its interval, beside zero."""
    rows = [
        [
            *(f"{STRATEGIES[r['to']].title} minus {STRATEGIES[r['from']].title}", r["benchmark"], r["T"]),
            *(_round(r[k]) for k in ("difference", "low", "high")),
            " and ".join(map(str, r.get("seeds", (1, 1)))),
        ]
        for r in records
    ]
    intervals = {
        "tasks alone": [r for r in records if "seeds" not in r],
        "runs and tasks": [r for r in records if "seeds" in r],
    }
    kinds = ", ".join(f"intervals over {k}: {len(v)} of {len(records)}" for k, v in intervals.items() if v)
    caption = f"Differences between strategies on the same tasks, with 95 % intervals ({kinds})."
    if intervals["tasks alone"]:
        caption += (
            " Over tasks alone, an interval compares two models and holds nothing of what further runs would give."
        )
    alt = "; ".join(f"{name}, {b} at T = {t}: {estimate(*v, '+')} points" for name, b, t, *v, _ in rows) + "."
    data = Table(["difference", "benchmark", "T", "points", "low", "high", "runs"], rows)
    figure = plots.differences([(f"{name}, {b}, T = {t}", *v) for name, b, t, *v, _ in rows])
    return Picture(figure, caption, alt, data)


def study_picture(facts: dict[str, Any]) -> Picture:
    """The study's forest plot (study.summary): each run a point, and the pooled differences."""
    _, compared = study.tables(facts)
    caption = (
        f"The study: {facts['runs']} training runs, each a point with its strategy’s mean and 95 % interval; and the "
        "differences over runs and tasks with theirs, beside zero and the effects that the paper claims."
    )
    alt = "; ".join(f"{name}, {outcome}: {change} points ({ends})" for name, outcome, change, ends, *_ in compared.rows)
    runs = [[facts["arms"][r["arm"]], r["outcome"], _round(v)] for r in facts["rates"] for v in r["runs"]]
    rows = [["run", *run, None] for run in runs] + [["difference", *row[:4]] for row in compared.rows]
    return Picture(study.figure(facts), caption, f"{alt}.", Table(["kind", "of", "outcome", "value", "interval"], rows))


def _round(value: float) -> float:
    return round(value, 4)


EXAMPLE = '''def depth(text):
    """Deepest nesting of parentheses."""
    deepest = level = 0
    for char in text:
        if char == "(":
            level += 1
            deepest = max(deepest, level)
        elif char == ")":
            level -= 1
    return deepest'''
"""The task of the paper's figures 1 to 3 (HumanEval/6), in a few lines."""


def pictures(
    cfg: Config,
    found: dict[str, Any],
    records: list[dict[str, Any]],
    facts: dict[str, Any] | None,
    tok: PreTrainedTokenizerFast | None,
) -> dict[str, Picture]:
    """The report's pictures by name, as far as there are runs: study, differences, and the paper's four in our data.

    `facts`: study.summary, if there was a study.
    """
    out, key = {}, next((j for j in reversed(cfg.jobs) if j[0] == cfg.benchmarks[0]), ())  # the first one's largest T
    if facts:
        out["study"] = study_picture(facts)
    if records:
        out["differences"] = differences_picture(records)
    if found:
        out["figure4"] = robustness_picture(cfg)
    if tok:
        out["figure1"] = masking_picture(cfg, tok, EXAMPLE)
        if key in found.get("random", {}) and key in found.get("ast", {}):
            out |= program_pictures(cfg.of(key[0]), *key)
    return out


def main() -> None:
    """The README's picture: the example under the three maskings at three noise levels."""
    cfg = resolve("tiny", seed=4)  # with seed 0, AST (span) takes the whole body at once
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg))
    plots.save(masking_picture(cfg, tok, EXAMPLE, (0.25, 0.5, 0.75)).figure, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
