"""The ledgers of all runs: which there are, which may be compared, and what comparing them says.

    found = ledgers(cfg)                    # {"ast": {("tinycode", 64): ledger, ...}, ...}: one seed, all strategies
    records = comparisons(cfg)              # every pair of strategies, task by task
    print(verdicts(records))                # in sentences

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
from treediff.report.paper import HALVES, PAIRS
from treediff.report.tables import cell
from treediff.runs import SHARED_OUT, of_stages, rows_per_step
from treediff.sampling.run import samples_path
from treediff.scoring import stats
from treediff.scoring.run import ledger_path
from treediff.strategies import BEYOND, STRATEGIES


def autoregressive_rates(cfg: Config) -> str:
    """The pass rates of all models that were sampled and scored under this preset, as Markdown; empty without any.

    Which prompt style, extraction and length each was sampled under stands beside it: rates of others cannot be set
    against it without.
    """

    lines = []
    for path in sorted(cfg.preset_dir.glob("model-*/scores/*.json")):
        ledger = read_json(path)
        said = next(iter(read_jsonl(path.parents[1] / "samples" / f"{path.stem}.jsonl")))["settings"]
        how = ", ".join(str(said[k]) for k in ("prompt_style", "think", "extract"))
        for part, name in zip(("base", "plus"), HALVES[ledger["benchmark"]], strict=True):
            cells = (said["model"], name, said["T"], how, cell(stats.rated(stats.counts(ledger, part))))
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    head = ["| model | benchmark | longest answer | prompt, think, extract | pass@1 [%] |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


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
        for key in _keys(cfg):
            if (ledger := _read(run, key)) is not None:
                found.setdefault(strategy, {})[key] = ledger
    for key in {k for by_key in found.values() for k in by_key}:
        _same_settings(key, {s: (cfg.with_masking(s), by_key[key]) for s, by_key in found.items() if key in by_key})
    return found


def all_seeds(cfg: Config) -> dict[Key, Runs]:
    """The runs of all strategies and seeds that have a ledger, by (benchmark, T) and name; refused as in `ledgers`."""
    out: dict[Key, Runs] = {}
    for key in _keys(cfg):
        runs = {
            f"{strategy}-seed{seed}": (run, ledger)
            for strategy, of in seeds(cfg).items()
            for seed in of
            if (ledger := _read(run := cfg.with_masking(strategy).but(seed=seed), key)) is not None
        }
        _same_settings(key, runs)
        out[key] = runs
    return out


def _keys(cfg: Config) -> list[Key]:
    return [(b, t) for b in cfg.benchmarks for t in cfg.lengths]


def _read(run: Config, key: Key) -> Ledger | None:
    """A run's ledger, if it has one. Raises UserError if it is not that of the samples beside it."""
    path = ledger_path(run, *key)
    if not path.exists():
        return None
    ledger, samples = read_json(path), samples_path(run, *key)
    told = ledger["settings"].get("samples_sha256")
    if told and samples.exists() and _sha256(samples, samples.stat().st_mtime_ns) != told:
        raise UserError(f"{path}: it is the ledger of other samples than {samples} holds now; score them again.")
    return ledger


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, changed_ns: int) -> str:
    """Of a file that last changed then: every table asks for the same ones."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ledger_settings(key: Key, run: Config, ledger: Ledger) -> dict[str, Any]:
    """How the ledger's samples were made and scored."""
    mine = {k: v for k, v in ledger["settings"].items() if "samples" not in k}
    lines = read_jsonl(samples_path(run, *key))
    return mine | {f"sampling {k}": v for k, v in next(iter(lines))["settings"].items()}


def _same_settings(key: Key, runs: Runs) -> None:
    """Refuse runs whose ledgers of `key` cannot be compared."""
    known: dict[str, tuple[str, Any]] = {}
    for who, (run, ledger) in runs.items():
        mine = ledger_settings(key, run, ledger)
        mine["tasks"] = sorted(ledger["tasks"])
        mine["samples per task"] = sorted({n for _, n in stats.counts(ledger, "base").values()})
        if len({r.seed for r, _ in runs.values()}) > 1:
            mine.pop("sampling seed", None)
        if (run.run_dir / "config.json").exists():
            made = read_json(run.run_dir / "config.json")
            trained = {k: v for k, v in of_stages(made, "data", "train").items() if k not in SHARED_OUT}
            trained["rows_per_step"] = rows_per_step(made)
            # Runs of several seeds may have several backbones: those of one seed have the same.
            trained[f"backbone_seed (of seed {run.seed})"] = trained.pop("backbone_seed", -1)
            names = BACKBONE if run.masking == "none" else trained
            mine |= {f"training switch {n}": trained[n] for n in names if n in trained}
        for name, value in mine.items():
            first, theirs = known.setdefault(name, (who, value))
            if theirs != value:
                values = f" ({theirs!r} and {value!r})" if len(f"{theirs!r}{value!r}") < 80 else ""
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
    """Every pair of strategies of this seed on every benchmark and T, on base and plus tests of the same tasks.

    Difference [points] with its paired bootstrap interval, discordant tasks, exact p (McNemar's; stats.SAMPLES where
    tasks have several samples), and p adjusted for the whole list (Holm).
    """
    found = ledgers(cfg)
    out = []
    for one, two in COMPARED:
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
                    "ledgers": [ledger_name(cfg.with_masking(s), *key) for s in (one, two)],
                }
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
            if min(map(len, sides)) < 2:
                continue
            paired = cfg.backbone == "pretrain" and sides[0].keys() == sides[1].keys()
            record = stats.pooled(*(list(of.values()) for of in sides), paired_runs=paired)
            if record["p"] is None:
                continue
            means = [
                [sum((run[t] for run in of.values()), Fraction(0)) / len(of) for t in run0]
                for of, run0 in ((of, next(iter(sides[0].values()))) for of in sides)
            ]
            head = {"benchmark": HALVES[key[0]][1], "T": key[1], "from": one, "to": two, "tasks": record["n"]}
            head |= {k: 100 * record[k] for k in ("difference", "low", "high")} | {"p": record["p"]}
            head |= {"p_tasks": stats.sign_flip(zip(*means, strict=True)), "seeds": record["runs"], "paired": paired}
            out.append(head | {"runs": [name for name, (r, _) in runs.items() if r.masking in (one, two)]})
    return _with_holm(out)


def seed_rates(cfg: Config) -> list[dict[str, Any]]:
    """Pass rates [percent] on base and plus tests of every strategy over its seeds: each run's, mean, interval, sd.

    Empty while each strategy has one seed.
    """
    out = []
    for key, runs in all_seeds(cfg).items():
        for strategy in ROWS:
            mine = {name: stats.passed(v, "plus") for name, (r, v) in runs.items() if r.masking == strategy}
            if not mine:
                continue
            rates = stats.pooled_rate(list(mine.values()))
            record = {"strategy": strategy, "benchmark": HALVES[key[0]][1], "T": key[1]}
            record |= {k: None if rates[k] is None else 100 * rates[k] for k in ("mean", "low", "high", "sd")}
            out.append(record | {"runs": dict(zip(mine, (100 * r for r in rates["rates"]), strict=True))})
    return out if any(len(r["runs"]) > 1 for r in out) else []


def _with_holm(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    adjusted = stats.holm([r["p"] for r in records])
    return [r | {"p_holm": p} for r, p in zip(records, adjusted, strict=True)]


def verdicts(records: list[dict[str, Any]], level: float = 0.05) -> str:
    """What the comparisons (or the pooled ones) allow to be said, in sentences.

    An order only where the exact test's p, adjusted by Holm for all of them, is below `level`; of seeds pooled also
    only where the interval, which holds the seeds' share of chance, leaves out zero.
    """
    if not records:
        return "No two runs can be compared yet."
    adjusted = stats.holm([r["p"] for r in records])
    lines = []
    for r, p in zip(records, adjusted, strict=True):
        names = f"{STRATEGIES[r['to']].title} against {STRATEGIES[r['from']].title}, {r['benchmark']} at T = {r['T']}"
        interval = f" [{r['low']:+.1f}, {r['high']:+.1f}]" if "low" in r else ""
        tasks = f"{r['only_to']} tasks to {r['only_from']} of {r['tasks']}" if "only_to" in r else ""
        tasks = tasks or "{1} seeds against {0}".format(*r["seeds"])
        clear = p < level and ("seeds" not in r or not r["low"] <= 0 <= r["high"])
        said = f"a difference at p = {p:.2g}" if clear else f"no difference can be told (p = {p:.2g})"
        lines.append(f"- {names}: {r['difference']:+.1f}{interval} points ({tasks}): {said}.")
    return "\n".join(lines)
