"""The ledger of one run on one benchmark."""

from __future__ import annotations

from pathlib import Path

from treediff.config import Config
from treediff.data import benchmarks
from treediff.sampling.run import sampled
from treediff.scoring import score


def ledger_path(cfg: Config, benchmark: str, length: int) -> Path:
    return cfg.run_dir / "scores" / f"{benchmark}-T{length}.json"


def scored(cfg: Config, benchmark: str, length: int) -> Path:
    """The ledger of one run on one benchmark; trains, samples and scores whatever is missing."""

    samples = sampled(cfg, benchmark, length)
    out = ledger_path(cfg, benchmark, length)
    wanted = list(benchmarks.benchmark_problems(cfg, benchmark))
    score.score(
        benchmark, benchmarks.benchmark_file(cfg, benchmark), samples, out, workers=cfg.workers, limit_to=wanted
    )
    return out
