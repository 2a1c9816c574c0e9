"""Do the training rows hold the benchmark's problems? Each row's problem text and program against each problem's.

    against = index(cfg)                                  # HumanEval and MBPP, as `benchmarks` names them
    near = against.compare("problem text", "program")     # the nearest benchmark problem, by three measures

Programs are compared without comments, docstrings, imports, layout, quotes and grouping, and with the names that a
program makes up replaced by where they were seen last, so that a renamed or reformatted copy is the same program.
Problem texts are compared as lower-case words, without tests. Two measures are exact, by n-grams: the share of a
problem's n-grams that the row holds (`code`, `text`). The third, MinHash, estimates the Jaccard similarity of the sets
of shorter n-grams, which rearranging does not destroy (`minhash`, the larger one of text and program). `embedder` adds
cosines of sentence embeddings, for reading only: they flag nothing.
"""

from __future__ import annotations

import builtins
import heapq
import keyword
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from treediff import progress
from treediff.config import Config
from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.masking import tiers, tokens
from treediff.masking.tokens import CODE, PROMPT

if TYPE_CHECKING:
    from datasketch import MinHash


log = logging.getLogger(__name__)

NGRAM = {"code": 12, "text": 8}
"""Length of the n-grams that the exact shares count [tokens of a program, words]."""

SHINGLE = {"code": 5, "text": 3}
"""Length of the n-grams whose sets MinHash compares."""

FLAG = {"code": 0.6, "text": 0.6, "minhash": 0.6}
"""A row is contaminated if one of its measures reaches this (docs/data.md: how the values were found)."""

FEW = 8
"""A problem with fewer n-grams than this counts by them only where a row holds them all; one with none, never."""

NEAREST = 20
PERMUTATIONS = 128


# --- a program and a text, normalised --------------------------------------------------------------------------------
_IMPORT = re.compile(r"import|include|use_declaration|package")
"""Types of nodes that say where names come from."""
_STRING = re.compile(
    r"((template|interpreted|raw)_)?string(_literal)?|raw_string_literal|char(acter)?_literal|rune_literal"
)
"""Types of nodes that are one string, whatever stands inside."""
_GROUPING = frozenset("(),;")
_KNOWN = frozenset(dir(builtins)) | frozenset(keyword.kwlist)
_WORD = re.compile(r"\w+")
_TESTS = re.compile(r"^\s*(?:>>>|assert\b).*$", re.M)


def program_tokens(code: str, language: str = "python") -> list[tuple[str, bool]]:
    """A program's tokens as (text, whether it is a made-up name), normalised as the module says: the leaves of its
    syntax tree. Never fails: what does not parse still has leaves."""
    parsed = tiers.parse(code.encode(errors="replace"), language)
    comments, names, source = parsed.grammar.comments, parsed.grammar.names, parsed.source
    found: list[tuple[str, bool]] = []
    last = ""  # the kind of the leaf before
    waiting = [parsed.tree.root_node]
    while waiting:
        node = waiting.pop()
        kind = node.type
        if node.is_named and (kind == "ERROR" or not comments[node.kind_id]) and not _IMPORT.match(kind):
            if (
                kind == "expression_statement"
                and node.child_count == 1
                and node.children[0].type in ("string", "concatenated_string")
            ):
                continue  # a string alone is a docstring
            if not _STRING.fullmatch(kind):
                waiting.extend(reversed(node.children))
            if node.child_count and not _STRING.fullmatch(kind):
                continue
        elif node.is_named:
            continue
        text = source[node.start_byte : node.end_byte].decode(errors="replace")
        if _STRING.fullmatch(kind):
            quote = "`" if text[-1:] == "`" else "\"'"
            found.append((text.lstrip("rbufRBUF").strip(quote).replace("\\", ""), False))
        elif kind != "line_continuation" and text not in _GROUPING:
            # What follows a dot is another one's name, which a copy must keep. "not in" is one leaf of two words.
            own = kind != "ERROR" and names[node.kind_id] and last != "."
            found += [(word, bool(own) and word not in _KNOWN) for word in text.split()]
        last = kind
    return found


def words(text: str) -> list[str]:
    """The words of a problem, lower case, without its tests; of a function's head with a docstring, those of both."""
    return _WORD.findall(_TESTS.sub("", text).lower())


def docstring(prompt: str) -> str:
    """What a benchmark's prompt says in words: its last docstring, or all of it."""
    found = re.findall(r'"{3}(.*?)"{3}|\'{3}(.*?)\'{3}', prompt, re.S)
    return "".join(found[-1]) if found else prompt


_FACTORS = np.random.default_rng(0).integers(1, 2**63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def ngrams(items: list[str], own: list[bool] | None, n: int) -> np.ndarray:
    """Hashes of the distinct n-grams of tokens, uint64, ascending. A name of the program's `own` counts only as the
    distance to where it stands before in the same n-gram, so that renaming changes nothing, wherever the copy stands.
    """
    if len(items) < n:
        return np.empty(0, np.uint64)
    hashes = np.array([zlib.crc32(t.encode(errors="replace")) for t in items], np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(hashes, n)
    if own is not None:
        last: dict[str, int] = {}
        back = np.zeros(len(items), np.int64)
        for i, (name, made_up) in enumerate(zip(items, own, strict=True)):
            if made_up:
                back[i] = i - last.get(name, -len(items) - n)
                last[name] = i
        far = np.lib.stride_tricks.sliding_window_view(back, n)
        seen = np.where(far <= np.arange(n), far, 0).astype(np.uint64) + np.uint64(1 << 40)
        windows = np.where(far > 0, seen, windows)
    mixed = windows * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed * _FACTORS[:n]).sum(1, dtype=np.uint64))


class Features(NamedTuple):
    """What is compared of one row or problem: hashed n-grams and a MinHash of its program and of its text."""

    code: np.ndarray
    text: np.ndarray
    sketches: tuple[MinHash, MinHash]


def features(text: str, code: str, language: str = "python") -> Features:
    """The n-grams and sketches of a row: its problem text and its program."""
    spoken, program = words(text), program_tokens(code, language)
    items, own = [t for t, _ in program], [made_up for _, made_up in program]
    small = (ngrams(items, own, SHINGLE["code"]), ngrams(spoken, None, SHINGLE["text"]))
    return Features(
        ngrams(items, own, NGRAM["code"]), ngrams(spoken, None, NGRAM["text"]), tuple(_sketch(s) for s in small)
    )


def _sketch(grams: np.ndarray) -> MinHash:
    from datasketch import MinHash

    empty = _empty_sketch()
    out = MinHash(PERMUTATIONS, hashfunc=int, permutations=empty.permutations, scheme=empty.scheme)
    out.update_batch((grams & np.uint64(0xFFFFFFFF)).tolist())
    return out


@lru_cache
def _empty_sketch() -> MinHash:
    from datasketch import MinHash

    return MinHash(PERMUTATIONS)


# --- the benchmarks --------------------------------------------------------------------------------------------------
class Near(NamedTuple):
    """The benchmark problem nearest to a row, and by which measures a row is contaminated."""

    task: str
    code: float  # share of the problem's n-grams that the row holds
    text: float
    minhash: float  # estimated Jaccard similarity, 0 where it is below about a half
    by: tuple[str, ...]  # the measures that reach FLAG, of whatever problem

    @property
    def score(self) -> float:
        """The largest of the three measures, 0 to 1."""
        return max(self.code, self.text, self.minhash)


class Index:
    """Benchmark problems in a language, by id: {"prompt", "canonical_solution"}, ready for comparisons with rows."""

    def __init__(self, problems: dict[str, dict[str, Any]], language: str = "python"):
        from datasketch import MinHashLSH

        self.tasks = list(problems)
        found = [
            features(docstring(p["prompt"]), p["prompt"] + p["canonical_solution"], language) for p in problems.values()
        ]
        self.grams = {"code": _invert([f.code for f in found]), "text": _invert([f.text for f in found])}
        self.sketches = [f.sketches for f in found]
        # Two empty or tiny sets are alike by chance.
        self.tables = [MinHashLSH(threshold=0.5, num_perm=PERMUTATIONS) for _ in ("code", "text")]
        for number, f in enumerate(found):
            for table, sketch, size in zip(self.tables, f.sketches, (len(f.code), len(f.text)), strict=True):
                if size >= FEW:
                    table.insert(number, sketch)

    def too_short(self, measure: str) -> list[str]:
        """The problems that are shorter than one n-gram, so that this measure finds no copy of them."""
        return [t for t, n in zip(self.tasks, self.grams[measure].sizes, strict=True) if n == 0]

    def compare(self, text: str, code: str, language: str = "python") -> Near:
        """The problem that is nearest to a row's problem text and program."""
        row = features(text, code, language)
        shares = {"code": _shares(self.grams["code"], row.code), "text": _shares(self.grams["text"], row.text)}
        alike = np.zeros(len(self.tasks))
        for side, table in enumerate(self.tables):
            for number in table.query(row.sketches[side]):
                alike[number] = max(alike[number], row.sketches[side].jaccard(self.sketches[number][side]))
        shares["minhash"] = alike
        best = int(np.argmax(np.maximum.reduce(list(shares.values()))))
        by = tuple(k for k, v in shares.items() if v.max() >= FLAG[k])
        return Near(self.tasks[best], *(round(float(v[best]), 4) for v in shares.values()), by)  # type: ignore[arg-type, call-arg]


class Grams(NamedTuple):
    """Which problems hold an n-gram: those of keys[i] are owners[starts[i] : starts[i + 1]]."""

    keys: np.ndarray  # uint64, ascending
    starts: np.ndarray
    owners: np.ndarray
    sizes: np.ndarray  # by problem: its n-grams


def _invert(sets: list[np.ndarray]) -> Grams:
    grams, owners = np.concatenate(sets), np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    order = np.argsort(grams, kind="stable")
    keys, starts = np.unique(grams[order], return_index=True)
    return Grams(keys, np.append(starts, len(grams)), owners[order], np.array([len(s) for s in sets]))


def _shares(grams: Grams, row: np.ndarray) -> np.ndarray:
    """Share of each problem's n-grams that the row holds, float64 (problems,)."""
    _, at, _ = np.intersect1d(grams.keys, row, assume_unique=True, return_indices=True)
    hits = [grams.owners[grams.starts[i] : grams.starts[i + 1]] for i in at.tolist()]
    count = np.bincount(np.concatenate(hits) if hits else [], minlength=len(grams.sizes))
    return np.where((count == grams.sizes) | (grams.sizes >= FEW), count / np.maximum(grams.sizes, 1), 0)


def _reach(cfg: Config) -> tuple[dict[str, tuple[str, Path | None, int]], dict[str, str]]:
    """What `_load` needs of each benchmark that can be checked, and why the others cannot, by name."""
    found, missing = {}, {}
    for name in cfg.benchmarks:
        if name == "tinycode":
            missing[name] = "held out by construction: its problems are near its training rows on purpose"
            continue
        path = benchmarks.benchmark_file(cfg, name)
        key = (name, path, path.stat().st_mtime_ns if path and path.exists() else 0)
        loaded = _load(*key)
        if isinstance(loaded, str):
            missing[name] = loaded
        else:
            found[name] = key
    return found, missing


@lru_cache(maxsize=8)
def _load(name: str, path: Path | None, time: int) -> tuple[dict[str, Any], str] | str:
    """A benchmark's problems and hash, or why it cannot be had: a download that failed is not tried again."""

    try:
        return benchmarks.load_benchmark(name, path)
    except UserError as e:
        return str(e)


def _problems(key: tuple[str, Path | None, int]) -> dict[str, Any]:
    """The problems of a benchmark that `_reach` found."""
    loaded = _load(*key)
    return {} if isinstance(loaded, str) else loaded[0]


def stamps(cfg: Config) -> dict[str, str]:
    """SHA-256 of each benchmark that rows can be compared with, by name.

    Raises UserError if rows are to be dropped by a benchmark that is out of reach.
    """
    found, missing = _reach(cfg)
    missing.pop("tinycode", None)
    if cfg.decontaminate and missing:
        name, why = next(iter(missing.items()))
        raise UserError(f"decontaminate: {name} cannot be read ({why}); name its file in benchmark_files.")
    return {name: _load(*key)[1] for name, key in found.items()}


def index(cfg: Config) -> Index:
    """The problems of all benchmarks of `cfg` that can be checked."""
    return _index(tuple(_reach(cfg)[0].values()))


@lru_cache(maxsize=2)
def _index(keys: tuple[tuple[str, Path | None, int], ...]) -> Index:
    return Index({task: problem for key in keys for task, problem in _problems(key).items()})


# --- rows ----------------------------------------------------------------------------------------------------------
class Compared(NamedTuple):
    """What comparing an Arrow file's rows gave."""

    rows: int
    flagged: list[int]  # places in the file
    tasks: set[str]  # the problems nearest to those
    by: dict[str, int]  # flagged rows by measure
    nearest: list[tuple[str, Near]]  # the nearest rows' ids


def texts(cfg: Config, path: Path) -> Iterator[tuple[str, str, str]]:
    """Id, problem text (in its chat frame) and program of every row of a prepared Arrow file, from its tokens."""
    import pyarrow as pa

    spelling = tokens.byte_table(tokens.load_tokenizer(cfg.tokenizer, cfg.revision)).spelling
    with pa.OSFile(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            for name, ids, labels in zip(*(batch[c] for c in ("id", "input_ids", "labels")), strict=True):
                ids, labels = ids.values.to_numpy(), labels.values.to_numpy()
                said, code = (
                    b"".join([spelling[i] for i in ids[which].tolist()]).decode(errors="replace")
                    for which in (labels == PROMPT, labels >= CODE)
                )
                yield name.as_py(), said, code


def compare_file(cfg: Config, path: Path) -> Compared:
    """Compare every row of a prepared Arrow file with the benchmarks of `cfg`."""
    against = index(cfg)
    pairs = [(name, against.compare(said, code, cfg.language)) for name, said, code in texts(cfg, path)]
    flagged = [i for i, (_, near) in enumerate(pairs) if near.by]
    return Compared(
        len(pairs),
        flagged,
        {pairs[i][1].task for i in flagged},
        {k: sum(k in near.by for _, near in pairs) for k in FLAG},
        heapq.nlargest(NEAREST, (p for p in pairs if p[1].score), key=lambda p: p[1].score),
    )


def summary(cfg: Config, found: Iterable[Compared]) -> dict[str, Any]:
    """The figures of all files together, and the nearest pairs. `not_checked` says why a benchmark was left out."""
    against, (reached, missing) = stamps(cfg), _reach(cfg)
    out: dict[str, Any] = {"against": against, "not_checked": missing, "checked": 0, "flagged": 0}
    if not reached:
        return out
    found, problems = list(found), index(cfg)
    pairs = heapq.nlargest(NEAREST, (p for f in found for p in f.nearest), key=lambda p: p[1].score)
    return out | {
        "checked": sum(f.rows for f in found),
        "flagged": sum(len(f.flagged) for f in found),
        "by": {k: sum(f.by[k] for f in found) for k in FLAG},
        "problems": len(problems.tasks),
        "problems_flagged": len(set().union(*(f.tasks for f in found))),
        "too_short": {k: len(problems.too_short(k)) for k in NGRAM},
        "thresholds": FLAG,
        "nearest": [{"row": name, **near._asdict(), "by": list(near.by)} for name, near in pairs],
    }


def embedded(cfg: Config, files: list[Path]) -> dict[str, Any]:
    """The nearest pairs by the cosine of mean-pooled embeddings (`embedder`) of problem text and program together.

    Raises UserError if there is no such model. On the first GPU, or slowly without one.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tok = AutoTokenizer.from_pretrained(cfg.embedder, trust_remote_code=False)
        net = AutoModel.from_pretrained(cfg.embedder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        if "trust_remote_code" in str(e):
            raise UserError(
                f"embedder: {cfg.embedder} can be loaded by code of its own only, which is never run here; name a "
                "model that transformers knows."
            ) from None
        first = str(e).strip().splitlines()[0]
        raise UserError(
            f"embedder: {cfg.embedder} is neither a model folder nor a reachable hub id ({first})."
        ) from None
    net = net.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    most = min(tok.model_max_length, getattr(net.config, "max_position_embeddings", 512))

    @torch.no_grad()
    def embed(some: list[str]) -> torch.Tensor:
        batch = tok(some, padding=True, truncation=True, max_length=most, return_tensors="pt").to(net.device)
        weight = batch["attention_mask"][:, :, None]
        pooled = (net(**batch).last_hidden_state * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(pooled.float(), dim=1)

    def batched(items: Iterable[Any]) -> Iterator[list[Any]]:
        items = iter(items)
        while some := list(islice(items, 32)):
            yield some

    problems = {task: p for key in _reach(cfg)[0].values() for task, p in _problems(key).items()}
    names = list(problems)
    said = (f"{docstring(p['prompt'])}\n{p['prompt']}{p['canonical_solution']}" for p in problems.values())
    against = torch.cat([embed(some) for some in batched(said)])
    nearest: list[tuple[float, str, str]] = []
    rows = (row for path in files for row in texts(cfg, path))
    for some in progress.bar(batched(rows), desc="embed", unit=" x 32 rows", mininterval=2):
        cosine, task = (embed([f"{said}\n{code}" for _, said, code in some]) @ against.T).max(1)
        found = zip(cosine.tolist(), (row[0] for row in some), (names[i] for i in task.tolist()), strict=True)
        nearest = heapq.nlargest(NEAREST, (*nearest, *found))
    pairs = [{"row": row, "task": task, "cosine": round(cosine, 4)} for cosine, row, task in nearest]
    return {"model": cfg.embedder, "nearest": pairs}
