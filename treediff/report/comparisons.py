"""The ledgers of all runs: which there are, which may be compared, and what comparing them says.

    found = ledgers(cfg)                    # {"ast": {("tinycode", 64): ledger, ...}, ...}: one seed, all strategies
    records = findings(cfg)                 # every pair of strategies, over all runs that there are
    sentences(records)                      # what they allow to be said

Runs that were trained, sampled or scored under different settings are refused, with the difference named.
"""

from __future__ import annotations

import functools
import hashlib
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from treediff.config import Config
from treediff.errors import UserError
from treediff.files import read_json, read_jsonl
from treediff.protocols import PROTOCOLS
from treediff.report.paper import HALVES, PAIRS
from treediff.report.tables import Cell, Table, estimate, rate
from treediff.runs import comparable, of_stages, rows_per_step
from treediff.sampling.run import samples_path
from treediff.scoring import departures, stats
from treediff.scoring.run import ledger_path
from treediff.scoring.run import read as read_ledger
from treediff.strategies import BEYOND, STRATEGIES


def autoregressive_table(cfg: Config) -> Table | None:
    """The pass rates of all autoregressive models that were sampled and scored under this preset; None without any.

    Which prompt style, extraction and length each was sampled under stands beside it: rates of others cannot be set
    against it without.
    """
    rows = []
    for path in sorted(cfg.preset_dir.glob("model-*/scores/*.json")):
        ledger = read_ledger(path, cfg.verdicts)
        made = next(iter(read_jsonl(path.parents[1] / "samples" / f"{path.stem}.jsonl")))["settings"]
        if made.get("protocol", "none") != cfg.protocol:
            continue
        how = ", ".join(str(made[k]) for k in ("prompt_style", "think", "extract", "decoding") if k in made)
        for part, name in zip(("base", "plus"), HALVES[ledger["benchmark"]], strict=True):
            rows.append([made["model"], name, made["T"], how, rate(counted(ledger, part))])
    head = ["model", "benchmark", "longest answer", "prompt, think, extract", "pass@1 [%]"]
    return Table(head, rows, "Ours, through the same prompts") if rows else None


def counted(ledger: Ledger, part: str) -> dict[str, Any]:
    """stats.rated of a ledger's part; where EvalPlus and we count otherwise, `other` is what the other counts."""
    counts, others = stats.counts(ledger, part), stats.counts(departures.other(ledger), part)
    if counts == others:
        return stats.rated(counts)
    who = "EvalPlus" if ledger["settings"].get("verdicts", "own") == "own" else "own"
    return stats.rated(counts) | {"other": sum(c for c, _ in others.values()), "other_verdicts": who}


ROWS = tuple(STRATEGIES)
COMPARED = [*PAIRS, *(("random", s) for s in BEYOND)]
BACKBONE = ("tokenizer", "backbone", "revision", "d_model", "n_layers", "n_heads", "mlp_hidden", "pretrain")
"""Switches in which a backbone must agree with the runs that were fine-tuned from it."""
Key = tuple[str, int]  # benchmark, T
Ledger = dict[str, Any]
Runs = dict[str, tuple[Config, Ledger]]  # by a name of the run


def ledger_name(cfg: Config, benchmark: str, length: int) -> str:
    """The ledger's path below runs/<preset>, as the report names it."""
    return ledger_path(cfg, benchmark, length).relative_to(cfg.preset_dir).as_posix()


def ledgers(cfg: Config) -> dict[str, dict[Key, Ledger]]:
    """The ledgers of this seed that are there, by strategy and (benchmark, T).

    Raises UserError if two runs were trained, sampled or scored under different settings: they could not be compared.
    """
    found: dict[str, dict[Key, Ledger]] = {}
    for strategy in ROWS:
        run = cfg.with_masking(strategy)
        for key in cfg.jobs:
            if (ledger := _read(run, key)) is not None:
                found.setdefault(strategy, {})[key] = ledger
    for key in {k for by_key in found.values() for k in by_key}:
        _same_settings(key, {s: (cfg.with_masking(s), by_key[key]) for s, by_key in found.items() if key in by_key})
    return found


def all_seeds(cfg: Config) -> dict[Key, Runs]:
    """The runs of all strategies and seeds that have a ledger, by (benchmark, T) and name; refused as in `ledgers`."""
    out: dict[Key, Runs] = {}
    for key in cfg.jobs:
        runs = {
            f"{strategy}-seed{seed}": (run, ledger)
            for strategy, of in seeds(cfg).items()
            for seed in of
            if (ledger := _read(run := cfg.with_masking(strategy).but(seed=seed), key)) is not None
        }
        _same_settings(key, runs)
        out[key] = runs
    return out


def decodings(cfg: Config) -> list[dict[str, Any]]:
    """The runs of this seed under every name of sampling switches (`decoding`, `protocol`) that has a ledger.

    One record per strategy, benchmark, T, name and tests: the rate, and the `switches` that differ from those of the
    first name there. Empty as long as there is one name.
    """
    out = []
    for strategy in ROWS:
        run = cfg.with_masking(strategy)
        found = (_LEDGER.fullmatch(path.stem) for path in (run.run_dir / "scores").glob("*-T*.json"))
        for benchmark, length, name in sorted((m[1], int(m[2]), m[3] or "") for m in found if m):
            if benchmark not in cfg.benchmarks:
                continue
            path = run.run_dir / "scores" / f"{benchmark}-T{length}{f'-{name}' if name else ''}.json"
            ledger = _of_file(path, benchmark, cfg.verdicts)
            made = next(iter(read_jsonl(path.parents[1] / "samples" / f"{path.stem}.jsonl")))["settings"]
            first = next(
                (r["made"] for r in out if (r["strategy"], r["of"], r["T"]) == (strategy, benchmark, length)), made
            )
            head = {"strategy": strategy, "of": benchmark, "T": length, "decoding": name, "made": made}
            others = {k: v for k, v in made.items() if k not in ("decoding", "protocol") and v != first.get(k)}
            for part, tests in zip(("base", "plus"), HALVES[benchmark], strict=True):
                out.append(head | {"switches": others, "benchmark": tests} | counted(ledger, part))
    several = len({r["decoding"] for r in out}) > 1
    return [{k: v for k, v in r.items() if k not in ("of", "made")} for r in out if several]


_LEDGER = re.compile(r"([a-z]+)-T(\d+)(?:-([a-z0-9_]+))?")


def _read(run: Config, key: Key) -> Ledger | None:
    """A run's ledger, if it has one; see `_of_file`."""
    path = ledger_path(run, *key)
    return _of_file(path, key[0], run.verdicts) if path.exists() else None


def _of_file(path: Path, benchmark: str, verdicts: str) -> Ledger:
    """The ledger in a file. Raises UserError if it is not that of the samples beside it, or if these say that they
    were made under a protocol and were not."""
    ledger, samples = read_ledger(path, verdicts), path.parents[1] / "samples" / f"{path.stem}.jsonl"
    if not samples.exists():
        return ledger
    sha256 = ledger["settings"].get("samples_sha256")
    if sha256 and _sha256(samples, samples.stat().st_mtime_ns) != sha256:
        raise UserError(f"{path}: it is the ledger of other samples than {samples} holds now; score them again.")
    made = next(iter(read_jsonl(samples)))["settings"]
    if protocol := PROTOCOLS.get(made.get("protocol", "")):
        for name, (theirs, wanted) in protocol.differences(benchmark, made).items():
            raise UserError(
                f"{samples}: sampled with {name} = {theirs!r}, where protocol {protocol.name} has {wanted!r}; it "
                "cannot stand in that protocol's table: delete the file and sample again."
            )
    return ledger


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, changed_ns: int) -> str:
    """Of a file that last changed then: every table asks for the same ones."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ledger_settings(key: Key, run: Config, ledger: Ledger) -> dict[str, Any]:
    """How the ledger's samples were made and scored."""
    own = {k: v for k, v in ledger["settings"].items() if "samples" not in k}
    lines = read_jsonl(samples_path(run, *key))
    return own | {f"sampling {k}": v for k, v in next(iter(lines))["settings"].items()}


def _same_settings(key: Key, runs: Runs) -> None:
    """Refuse runs whose ledgers of `key` cannot be compared."""
    known: dict[str, tuple[str, Any]] = {}
    for who, (run, ledger) in runs.items():
        own = ledger_settings(key, run, ledger)
        own["tasks"] = sorted(ledger["tasks"])
        own["samples per task"] = sorted({n for _, n in stats.counts(ledger, "base").values()})
        if len({r.seed for r, _ in runs.values()}) > 1:
            own.pop("sampling seed", None)
        if (run.run_dir / "config.json").exists():
            made = read_json(run.run_dir / "config.json")
            trained = comparable(of_stages(made, "data", "train")) | {"rows_per_step": rows_per_step(made)}
            # Runs of several seeds may have several backbones: those of one seed have the same.
            trained[f"backbone_seed (of seed {run.seed})"] = trained.pop("backbone_seed", -1)
            names = BACKBONE if run.masking == "none" else trained
            own |= {f"training switch {n}": trained[n] for n in names if n in trained}
        for name, value in own.items():
            first, other = known.setdefault(name, (who, value))
            if other != value:
                values = f" ({other!r} and {value!r})" if len(f"{other!r}{value!r}") < 80 else ""
                raise UserError(
                    f"{key[0]} at T = {key[1]}: {first} and {who} differ in {name}{values}, so they cannot be "
                    "compared; make one of them again."
                )


def seeds(cfg: Config) -> dict[str, list[int]]:
    """The seeds that have a run directory, by strategy."""
    found = {s: [int(m[1]) for p in cfg.preset_dir.glob(f"{s}-seed*") if (m := _SEED.search(p.name))] for s in ROWS}
    return {s: sorted(k) for s, k in found.items() if k}


_SEED = re.compile(r"-seed(\d+)$")


def shown(cfg: Config, strategies: tuple[str, ...]) -> tuple[str, ...]:
    """These strategies, and those beyond the paper's that were run with this seed."""
    return (*strategies, *(s for s in BEYOND if cfg.with_masking(s).run_dir.exists()))


def sandbox_layers(cfg: Config) -> dict[str, Any]:
    """The sandbox that the ledgers name (all runs of a preset are scored on one machine, or say so)."""
    layers = [ledger["sandbox"] for by_key in ledgers(cfg).values() for ledger in by_key.values()]
    if not layers:
        return {}
    return layers[0] if all(x == layers[0] for x in layers) else {"differs between runs": layers}


# --- comparisons ---------------------------------------------------------------------------------------------------
def comparisons(cfg: Config) -> list[dict[str, Any]]:
    """Every pair of runs of this seed on every benchmark and T, on base and plus tests of the same tasks.

    Difference [points] with its paired bootstrap interval, discordant tasks, exact p over tasks (McNemar's;
    stats.SAMPLES where tasks have several samples), and p adjusted for the whole list (Holm). They speak of these runs.
    """
    found = ledgers(cfg)
    out = []
    for one, two in COMPARED:
        for key in found.get(one, {}):
            if key not in found.get(two, {}):
                continue
            both = stats.compare(*(stats.passed(found[s][key], "plus") for s in (one, two)))
            counts = {"both": both["both"], "only_from": both["only_a"], "only_to": both["only_b"]}
            runs = [cfg.with_masking(s) for s in (one, two)]
            out.append(
                _points(one, two, key, both)
                | counts
                | {"neither": both["neither"], "ledgers": [ledger_name(r, *key) for r in runs]}
                | {"runs": [r.run_dir.name for r in runs]}
            )
    return _with_holm(out)


def pooled(cfg: Config) -> list[dict[str, Any]]:
    """The comparisons of strategies with two runs (seeds) each at least: stats.pooled, p adjusted for all (Holm).

    Runs are compared in pairs where both strategies have the same seeds and each seed its own backbone. `p_tasks` is
    the exact sign-flip test over tasks: it speaks of these runs' models alone.
    """
    out = []
    for key, runs in all_seeds(cfg).items():
        for one, two in COMPARED:
            sides = [{r.seed: stats.passed(v, "plus") for r, v in runs.values() if r.masking == s} for s in (one, two)]
            record = pooled_record(one, two, key, *sides, own_backbones(runs) and sides[0].keys() == sides[1].keys())
            if record:
                means = [
                    {t: Fraction(sum(run[t] for run in of.values()), len(of)) for t in of[min(of)]} for of in sides
                ]
                record |= {"p_tasks": stats.sign_flip(stats.paired(*means))}
                out.append(record | {"runs": [name for name, (r, _) in runs.items() if r.masking in (one, two)]})
    return _with_holm(out)


def own_backbones(runs: Runs) -> bool:
    """Whether each seed has a backbone of its own, which its runs share: those of a study share one over seeds."""
    made = [read_json(p) for run, _ in runs.values() if (p := run.run_dir / "config.json").exists()]
    return all(m["backbone"] == "pretrain" and m.get("backbone_seed", -1) < 0 for m in made)


def pooled_record(
    one: str, two: str, key: Key, a: dict[int, stats.Passes], b: dict[int, stats.Passes], paired: bool
) -> dict[str, Any] | None:
    """Two strategies' runs by seed compared (stats.pooled) [points]; None where chance between runs is unknown."""
    if min(len(a), len(b)) < 2:
        return None
    found = stats.pooled(list(a.values()), list(b.values()), paired_runs=paired)
    return None if found["p"] is None else _points(one, two, key, found) | {"seeds": found["runs"], "paired": paired}


def _points(one: str, two: str, key: Key, found: dict[str, Any]) -> dict[str, Any]:
    """A comparison's record with its shares in points."""
    head = {"benchmark": HALVES[key[0]][1], "T": key[1], "from": one, "to": two, "tasks": found["n"], "p": found["p"]}
    return head | {k: 100 * found[k] for k in ("difference", "low", "high")}


def seed_rates(cfg: Config) -> list[dict[str, Any]]:
    """Pass rates [percent] on base and plus tests of every strategy over its seeds: each run's, mean, interval, sd.

    Empty while each strategy has one seed.
    """
    out = []
    for key, runs in all_seeds(cfg).items():
        for strategy in ROWS:
            passes = {name: stats.passed(v, "plus") for name, (r, v) in runs.items() if r.masking == strategy}
            if not passes:
                continue
            rates = stats.pooled_rate(list(passes.values()))
            record = {"strategy": strategy, "benchmark": HALVES[key[0]][1], "T": key[1]}
            record |= {k: None if rates[k] is None else 100 * rates[k] for k in ("mean", "low", "high", "sd")}
            out.append(record | {"runs": dict(zip(passes, (100 * r for r in rates["rates"]), strict=True))})
    return out if any(len(r["runs"]) > 1 for r in out) else []


def _with_holm(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    adjusted = stats.holm([r["p"] for r in records])
    return [r | {"p_holm": p} for r, p in zip(records, adjusted, strict=True)]


# --- in words ------------------------------------------------------------------------------------------------------
def findings(cfg: Config) -> list[dict[str, Any]]:
    """Every comparison once: `pooled` over runs where there are several, else the two runs of this seed."""
    several = pooled(cfg)
    done = {_place(r) for r in several}
    return [*several, *(r for r in comparisons(cfg) if _place(r) not in done)]


def _place(r: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(r[k] for k in ("from", "to", "benchmark", "T"))


ONE_RUN = "one training run each ({}): this compares two models, not two methods"


def decides(record: dict[str, Any], level: float = 0.05) -> bool:
    """Whether a finding allows a difference between two strategies to be claimed: never from one run of each."""
    return "seeds" in record and record["p_holm"] < level


def sentence(r: dict[str, Any]) -> str:
    """What one finding allows to be said. A p-value stands in it only where several runs of each were pooled."""
    names = f"{STRATEGIES[r['to']].title} against {STRATEGIES[r['from']].title}, {r['benchmark']} at T = {r['T']}"
    text = f"{names}: {estimate(r['difference'], r['low'], r['high'], '+')} points"
    if "seeds" not in r:
        return f"{text} on {r['tasks']} tasks; {ONE_RUN.format(' and '.join(r['runs']))}."
    how = "a difference" if decides(r) else "no difference can be told"
    runs = "{1} training runs against {0}".format(*r["seeds"])
    return f"{text} over {runs} and {r['tasks']} tasks: {how} (p = {r['p_holm']:.2g}, adjusted)."


def sentences(records: list[dict[str, Any]]) -> list[str]:
    """What `findings` allow to be said, one sentence each."""
    return [sentence(r) for r in records] or ["No two runs can be compared yet."]


def answer(records: list[dict[str, Any]]) -> str:
    """Whether AST masking beats random masking, as far as `findings` tell, at the largest T of each benchmark."""
    about = [r for r in records if (r["from"], r["to"]) == ("random", "ast")]
    about = [r for r in about if r["T"] == max(o["T"] for o in about if o["benchmark"] == r["benchmark"])]
    parts = []
    for r in about:
        change = (
            f"{r['difference']:+.1f} points (interval {r['low']:+.1f} to {r['high']:+.1f}) on the {r['tasks']} tasks"
        )
        change = f"AST masking against random masking: {change} of {r['benchmark']} at T = {r['T']}"
        if "seeds" in r:
            verdict = "so a difference can be claimed" if decides(r) else "so no difference can be told"
            runs = "{1} training runs with AST masking and {0} with random masking".format(*r["seeds"])
            parts.append(f"{change}, over {runs}, {verdict}.")
        else:
            runs = ONE_RUN.format(" and ".join(r["runs"])).capitalize()
            parts.append(f"{runs}. {change}. The interval is over tasks; what further runs would give is unknown.")
    return " ".join(parts) or "Nothing can be said yet: AST masking and random masking have not both been run."


# --- as tables -----------------------------------------------------------------------------------------------------
def shown_by(r: dict[str, Any]) -> dict[str, str]:
    """The task explorer's filters for a record's benchmark and T, and its strategy if it is of one."""
    benchmark = next(b for b, names in HALVES.items() if r["benchmark"] in names)
    filters = {"set": f"{benchmark}, T = {r['T']}"}
    return filters | ({"strategy": STRATEGIES[r["strategy"]].title} if "strategy" in r else {})


def _head(r: dict[str, Any]) -> list[Any]:
    change = estimate(r["difference"], r["low"], r["high"], "+")
    return [STRATEGIES[r["from"]].title, STRATEGIES[r["to"]].title, r["benchmark"], r["T"], change]


def comparisons_table(records: list[dict[str, Any]]) -> Table:
    """`comparisons`, a row each; a click on a count of tasks lists them."""

    def only(r: dict[str, Any], ahead: str, behind: str) -> Cell:
        filters = {"strategy": STRATEGIES[r[ahead]].title, "over": STRATEGIES[r[behind]].title}
        return Cell(r[f"only_{ahead}"], shown_by(r) | filters)

    head = ["from", "to", "benchmark", "T", "difference [points]", "only from", "only to", "tasks", "p over tasks"]
    rows = [
        [*_head(r), only(r, "from", "to"), only(r, "to", "from"), r["tasks"], f"{r['p']:.2g}", f"{r['p_holm']:.2g}"]
        for r in records
    ]
    return Table([*head, "its Holm"], rows, "Ours, one run each; exact test over tasks: compares these two models")


def decodings_table(records: list[dict[str, Any]]) -> Table | None:
    """`decodings`, a row each; None without records."""
    rows = [
        [
            *(STRATEGIES[r["strategy"]].title, r["benchmark"], r["T"], r["decoding"] or "(no name)", rate(r)),
            ", ".join(f"{k} {v}" for k, v in r["switches"].items()),
        ]
        for r in records
    ]
    head = ["", "tests", "T", "decoding", "pass@1 [%]", "switches that differ from the first"]
    return Table(head, rows, "One run under several decodings") if rows else None


def pooled_table(records: list[dict[str, Any]]) -> Table:
    """`pooled`, a row each."""
    head = ["from", "to", "benchmark", "T", "difference [points]", "runs", "p", "its Holm", "p over tasks"]
    rows = [
        [*_head(r), " and ".join(map(str, r["seeds"])), *(f"{r[k]:.2g}" for k in ("p", "p_holm", "p_tasks"))]
        for r in records
    ]
    caption = "Ours, all runs: p over runs and tasks; p over tasks is an exact test that compares these models alone"
    return Table(head, rows, caption)


def seed_rates_table(records: list[dict[str, Any]]) -> Table:
    """`seed_rates`, a row each."""
    rows = [
        [
            *(STRATEGIES[r["strategy"]].title, r["benchmark"], r["T"], estimate(r["mean"], r["low"], r["high"])),
            *(None if r["sd"] is None else f"{r['sd']:.1f}", ", ".join(f"{k}: {v:.1f}" for k, v in r["runs"].items())),
        ]
        for r in records
    ]
    head = ["strategy", "benchmark", "T", "mean [%]", "sd between runs", "each run"]
    return Table(head, rows, "Pass rates over runs, with intervals over runs and tasks")
