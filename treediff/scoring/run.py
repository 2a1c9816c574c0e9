"""The ledger of one run on one benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treediff import usage
from treediff.config import Config
from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.files import read_json
from treediff.sampling.run import name, samples_path
from treediff.scoring import departures
from treediff.scoring import score as scoring


def ledger_path(cfg: Config, benchmark: str, length: int) -> Path:
    """runs/<preset>/<run>/scores/<benchmark>-T<length>.json, the sampling switches' name behind T if they have one."""
    return cfg.run_dir / "scores" / f"{name(cfg, benchmark, length)}.json"


def score(cfg: Config, benchmark: str, length: int) -> Path:
    """Score the run's samples; the ledger's path. Raises UserError if they are not there."""
    out = ledger_path(cfg, benchmark, length)
    wanted = list(benchmarks.benchmark_problems(cfg, benchmark))
    data, samples = benchmarks.benchmark_file(cfg, benchmark), samples_path(cfg, benchmark, length)
    with usage.attempt(cfg.run_dir, "score", 0):
        scoring.score(benchmark, data, samples, out, workers=cfg.workers, limit_to=wanted, label=cfg.label)
    return out


def read(path: Path, verdicts: str) -> dict[str, Any]:
    """The ledger in a file, its verdicts `own` or those of `evalplus`. Raises UserError that names the file."""
    try:
        return departures.counted(read_json(path), verdicts)
    except UserError as e:
        raise e if str(path) in str(e) else UserError(f"{path}: {e}") from None
