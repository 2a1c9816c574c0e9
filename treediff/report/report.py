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

from treediff import usage
from treediff.config import SWITCHES, Config, resolve
from treediff.data import benchmarks, reach, sources
from treediff.errors import UserError
from treediff.figures import plots
from treediff.files import read_json, read_jsonl, whole, write_json
from treediff.masking import tiers, tokens
from treediff.protocols import PROTOCOLS
from treediff.report import comparisons, infill, page, paper, pictures, study
from treediff.report.comparisons import ROWS, ledger_name, ledgers, seeds, shown, shown_by
from treediff.report.paper import HALVES, IN_TABLE, PAPER
from treediff.report.tables import Cell, Table, estimate, rate
from treediff.runs import provenance
from treediff.sampling.run import samples_path
from treediff.scoring import stats
from treediff.strategies import MASKINGS, STRATEGIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


log = logging.getLogger(__name__)


# --- tables --------------------------------------------------------------------------------------------------------
def pass_rates(cfg: Config, strategies: tuple[str, ...]) -> list[dict[str, Any]]:
    """One record per strategy, benchmark, tests and T: our k of n with its interval, the ledger that they are counted
    from, and the paper's percentage at this T, if it prints one."""
    found = ledgers(cfg)
    out = []
    ours_alone = cfg.protocol not in ("none", "treediff")  # the paper's rates are of its own protocol
    for strategy in strategies:
        for benchmark, length in sorted(cfg.jobs, key=lambda job: job[1]):
            ledger = found.get(strategy, {}).get((benchmark, length))
            for part, name in zip(("base", "plus"), HALVES[benchmark], strict=True):
                record: dict[str, Any] = {"strategy": strategy, "T": length, "benchmark": name}
                if ledger:
                    record |= comparisons.counted(ledger, part)
                    record["ledger"] = ledger_name(cfg.with_masking(strategy), benchmark, length)
                paper = PAPER.get(strategy, {}).get(benchmark, {}).get(length)
                if paper and not ours_alone:
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
    "other",
    "other_verdicts",
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


# --- the report ----------------------------------------------------------------------------------------------------
def write(cfg: Config) -> Path:
    """Write runs/<preset>/report/: tables, comparisons, figures with their data, provenance, report.html; its path.

    What is missing shows as missing. Raises UserError, and writes nothing, if runs cannot be compared.
    """
    folder, found = cfg.preset_dir / cfg.named("report"), ledgers(cfg)
    rates = {"table1": pass_rates(cfg, IN_TABLE[1]), "table2": pass_rates(cfg, shown(cfg, MASKINGS))}
    models, (under, protocol_said) = comparisons.autoregressive_table(cfg), protocol(cfg, found)
    records, many, filled = comparisons.findings(cfg), study.summary(cfg), infill.summary(cfg)
    facts = {
        "comparisons": comparisons.comparisons(cfg),
        "pooled": comparisons.pooled(cfg),
        "seed_rates": comparisons.seed_rates(cfg),
        "pass_at_k": pass_at_k(cfg, ROWS),
        "decodings": comparisons.decodings(cfg),
        "paper": {"printed": paper.checked(), "misprints": paper.misprints(), "comparisons": paper.claims()},
        "power": stats.power_table(),
        "deviations": deviations(cfg),
        "data": data_sets(cfg),
        "cost": {f.name: spent for f in sorted(cfg.preset_dir.glob("*-seed*")) if (spent := usage.total(f))},
        "infilling": filled,
        "provenance": {"report": provenance(switches=cfg.as_dict()), "runs": provenances(cfg)},
    }
    tok, left_out = _tokenizer(cfg, found)
    tasks = page.explorer(cfg, found, tok)
    drawn = pictures.pictures(cfg, found, records, many, tok)
    holes = {f"infilling-{e['holes']}-{e['hole_length']}": infill.picture(e) for e in filled}
    # Everything that may be refused has been counted; only now is anything written.
    for number, (name, of) in enumerate(rates.items(), start=1):
        printed = paper.paper_table(IN_TABLE[number], number == 1).markdown()
        measured = f"\n\nAutoregressive models, ours:\n\n{models.markdown()}" if models and number == 1 else ""
        table = rates_table(of)
        ours = f"Ours; {under}:\n\n{table.markdown()}"
        _write_text(folder / f"{name}.md", f"{ours}\n\nThe paper's:\n\n{printed}{measured}\n")
        _write_text(folder / f"{name}.csv", Table.of(of, RECORD).csv())
        _write_text(folder / f"{name}.tex", table.latex())
        write_json(folder / f"{name}.json", of)
    for name, value in facts.items():
        write_json(folder / f"{name}.json", value)
    for name, picture in {**drawn, **holes}.items():
        plots.save(picture.figure, folder / f"{name}.png")
        _write_text(folder / f"{name}.csv", picture.data.csv())
    pairs = page.pairs(tasks)
    # ASCII, because somebody else's program may hold half a surrogate pair.
    _write_text(folder / "pairs.json", json.dumps(pairs, indent=1) + "\n")
    _write_text(folder / "pairs.md", page.pairs_markdown(pairs))
    summary = {
        "title": ", ".join([f"preset {cfg.preset}, seed {cfg.seed}", *(" ".join(x) for x in cfg.label.items())]),
        "answer": many["answer"] if many else comparisons.answer(records),
        "study": study.tables(many) if many else [],
        "lead": [*lead(cfg, records), paper.claims_summary(facts["paper"]["comparisons"]).rpartition(". ")[2]],
        "sentences": comparisons.sentences(records),
        "tables": [
            (rates_table(of, f"Table {i}, ours; {under}"), paper.paper_table(IN_TABLE[i]))
            for i, of in enumerate(rates.values(), 1)
        ],
        "models": models,
        "pass_at": pass_at_table(facts["pass_at_k"]),
        "decodings": comparisons.decodings_table(facts["decodings"]),
        "protocol": protocol_said,
        "published": published_table(cfg),
        "halves": halves_table(cfg, shown(cfg, ("none", *MASKINGS))) if found else None,
        "comparisons": comparisons.comparisons_table(facts["comparisons"]),
        "pooled": facts["pooled"] and comparisons.pooled_table(facts["pooled"]),
        "seed_rates": comparisons.seed_rates_table(facts["seed_rates"]),
        "claims": paper.claims_table(facts["paper"]["comparisons"]),
        "claims_summary": paper.claims_summary(facts["paper"]["comparisons"]),
        "checked": paper.checked_table(facts["paper"]["printed"]),
        "misprints": facts["paper"]["misprints"],
        "power": paper.power_table(facts["power"]),
        "data": [
            (name, of, training_tables(of), reach.text(of["reach"]) if "reach" in of else "")
            for name, of in facts["data"].items()
        ],
        "deviations": deviations_table(facts["deviations"]),
        "cost": cost_table(facts["cost"]),
        "seeds": "; ".join(f"{STRATEGIES[s].title}: {', '.join(map(str, k))}" for s, k in seeds(cfg).items()),
        "sandbox": ", ".join(f"{name} ({how})" for name, how in comparisons.sandbox_layers(cfg).items()),
        "figures": [(name, picture, folder / f"{name}.png") for name, picture in drawn.items()],
        "left_out": left_out,
        "infilling": [
            (e, infill.said(e), infill.tables(e), name, picture, folder / f"{name}.png")
            for e, (name, picture) in zip(filled, holes.items(), strict=True)
        ],
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


def protocol(cfg: Config, found: dict[str, dict[comparisons.Key, dict[str, Any]]]) -> tuple[str, str]:
    """Which protocol our tables stand for, in a few words and in sentences; where none is named, which one's switches
    the samples have."""
    if cfg.protocol != "none":
        p = PROTOCOLS[cfg.protocol]
        unknown = list(dict.fromkeys(name for b in cfg.benchmarks for name in p.unknown(b)))
        said = f"{p.title} protocol, {p.name} (source: {p.source}). Unknown there, so ours: {', '.join(unknown)}."
        return f"protocol {p.name}", " ".join([said, *p.notes])
    samples = {}
    for strategy, by_key in found.items():
        for key in by_key:
            samples.setdefault(key, samples_path(cfg.with_masking(strategy), *key))
    made = {key: next(iter(read_jsonl(path)))["settings"] for key, path in samples.items()}
    fits = [
        p.name
        for p in PROTOCOLS.values()
        if made and all(b in p.benchmarks and not p.differences(b, of) for (b, _), of in made.items())
    ]
    if not fits:
        return "no named protocol", "These are rates of no named protocol (docs/protocols.md)." if made else ""
    return (
        f"as under {', '.join(fits)}",
        f"No protocol was named; the samples’ switches are those of {', '.join(fits)}.",
    )


def published_table(cfg: Config) -> Table | None:
    """What was published under the report's protocol; None without one, or where nothing is known."""
    rows = [[r.model, r.benchmark, r.rate, r.where] for r in getattr(PROTOCOLS.get(cfg.protocol), "published", ())]
    caption = f"Published under {cfg.protocol}, by others"
    return Table(["model", "tests", "pass@1 [%]", "where"], rows, caption) if rows else None


def lead(cfg: Config, records: list[dict[str, Any]]) -> list[str]:
    """Two findings beside the answer, at the largest T of the first benchmark."""
    places = [{"benchmark": HALVES[b][1], "T": cfg.of(b).lengths[-1]} for b in cfg.benchmarks[:1]]
    pairs = [{"from": one, "to": "ast", **place} for place in places for one in ("ast_span", "none")]
    return [comparisons.sentence(r) for want in pairs for r in records if want.items() <= r.items()]


def deviations(cfg: Config) -> list[dict[str, Any]]:
    """The switches in which our runs differ from the paper's: ours, the paper's, and what it is.

    Ours are those that the runs of this seed were made with, as their directories record them, by run where these
    differ; the report's own where there is no run. What a backbone made on the spot changes stands in `pretrain`.
    """
    printed = resolve("paper").as_dict()
    runs = [s for s in MASKINGS if (cfg.with_masking(s).run_dir / "config.json").exists()]
    made = {STRATEGIES[s].title: _made(cfg.with_masking(s)) for s in runs} or {"": cfg.as_dict()}
    out = []
    for name in (n for n in SWITCHES if n not in ("preset", "masking", "seed", "decoding", "protocol")):
        values = {who: switches[name] for who, switches in made.items() if name in switches}
        distinct = list({json.dumps(v): v for v in values.values()}.values())
        if distinct and distinct != [printed[name]]:
            ours = distinct[0] if len(distinct) == 1 else values
            meaning = SWITCHES[name].help
            out.append({"switch": name, "ours": ours, "paper": printed[name], "meaning": meaning})
    return out


def _made(run: Config) -> dict[str, Any]:
    """The switches that a run was made with: its own record, and for sampling that of its samples."""
    switches = read_json(run.run_dir / "config.json") | {"benchmarks": run.benchmarks, "lengths": run.lengths}
    for benchmark, length in run.jobs:
        if (path := samples_path(run, benchmark, length)).exists():
            sampled = next(iter(read_jsonl(path)), {}).get("settings", {})
            switches |= {k: v for k, v in sampled.items() if k in SWITCHES}
    return switches


def deviations_table(records: list[dict[str, Any]]) -> Table:
    """`deviations`, a row each."""
    values = [[v if isinstance(v, str) else json.dumps(v) for v in (r["ours"], r["paper"])] for r in records]
    rows = [[r["switch"], *v, r["meaning"]] for r, v in zip(records, values, strict=True)]
    return Table(["switch", "ours", "the paper’s run", "what it is"], rows, f"{len(rows)} switches differ")


def cost_table(cost: dict[str, dict[str, dict[str, Any]]]) -> Table | None:
    """What each run of the preset cost by stage, attempts that failed or were killed included; None if unknown."""
    rows = [
        [
            *(run, stage, of["attempts"], of["not_finished"], f"{of['seconds']:.0f}", f"{of['gpu_hours']:.3g}"),
            ", ".join(f"{k} {v / 3.6e6:.4g}" for k, v in of["joules"].items()),
        ]
        for run, by_stage in cost.items()
        for stage, of in by_stage.items()
    ]
    head = ["run", "stage", "attempts", "of them not finished", "seconds", "GPU-hours", "energy [kWh]"]
    return Table(head, rows, "What the runs cost, as their machines’ counters say") if rows else None


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
