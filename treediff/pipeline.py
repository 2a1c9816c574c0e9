"""The order of the stages, and what is made when something is missing: the only place that knows.

    path = scored(cfg, "tinycode", 96)        # trains, samples and scores what is not there yet

A stage itself reads what the one before it left in the run directory and never makes it. What is there is used again;
what was killed goes on. Commands and notebooks call the stages through here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treediff.config import Config
from treediff.data import benchmarks, prepare, reach, sources
from treediff.masking import tokens
from treediff.report import comparisons, report
from treediff.runs import open_run
from treediff.sampling import run as sampling
from treediff.scoring import infill as infill_scoring
from treediff.scoring import restore, stats
from treediff.scoring import run as scoring
from treediff.scoring import score as judge
from treediff.training import launch, plan

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast


def tokenizer(cfg: Config) -> PreTrainedTokenizerFast:
    """The run's tokenizer; trained on the backbone's rows first, if it is to be."""
    sources.train_tokenizer(cfg)
    return tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)


def prepared(cfg: Config, out: Path | None = None) -> datasets.Dataset:
    """The encoded data set of `cfg`, in `out` or under runs/<preset>/data."""
    sources.train_tokenizer(cfg)
    return prepare.prepare(cfg, out)


def share_prepared(cfg: Config, number: int, of: int, out: Path | None = None) -> Path:
    """A share of that data set's parts, which `prepared` puts together when all are there; their folder."""
    sources.train_tokenizer(cfg)
    return prepare.encode_share(cfg, number, of, out)


def statistics(cfg: Config, out: Path | None = None) -> dict[str, Any]:
    """What is known of that data set (prepare.stats), and how far the rules reach on it (reach.reach)."""
    data = prepared(cfg, out)
    return prepare.stats(cfg, out) | {"reach": reach.reach(cfg, data)}


def reach_of(cfg: Config) -> dict[str, Any] | None:
    """How far the rules reach on the run's data set; None as long as that is not prepared. Makes nothing."""
    folder = Path(sources.tokenizer_folder(cfg))
    if not folder.is_dir() or not (prepare.data_folder(cfg) / "stats.json").exists():
        return None
    return reach.reach(cfg, prepare.load(cfg))


def trained(cfg: Config) -> Path:
    """The run directory with its weights: the backbone and the data first, then the run itself."""
    if not launch.is_trained(cfg):
        plan.require_room(cfg)
    run_dir = open_run(cfg, *launch.TRAINING_STAGES)
    if not launch.is_trained(cfg):
        if cfg.masking != "none":
            trained(cfg.with_masking("none"))
        prepared(cfg)
        launch.train(cfg)
    return run_dir


def sampled(cfg: Config, benchmark: str, length: int) -> Path:
    """The run's samples of a benchmark with `length` tokens each."""
    return all_sampled(cfg.of(benchmark).but(benchmarks=[benchmark], lengths=[length]))[benchmark, length]


def all_sampled(cfg: Config) -> dict[tuple[str, int], Path]:
    """The run's samples of all its benchmarks and lengths, for which the model is loaded once (under a protocol that
    has other switches for each benchmark, once for each).

    A process of a launcher (torchrun) never trains.
    """
    if "tinycode" in cfg.benchmarks:
        benchmarks.write_tinycode(cfg)
    if not cfg.model and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        trained(cfg)
    together: dict[str, tuple[Config, list[tuple[str, int]]]] = {}
    for benchmark, length in cfg.jobs:
        of = cfg.of(benchmark)
        alike = json.dumps({**of.as_dict(), "benchmarks": None, "lengths": None})
        together.setdefault(alike, (of, []))[1].append((benchmark, length))
    return {
        job: path
        for of, jobs in together.values()
        for job, path in zip(jobs, sampling.sample_all(of, jobs), strict=True)
    }


def scored(cfg: Config, benchmark: str, length: int) -> Path:
    """The ledger of those samples."""
    sampled(cfg, benchmark, length)
    return scoring.score(cfg.of(benchmark), benchmark, length)


def all_scored(cfg: Config, strategies: Iterable[str]) -> list[Path]:
    """The ledgers of these strategies' runs beside `cfg`, on all its benchmarks and lengths."""
    runs = [cfg.with_masking(s) for s in strategies]
    return [scored(run, benchmark, length) for run in runs for benchmark, length in cfg.jobs]


def infilled(cfg: Config, hole_set: str) -> Path:
    """The ledger of the run's completions of a hole set, trained, filled and scored as far as need be."""
    if "tinycode" in hole_set:
        benchmarks.write_tinycode(cfg)
    if not cfg.model and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        trained(cfg)
    sampling.sample(cfg, hole_set, None)
    infill_scoring.floor(cfg, hole_set)
    return infill_scoring.score(cfg, hole_set)


def results_said(cfg: Config) -> list[str]:
    """A line on each ledger that the run has, of its benchmarks and lengths and under its sampling switches' name."""
    lines = []
    for benchmark, length in cfg.jobs:
        if (path := scoring.ledger_path(cfg, benchmark, length)).exists():
            of = judge.passes(scoring.read(path, cfg.verdicts))
            n = of["n"]
            lines.append(f"- {cfg.named(f'{benchmark}, T = {length}')}: base {of['base']}/{n}, plus {of['plus']}/{n}")
    return lines


def infill_said(cfg: Config, hole_set: str) -> str:
    """One line on that ledger: the share of holes that pass, with its interval, and how many pass when left empty."""
    found, empty = infill_scoring.outcomes(cfg, hole_set), infill_scoring.floor(cfg, hole_set)
    program = {hole: r["task"] for hole, r in found.items()}
    rate = stats.clustered([{hole: int(r["passed"]) for hole, r in found.items()}], program)
    same = sum(r["exact"] for r in found.values())
    percent = "{rate:.1%} [{low:.1%}, {high:.1%}] of {holes} holes in {programs} programs".format(**rate)
    return (
        f"{hole_set}, hole_length {cfg.hole_length}: {percent} pass, {same} as they were; {len(empty)} pass left empty"
    )


def restored(cfg: Config) -> Path:
    """The ledger of the AST nodes that the run restores whole, of the held-out part of `data = stdlib`."""
    trained(cfg)
    return restore.score(cfg)


def reported(cfg: Config) -> Path:
    """The report's page on all runs of the preset that are there; without any, no tokenizer is made or asked for."""
    if comparisons.ledgers(cfg):
        sources.train_tokenizer(cfg)
    return report.write(cfg)
