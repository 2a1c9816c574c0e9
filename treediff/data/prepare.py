"""Rows -> a chosen, encoded Arrow data set: parallel over cores, in flat memory, going on after kill -9.

    data = prepare(cfg)              # a datasets.Dataset under runs/<preset>/data/, made if it is missing
    data[0]["input_ids"], data[0]["labels"], data[0]["spans"]
    stats(cfg)["rows"]               # how many rows were read, dropped for which reason, not chosen, kept

The rows are cut into chunks; each becomes one Arrow file under runs/<preset>/data/parts, written whole or not at all. A
call that follows a killed one takes over the files that are there, and so does one that only chooses other rows. Of the
rows that can serve, a seeded hash of their number chooses `rows`, or (`choice = first`) the first are taken and nothing
is read behind them; neither the processes nor a restart nor the order of work can change which.
Command: treediff prepare --data FILE --tokenizer FOLDER --out DIR
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from treediff import cards, progress
from treediff.config import Config
from treediff.data import contamination, examples, sources
from treediff.data.examples import Dropped
from treediff.data.sources import fingerprint
from treediff.errors import UserError
from treediff.files import read_json, read_row, whole, write_json
from treediff.masking import tiers, tokens
from treediff.masking.tokens import CODE, LABELS, PROMPT, REASONING

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast


log = logging.getLogger(__name__)
PART_BYTES = 16_000_000  # bytes of rows: what a kill can lose per process, and a process's memory, grow with it
SHARD = 128_000_000  # bytes of a file of the finished data set
HELD_BACK = 256
"""Rows that `choice = first` leaves before those it takes, for held-out evaluation."""
_FORMAT = 4  # raise it when the same rows and switches give other bits


def prepare(cfg: Config, out: Path | None = None) -> datasets.Dataset:
    """The encoded data set of `cfg`, made first if it is missing. Its statistics lie beside it in stats.json.

    Raises UserError if `out` holds something else, if no row can be used, or if the disk is full.
    """
    folder = Path(out or data_folder(cfg))
    if not (folder / "stats.json").exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty, and no data set of this kit; name another folder.")
        with _alone(folder):
            if not (folder / "stats.json").exists():
                _prepare(cfg, folder, out is None)
    return load(cfg, out)


def encode_share(cfg: Config, number: int, of: int, out: Path | None = None) -> Path:
    """Encode the chunks `number`, `number` + `of`, ... alone, as one of `of` calls on any machines that share the
    folder; `prepare` then takes over the parts of all. The folder of the parts.

    Raises UserError if there is no such share, or if the choice of rows reads only their beginning.
    """
    if not 0 <= number < of:
        raise UserError(f"share: {number}/{of} is none of 0/{of} to {of - 1}/{of}.")
    if cfg.choice == "first" and cfg.rows:
        raise UserError("choice: `first` reads no further than its rows; prepare them in one call, without --share.")
    parts = _parts(cfg, Path(out or data_folder(cfg)), out is None)
    cfg = cfg.but(tokenizer=sources.tokenizer_folder(cfg))

    def jobs() -> Iterator[tuple[Any, ...]]:
        for i, rows in enumerate(_chunks(cfg)):
            if i % of == number and not _part(parts, i).exists():
                yield cfg, _part(parts, i), rows

    parts.mkdir(parents=True, exist_ok=True)
    with (
        _alone(parts.with_name(f"{parts.name}-{number}")),
        progress.bar(desc=f"prepare {number}/{of}", unit=" rows", mininterval=2) as bar,
        closing(spread(cfg, encode_part, jobs())) as encoded,
    ):
        for done in encoded:
            bar.update(done)
    return parts


def load(cfg: Config, out: Path | None = None) -> datasets.Dataset:
    """The data set that `prepare` made. Raises UserError if it is not there, or was made from something else."""
    import datasets

    folder = Path(out or data_folder(cfg))
    if not (folder / "stats.json").exists():
        raise UserError(f"{folder}: there is no data set yet; run `treediff prepare` with the same switches first.")
    if read_json(folder / "stats.json")["fingerprint"] != data_fingerprint(cfg):
        raise UserError(f"{folder}: holds a data set made from other data or switches; name another folder.")
    return datasets.load_from_disk(str(folder)).with_format("numpy")


def stats(cfg: Config, out: Path | None = None) -> dict[str, Any]:
    """What is known of the prepared data set: rows at each filter, tokens by label, lengths, shares, contamination.

    The contamination is checked again if it was not checked yet, or against other benchmark files or embeddings.
    """
    folder = Path(out or data_folder(cfg))
    found: dict[str, Any] = read_json(folder / "stats.json")
    known = found["contamination"]
    other_model = cfg.embedder not in ("", known.get("embeddings", {}).get("model")) and known["against"]
    if other_model or known["against"] != contamination.stamps(cfg):
        found["contamination"] = _check(cfg, sorted(folder.glob("*.arrow")))
        write_json(folder / "stats.json", found)
    return found


def data_folder(cfg: Config) -> Path:
    """runs/<preset>/data/<fingerprint of everything that the data set depends on>."""
    return cfg.preset_dir / "data" / data_fingerprint(cfg)


def data_fingerprint(cfg: Config) -> str:
    """Changes with the data, the tokenizer, the grammar, any data switch, and what else decides about a row: the
    weights where they choose a token's owner, the benchmarks where rows that hold their problems are dropped."""
    return fingerprint(_made_of(cfg), contamination.stamps(cfg) if cfg.decontaminate else [])


def _made_of(cfg: Config, *without: str) -> list[Any]:
    """What the encoded rows depend on: every data switch but some, the data, the tokenizer, the grammar."""
    switches = {k: v for k, v in cfg.as_dict("data").items() if k not in ("tokenizer", *without)}
    weights = cfg.weights() if cfg.token_owner == "max_weight" else []
    grammar = tiers.grammar_version(cfg.language)
    return [switches, _tokenizer_stamp(cfg), sources.data_stamp(cfg), weights, grammar, _FORMAT]


def _tokenizer_stamp(cfg: Config) -> str:
    """What stands for the tokenizer: a hash of its merges and its template, wherever it lies."""
    tok = _tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    said = [tok.backend_tokenizer.to_str(), tok.chat_template, tok.mask_token, tok.eos_token]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


@lru_cache(maxsize=2)
def _tokenizer(folder: str, revision: str) -> PreTrainedTokenizerFast:
    return tokens.load_tokenizer(folder, revision)


# --- the run -------------------------------------------------------------------------------------------------------
def _prepare(cfg: Config, folder: Path, keep: bool) -> None:
    """Make `folder`, from parts that are kept for other choices of rows, or from ones beside it that are not.

    Bad input leaves nothing; a kill or a full disk leaves the finished parts to the next call.
    """
    mark, parts = data_fingerprint(cfg), _parts(cfg, folder, keep)
    home = parts.parent
    cfg = cfg.but(tokenizer=sources.tokenizer_folder(cfg))
    for old in (*folder.parent.glob(f".{folder.name}.*.tmp"), *(() if keep else home.glob("*"))):
        if old.name != parts.name:
            shutil.rmtree(old) if old.is_dir() else old.unlink()  # of a killed call; of other data
    try:
        with _alone(parts):
            files = _encode(cfg, parts)
        with whole(folder) as temporary:
            temporary.mkdir()
            _publish(cfg, files, temporary, mark)
    except UserError:
        if not (keep and (parts / "complete.json").exists()):
            shutil.rmtree(parts, ignore_errors=True)
        raise
    except BrokenProcessPool:
        raise UserError(
            "workers: a process ended before its work did; if memory ran out, set workers to fewer. The same call goes "
            'on from here (a script that makes it needs `if __name__ == "__main__":`).'
        ) from None
    except OSError as e:
        done = len(list(parts.glob("*.arrow")))
        raise UserError(
            f"{folder}: cannot be written ({e.strerror or e}); make room and call again; {done} parts are kept for it."
        ) from None
    if not keep:
        shutil.rmtree(home)


def _parts(cfg: Config, folder: Path, keep: bool) -> Path:
    """Where the parts of a data set in `folder` lie: with those of other choices of rows (`keep`), or beside it."""
    chosen = ("choice", "decontaminate", *(() if cfg.data == "tinycode" else ("rows", "data_seed")))
    home = folder.parent / "parts" if keep else folder.with_name(f".{folder.name}.parts")
    return home / fingerprint(_made_of(cfg, *chosen))


def _encode(cfg: Config, parts: Path) -> list[Path]:
    """Write the part of every chunk that has none yet; all parts' files, in the order of the rows.

    Under `choice = first` only of as many chunks as hold the rows wanted, unless some may still fall out.
    """

    complete = parts / "complete.json"
    enough = cfg.rows + HELD_BACK if cfg.choice == "first" and cfg.rows and not cfg.decontaminate else 0
    if enough and (found := _leading(parts, enough)):
        return found
    if not complete.exists():
        for old in parts.glob(".*.tmp"):  # of a killed call
            shutil.rmtree(old)
        count = 0

        def jobs() -> Iterator[tuple[Any, ...]]:
            nonlocal count
            for rows in _chunks(cfg):
                path = _part(parts, count)
                count += 1
                if not path.exists():
                    yield cfg, path, rows

        with (
            progress.bar(desc="prepare", unit=" rows", mininterval=2) as bar,
            closing(spread(cfg, encode_part, jobs())) as encoded,
        ):
            for done in encoded:
                bar.update(done)
                if enough and (found := _leading(parts, enough)):
                    return found
        write_json(complete, {"parts": count, "switches": cfg.as_dict("data")})
    return [_part(parts, i) for i in range(read_json(complete)["parts"])]


def _leading(parts: Path, rows: int) -> list[Path]:
    """The first parts that hold so many rows together; none, if those that are there in a row do not."""
    found: list[Path] = []
    while (path := _part(parts, len(found))).exists():
        found.append(path)
        rows -= _usable(path)
        if rows <= 0:
            return found
    return []


@lru_cache(maxsize=100_000)
def _usable(path: Path) -> int:
    return len(_facts(path)["rows"])


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.arrow"


def _chunks(cfg: Config) -> Iterator[list[tuple[int, Any]]]:
    """The numbered rows, in lists of about PART_BYTES. They depend on the data alone."""
    rows, size = [], 0
    for number, row in sources.raw_rows(cfg):
        rows.append((number, row))
        size += len(row) if isinstance(row, bytes) else sum(len(v) for v in row.values() if isinstance(v, str))
        if size >= PART_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def encode_part(cfg: Config, path: Path, rows: list[tuple[int, Any]]) -> int:
    """Encode a chunk into the Arrow file `path`; what was dropped stands in its metadata. The number of rows read."""
    import pyarrow as pa

    tok = _tokenizer(cfg.tokenizer, cfg.revision)
    dropped: Counter[str] = Counter()
    records: list[dict[str, Any]] = []
    for number, raw in rows:
        row = read_row(cfg.data, number, raw)
        try:
            ex = examples.example({"id": str(number), **row}, cfg.language, cfg.empty_reasoning)
            records.append({"row": number, **examples.encode(cfg, tok, ex)})
        except Dropped as reason:
            dropped[str(reason)] += 1
    facts = {"read": len(rows), "dropped": dropped, "rows": [r["row"] for r in records]}
    arrays = [_column([r[f.name] for r in records], f.type) for f in _schema()]
    table = pa.table(arrays, schema=_schema().with_metadata({"facts": json.dumps(facts)}))
    with (
        whole(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    return len(rows)


def _schema() -> pa.Schema:
    """Columns of a part: those of the data set, and what its statistics need."""
    import pyarrow as pa

    own = {"id": pa.string(), "uid": pa.int64()}
    own |= {"labels": pa.list_(pa.uint8())}
    own |= dict.fromkeys(("input_ids", *examples.COLUMNS), pa.list_(pa.int32()))
    return pa.schema(own | dict.fromkeys(("row", "code_bytes", "error_bytes"), pa.int64()))


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    offsets = np.cumsum([0] + [len(v) for v in values], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values) if values else [], kind.value_type))


# --- the choice and the data set -------------------------------------------------------------------------------------
def _publish(cfg: Config, files: list[Path], temporary: Path, mark: str) -> None:
    """Write the data set of the chosen rows of all parts to the folder `temporary`, with its stats.json."""
    facts = [_facts(path) for path in files]
    dropped = sum((Counter(f["dropped"]) for f in facts), Counter())
    fit = np.array([n for f in facts for n in f["rows"]], np.int64)
    if cfg.decontaminate:
        compared = spread(cfg, contamination.compare_file, ((cfg, path) for path in files))
        flagged = [f["rows"][i] for f, found in zip(facts, compared, strict=True) for i in found.flagged]
        fit = fit[~np.isin(fit, flagged)]
        dropped["contaminated"] = len(flagged)
    read = sum(f["read"] for f in facts)
    if not len(fit):
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common()) or "it has no rows"
        raise UserError(f"{cfg.data}: no row can be used ({why}).")
    if cfg.choice == "first" and cfg.rows:
        held = min(HELD_BACK, max(0, len(fit) - cfg.rows))
        chosen = fit[held : held + cfg.rows]
    else:
        chosen = choice(fit, cfg.rows, cfg.data_seed)
    if len(chosen) < cfg.rows:
        log.warning("%s: %d rows can be used, fewer than the %d wanted.", cfg.data, len(chosen), cfg.rows)
    tally = _write(files, chosen, temporary, mark)
    checked = _check(cfg, sorted(temporary.glob("*.arrow")))
    rows = {"read": read, "dropped": dict(dropped.most_common()), "usable": len(fit)}
    rows |= {"not_chosen": len(fit) - len(chosen), "kept": len(chosen)}
    known = {"fingerprint": mark, "data": cfg.data, "source": sources.data_stamp(cfg)}
    known |= {"tokenizer": cfg.tokenizer, "rows": rows}
    known |= tally.as_dict() | {"contamination": checked, "switches": cfg.as_dict("data")}
    write_json(temporary / "stats.json", known)
    (temporary / "README.md").write_text(cards.data_card(cfg, known), encoding="utf-8")


def choice(numbers: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """The `rows` of these row numbers that a seeded hash puts first (all, if `rows` is 0), in ascending order."""
    if not rows or len(numbers) <= rows:
        return numbers
    keys = [hashlib.blake2b(f"{seed} {n}".encode(), digest_size=8).digest() for n in numbers.tolist()]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.sort(numbers[order[:rows]])


def _write(files: list[Path], chosen: np.ndarray, temporary: Path, mark: str) -> Tally:
    """Copy the chosen rows of the parts into shards that `datasets.load_from_disk` opens."""
    import datasets
    import pyarrow as pa

    columns = ["id", "uid", "input_ids", "labels", *examples.COLUMNS]
    features = datasets.Features.from_arrow_schema(pa.schema([_schema().field(c) for c in columns]))
    tally, size = Tally(), 0
    shards: list[str] = []
    writer: Any = None
    for path in files:
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        table = table.filter(pa.array(np.isin(table["row"].to_numpy(), chosen)))
        tally.add(table)
        if writer is None or size > SHARD:
            if writer:
                writer.finalize()
            size = 0
            shards.append(f"data-{len(shards):05d}.arrow")
            writer = datasets.arrow_writer.ArrowWriter(path=str(temporary / shards[-1]), features=features)
        writer.write_table(table.select(columns))
        size += table.nbytes
    writer.finalize()
    # What Dataset.save_to_disk writes; that would map all of it into memory first.
    datasets.DatasetInfo(features=features).write_to_directory(str(temporary))
    state: dict[str, Any] = {"_data_files": [{"filename": name} for name in shards], "_fingerprint": mark}
    state |= {"_split": None, "_format_type": None, "_format_columns": None, "_format_kwargs": {}}
    state["_output_all_columns"] = False
    write_json(temporary / "state.json", state)
    return tally


def _facts(path: Path) -> dict[str, Any]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        facts: dict[str, Any] = json.loads(pa.ipc.open_stream(file).schema.metadata[b"facts"])
    return facts


class Tally:
    """Statistics of the rows kept, added up part by part."""

    def __init__(self) -> None:
        self.by_label = np.zeros(len(LABELS), np.int64)
        self.lengths: dict[str, list[np.ndarray]] = {k: [] for k in ("sample", "prompt", "reasoning", "code")}
        self.code_bytes = self.error_bytes = self.with_errors = 0

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table with the columns labels, code_bytes and error_bytes."""
        column = table["labels"].combine_chunks()
        labels, sizes = column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())
        self.by_label += np.bincount(labels, minlength=len(LABELS))
        row = np.repeat(np.arange(len(sizes)), sizes)
        is_code = labels >= CODE
        for name, which in (("prompt", labels == PROMPT), ("reasoning", labels == REASONING), ("code", is_code)):
            self.lengths[name].append(np.bincount(row[which], minlength=len(sizes)))
        self.lengths["sample"].append(sizes)
        errors = table["error_bytes"].to_numpy()
        self.code_bytes += int(table["code_bytes"].to_numpy().sum())
        self.error_bytes += int(errors.sum())
        self.with_errors += int((errors > 0).sum())

    def as_dict(self) -> dict[str, Any]:
        """Tokens by label, shares, and the deciles of the samples' and regions' lengths [tokens]."""
        code = max(1, int(self.by_label[CODE:].sum()))
        lengths = {k: np.concatenate(v) for k, v in self.lengths.items()}
        deciles = {k: np.percentile(v, range(0, 101, 10), method="lower").tolist() for k, v in lengths.items()}
        return {
            "tokens": dict(zip(LABELS, self.by_label.tolist(), strict=True)),
            "longest": int(lengths["sample"].max()),
            "length_deciles": deciles,
            "default_share": round(int(self.by_label[CODE]) / code, 4),
            "rows_with_parse_errors": self.with_errors,
            "parse_error_row_share": round(self.with_errors / len(lengths["sample"]), 5),
            "parse_error_byte_share": round(self.error_bytes / max(1, self.code_bytes), 5),
        }


def _check(cfg: Config, files: list[Path]) -> dict[str, Any]:
    """Compare the rows of Arrow files with the benchmarks, a file per process at a time."""
    cfg = cfg.but(tokenizer=sources.tokenizer_folder(cfg))
    if not contamination.stamps(cfg):
        return contamination.summary(cfg, [])
    found = contamination.summary(cfg, spread(cfg, contamination.compare_file, ((cfg, path) for path in files)))
    return found | ({"embeddings": contamination.embedded(cfg, files)} if cfg.embedder else {})


# --- processes -----------------------------------------------------------------------------------------------------
def spread(cfg: Config, task: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Generator[Any]:
    """task(*job) of every job, in order, over `workers` processes (0: one per core); here, if there is but one job.

    Only a few jobs are drawn ahead. An error of a task is raised here; BrokenProcessPool if a process dies.
    """
    jobs = iter(jobs)
    first = list(islice(jobs, 2))
    workers = cfg.workers or len(os.sched_getaffinity(0))
    if len(first) < 2 or workers == 1:
        for job in chain(first, jobs):
            yield task(*job)
        return
    # Not forked: the tokenizer's and torch's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_as_worker) as pool:
        waiting: deque[Any] = deque()
        try:
            for job in chain(first, jobs):
                waiting.append(pool.submit(task, *job))
                if len(waiting) > workers + 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _as_worker() -> None:
    """A worker leaves Ctrl-C to the process that started it, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of the data set `folder`; wait for another process that makes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process is making this data set; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
