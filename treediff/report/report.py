"""The paper's tables and ours side by side, and the paper's figures in our data, from the ledgers of all runs.

    ledger = scored(cfg, "tinycode", 64)     # runs/.../scores/tinycode-T64.json
    path = write(cfg)                        # runs/<preset>/report/: tables, figures, report.html

Every number is counted from ledger lines; each of ours carries its 95 % interval. What was not run shows as missing.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from treediff.config import SWITCHES, Config, resolve
from treediff.data import benchmarks, sources
from treediff.errors import UserError
from treediff.figures import plots, views
from treediff.files import read_json, read_jsonl, whole, write_json
from treediff.masking import tiers, tokens
from treediff.report import comparisons, page, paper, trajectory
from treediff.report.comparisons import ROWS, ledger_name, ledgers, seeds, shown, shown_by
from treediff.report.paper import HALVES, IN_TABLE, PAPER
from treediff.report.tables import Cell, Table, estimate, rate
from treediff.runs import provenance
from treediff.sampling.run import read_samples, samples_path
from treediff.scoring import stats
from treediff.strategies import MASKINGS, STRATEGIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerFast


log = logging.getLogger(__name__)


# --- tables --------------------------------------------------------------------------------------------------------
def pass_rates(cfg: Config, strategies: tuple[str, ...]) -> list[dict[str, Any]]:
    """One record per strategy, benchmark, tests and T: our k of n with its interval, the ledger that they are counted
    from, and the paper's percentage at this T, if it prints one."""
    found = ledgers(cfg)
    out = []
    for strategy in strategies:
        for length in cfg.lengths:
            for benchmark in cfg.benchmarks:
                ledger = found.get(strategy, {}).get((benchmark, length))
                for part, name in zip(("base", "plus"), HALVES[benchmark], strict=True):
                    record: dict[str, Any] = {"strategy": strategy, "T": length, "benchmark": name}
                    if ledger:
                        record |= stats.rated(stats.counts(ledger, part))
                        record["ledger"] = ledger_name(cfg.with_masking(strategy), benchmark, length)
                    if paper := PAPER.get(strategy, {}).get(benchmark, {}).get(length):
                        record |= {"paper_T": length, "paper": paper[part == "plus"]}
                    out.append(record)
    return out


def pass_at_k(cfg: Config, strategies: tuple[str, ...]) -> list[dict[str, Any]]:
    """The unbiased pass@k of `pass_rates`, for k = 1, 2, 5, 10, 100 as far as every task has as many samples.

    Empty where each task has one sample. stats.SAMPLES is the model of the intervals.
    """
    out = []
    for strategy, by_key in ledgers(cfg).items():
        for (benchmark, length), ledger in by_key.items() if strategy in strategies else ():
            for part, name in zip(("base", "plus"), HALVES[benchmark], strict=True):
                counted = stats.counts(ledger, part)
                head = {"strategy": strategy, "T": length, "benchmark": name}
                most = min(n for _, n in counted.values())
                out += [head | stats.rated(counted, k) for k in (1, 2, 5, 10, 100) if 1 < most >= k]
    return out


RECORD = (
    "strategy",
    "T",
    "benchmark",
    "passed",
    "tasks",
    "samples",
    "rate",
    "low",
    "high",
    "paper_T",
    "paper",
    "ledger",
)
"""Columns of `pass_rates` as data."""


def rates_table(records: list[dict[str, Any]], caption: str = "") -> Table:
    """`pass_rates` in the paper's layout: a row per strategy, a column per T and benchmark, ours with its interval.

    Below each row what the paper prints, where it prints something. A click on a rate of ours lists its tasks.
    """
    columns = list(dict.fromkeys((r["T"], r["benchmark"]) for r in records))
    by_place = {(r["strategy"], r["T"], r["benchmark"]): r for r in records}
    rows = []
    for strategy in dict.fromkeys(r["strategy"] for r in records):
        found, title = [by_place[strategy, *c] for c in columns], STRATEGIES[strategy].title
        rows.append([title, *map(_counted, found)])
        if any("paper" in r for r in found):
            rows.append([f"{title}, the paper", *(f"{r['paper']:.1f}" if "paper" in r else None for r in found)])
    return Table(["", *(f"{name}, T = {t}" for t, name in columns)], rows, caption)


def _counted(r: dict[str, Any]) -> str:
    if "ledger" not in r:
        return rate(r)
    verdict = "pass" if r["benchmark"].endswith("+") else "base tests"
    return Cell(rate(r), shown_by(r) | {"verdict": "" if r["samples"] > 1 else verdict})


def pass_at_table(records: list[dict[str, Any]]) -> Table | None:
    """`pass_at_k`: a row per strategy, benchmark and T, a column per k; None without records."""
    if not records:
        return None
    ks = sorted({r["k"] for r in records})
    rows: dict[tuple, dict[int, str]] = {}
    for r in records:
        head = (STRATEGIES[r["strategy"]].title, r["benchmark"], r["T"], r["tasks"], r["samples"])
        rows.setdefault(head, {})[r["k"]] = estimate(r["rate"], r["low"], r["high"])
    head = ["", "tests", "T", "tasks", "samples", *(f"pass@{k}" for k in ks)]
    cells = [[*row, *(by_k.get(k) for k in ks)] for row, by_k in rows.items()]
    return Table(head, cells, "Ours, the unbiased pass@k in percent of tasks")


def halves_table(cfg: Config, strategies: tuple[str, ...]) -> Table | None:
    """Pass rates on TinyCode's two halves, base and plus tests; None without TinyCode."""
    if "tinycode" not in cfg.benchmarks:
        return None
    found, half = ledgers(cfg), {i: p["half"] for i, p in benchmarks.benchmark_problems(cfg, "tinycode").items()}
    columns = [(t, h) for t in cfg.lengths for h in dict.fromkeys(half.values())]
    rows = []
    for strategy in strategies:
        rows.append([STRATEGIES[strategy].title])
        for length, name in columns:
            ledger = found.get(strategy, {}).get(("tinycode", length), {"tasks": {}})
            counted = {i: v for i, v in stats.counts(ledger, "plus").items() if half.get(i) == name}
            rows[-1].append(rate(stats.rated(counted)) if counted else "not run")
    return Table(["", *(f"{h}, T = {t}" for t, h in columns)], rows, "Ours, base and plus tests")


def reasons(cfg: Config, strategies: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """How many programs of each run pass or fail for which kind of reason, by a title of the run."""
    found = ledgers(cfg)
    out = {}
    for strategy in strategies:
        for (benchmark, length), ledger in found.get(strategy, {}).items():
            verdicts = [v for entry in ledger["tasks"].values() for v in stats.samples(entry)]
            kinds = Counter(
                "pass" if v["base"] == v["plus"] == "pass" else str(v["reason"]).partition(":")[0].strip()
                for v in verdicts
            )
            out[f"{STRATEGIES[strategy].title}, {benchmark}, T = {length}"] = dict(kinds)
    return out


# --- figures -------------------------------------------------------------------------------------------------------
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
    said = "; ".join(f"{title}: {verdict}" for title, verdict, _, _ in panels)
    whole_answers = Picture(
        plots.programs([(f"{title}: {verdict}", text) for title, verdict, _, text in panels]),
        f"Two answers to one task. {why}",
        f"Two programs side by side. {said}.",
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
        for length in cfg.lengths:
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
    kinds = "; ".join(f"intervals over {k}: {len(v)} of {len(records)}" for k, v in intervals.items() if v)
    caption = f"Differences between strategies on the same tasks, with 95 % intervals ({kinds})."
    if intervals["tasks alone"]:
        caption += (
            " Over tasks alone, an interval compares two models and holds nothing of what further runs would give."
        )
    alt = "; ".join(f"{name}, {b} at T = {t}: {estimate(*v, '+')} points" for name, b, t, *v, _ in rows) + "."
    data = Table(["difference", "benchmark", "T", "points", "low", "high", "runs"], rows)
    figure = plots.differences([(f"{name}, {b}, T = {t}", *v) for name, b, t, *v, _ in rows])
    return Picture(figure, caption, alt, data)


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


# --- the report ----------------------------------------------------------------------------------------------------
def write(cfg: Config) -> Path:
    """Write runs/<preset>/report/: tables, comparisons, figures with their data, provenance, report.html; its path.

    What is missing shows as missing. Raises UserError, and writes nothing, if runs cannot be compared.
    """
    folder, found = cfg.preset_dir / "report", ledgers(cfg)
    rates = {"table1": pass_rates(cfg, IN_TABLE[1]), "table2": pass_rates(cfg, shown(cfg, MASKINGS))}
    models = comparisons.autoregressive_table(cfg)
    records = comparisons.findings(cfg)
    facts = {
        "comparisons": comparisons.comparisons(cfg),
        "pooled": comparisons.pooled(cfg),
        "seed_rates": comparisons.seed_rates(cfg),
        "pass_at_k": pass_at_k(cfg, ROWS),
        "paper": {"printed": paper.checked(), "misprints": paper.misprints(), "comparisons": paper.claims()},
        "power": stats.power_table(),
        "deviations": deviations(cfg),
        "data": data_sets(cfg),
        "provenance": {"report": provenance(switches=cfg.as_dict()), "runs": provenances(cfg)},
    }
    tok, left_out = _tokenizer(cfg, found)
    tasks = page.explorer(cfg, found, tok)
    pictures = _pictures(cfg, found, records, tok)
    # Everything that may be refused has been counted; only now is anything written.
    for number, (name, of) in enumerate(rates.items(), start=1):
        printed = paper.paper_table(IN_TABLE[number], number == 1).markdown()
        measured = f"\n\nAutoregressive models, ours:\n\n{models.markdown()}" if models and number == 1 else ""
        table = rates_table(of)
        _write_text(folder / f"{name}.md", f"Ours:\n\n{table.markdown()}\n\nThe paper's:\n\n{printed}{measured}\n")
        _write_text(folder / f"{name}.csv", Table.of(of, RECORD).csv())
        _write_text(folder / f"{name}.tex", table.latex())
        write_json(folder / f"{name}.json", of)
    for name, value in facts.items():
        write_json(folder / f"{name}.json", value)
    for name, picture in pictures.items():
        plots.save(picture.figure, folder / f"{name}.png")
        _write_text(folder / f"{name}.csv", picture.data.csv())
    pairs = page.pairs(tasks)
    # ASCII, because somebody else's program may hold half a surrogate pair.
    _write_text(folder / "pairs.json", json.dumps(pairs, indent=1) + "\n")
    _write_text(folder / "pairs.md", page.pairs_markdown(pairs))
    summary = {
        "title": f"preset {cfg.preset}, seed {cfg.seed}",
        "answer": comparisons.answer(records),
        "lead": lead(cfg, records),
        "sentences": comparisons.sentences(records),
        "tables": [
            (rates_table(of, f"Table {i}, ours"), paper.paper_table(IN_TABLE[i]))
            for i, of in enumerate(rates.values(), 1)
        ],
        "models": models,
        "pass_at": pass_at_table(facts["pass_at_k"]),
        "halves": halves_table(cfg, shown(cfg, ("none", *MASKINGS))) if found else None,
        "comparisons": comparisons.comparisons_table(facts["comparisons"]),
        "pooled": facts["pooled"] and comparisons.pooled_table(facts["pooled"]),
        "seed_rates": comparisons.seed_rates_table(facts["seed_rates"]),
        "claims": paper.claims_table(facts["paper"]["comparisons"]),
        "claims_summary": paper.claims_summary(facts["paper"]["comparisons"]),
        "checked": paper.checked_table(facts["paper"]["printed"]),
        "misprints": facts["paper"]["misprints"],
        "power": paper.power_table(facts["power"]),
        "data": [(name, of, training_tables(of)) for name, of in facts["data"].items()],
        "deviations": deviations_table(facts["deviations"]),
        "seeds": "; ".join(f"{STRATEGIES[s].title}: {', '.join(map(str, k))}" for s, k in seeds(cfg).items()),
        "sandbox": ", ".join(f"{name} ({how})" for name, how in comparisons.sandbox_layers(cfg).items()),
        "figures": [(name, picture, folder / f"{name}.png") for name, picture in pictures.items()],
        "left_out": left_out,
        "details": {"Every switch": cfg.as_dict(), "This report": facts["provenance"]["report"]}
        | facts["provenance"]["runs"],
    }
    _write_text(folder / "report.html", page.build(summary, tasks))
    log.info("report: %s (%d bytes)", folder / "report.html", (folder / "report.html").stat().st_size)
    return folder / "report.html"


def _tokenizer(cfg: Config, found: dict[str, Any]) -> tuple[PreTrainedTokenizerFast | None, str]:
    """The runs' tokenizer; without runs, or where it cannot be had, None and a sentence that says what is left out."""
    missing = "The pictures of single tokens are left out: "
    if not found:
        return None, f"{missing}no run was scored yet, so no tokenizer was asked for."
    try:
        return tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision), ""
    except UserError as e:
        log.warning("%s%s", missing, e)
        return None, f"{missing}{e}"


def _pictures(
    cfg: Config, found: dict[str, Any], records: list[dict[str, Any]], tok: PreTrainedTokenizerFast | None
) -> dict[str, Picture]:
    """The report's pictures by name, as far as there are runs: the differences, and the paper's four in our data."""
    out, key = {}, (cfg.benchmarks[0], cfg.lengths[-1])
    if records:
        out["differences"] = differences_picture(records)
    if found:
        out["figure4"] = robustness_picture(cfg)
    if tok:
        out["figure1"] = masking_picture(cfg, tok, EXAMPLE)
        if key in found.get("random", {}) and key in found.get("ast", {}):
            out |= program_pictures(cfg, *key)
    return out


def lead(cfg: Config, records: list[dict[str, Any]]) -> list[str]:
    """Two findings beside the answer, at the largest T of the first benchmark, and what the paper's counts allow."""
    place = {"benchmark": HALVES[cfg.benchmarks[0]][1], "T": cfg.lengths[-1]}
    pairs = ({"from": one, "to": "ast", **place} for one in ("ast_span", "none"))
    out = [comparisons.sentence(r) for want in pairs for r in records if want.items() <= r.items()]
    return [*out, paper.claims_summary(paper.claims()).rpartition(". ")[2]]


def deviations(cfg: Config) -> list[dict[str, Any]]:
    """The switches in which our runs differ from the paper's: ours, the paper's, and what it is.

    Ours are those that the runs of this seed were made with, as their directories record them, by run where these
    differ; the report's own where there is no run. What a backbone made on the temporary changes stands in `pretrain`.
    """
    printed = resolve("paper").as_dict()
    runs = [s for s in MASKINGS if (cfg.with_masking(s).run_dir / "config.json").exists()]
    made = {STRATEGIES[s].title: _made(cfg.with_masking(s)) for s in runs} or {"": cfg.as_dict()}
    out = []
    for name in (n for n in SWITCHES if n not in ("preset", "masking", "seed")):
        values = {who: switches[name] for who, switches in made.items() if name in switches}
        distinct = list({json.dumps(v): v for v in values.values()}.values())
        if distinct and distinct != [printed[name]]:
            ours = distinct[0] if len(distinct) == 1 else values
            meaning = SWITCHES[name].metadata["help"]
            out.append({"switch": name, "ours": ours, "paper": printed[name], "meaning": meaning})
    return out


def _made(run: Config) -> dict[str, Any]:
    """The switches that a run was made with: its own record, and for sampling that of its samples."""
    switches = read_json(run.run_dir / "config.json") | {"benchmarks": run.benchmarks, "lengths": run.lengths}
    for benchmark, length in [(b, t) for b in run.benchmarks for t in run.lengths]:
        if (path := samples_path(run, benchmark, length)).exists():
            sampled = next(iter(read_jsonl(path)), {}).get("settings", {})
            switches |= {k: v for k, v in sampled.items() if k in SWITCHES}
    return switches


def deviations_table(records: list[dict[str, Any]]) -> Table:
    """`deviations`, a row each."""
    values = [[v if isinstance(v, str) else json.dumps(v) for v in (r["ours"], r["paper"])] for r in records]
    rows = [[r["switch"], *v, r["meaning"]] for r, v in zip(records, values, strict=True)]
    return Table(["switch", "ours", "the paper’s run", "what it is"], rows, f"{len(rows)} switches differ")


def data_sets(cfg: Config) -> dict[str, Any]:
    """Statistics of the data sets that the runs of this seed were trained on, by the runs' names."""
    of: dict[str, list[str]] = {}
    for strategy in ROWS:
        path = cfg.with_masking(strategy).run_dir / "provenance.json"
        if path.exists():
            of.setdefault(read_json(path)["data"], []).append(STRATEGIES[strategy].title)
    files = {", ".join(names): cfg.preset_dir / "data" / mark / "stats.json" for mark, names in of.items()}
    found = {names: read_json(path) for names, path in files.items() if path.exists()}
    return {names: facts for names, facts in found.items() if "contamination" in facts}  # older ones have less to show


def training_tables(data: dict[str, Any]) -> list[Table]:
    """A data set's rows at each filter, tokens, lengths, and its rows nearest to a benchmark's problems."""
    rows, labels, found = data["rows"], data["tokens"], data["contamination"]
    total, code = sum(labels.values()), sum(labels[k] for k in tokens.LABELS[tokens.CODE :])
    steps = [("read", rows["read"]), *rows["dropped"].items(), ("can be used", rows["usable"])]
    steps += [("not chosen", rows["not_chosen"]), ("kept", rows["kept"])]
    parts = [
        [k, v, f"{100 * v / total:.1f}", f"{100 * v / max(1, code):.1f}" if k in tiers.TIERS else None]
        for k, v in labels.items()
    ]
    deciles = [[k, *(v[i] for i in (0, 1, 5, 9, 10))] for k, v in data["length_deciles"].items()]
    out = [
        Table(["rows", "number"], steps, "Rows at each filter"),
        Table(
            ["tokens of", "number", "of all [%]", "of the code [%]"],
            parts,
            "Tokens by region and tier; `default` is code that no tier claims",
        ),
        Table(["tokens per", "least", "10 %", "median", "90 %", "most"], deciles, "Lengths"),
    ]
    if found["checked"]:
        near = [
            [p["row"], p["task"], *(f"{p[k]:.2f}" for k in ("code", "text", "minhash")), ", ".join(p["by"]) or "-"]
            for p in found["nearest"]
        ]
        head = ["row", "nearest problem", "program", "text", "MinHash", "counted by"]
        out.append(Table(head, near, f"The {len(near)} nearest pairs of a row and a problem"))
    if "embeddings" in found:
        near = [[p["row"], p["task"], f"{p['cosine']:.3f}"] for p in found["embeddings"]["nearest"]]
        caption = f"By embeddings of {found['embeddings']['model']}"
        out.append(Table(["row", "nearest problem", "cosine"], near, caption))
    return out


def provenances(cfg: Config) -> dict[str, Any]:
    """What each run directory says of itself: switches, provenance of its stages, settings and sandbox of ledgers."""
    out = {}
    for strategy, of in seeds(cfg).items():
        for seed in of:
            folder = cfg.preset_dir / f"{strategy}-seed{seed}"
            files = [folder / "config.json", *sorted(folder.glob("**/*provenance.json"))]
            about = {str(p.relative_to(folder)): read_json(p) for p in files if p.exists()}
            for path in sorted(folder.glob("scores/*.json")):
                ledger = read_json(path)
                if "tasks" in ledger:
                    about[str(path.relative_to(folder))] = {k: v for k, v in ledger.items() if k != "tasks"}
            out[folder.name] = about
    return out


def _write_text(path: Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
