"""Where rows come from: TinyCode, Python's standard library, a JSONL or Parquet file, a hub data set; and the tokenizer
that is trained on them.

    for row in rows(cfg): ...                     # OpenCodeReasoning's columns: id, input, output, solution

A row that cannot be read is an error that names its file and line.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from treediff.config import Config
from treediff.data import examples, stdlib, tinycode
from treediff.errors import UserError
from treediff.files import numbered_lines, read_row, whole
from treediff.masking import tokens

COLUMNS = ("id", "input", "output", "solution")
"""What is read of a row, in OpenCodeReasoning's names."""


def rows(cfg: Config) -> Iterator[dict[str, Any]]:
    """The rows of `cfg.data`, streamed. Raises UserError naming the file and row that cannot be read."""
    return (read_row(cfg.data, number, row) for number, row in raw_rows(cfg))


def raw_rows(cfg: Config) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """Number (from 0) and content of each row. A JSONL file's lines are left for `read_row`, so that the processes
    that encode them can read them too."""
    if cfg.data == "tinycode":
        yield from enumerate(tinycode.training(cfg.rows, cfg.data_seed))
    elif cfg.data in stdlib.SOURCES:
        yield from enumerate(stdlib.rows(every=cfg.data == "stdlib_all"))
    elif Path(cfg.data).suffix in (".jsonl", ".json"):
        yield from numbered_lines(Path(cfg.data))
    elif Path(cfg.data).suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(cfg.data)
            batches = file.iter_batches(100, columns=[c for c in COLUMNS if c in file.schema_arrow.names])
            yield from enumerate(row for batch in batches for row in batch.to_pylist())
        except (OSError, ValueError) as e:
            raise UserError(f"{cfg.data}: cannot be read as Parquet ({e}).") from None
    else:
        import datasets

        try:
            found = datasets.load_dataset(cfg.data, cfg.data_split, split=cfg.data_split, streaming=True)
            yield from enumerate({c: row[c] for c in COLUMNS if c in row} for row in found)
        except Exception as e:  # the hub's errors have no common base; all mean that the data is out of reach
            reason = str(e).strip().splitlines()[0]
            raise UserError(
                f"data: {cfg.data} is no `tinycode`, `stdlib` or `stdlib_all`, no .jsonl or .parquet file and no "
                f"reachable data set ({reason})."
            ) from None


def fingerprint(*parts: Any) -> str:
    """12 hex digits of a hash of JSON-able `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def tokenizer_folder(cfg: Config) -> str:
    """`cfg.tokenizer`, or the folder of the BPE that `train_tokenizer` makes."""
    if cfg.tokenizer != "train":
        return cfg.tokenizer
    backbone = cfg.with_masking("none")
    made_of = backbone.as_dict("data")
    mark = fingerprint({k: made_of[k] for k in _TOKENIZER_SWITCHES}, data_stamp(backbone))
    return str(cfg.preset_dir / f"tokenizer-{mark}")


def train_tokenizer(cfg: Config) -> None:
    """Train the BPE on the backbone's training rows, if the run is to have one and it is not there."""
    if cfg.tokenizer != "train" or (folder := Path(tokenizer_folder(cfg))).is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # of other processes that begin at once
        if folder.is_dir():
            return
        log.info("training a BPE tokenizer of %d entries", cfg.vocab_size)
        with whole(folder) as temporary:
            # With the words of the chat template, which stand in every sample.
            found = _examples(cfg.with_masking("none"))
            texts = (f"user\n\n{e.prompt}\nassistant\n\n{e.answer()[0]}" for e in found)
            tokens.train_tokenizer(texts, cfg.vocab_size, temporary)


def _examples(cfg: Config) -> Iterator[examples.Example]:
    """The rows that can serve, whatever their length."""
    for row in rows(cfg):
        with suppress(examples.Dropped):
            yield examples.example(row, cfg.language, cfg.empty_reasoning)


log = logging.getLogger(__name__)

_TOKENIZER_SWITCHES = ("data", "data_split", "rows", "data_seed", "vocab_size", "language", "empty_reasoning")


def data_stamp(cfg: Config) -> Any:
    """What stands for the rows: a file's size and time; TinyCode's own source; Python's version and the standard
    library's files; nothing for a hub data set."""
    if cfg.data == "tinycode":
        return tinycode.stamp()
    if cfg.data in stdlib.SOURCES:
        return stdlib.stamp()
    source = Path(cfg.data)
    return [source.stat().st_size, source.stat().st_mtime_ns] if source.is_file() else []
