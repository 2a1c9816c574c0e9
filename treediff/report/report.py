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
from typing import TYPE_CHECKING, Any

from treediff.config import SWITCHES, Config, resolve
from treediff.data import benchmarks, reach, sources
from treediff.errors import UserError
from treediff.figures import plots, views
from treediff.files import read_json, read_jsonl, whole, write_json
from treediff.masking import tokens
from treediff.report import page, trajectory
from treediff.report.comparisons import (
    ROWS,
    autoregressive_rates,
    comparisons,
    ledger_name,
    ledgers,
    pooled,
    sandbox_layers,
    seed_rates,
    seeds,
    shown,
    verdicts,
)
from treediff.report.paper import HALVES, IN_TABLE, PAPER, checked, claims, misprints, paper_markdown
from treediff.report.tables import as_csv, cell, latex, markdown, pass_at_markdown
from treediff.runs import provenance
from treediff.sampling.run import read_samples, samples_path
from treediff.scoring import stats
from treediff.strategies import MASKINGS, STRATEGIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """The unbiased pass@k of `table`'s cells, for k = 1, 2, 5, 10, 100 as far as every task has as many samples.

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


def halves_markdown(cfg: Config, strategies: tuple[str, ...]) -> str:
    """Pass rates on TinyCode's two halves, base and plus tests, as a Markdown table; empty without TinyCode."""
    if "tinycode" not in cfg.benchmarks:
        return ""
    found, half = ledgers(cfg), {i: p["half"] for i, p in benchmarks.benchmark_problems(cfg, "tinycode").items()}
    names = list(dict.fromkeys(half.values()))
    columns = [(t, h) for t in cfg.lengths for h in names]
    lines = ["| | " + " | ".join(f"{h}, T = {t}" for t, h in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for strategy in strategies:
        cells = []
        for length, name in columns:
            ledger = found.get(strategy, {}).get(("tinycode", length), {"tasks": {}})
            counted = {i: v for i, v in stats.counts(ledger, "plus").items() if half.get(i) == name}
            cells.append(cell(stats.rated(counted)) if counted else "not run")
        lines.append(f"| {STRATEGIES[strategy].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
def masking_figure(cfg: Config, code: str, levels: tuple[float, ...] = (0.3, 0.7)) -> Figure:
    """Figure 1 in our data: one program under the maskings, each at the same noise levels."""
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    view = views.view(cfg, tok, code)
    masks = {m: [views.view_masks(cfg.with_masking(m), view, level)[0] for level in levels] for m in MASKINGS}
    return plots.maskings(code, view.starts, view.labels, masks, levels)


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


def program_figure(cfg: Config, benchmark: str, length: int, task: str) -> Figure:
    """Figure 2 in our data: what random masking and AST masking answer to one task."""
    found = ledgers(cfg)
    panels = []
    for strategy in ("random", "ast"):
        rows = read_samples(samples_path(cfg.with_masking(strategy), benchmark, length))
        verdict = stats.samples(found[strategy][benchmark, length]["tasks"][task])[0]
        why = verdict["plus"] if verdict["base"] == "pass" else verdict["base"]
        panels.append((f"{STRATEGIES[strategy].title}: {why}", rows[task]["solution"]))
    return plots.programs(panels)


def robustness_figure(cfg: Config) -> Figure:
    """Figure 4 in our data: the pass rate on the plus tests over T, all benchmarks pooled, with Wilson intervals."""
    found = ledgers(cfg)
    scores: dict[str, dict[int, tuple[float, float, float]]] = {}
    for strategy, by_key in found.items():
        for length in cfg.lengths:
            parts = [stats.counts(by_key[b, length], "plus") for b in cfg.benchmarks if (b, length) in by_key]
            if parts:
                r = stats.rated({task: v for counted in parts for task, v in counted.items()})
                scores.setdefault(strategy, {})[length] = (r["rate"], r["low"], r["high"])
    return plots.robustness(scores, "pass@1, base and plus tests [%]\nwith 95 % intervals")


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
"""The task of the paper's figures 1 to 3 (HumanEval/6), in a few lines of ours."""


# --- the report ----------------------------------------------------------------------------------------------------
def write(cfg: Config) -> Path:
    """Write runs/<preset>/report/: tables, comparisons, figures, provenance, report.html. What is missing shows so."""
    folder = cfg.preset_dir / "report"
    found = ledgers(cfg)
    tables = {"table1": pass_rates(cfg, IN_TABLE[1]), "table2": pass_rates(cfg, shown(cfg, MASKINGS))}
    models = autoregressive_rates(cfg)
    printed = {"printed": checked(), "misprints": misprints(), "comparisons": claims()}
    facts = {
        "comparisons": comparisons(cfg),
        "pooled": pooled(cfg),
        "seed_rates": seed_rates(cfg),
        "pass_at_k": pass_at_k(cfg, ROWS),
        "paper": printed,
        "power": stats.power_table(),
        "deviations": deviations(cfg),
        "data": data_sets(cfg),
        "provenance": {"report": provenance(switches=cfg.as_dict()), "runs": provenances(cfg)},
    }
    # Everything that may be refused has been counted; only now is anything written.
    for number, (name, records) in enumerate(tables.items(), start=1):
        theirs = paper_markdown(IN_TABLE[number], number == 1)
        measured = f"\n\nAutoregressive models, ours:\n\n{models}" if models and number == 1 else ""
        _write_text(folder / f"{name}.md", f"Ours:\n\n{markdown(records)}\n\nThe paper's:\n\n{theirs}{measured}\n")
        _write_text(folder / f"{name}.csv", as_csv(records))
        _write_text(folder / f"{name}.tex", latex(records))
        write_json(folder / f"{name}.json", records)
    for name, value in facts.items():
        write_json(folder / f"{name}.json", value)
    figures = _figures(cfg, found)
    for name, (_, figure) in figures.items():
        plots.save(figure, folder / f"{name}.png")
    tasks = page.explorer(cfg, found)
    pairs = page.pairs(tasks)
    # ASCII, because a program of somebody else's may hold half a surrogate pair.
    _write_text(folder / "pairs.json", json.dumps(pairs, indent=1) + "\n")
    _write_text(folder / "pairs.md", page.pairs_markdown(pairs))
    summary = {
        "title": f"preset {cfg.preset}, seed {cfg.seed}",
        "tables": {k: (r, paper_markdown(IN_TABLE[i])) for i, (k, r) in enumerate(tables.items(), 1)},
        "models": models,
        "pass_at": pass_at_markdown(facts["pass_at_k"]),
        "halves": halves_markdown(cfg, shown(cfg, ("none", *MASKINGS))) if found else "",
        "said": verdicts(facts["pooled"] or facts["comparisons"]),
        "seeds": seeds(cfg),
        "sandbox": sandbox_layers(cfg),
        "figures": {name: (caption, folder / f"{name}.png") for name, (caption, _) in figures.items()},
        **facts,
    }
    _write_text(folder / "report.html", page.build(cfg, summary, tasks))
    log.info("report: %s (%d bytes)", folder / "report.html", (folder / "report.html").stat().st_size)
    return folder / "report.html"


def _figures(cfg: Config, found: dict[str, dict[tuple[str, int], dict[str, Any]]]) -> dict[str, tuple[str, Figure]]:
    """The paper's four figures in our data, as far as there are runs, each with its caption."""
    figures = {
        "figure1": (
            "The three maskings on one program at two noise levels P: coloured by tier, masked tokens black. The last "
            "subtree that AST (span) takes may pass its budget, as Algorithm 2 has it.",
            masking_figure(cfg, EXAMPLE),
        )
    }
    key = (*cfg.benchmarks[:1], cfg.lengths[-1])  # of no run, if there is no benchmark
    if key in found.get("random", {}) and key in found.get("ast", {}):
        task = differing_task(cfg, *key)
        if task in read_samples(samples_path(cfg.with_masking("ast"), *key)):
            both = stats.compare(*(stats.passed(found[s][key], "plus") for s in ("random", "ast")))
            why = (
                f"{task} at T = {key[1]}, chosen because the two differ there: of {both['n']} tasks AST masking alone "
                f"passes {both['only_b']}, random masking alone {both['only_a']}"
            )
            figures["figure2"] = (f"Two answers to one task. {why}.", program_figure(cfg, *key, task))
            half_way = trajectory.states(cfg, *key, task, ("random", "ast"))
            figures["figure3"] = (f"The same answers part of the way. {why}.", half_way)
    if found:
        text = (
            f"Robustness over T: pass@1 on base and plus tests of {' and '.join(cfg.benchmarks)}, with 95 % intervals "
            "of each rate. Overlapping intervals say nothing of a difference on the same tasks: see Comparisons."
        )
        figures["figure4"] = (text, robustness_figure(cfg))
    return figures


def deviations(cfg: Config) -> list[dict[str, Any]]:
    """The switches in which our runs differ from the paper's: ours, the paper's, and what it is.

    Ours are those that the runs of this seed were made with, as their directories record them, by run where these
    differ; the report's own where there is no run. What a backbone made on the spot changes stands in `pretrain`.
    """
    theirs = resolve("paper").as_dict()
    runs = [s for s in MASKINGS if (cfg.with_masking(s).run_dir / "config.json").exists()]
    made = {STRATEGIES[s].title: _made(cfg.with_masking(s)) for s in runs} or {"": cfg.as_dict()}
    out = []
    for name in (n for n in SWITCHES if n not in ("preset", "masking", "seed")):
        values = {who: switches[name] for who, switches in made.items() if name in switches}
        distinct = list({json.dumps(v): v for v in values.values()}.values())
        if distinct and distinct != [theirs[name]]:
            ours = distinct[0] if len(distinct) == 1 else values
            meaning = SWITCHES[name].help
            out.append({"switch": name, "ours": ours, "paper": theirs[name], "meaning": meaning})
    return out


def _made(run: Config) -> dict[str, Any]:
    """The switches that a run was made with: its own record, and for sampling that of its samples."""
    switches = read_json(run.run_dir / "config.json") | {"benchmarks": run.benchmarks, "lengths": run.lengths}
    for benchmark, length in [(b, t) for b in run.benchmarks for t in run.lengths]:
        if (path := samples_path(run, benchmark, length)).exists():
            told = next(iter(read_jsonl(path)), {}).get("settings", {})
            switches |= {k: v for k, v in told.items() if k in SWITCHES}
    return switches


def data_sets(cfg: Config) -> dict[str, Any]:
    """Statistics of the data sets that the runs of this seed were trained on, by the runs' names."""
    import datasets

    of: dict[str, list[str]] = {}
    for strategy in ROWS:
        path = cfg.with_masking(strategy).run_dir / "provenance.json"
        if path.exists():
            of.setdefault(read_json(path)["data"], []).append(STRATEGIES[strategy].title)
    files = {", ".join(names): cfg.preset_dir / "data" / mark / "stats.json" for mark, names in of.items()}
    found = {names: read_json(path) for names, path in files.items() if path.exists()}
    found = {names: facts for names, facts in found.items() if "contamination" in facts}  # older ones have less to show
    for names, facts in found.items():
        run = next(cfg.with_masking(s) for s in ROWS if STRATEGIES[s].title in names.split(", "))
        if (files[names].parent / "state.json").exists():  # else the rows themselves are gone
            data = datasets.load_from_disk(str(files[names].parent)).with_format("numpy")
            facts["reach"] = reach.reach(run, data)
    return found


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
