"""The problems of a benchmark: TinyCode's, a file in EvalPlus's format, or EvalPlus's own download.

    problems, sha256 = load_benchmark("humaneval", Path("HumanEvalPlus-v0.1.10.jsonl.gz"))
    problems["HumanEval/0"]["prompt"]

A field that is missing is an error that names file and row.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treediff.config import Config
from treediff.data import tinycode
from treediff.errors import UserError
from treediff.files import whole


def benchmark_problems(cfg: Config, benchmark: str) -> dict[str, dict[str, Any]]:
    """The problems to sample, by task id: all, or `limit` of them spread evenly."""

    problems, _ = load_benchmark(benchmark, benchmark_file(cfg, benchmark))
    return {i: problems[i] for i in spread(list(problems), cfg.limit)}


def spread(ids: list[str], limit: int) -> list[str]:
    """`limit` of the ids, spread evenly; all of them if it is 0."""
    return [ids[i * len(ids) // limit] for i in range(limit)] if 0 < limit < len(ids) else ids


def benchmark_file(cfg: Config, benchmark: str) -> Path | None:
    """The file of a benchmark's problems: TinyCode's below runs/<preset>, others' as `benchmark_files` says; None is
    EvalPlus's own download."""
    if benchmark == "tinycode":
        return tinycode_file(cfg)
    path = cfg.benchmark_files.get(benchmark)
    return Path(path) if path else None


def tinycode_file(cfg: Config) -> Path:
    """Where TinyCode's problems lie, whether they are there or not."""
    return cfg.preset_dir / f"tinycode-{tinycode.stamp()[:12]}.jsonl"


def write_tinycode(cfg: Config) -> Path:
    """The file of TinyCode's problems, made if it is missing."""
    path = tinycode_file(cfg)
    if not path.exists():
        with whole(path) as temporary:
            temporary.write_text("".join(json.dumps(p) + "\n" for p in tinycode.benchmark()))
    return path


PARTS = ("base", "plus")
RELEASES = {
    "42526ec0e7d5f3ee0b06d6ced98f8c8bae3d76519151bfb3d36f79010645bd7f": "HumanEvalPlus v0.1.10",
    "b54e762755248ca411b523c917fa9f93c07b5ff2966bf60b3917b853926a3dad": "MbppPlus v0.2.0",
}
"""EvalPlus's data files by the SHA-256 of their unpacked content."""
FIELDS = {"prompt": str, "entry_point": str, "canonical_solution": str, "base_input": list, "plus_input": list}


def load_benchmark(name: str, data: Path | None = None) -> tuple[dict[str, dict[str, Any]], str]:
    """The problems of `humaneval`, `mbpp` or `tinycode` by task id, and the SHA-256 of the unpacked data file.

    `data` is an EvalPlus-format JSONL or .jsonl.gz file; without it, EvalPlus finds or downloads its own.
    """
    if name not in ("humaneval", "mbpp", "tinycode"):
        raise UserError(f"benchmark: there is no {name!r}; choose humaneval, mbpp or tinycode.")
    path = Path(data) if data else _download(name)
    raw = unpack(path)
    digest = hashlib.sha256(raw).hexdigest()
    if not data and digest not in RELEASES and not os.environ.get(f"{name.upper()}_OVERRIDE_PATH"):
        raise UserError(
            f"{path}: EvalPlus's download is no release known here (SHA-256 {digest}), perhaps cut short; delete the "
            "file to have it downloaded again."
        )
    problems: dict[str, dict[str, Any]] = {}
    for row, problem in rows(path, raw):
        if problem.get("plus_input") == {}:  # how MbppPlus writes that a task has no further tests
            problem["plus_input"] = []
        wrong = [k for k, t in FIELDS.items() if not isinstance(problem.get(k), t)]
        if not isinstance(problem.get("task_id"), str) or wrong:
            raise UserError(
                f"{path}, row {row}: {(wrong or ['task_id'])[0]} is missing or no EvalPlus field; "
                f"give a file in the format of EvalPlus's {name}."
            )
        if not problem["base_input"]:
            raise UserError(f"{path}, row {row}: base_input is empty; every task needs a test.")
        if problem["task_id"] in problems:
            raise UserError(f"{path}, row {row}: task {problem['task_id']} is there twice; delete one.")
        if name == "mbpp":
            from evalplus.data.mbpp import mbpp_deserialize_inputs

            for part in PARTS:
                key = f"{part}_input"
                problem[key] = mbpp_deserialize_inputs(problem["task_id"], problem[key])
        problems[problem["task_id"]] = problem
    if not problems:
        raise UserError(f"{path}: there is no task in it; give a file in the format of EvalPlus's {name}.")
    return problems, digest


def _download(name: str) -> Path:
    """EvalPlus's own copy of its data, downloaded if need be."""
    if name == "tinycode":
        raise UserError(
            "data: tinycode has no download; give the file tinycode-*.jsonl that sampling left in runs/<preset>/."
        )
    from evalplus.data import humaneval, mbpp

    ready = {"humaneval": humaneval._ready_human_eval_plus_path, "mbpp": mbpp._ready_mbpp_plus_path}[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Path(ready())
    except Exception as e:  # whatever urllib, gzip or the file system may raise
        raise UserError(
            f"{name}: EvalPlus could not download it ({type(e).__name__}: {e}); give its file with --problems."
        ) from None


def unpack(path: Path) -> bytes:
    """The content of a file, unpacked if it is gzip. Raises UserError if it cannot be read."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); give another file.") from None


def rows(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, object) of each non-blank line."""
    for row, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            raise UserError(f"{path}, row {row}: not a line of JSON; mend or delete it.") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}, row {row}: not a JSON object; mend or delete it.")
        yield row, value
