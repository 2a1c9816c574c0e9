"""The paper's tables and ours side by side, and the paper's figures in our data, from the ledgers of all runs.

    ledger = scored(cfg, "tinycode", 64)     # runs/.../scores/tinycode-T64.json
    path = write(cfg)                        # runs/<preset>/report/: tables, figures, report.html

Every number is counted from ledger lines; each of ours carries its 95 % interval. What was not run shows as missing.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treediff import answers, corpus, page, paper, plots, stats, tokens, trajectory
from treediff.config import MASKINGS, SWITCHES, Config, UserError, provenance, read_json, resolve, whole, write_json
from treediff.paper import HALVES, PAIRS, PAPER, paper_markdown
from treediff.tables import as_csv, latex, markdown, rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

ROWS = ("base", *MASKINGS)


# --- ledgers -------------------------------------------------------------------------------------------------------


def ledger_path(cfg: Config, benchmark: str, length: int) -> Path:
    return cfg.run_dir / "scores" / f"{benchmark}-T{length}.json"


def scored(cfg: Config, benchmark: str, length: int) -> Path:
    """The ledger of one run on one benchmark; trains, samples and scores whatever is missing."""
    from treediff import score

    samples = answers.sampled(cfg, benchmark, length)
    out = ledger_path(cfg, benchmark, length)
    wanted = list(answers.benchmark_problems(cfg, benchmark))
    score.score(benchmark, corpus.benchmark_file(cfg, benchmark), samples, out, workers=cfg.workers, limit_to=wanted)
    return out


def ledgers(cfg: Config) -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
    """The ledgers that are there, by strategy and (benchmark, T).

    Raises UserError if two runs were trained, sampled or scored under different settings: they could not be compared.
    """
    found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for strategy in ROWS:
        run = cfg.with_masking(strategy)
        for benchmark in cfg.benchmarks:
            for length in cfg.lengths:
                path = ledger_path(run, benchmark, length)
                if path.exists():
                    found.setdefault(strategy, {})[benchmark, length] = read_json(path)
    for key in {k for by_key in found.values() for k in by_key}:
        runs = {s: (cfg.with_masking(s), by_key[key]) for s, by_key in found.items() if key in by_key}
        _same_settings(key, runs)
    return found


def _same_settings(key: tuple[str, int], runs: dict[str, tuple[Config, dict[str, Any]]]) -> None:
    """Refuse runs, by a name of each, whose ledgers of `key` cannot be compared."""
    known: dict[str, tuple[str, Any]] = {}
    for who, (run, ledger) in runs.items():
        mine = {k: v for k, v in ledger["settings"].items() if "samples" not in k}
        lines = corpus.read_jsonl(answers.samples_path(run, *key))
        mine |= {f"sampling {k}": v for k, v in next(iter(lines))["settings"].items()}
        mine["tasks"] = sorted(ledger["tasks"])
        mine["sampling seed"] = mine.get("sampling seed") if len({r.seed for r, _ in runs.values()}) == 1 else None
        if run.masking != "base" and (run.run_dir / "config.json").exists():
            switches = read_json(run.run_dir / "config.json")
            trained = (n for n, f in SWITCHES.items() if f.metadata["stage"] in ("data", "train"))
            mine |= {f"training switch {n}": switches[n] for n in trained if n in switches}
        for name, value in mine.items():
            first, theirs = known.setdefault(name, (who, value))
            if theirs != value:
                raise UserError(
                    f"{key[0]} at T = {key[1]}: {first} and {who} differ in {name}, so they cannot be "
                    "compared; make one of them again."
                )


def seeds(cfg: Config) -> dict[str, list[int]]:
    """The seeds that have a run directory, by strategy."""
    found = {s: [int(m[1]) for p in cfg.preset_dir.glob(f"{s}-seed*") if (m := _SEED.search(p.name))] for s in ROWS}
    return {s: sorted(k) for s, k in found.items() if k}


_SEED = re.compile(r"-seed(\d+)$")


def _counts(ledger: dict[str, Any]) -> tuple[int, int, int]:
    """Tasks that pass the base tests, that pass base and plus, and tasks."""
    base, plus = stats.passed(ledger, "base"), stats.passed(ledger, "plus")
    return sum(base.values()), sum(plus.values()), len(base)


# --- tables --------------------------------------------------------------------------------------------------------


def table(cfg: Config, strategies: tuple[str, ...]) -> list[dict[str, Any]]:
    """One record per strategy, benchmark, tests and T: our k of n with its interval, and the paper's percentage.

    The paper's T (256, 512) stand beside ours in order: the first length beside 256, the second beside 512.
    """
    found = ledgers(cfg)
    out = []
    for strategy in strategies:
        for place, length in enumerate(cfg.lengths):
            for benchmark in cfg.benchmarks:
                ledger = found.get(strategy, {}).get((benchmark, length))
                for column, name in enumerate(HALVES[benchmark]):
                    record: dict[str, Any] = {"strategy": strategy, "T": length, "benchmark": name}
                    if ledger:
                        *k, n = _counts(ledger)
                        low, high = stats.wilson(k[column], n)
                        rate = 100 * k[column] / n
                        record |= {"passed": k[column], "tasks": n, "rate": rate, "low": 100 * low, "high": 100 * high}
                    paper = list(PAPER[strategy].get(benchmark, {}).items())
                    if place < len(paper):
                        record |= {"paper_T": paper[place][0], "paper": paper[place][1][column]}
                    out.append(record)
    return out


def halves_markdown(cfg: Config, strategies: tuple[str, ...]) -> str:
    """Pass rates on TinyCode's two halves, base and plus tests, as a Markdown table; empty without TinyCode."""
    if "tinycode" not in cfg.benchmarks:
        return ""
    found, half = ledgers(cfg), {i: p["half"] for i, p in answers.benchmark_problems(cfg, "tinycode").items()}
    names = list(dict.fromkeys(half.values()))
    columns = [(t, h) for t in cfg.lengths for h in names]
    lines = ["| | " + " | ".join(f"{h}, T = {t}" for t, h in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for strategy in strategies:
        cells = []
        for length, name in columns:
            ledger = found.get(strategy, {}).get(("tinycode", length), {"tasks": {}})
            passed = [v for i, v in stats.passed(ledger, "plus").items() if half.get(i) == name]
            cells.append(rate(sum(passed), len(passed)))
        lines.append(f"| {plots.NAMES[strategy]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons(cfg: Config, strategies: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """How many programs of each run pass or fail for which kind of reason, by a title of the run."""
    found = ledgers(cfg)
    out = {}
    for strategy in strategies:
        for (benchmark, length), ledger in found.get(strategy, {}).items():
            passed = stats.passed(ledger, "plus")
            kinds = Counter(
                "pass" if passed[i] else str(v["reason"]).partition(":")[0].strip() for i, v in ledger["tasks"].items()
            )
            out[f"{plots.NAMES[strategy]}, {benchmark}, T = {length}"] = dict(kinds)
    return out


def sandbox_layers(cfg: Config) -> dict[str, Any]:
    """The sandbox that the ledgers name (all runs of a preset are scored on one machine, or say so)."""
    layers = [ledger["sandbox"] for by_key in ledgers(cfg).values() for ledger in by_key.values()]
    return layers[0] if all(x == layers[0] for x in layers) else {"differs between runs": layers}


def comparisons(cfg: Config) -> list[dict[str, Any]]:
    """Every pair of strategies on every benchmark and T, on base and plus tests of the same tasks.

    Difference [points] with its paired bootstrap interval, discordant tasks, exact McNemar p, and p adjusted for the
    whole list (Holm).
    """
    found = ledgers(cfg)
    out = []
    for one, two in PAIRS:
        for key in found.get(one, {}):
            if key not in found.get(two, {}):
                continue
            both = stats.compare(*(stats.passed(found[s][key], "plus") for s in (one, two)))
            out.append(
                {
                    "benchmark": HALVES[key[0]][1],
                    "T": key[1],
                    "from": one,
                    "to": two,
                    **{k: 100 * both[k] for k in ("difference", "low", "high")},
                    "both": both["both"],
                    "only_from": both["only_a"],
                    "only_to": both["only_b"],
                    "neither": both["neither"],
                    "tasks": both["n"],
                    "p": both["p"],
                }
            )
    return _with_holm(out)


def pooled(cfg: Config) -> list[dict[str, Any]]:
    """The comparisons over all seeds that were run (stats.POOLING is the model); empty with one seed of each."""
    of = seeds(cfg)
    if max(map(len, of.values()), default=0) < 2:
        return []
    out = []
    for one, two in PAIRS:
        for key in [(b, t) for b in cfg.benchmarks for t in cfg.lengths]:
            runs = {}
            for strategy in (one, two):
                for seed in of.get(strategy, []):
                    run = cfg.with_masking(strategy).but(seed=seed)
                    if (path := ledger_path(run, *key)).exists():
                        runs[f"{strategy}-seed{seed}"] = (run, read_json(path))
            _same_settings(key, runs)
            sides = [[stats.passed(v, "plus") for r, v in runs.values() if r.masking == s] for s in (one, two)]
            if not all(sides) or len(runs) < 3:
                continue
            record = stats.pooled(*sides)
            head = {"benchmark": HALVES[key[0]][1], "T": key[1], "from": one, "to": two, "runs": list(runs)}
            out.append(head | {k: 100 * record[k] for k in ("difference", "low", "high")} | {"p": record["p"]})
    return _with_holm(out)


def _with_holm(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    adjusted = stats.holm([r["p"] for r in records])
    return [r | {"p_holm": p} for r, p in zip(records, adjusted, strict=True)]


def verdicts(records: list[dict[str, Any]], level: float = 0.05) -> str:
    """What the comparisons allow to be said, in sentences: an order only where McNemar's p, Holm-adjusted, says so."""
    if not records:
        return "No two runs can be compared yet."
    adjusted = stats.holm([r["p"] for r in records])
    lines = []
    for r, p in zip(records, adjusted, strict=True):
        names = f"{plots.NAMES[r['to']]} against {plots.NAMES[r['from']]}, {r['benchmark']} at T = {r['T']}"
        interval = f" [{r['low']:+.1f}, {r['high']:+.1f}]" if "low" in r else ""
        counts = f"{r['difference']:+.1f}{interval} points ({r['only_to']} tasks to {r['only_from']} of {r['tasks']})"
        said = f"a difference at p = {p:.2g}" if p < level else f"no difference can be told (p = {p:.2g})"
        lines.append(f"- {names}: {counts}: {said}.")
    return "\n".join(lines)


# --- figures -------------------------------------------------------------------------------------------------------


def masking_figure(cfg: Config, code: str, levels: tuple[float, ...] = (0.3, 0.7)) -> Figure:
    """Figure 1 in our data: one program under the maskings, each at the same noise levels."""
    tok = tokens.load_tokenizer(corpus.tokenizer_folder(cfg), cfg.revision)
    view = corpus.view(cfg, tok, code)
    masks = {m: [corpus.view_masks(cfg.with_masking(m), view, level)[0] for level in levels] for m in MASKINGS}
    return plots.maskings(code, view.starts, view.labels, masks, levels)


def differing_task(cfg: Config, benchmark: str, length: int, one: str = "random", two: str = "ast") -> str:
    """A task that `two` passes and `one` fails, if there is one; else any task that they answer differently."""
    found = ledgers(cfg)
    a, b = (found[s][benchmark, length]["tasks"] for s in (one, two))
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
        rows = answers.read_samples(answers.samples_path(cfg.with_masking(strategy), benchmark, length))
        verdict = found[strategy][benchmark, length]["tasks"][task]
        why = verdict["plus"] if verdict["base"] == "pass" else verdict["base"]
        panels.append((f"{plots.NAMES[strategy]}: {why}", rows[task]["solution"]))
    return plots.programs(panels)


def robustness_figure(cfg: Config) -> Figure:
    """Figure 4 in our data: the pass rate on the plus tests over T, all benchmarks pooled, with Wilson intervals."""
    found = ledgers(cfg)
    scores: dict[str, dict[int, tuple[float, float, float]]] = {}
    for strategy, by_key in found.items():
        for length in cfg.lengths:
            parts = [_counts(by_key[b, length]) for b in cfg.benchmarks if (b, length) in by_key]
            if parts:
                k, n = sum(p[1] for p in parts), sum(p[2] for p in parts)
                low, high = stats.wilson(k, n)
                scores.setdefault(strategy, {})[length] = (100 * k / n, 100 * low, 100 * high)
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
    tables = {"table1": table(cfg, paper.IN_TABLE[1]), "table2": table(cfg, MASKINGS)}
    for number, (name, records) in enumerate(tables.items(), start=1):
        theirs = paper_markdown(paper.IN_TABLE[number], number == 1)
        _write_text(folder / f"{name}.md", f"Ours:\n\n{markdown(records)}\n\nThe paper's:\n\n{theirs}\n")
        _write_text(folder / f"{name}.csv", as_csv(records))
        _write_text(folder / f"{name}.tex", latex(records))
        write_json(folder / f"{name}.json", records)
    checked = {"printed": paper.checked(), "misprints": paper.misprints(), "comparisons": paper.claims()}
    facts = {
        "comparisons": comparisons(cfg),
        "pooled": pooled(cfg),
        "paper": checked,
        "power": stats.power_table(),
        "deviations": deviations(cfg),
        "data": data_sets(cfg),
        "provenance": {"report": provenance(switches=cfg.as_dict()), "runs": provenances(cfg)},
    }
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
        "tables": {k: (markdown(r), paper_markdown(paper.IN_TABLE[i])) for i, (k, r) in enumerate(tables.items(), 1)},
        "halves": halves_markdown(cfg, ROWS) if found else "",
        "said": verdicts(facts["comparisons"]),
        "seeds": seeds(cfg),
        "figures": {name: (caption, folder / f"{name}.png") for name, (caption, _) in figures.items()},
        **facts,
    }
    _write_text(folder / "report.html", page.build(cfg, summary, tasks))
    log.info("report: %s (%d bytes)", folder / "report.html", (folder / "report.html").stat().st_size)
    return folder / "report.html"


def _figures(cfg: Config, found: dict[str, dict[tuple[str, int], dict[str, Any]]]) -> dict[str, tuple[str, Figure]]:
    """The paper's four figures in our data, as far as there are runs, each with its caption."""
    figures = {"figure1": ("The three maskings on one program.", masking_figure(cfg, EXAMPLE))}
    key = (cfg.benchmarks[0], cfg.lengths[-1])
    if key in found.get("random", {}) and key in found.get("ast", {}):
        task = differing_task(cfg, *key)
        if task in answers.read_samples(answers.samples_path(cfg.with_masking("ast"), *key)):
            figures["figure2"] = (f"{task}: two answers.", program_figure(cfg, *key, task))
            half_way = trajectory.states(cfg, *key, task, ("random", "ast"))
            figures["figure3"] = (f"{task}: the same answers part of the way.", half_way)
    if found:
        figures["figure4"] = ("Robustness over T, with 95 % intervals.", robustness_figure(cfg))
    return figures


def deviations(cfg: Config) -> list[dict[str, Any]]:
    """The switches that differ from the paper's run, computed from the presets: ours, the paper's, and what it is."""
    theirs = resolve("paper").as_dict()
    return [
        {"switch": name, "ours": ours, "paper": theirs[name], "meaning": SWITCHES[name].metadata["help"]}
        for name, ours in cfg.as_dict().items()
        if ours != theirs[name] and name not in ("preset", "masking", "seed")
    ]


def data_sets(cfg: Config) -> dict[str, Any]:
    """Statistics of the data sets that the runs of this seed were trained on, by the runs' names."""
    of: dict[str, list[str]] = {}
    for strategy in ROWS:
        path = cfg.with_masking(strategy).run_dir / "provenance.json"
        if path.exists():
            of.setdefault(read_json(path)["data"], []).append(plots.NAMES[strategy])
    files = {", ".join(names): cfg.preset_dir / "data" / mark / "stats.json" for mark, names in of.items()}
    found = {names: read_json(path) for names, path in files.items() if path.exists()}
    return {names: facts for names, facts in found.items() if "contamination" in facts}  # older ones have less to show


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
    with whole(path) as spot:
        spot.write_text(text, encoding="utf-8", errors="backslashreplace")
