"""The report's page: one HTML file with tables, figures, a task explorer and a trajectory explorer. No server.

    tasks = explorer(cfg, ledgers(cfg))      # what the explorers show: programs, verdicts, token by token answers
    text = build(cfg, summary, tasks)        # the page, from page.html

What a model wrote is hostile: it reaches the page only as JSON in which no tag can begin, and from there only as text.
The page's policy forbids every request and every script but its own (by hash).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treediff.config import Config
from treediff.data import benchmarks, sources
from treediff.errors import UserError
from treediff.figures import plots, views
from treediff.files import read_jsonl
from treediff.masking import tiers, tokens
from treediff.report import paper, tables
from treediff.report.comparisons import ledger_name
from treediff.sampling.run import samples_path
from treediff.scoring import stats
from treediff.strategies import STRATEGIES

log = logging.getLogger(__name__)

NEVER = 0xFFFF
"""Step of a token that was never committed, in a packed trajectory."""
SHOWN = 10
"""Samples of a task that the page shows; all are counted."""


# --- what the explorers show ---------------------------------------------------------------------------------------
def explorer(cfg: Config, found: dict[str, dict[tuple[str, int], dict[str, Any]]]) -> dict[str, Any]:
    """All answers of all runs: {"runs", "vocab", "tasks"}, a task's answers by the number of the run.

    Token texts are kept once, in `vocab`; a trajectory is packed (see `_packed`) and unpacked in the browser.
    """
    runs, tasks, vocab = [], {}, {}
    # Loaded once, and only if there is an answer to show: a report without runs needs no tokenizer.
    tokenizer = functools.cache(lambda: tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision))
    problems = {b: _problems(cfg, b) for b in cfg.benchmarks}
    for benchmark, length in [(b, t) for b in cfg.benchmarks for t in cfg.lengths]:
        for strategy, by_key in found.items():
            ledger = by_key.get((benchmark, length))
            if not ledger:
                continue
            rows = _rows(samples_path(cfg.with_masking(strategy), benchmark, length))
            for task, verdict in ledger["tasks"].items():
                problem, of = problems[benchmark].get(task, {}), rows.get(task, [])
                entry = tasks.setdefault(
                    (benchmark, task),
                    {
                        "id": task,
                        "benchmark": benchmark,
                        "half": problem.get("half", ""),
                        "prompt": problem.get("prompt", ""),
                        "answers": {},
                    },
                )
                entry["answers"][len(runs)] = _answer(stats.samples(verdict), of) | {
                    "tokens": _packed(cfg, tokenizer, of[0] if of else {}, vocab)
                }
            run = {"strategy": strategy, "name": STRATEGIES[strategy].title, "benchmark": benchmark, "T": length}
            run["ledger"] = ledger_name(cfg.with_masking(strategy), benchmark, length)
            runs.append(run | {"steps": length // cfg.tokens_per_step})
    return {"runs": runs, "vocab": list(vocab), "tasks": list(tasks.values())}


def _rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The samples of a file by task, in the order of their numbers."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in read_jsonl(path):
        rows.setdefault(record["task_id"], []).append(record)
    return {task: sorted(of, key=lambda r: r.get("sample", 0)) for task, of in rows.items()}


def _answer(verdicts: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A task's answer of one run: its first sample; where there are several, how many pass, and those after it."""
    programs = [r.get("solution", "") for r in rows] + [""] * len(verdicts)
    each = [
        {"verdict": _verdict(v), "why": str(v["reason"]), "seconds": v["seconds"], "program": program}
        for v, program in zip(verdicts, programs, strict=False)
    ]
    if len(each) == 1:
        return each[0]
    passes = sum(x["verdict"] == "pass" for x in each)
    total = {"passes": passes, "of": len(each), "first": each[0]["verdict"], "more": each[1:SHOWN]}
    return each[0] | total | {"verdict": "some pass" if 0 < passes < len(each) else each[0]["verdict"]}


def _problems(cfg: Config, benchmark: str) -> dict[str, dict[str, Any]]:
    """The benchmark's problems; none where their file is not at hand, which leaves the page without prompts."""
    try:
        return benchmarks.benchmark_problems(cfg, benchmark)
    except UserError as e:
        log.warning("The page shows no prompts of %s: %s", benchmark, e)
        return {}


def _verdict(row: dict[str, Any]) -> str:
    """pass, `base only` (fails the plus tests), fail or timeout."""
    if row["base"] != "pass":
        return row["base"]
    return "pass" if row["plus"] == "pass" else "base only"


def _packed(cfg: Config, tokenizer: Callable[[], Any], row: dict[str, Any], vocab: dict[str, int]) -> str:
    """An answer's tokens up to its end: uint32 entry of `vocab`, uint16 step and uint8 label of each; zlib, base64."""
    if "committed_at" not in row:
        return ""
    text, runs, at, labels = views.answer_tokens(cfg, tokenizer(), np.array(row["ids"]), np.array(row["committed_at"]))
    which = [vocab.setdefault(text[a:b], len(vocab)) for a, b in runs]
    raw = np.array(which, "<u4").tobytes() + np.where(at < 0, NEVER, at).astype("<u2").tobytes()
    return base64.b64encode(zlib.compress(raw + labels.astype("u1").tobytes(), 9)).decode()


def pairs(tasks: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks that some strategies pass and others do not, at one T, with every strategy's program and reason."""
    out = []
    for task in tasks["tasks"]:
        for length in sorted({tasks["runs"][i]["T"] for i in task["answers"]}):
            answers = [
                {"strategy": tasks["runs"][i]["strategy"], **{k: a[k] for k in ("verdict", "why", "program")}}
                for i, a in task["answers"].items()
                if tasks["runs"][i]["T"] == length
            ]
            if len({a["verdict"] in ("pass", "some pass") for a in answers}) == 2:
                out.append({"task": task["id"], "T": length, "prompt": task["prompt"], "answers": answers})
    return out


def pairs_markdown(records: list[dict[str, Any]], most: int = 20) -> str:
    """The first of those tasks, spread evenly, for reading."""
    shown = [records[i * len(records) // most] for i in range(most)] if len(records) > most else records
    parts = [
        f"# Tasks that the strategies answer differently\n\n{len(shown)} of {len(records)}; all are in pairs.json "
        "and in report.html. Base and plus tests.\n"
    ]
    for r in shown:
        parts.append(f"## {r['task']}, T = {r['T']}\n\n{_fenced(r['prompt'])}")
        for a in r["answers"]:
            why = f"\n\n{_fenced(a['why'])}" if a["why"] else ""
            parts.append(
                f"{STRATEGIES[a['strategy']].title}: **{a['verdict']}**{why}\n\n{_fenced(a['program'], 'python')}"
            )
    return "\n\n".join(parts) + "\n"


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in `text`."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}{language}\n{text}\n{fence}"


# --- the page ------------------------------------------------------------------------------------------------------
def build(cfg: Config, summary: dict[str, Any], tasks: dict[str, Any]) -> str:
    """The page as one text. `summary` is what report.write put together, `tasks` what `explorer` gives."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    data = tasks | {
        "labels": tokens.LABELS,
        "colours": [plots.COLOURS[x] for x in tokens.LABELS],
        "masked": plots.MASKED,
        "strategies": {s.name: s.colour for s in STRATEGIES.values()},
    }
    parts = {
        "policy": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": html.escape(summary["title"]),
        "masked": plots.MASKED,
        "body": "\n".join([*_results(summary), *_paper(summary), *_data(summary), *_figures(summary)]),
        "settings": "\n".join(_settings(cfg, summary)),
        # ASCII, so that half a surrogate pair in a program cannot spoil the file.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template)


def _results(summary: dict[str, Any]) -> Iterable[str]:
    said = [x.removeprefix("- ") for x in summary["said"].splitlines()]
    found = "".join(f"<li>{html.escape(x)}</li>" for x in said)
    yield f'<section id="said"><h2>What may be said</h2><ul>{found}</ul></section>'
    yield '<section id="tables"><h2>Tables</h2>'
    yield "<p>A click on one of our figures lists the tasks that it counts, with the ledger that they stand in.</p>"
    for number, (ours, theirs) in enumerate(summary["tables"].values(), start=1):
        topic = ("does AST masking beat random masking?", "tokens or spans?")[number - 1]
        yield f"<h3>Table {number}: {topic}</h3>{_ours(ours, f'Table {number}, ours')}"
        yield _from_markdown(theirs, f"Table {number}, as the paper prints it")
    if summary["halves"]:
        yield f"<h3>TinyCode's halves</h3>{_from_markdown(summary['halves'], 'Ours, base and plus tests')}"
    if summary["models"]:
        yield f"<h3>Autoregressive models</h3>{_from_markdown(summary['models'], 'Ours, through the same prompts')}"
    if summary["pass_at"]:
        yield f"<h3>Several samples per task</h3><p>{html.escape(stats.SAMPLES)}</p>"
        yield _from_markdown(summary["pass_at"], "Ours, the unbiased pass@k in percent of tasks")
    yield '</section><section id="comparisons"><h2>Comparisons</h2>'
    seed = summary["title"].rpartition(", ")[2]
    test = "the exact sign-flip test" if summary["pass_at"] else "McNemar’s exact test"
    yield (
        f"<p>Runs of {seed}, base and plus tests on the same tasks. The interval is a paired bootstrap over tasks; p "
        f"is {test}, adjusted for all rows by Holm’s procedure. It speaks of these very models on further "
        "tasks: what another seed of the same strategy would give is another matter. A click on a count in the columns "
        "<i>only</i> lists the tasks that one solves and the other does not, on which p rests.</p>"
    )
    names = ["from", "to", "benchmark", "T", "difference [points]", "only from", "only to", "tasks", "p", "p, Holm"]
    rows = [
        [
            *_who(r),
            f"{r['difference']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]",
            _only(r, "from", "to"),
            _only(r, "to", "from"),
            r["tasks"],
            f"{r['p']:.2g}",
            f"{r['p_holm']:.2g}",
        ]
        for r in summary["comparisons"]
    ]
    yield _table(names, rows, "Ours") if rows else "<p>No two runs can be compared yet.</p>"
    yield "<h3>Seeds pooled</h3>"
    if summary["pooled"]:
        yield f"<p>{html.escape(stats.POOLING)}</p>"
        names = ["from", "to", "benchmark", "T", "difference [points]", "seeds", "p, tasks", "its Holm", "p, seeds"]
        rows = [
            [
                *_who(r),
                f"{r['difference']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]",
                " and ".join(map(str, r["seeds"])),
                f"{r['p']:.2g}",
                f"{r['p_holm']:.2g}",
                "" if r["p_seeds"] is None else f"{r['p_seeds']:.2g}",
            ]
            for r in summary["pooled"]
        ]
        yield _table(names, rows, "Ours, all seeds")
        rows = [
            [
                STRATEGIES[r["strategy"]].title,
                r["benchmark"],
                r["T"],
                f"{r['mean']:.1f} [{r['low']:.1f}, {r['high']:.1f}]",
                "" if r["sd"] is None else f"{r['sd']:.1f}",
                ", ".join(f"{name}: {rate:.1f}" for name, rate in r["runs"].items()),
            ]
            for r in summary["seed_rates"]
        ]
        names = ["strategy", "benchmark", "T", "mean [%]", "sd between seeds", "each run"]
        yield _table(names, rows, "Pass rates over seeds, with intervals over tasks and runs")
    else:
        yield (
            "<p>There is one seed of each strategy at most, so nothing is pooled: how much the seed moves the results "
            "is unknown and in no interval above.</p>"
        )
    yield "</section>"


def _ours(records: list[dict[str, Any]], caption: str) -> str:
    """A table of ours as tables.markdown lays it out; each figure opens the task explorer on what it counts."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in tables.markdown(records).splitlines()]
    by_text = {(STRATEGIES[r["strategy"]].title, f"{r['benchmark']}, T = {r['T']}"): r for r in records}
    for row in rows[2:]:
        for i, title in enumerate(rows[0][1:], start=1):
            record = by_text.get((row[0], title))
            if record and "ledger" in record:
                verdict = "" if record["samples"] > 1 else "pass" if title.split(",")[0].endswith("+") else "base tests"
                row[i] = _Link(row[i], {**_run(record), "verdict": verdict})
    return _table(rows[0], rows[2:], caption)


class _Link(str):
    """A cell's text that, clicked, sets the task explorer's filters."""

    def __new__(cls, text: str, filters: dict[str, str]) -> _Link:
        link = super().__new__(cls, text)
        link.filters = filters
        return link


def _run(record: dict[str, Any]) -> dict[str, str]:
    """The explorer's filters for a record's benchmark and T, and its strategy if it is of one."""
    benchmark = next(b for b, names in paper.HALVES.items() if record["benchmark"] in names)
    filters = {"set": f"{benchmark}, T = {record['T']}"}
    return filters | ({"strategy": STRATEGIES[record["strategy"]].title} if "strategy" in record else {})


def _only(r: dict[str, Any], ahead: str, behind: str) -> str:
    """How many tasks one of the two passes (or passes more often) and the other does not."""
    filters = _run(r) | {"strategy": STRATEGIES[r[ahead]].title, "over": STRATEGIES[r[behind]].title}
    return _Link(r[f"only_{ahead}"], filters)


def _who(r: dict[str, Any]) -> list[Any]:
    return [STRATEGIES[r["from"]].title, STRATEGIES[r["to"]].title, r["benchmark"], r["T"]]


def _paper(summary: dict[str, Any]) -> Iterable[str]:
    claims, checked = summary["paper"]["comparisons"], summary["paper"]["printed"]
    yield '<section id="paper"><h2>What the paper’s figures can bear</h2>'
    yield f"<p>{html.escape(paper.claims_said(claims))}</p>"
    bad = "".join(f"<li>{html.escape(x)}</li>" for x in summary["paper"]["misprints"])
    yield f"<p>Printed percentages that no number of tasks gives:</p><ul>{bad or '<li>none</li>'}</ul>"
    names = ["from", "to", "benchmark", "T", "difference [points]", "tasks passed", "least p", "greatest p"]
    rows = [
        [
            *_who(r),
            f"{r['difference']:+.1f}",
            " to ".join("/".join(map(str, k)) or "misprint" for k in r["counts"]) + f" of {r['tasks']}",
            *(["misprint"] * 2 if r["misprint"] else [f"{r['p_min']:.2g}", f"{r['p_max']:.2g}"]),
        ]
        for r in claims
    ]
    text = "The paper’s comparisons: exact McNemar p over all overlaps that its counts allow"
    yield _table(
        [*names, "least p, Holm"], [[*r, _p(c.get("holm_min"))] for r, c in zip(rows, claims, strict=True)], text
    )
    rows = [
        [
            r["table"],
            STRATEGIES[r["strategy"]].title,
            r["benchmark"],
            r["T"],
            f"{r['printed']:.1f}",
            f"{'/'.join(map(str, r['counts']))} of {r['tasks']}" if r["counts"] else "none: a misprint",
        ]
        for r in checked
    ]
    yield "<details><summary>Every printed figure and its count of tasks</summary>"
    yield _table(["table", "strategy", "benchmark", "T", "printed [%]", "tasks"], rows, "The paper’s figures")
    yield "</details><h3>What would be needed</h3>"
    yield (
        "<p>Tasks that the exact McNemar test needs to find a true difference in four of five tries at p &lt; 0.05, by "
        "the share of tasks that only one of the two solves; and seeds per strategy that a t-test needs, by the "
        "standard deviation from seed to seed.</p>"
    )
    power = summary["power"]
    names = ["difference [points]", *(f"tasks, {100 * x:g} % differ" for x in power[0]["tasks"])]
    names += [f"seeds, sd {x:g}" for x in power[0]["seeds"]]
    yield _table(names, [[r["points"], *r["tasks"].values(), *r["seeds"].values()] for r in power], "Power 0.8")
    yield "</section>"


def _p(value: float | None) -> str:
    return "misprint" if value is None else f"{value:.2g}"


def _data(summary: dict[str, Any]) -> Iterable[str]:
    """What the runs were trained on: rows at each filter, tokens, lengths, and what of the benchmarks they hold."""
    yield '<section id="training"><h2>Training data</h2>'
    if not summary["data"]:
        yield "<p>No run of this preset has been trained yet.</p>"
    for who, data in summary["data"].items():
        rows, labels = data["rows"], data["tokens"]
        total, code = sum(labels.values()), sum(labels[k] for k in tokens.LABELS[tokens.CODE :])
        yield f"<h3>{html.escape(who)}: {html.escape(data['data'])}</h3>"
        steps = [("read", rows["read"]), *rows["dropped"].items(), ("can be used", rows["usable"])]
        steps += [("not chosen", rows["not_chosen"]), ("kept", rows["kept"])]
        yield _table(["rows", "number"], steps, "Rows at each filter")
        names = ["tokens of", "number", "of all [%]", "of the code [%]"]
        parts = [
            [k, v, f"{100 * v / total:.1f}", f"{100 * v / max(1, code):.1f}" if k in tiers.TIERS else ""]
            for k, v in labels.items()
        ]
        yield _table(names, parts, "Tokens by region and tier; `default` is code that no tier claims")
        deciles = [[k, *(v[i] for i in (0, 1, 5, 9, 10))] for k, v in data["length_deciles"].items()]
        yield _table(["tokens per", "least", "10 %", "median", "90 %", "most"], deciles, "Lengths")
        yield (
            f"<p>{data['rows_with_parse_errors']:,} programs ({data['parse_error_row_share']:.2%}) do not parse whole; "
            f"{data['parse_error_byte_share']:.2%} of the code’s bytes lie in what does not parse.</p>"
        )
        yield from _contamination(data["contamination"])
    yield "</section>"


def _contamination(found: dict[str, Any]) -> Iterable[str]:
    reasons = "; ".join(f"{k}: {v.rstrip('.')}" for k, v in found["not_checked"].items())
    if reasons:
        yield f"<p>Not compared with the problems of a benchmark: {html.escape(reasons)}.</p>"
    if not found["checked"]:
        return
    flagged, checked, limit, short = (found[k] for k in ("flagged", "checked", "thresholds", "too_short"))
    by = ", ".join(f"{k} {v}" for k, v in found["by"].items())
    yield (
        f"<p>Contamination: <b>{flagged:,} of {checked:,} rows</b> ({100 * flagged / checked:.3f} %) hold a problem of "
        f"{html.escape(' or '.join(found['against']))} ({by}); they are nearest to {found['problems_flagged']} of the "
        f"{found['problems']} problems. A row counts if it holds {limit['code']:g} of a program’s n-grams or "
        f"{limit['text']:g} of a text’s, or if MinHash estimates a Jaccard similarity of {limit['minhash']:g}. "
        f"{short['code']} programs and {short['text']} texts are too short to be found by n-grams.</p>"
    )
    names = ["row", "nearest problem", "program", "text", "MinHash", "counted by"]
    rows = [
        [p["row"], p["task"], *(f"{p[k]:.2f}" for k in ("code", "text", "minhash")), ", ".join(p["by"]) or "-"]
        for p in found["nearest"]
    ]
    yield _table(names, rows, f"The {len(rows)} nearest pairs of a row and a problem")
    if "embeddings" in found:
        near = [[p["row"], p["task"], f"{p['cosine']:.3f}"] for p in found["embeddings"]["nearest"]]
        yield _table(["row", "nearest problem", "cosine"], near, f"By embeddings of {found['embeddings']['model']}")


def _figures(summary: dict[str, Any]) -> Iterable[str]:
    yield '<section id="figures"><h2>Figures</h2>'
    for number, (name, (caption, path)) in enumerate(summary["figures"].items(), start=1):
        data = base64.b64encode(path.read_bytes()).decode()
        text = html.escape(f"{name.replace('figure', 'Figure ')}. {caption}")
        yield (
            f'<figure><div class="wide" tabindex="0" role="region" aria-label="figure {number}">'
            f'<img alt="{text}" src="data:image/png;base64,{data}"></div><figcaption>{text}</figcaption></figure>'
        )
    yield "</section>"


def _settings(cfg: Config, summary: dict[str, Any]) -> Iterable[str]:
    rows = [[r["switch"], _show(r["ours"]), _show(r["paper"]), r["meaning"]] for r in summary["deviations"]]
    yield '<section id="settings"><h2>Settings and provenance</h2><h3>Deviations from the paper</h3>'
    if rows:
        yield _table(["switch", "ours", "the paper’s run", "what it is"], rows, f"{len(rows)} switches differ")
    else:
        yield "<p>None: every switch has the value of the paper’s run.</p>"
    layers = ", ".join(f"{name} ({how})" for name, how in summary["sandbox"].items()) or "no program was run yet"
    yield f"<p>Programs were run in the sandbox with these layers: {html.escape(layers)}.</p>"
    seeds = "; ".join(f"{STRATEGIES[s].title}: {', '.join(map(str, k))}" for s, k in summary["seeds"].items())
    yield f"<p>Seeds that were run: {html.escape(seeds or 'none')}.</p>"
    facts = {"Every switch": cfg.as_dict(), "This report": summary["provenance"]["report"]}
    for title, value in {**facts, **summary["provenance"]["runs"]}.items():
        text = html.escape(json.dumps(value, indent=1))
        yield f'<details><summary>{html.escape(title)}</summary><pre tabindex="0">{text}</pre></details>'
    yield "</section>"


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """A sortable table that scrolls inside its own box."""
    head = "".join(f'<th scope="col"><button>{html.escape(x) or "strategy"}</button></th>' for x in names)
    body = "".join(f"<tr>{''.join(map(_td, row))}</tr>" for row in rows)
    text = html.escape(caption)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{text}"><table><caption>{text}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _td(value: Any) -> str:
    text = str(value)
    if isinstance(value, _Link):
        filters = html.escape(json.dumps(value.filters))
        return f'<td><button class="cell" data-show="{filters}">{html.escape(text)}</button></td>'
    return f"<td{' class=long' if len(text) > 45 else ''}>{html.escape(text)}</td>"


def _from_markdown(text: str, caption: str) -> str:
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return _table(rows[0], rows[2:], caption)
