"""Rows -> Example(prompt, reasoning, code) -> an encoded sample; the same code and answers as tokens, for pictures.

    for row in rows(cfg):
        record = encode(cfg, tok, example(row))     # or Dropped, whose text says why the row cannot serve

Sources: TinyCode (made on the spot), functions of Python's standard library, a local JSONL or Parquet file, or a hub data set, all in OpenCodeReasoning's
columns (`id`, `input`, `output`, and `solution` where there is one). A whole data set is made by prepare.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from treediff import syntax, tokens
from treediff.config import Config, UserError, whole
from treediff.tokens import CODE, LABELS, PROMPT, REASONING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
"""EvalPlus's instruction, put before a benchmark's problem."""

COLUMNS = ("id", "input", "output", "solution")
"""What is read of a row, in OpenCodeReasoning's names."""

_FENCE = re.compile(r"^```[ \t]*(?P<language>[\w+-]*)[ \t]*\r?\n(?P<code>.*?)^```[ \t]*$", re.S | re.M)


class Dropped(Exception):
    """A row that cannot serve; its text is the reason under which it is counted."""


@dataclass(frozen=True)
class Example:
    """One training sample as text: x0 = [prompt | reasoning | code] (3.1)."""

    id: str
    prompt: str  # the user's message
    reasoning: str  # between <think> and </think>, stripped
    code: str  # the final program
    language: str = "python"

    def answer(self) -> tuple[str, int, int]:
        """The assistant's answer, and the bytes of it between which the code lies."""
        head = f"<think>\n{self.reasoning}\n</think>\n\n```{self.language}\n"
        start = len(head.encode())
        return f"{head}{self.code}\n```", start, start + len(self.code.encode())


def example(row: dict[str, Any], language: str = "python", empty_reasoning: str = "drop") -> Example:
    """Split a row into its three regions (3.2, A.3). Raises Dropped with the reason if it has not all of them; the
    reasoning may be empty where `empty_reasoning` is `keep`."""
    output, problem = row.get("output"), row.get("input")
    if not isinstance(output, str) or not isinstance(problem, str):
        raise Dropped("no input or output column")
    try:
        f"{problem}{output}".encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no text holds
        raise Dropped("not valid Unicode") from None
    if not problem.strip() or problem.strip() == "-":
        raise Dropped("no problem text")
    before, opened, rest = output.partition("<think>")
    if not opened or before.strip():
        raise Dropped("no <think>")
    reasoning, closed, rest = rest.rpartition("</think>")
    if not closed:
        raise Dropped("<think> never closed")
    if not reasoning.strip() and empty_reasoning == "drop":
        raise Dropped("empty reasoning")
    names = ("", *syntax.table_of(language).fences.split())
    blocks = [m["code"] for m in _FENCE.finditer(rest) if m["language"].lower() in names]
    if not blocks:
        raise Dropped("no code block")
    # Several blocks: `solution` says which one is the program; without it, the last one is.
    solution = row.get("solution")
    solution = solution.strip() if isinstance(solution, str) else ""
    code = next((b for b in blocks if b.strip() == solution), blocks[-1]).strip("\r\n")
    if not code.strip():
        raise Dropped("empty code block")
    return Example(str(row.get("id", "")), problem.strip(), reasoning.strip(), code, language)


def prompt_text(tok: PreTrainedTokenizerFast, message: str) -> str:
    """The user's message in the model's chat template, up to the open assistant header."""
    turn = [{"role": "user", "content": message}]
    return tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def encode(cfg: Config, tok: PreTrainedTokenizerFast, ex: Example) -> dict[str, Any]:
    """One encoded sample: id, uid (int64), input_ids (int32), labels (uint8, tokens.LABELS), the columns of `groups`
    (int32, flat triples), code_bytes, error_bytes (those that do not parse). It ends with the end-of-turn token, if
    there is one, without EOS.

    Raises Dropped if it is longer than `max_length` (see the switch `overlong`) or speaks the mask token.
    """
    prompt, _ = tokens.encode(tok, prompt_text(tok, ex.prompt), special=True)
    if (prompt == tok.mask_token_id).any():
        raise Dropped("mask token in the prompt")
    ending = tokens.endings(tok)[1:]
    room = cfg.max_length - len(prompt) - len(ending) - 1  # one EOS
    text, start, end = ex.answer()
    if cfg.overlong == "drop" and surely_longer(tok, text, room):
        raise Dropped(TOO_LONG)
    ids, starts = tokens.encode(tok, text)
    if len(ids) > room and cfg.overlong == "trim_reasoning":
        ex = replace(ex, reasoning=_shorter(tok, ex.reasoning, len(ids) - room))
        text, start, end = ex.answer()
        ids, starts = tokens.encode(tok, text)
    if len(ids) > room:
        raise Dropped(TOO_LONG)
    parsed = syntax.parse(ex.code.encode(), cfg.language)
    tiers = np.zeros(len(text.encode()), np.uint8)
    tiers[start:end] = syntax.byte_tiers(parsed, cfg.tier_owner)
    weights = cfg.weights()[CODE:] if cfg.token_owner == "max_weight" else None
    at = tokens.anchors(tok, ids, starts)
    labels = np.full(len(ids), REASONING, np.uint8)
    inside = (at >= start) & (at < end)
    labels[inside] = CODE + tokens.token_tiers(tok, ids, starts, tiers, weights)[inside]
    found = groups(cfg, parsed, at[inside] - start, len(prompt) + int(np.searchsorted(at, start)))
    labels = [np.full(len(prompt), PROMPT, np.uint8), labels, np.full(len(ending), REASONING, np.uint8)]
    return {
        "id": ex.id,
        "uid": uid(ex),
        "input_ids": np.concatenate([prompt, ids, np.array(ending, np.int32)]),
        "labels": np.concatenate(labels),
        **{name: triples.reshape(-1) for name, triples in found.items()},
        "code_bytes": end - start,
        "error_bytes": syntax.error_bytes(parsed),
    }


def groups(cfg: Config, parsed: syntax.Parsed, at: np.ndarray, shift: int) -> dict[str, np.ndarray]:
    """What masking rules read besides labels, int32 (n, 3) each of first token, token after the last, and a number:
    `spans` of AST nodes (their tier), `names` (which name) and `lines` (which line). `at`: the byte of the code that
    places each token; `shift` is added to the token numbers."""
    by_byte = {
        "spans": syntax.node_spans(parsed, cfg.span_nodes == "tiered"),
        "names": syntax.name_spans(parsed),
        "lines": syntax.line_spans(parsed.source),
    }
    by_token = {name: tokens.token_spans(at, spans) for name, spans in by_byte.items()}
    for spans in by_token.values():
        spans[:, :2] += shift
    return by_token


TOO_LONG = "longer than max_length"
_PIECE = 4096  # characters
_WORTH = 5  # characters a token: a text of more than these may well be too long
_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = (  # LLaDA's, Llama 3's and Qwen 2's way of cutting a text before the merges
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    _PIECES % r"\p{N}{1,3}",
    _PIECES % r"\p{N}",
)


def surely_longer(tok: PreTrainedTokenizerFast, text: str, room: int) -> bool:
    """Whether `text` has more than `room` tokens, by tokenizing it piece by piece until it does. False also where that
    is not sure, or not worth it.

    Most rows of OpenCodeReasoning are far too long, so that this saves most of the work. It is exact, because the
    pieces are cut at a blank between two words, where the tokenizers that are let in here never join anything.
    """
    if len(text) <= _WORTH * room or not _splits_at_words(tok):
        return False
    count = start = 0
    backend = tok.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        while count <= room:
            cut = _WORDS.search(text, start + _PIECE)
            if not cut:
                return False
            count += len(backend.encode(text[start : cut.start()], add_special_tokens=False))
            start = cut.start()
    finally:
        backend.encode_special_tokens = False
    return True


@lru_cache(maxsize=8)
def _splits_at_words(tok: PreTrainedTokenizerFast) -> bool:
    """Whether no token reaches over a blank between two words: known from the tokenizer's own description."""
    made = json.loads(tok.backend_tokenizer.to_str())
    steps = made["pre_tokenizer"] or {}
    patterns = [s["pattern"].get("Regex") for s in steps.get("pretokenizers", ()) if s["type"] == "Split"]
    return (
        made["normalizer"] is None
        and all(t["special"] for t in made["added_tokens"])  # those are spelled out
        and [s["type"] for s in steps.get("pretokenizers", ())] == ["Split", "ByteLevel"]
        and patterns[0] in _SPLITS
    )


def _shorter(tok: PreTrainedTokenizerFast, reasoning: str, by: int) -> str:
    """`reasoning` without its last `by` tokens or a few more. Raises Dropped if nothing would be left."""
    ids, starts = tokens.encode(tok, reasoning)
    keep = len(ids) - by - 2  # cutting can split a token in two
    if keep <= 0:
        raise Dropped(TOO_LONG)
    return reasoning.encode()[: starts[keep]].decode(errors="ignore").strip()


def uid(ex: Example) -> int:
    """A sample's number, int64: a hash of its id and code, the same wherever it stands in whatever data set."""
    digest = hashlib.blake2b(f"{ex.id}\0{ex.prompt}\0{ex.code}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# --- rows ----------------------------------------------------------------------------------------------------------


def rows(cfg: Config) -> Iterator[dict[str, Any]]:
    """The rows of `cfg.data`, streamed. Raises UserError naming the file and row that cannot be read."""
    return (read_row(cfg.data, number, row) for number, row in raw_rows(cfg))


def raw_rows(cfg: Config) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """Number (from 0) and content of each row. A JSONL file's lines are left for `read_row`, so that the processes
    that encode them can read them too."""
    if cfg.data == "tinycode":
        from treediff import tinycode

        yield from enumerate(tinycode.training(cfg.rows, cfg.data_seed))
    elif cfg.data == "stdlib":
        from treediff import stdlib

        yield from enumerate(stdlib.rows())
    elif Path(cfg.data).suffix in (".jsonl", ".json"):
        yield from _lines(Path(cfg.data))
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
                f"data: {cfg.data} is no `tinycode`, no `stdlib`, no .jsonl or .parquet file and no reachable data set ({reason})."
            ) from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises UserError naming the file and line of anything else."""
    return (read_row(str(path), number, line) for number, line in _lines(Path(path)))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 0) and bytes of each line that is not blank."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file) if not line.isspace())
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}).") from None


def read_row(source: str, number: int, row: bytes | dict[str, Any]) -> dict[str, Any]:
    """What `raw_rows` gave, as a dictionary. Raises UserError naming the line that is no JSON object in UTF-8."""
    if isinstance(row, dict):
        return row
    try:
        value = json.loads(row.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"{source}, line {number + 1}: not valid UTF-8 ({e}).") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{source}, line {number + 1}: not valid JSON ({e}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}, line {number + 1}: not a JSON object.")
    return value


def fingerprint(*parts: Any) -> str:
    """12 hex digits of a hash of JSON-able `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def tokenizer_folder(cfg: Config) -> str:
    """`cfg.tokenizer`, or the folder of the BPE trained on the backbone's training rows (made if it is missing)."""
    if cfg.tokenizer != "train":
        return cfg.tokenizer
    base = cfg.with_masking("base")
    made_of = base.as_dict("data")
    mark = fingerprint({k: made_of[k] for k in _TOKENIZER_SWITCHES}, data_stamp(base))
    folder = cfg.preset_dir / f"tokenizer-{mark}"
    if not folder.is_dir():
        log.info("training a BPE tokenizer of %d entries", cfg.vocab_size)
        with whole(folder) as spot:
            # With the words of the chat template, which stand in every sample.
            texts = (f"user\n\n{e.prompt}\nassistant\n\n{e.answer()[0]}" for e in _examples(base))
            tokens.train_tokenizer(texts, cfg.vocab_size, spot)
    return str(folder)


def _examples(cfg: Config) -> Iterator[Example]:
    """The rows that can serve, whatever their length."""
    for row in rows(cfg):
        with suppress(Dropped):
            yield example(row, cfg.language, cfg.empty_reasoning)


_TOKENIZER_SWITCHES = ("data", "data_split", "rows", "data_seed", "vocab_size", "language", "empty_reasoning")


def data_stamp(cfg: Config) -> Any:
    """What stands for the rows: a file's size and time; TinyCode's own source; Python's version and the standard
    library's files; nothing for a hub data set."""
    if cfg.data == "tinycode":
        return _tinycode()
    if cfg.data == "stdlib":
        from treediff import stdlib

        return stdlib.stamp()
    source = Path(cfg.data)
    return [source.stat().st_size, source.stat().st_mtime_ns] if source.is_file() else []


def _tinycode() -> str:
    return hashlib.sha256(Path(__file__).with_name("tinycode.py").read_bytes()).hexdigest()


# --- benchmarks ----------------------------------------------------------------------------------------------------


def benchmark_file(cfg: Config, benchmark: str) -> Path | None:
    """The file of a benchmark's problems: TinyCode's is made on the spot, others' as `benchmark_files` says; None is
    EvalPlus's own download."""
    if benchmark != "tinycode":
        path = cfg.benchmark_files.get(benchmark)
        return Path(path) if path else None
    from treediff import tinycode

    path = cfg.preset_dir / f"tinycode-{_tinycode()[:12]}.jsonl"
    if not path.exists():
        with whole(path) as spot:
            spot.write_text("".join(json.dumps(p) + "\n" for p in tinycode.benchmark()))
    return path


# --- views: code and answers as tokens, for pictures -----------------------------------------------------------------


class View(NamedTuple):
    """A piece of code as tokens: ids int32, starts int64 [byte], labels uint8, per token; and its `groups`."""

    ids: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    groups: dict[str, np.ndarray]


def example_code(source: str, lines: int, language: str = "python") -> tuple[str, str]:
    """A name and up to `lines` lines of code to look at, from the file `source` (or a module of the standard library):
    its shortest telling function, without the indentation it has there. Raises UserError for an unreadable file."""
    import heapq
    import textwrap

    if not source and language != "python":
        raise UserError(f"source: name a file in {language}; only for Python one is at hand.")
    path = Path(source) if source else Path(heapq.__file__)
    parsed = syntax.parse(syntax.read_source(path), language)
    first, last = syntax.telling_function(parsed)
    shown = parsed.source.decode().splitlines()[first : min(last + 1, first + lines)]
    if not any(x.strip() for x in shown):
        raise UserError(f"{path}: there is no code in this file.")
    return f"{path.name}, line {first + 1}", textwrap.dedent("\n".join(x.expandtabs(4) for x in shown))


def view(cfg: Config, tok: PreTrainedTokenizerFast, code: str) -> View:
    """Tokens, tiers and spans of a piece of code alone, as `prepare` would give them."""
    ids, starts = tokens.encode(tok, code)
    parsed = syntax.parse(code.encode(), cfg.language)
    tiers = syntax.byte_tiers(parsed, cfg.tier_owner)
    weights = cfg.weights()[CODE:] if cfg.token_owner == "max_weight" else None
    labels = (CODE + tokens.token_tiers(tok, ids, starts, tiers, weights)).astype(np.uint8)
    return View(ids, starts, labels, groups(cfg, parsed, tokens.anchors(tok, ids, starts), 0))


def view_masks(cfg: Config, seen: View, level: float, draws: int = 1) -> np.ndarray:
    """The tokens of a view that `cfg.masking` masks at noise level `level`, bool (draws, tokens)."""
    import torch

    from treediff import masking

    labels = torch.from_numpy(seen.labels).expand(draws, -1)
    p = torch.full((draws,), level, dtype=torch.float64)
    spans = [seen.groups[masking.READS[cfg.masking]]] * draws if cfg.masking in masking.READS else None
    return masking.corrupt(cfg, labels, spans, torch.arange(draws), 0, p).numpy()


def answer_tokens(
    cfg: Config, tok: PreTrainedTokenizerFast, ids: np.ndarray, committed_at: np.ndarray
) -> tuple[str, list[tuple[int, int]], np.ndarray, np.ndarray]:
    """A sampled answer up to its end: text, each token's characters, its step of commitment and its label.

    The code is what stands in the first fence after the reasoning; everything else is labelled reasoning.
    """
    table = tokens.byte_table(tok)
    ends = np.flatnonzero(np.isin(ids, tokens.endings(tok)))
    ids = ids[: ends[0]] if len(ends) else ids
    known = ids < len(table.spelling)  # a head may have more rows than the tokenizer has tokens
    ids, committed_at = ids[known], committed_at[: len(ids)][known]
    raw = b"".join(table.spelling[i] for i in ids.tolist())
    text = raw.decode(errors="surrogateescape")  # a byte that is no UTF-8 stays one character, so that places agree
    length = table.length[ids]
    starts = np.cumsum(length) - length
    labels = np.full(len(ids), REASONING, np.uint8)
    begin = raw.find(b"\n", raw.find(b"```", max(0, raw.rfind(b"</think>")))) + 1
    if b"```" in raw and begin:
        end = raw.find(b"```", begin) if b"```" in raw[begin:] else len(raw)
        tiers = np.zeros(len(raw) + 1, np.uint8)
        tiers[begin:end] = syntax.byte_tiers(syntax.parse(raw[begin:end], cfg.language), cfg.tier_owner)
        at = np.minimum(tokens.anchors(tok, ids, starts), len(raw))
        inside = (at >= begin) & (at < end)
        labels[inside] = CODE + tiers[at[inside]]
    byte_of_char = np.cumsum([0] + [len(c.encode(errors="surrogateescape")) for c in text])
    first = np.searchsorted(byte_of_char, starts, "right") - 1
    last = np.append(first, len(text))[1:]
    text = "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text)
    return text, list(zip(first.tolist(), last.tolist(), strict=True)), committed_at, labels


def inclusion(cfg: Config, seen: View, levels: np.ndarray, draws: int) -> dict[str, np.ndarray]:
    """Share of each tier's tokens that `cfg.masking` masks at each noise level, over `draws` draws: by tier name."""
    masked = np.array([view_masks(cfg, seen, p, draws).mean(0) for p in levels])
    there = [i for i in range(CODE, len(LABELS)) if (seen.labels == i).any()]
    return {LABELS[i]: masked[:, seen.labels == i].mean(1) for i in there}


def expected_inclusion(cfg: Config, seen: View, levels: np.ndarray) -> dict[str, np.ndarray]:
    """What theory says of `inclusion`, by tier name; empty for rules that have no closed form."""
    from treediff import masking

    there = [i for i in range(CODE, len(LABELS)) if (seen.labels == i).any()]
    if cfg.masking in ("base", "random"):
        return {LABELS[i]: levels for i in there}
    if cfg.masking != "ast" or cfg.budget != "exact":
        return {}
    weights = np.array(cfg.weights())[seen.labels]
    expected = np.array([masking.expected_inclusion(weights, int(p * len(weights))) for p in levels])
    return {LABELS[i]: expected[:, seen.labels == i].mean(1) for i in there}


def run_lengths(cfg: Config, seen: View, level: float, draws: int) -> list[int]:
    """Lengths of the runs of adjacent masked tokens over `draws` draws at one noise level."""
    padded = np.pad(view_masks(cfg, seen, level, draws).astype(np.int8), ((0, 0), (1, 1))).ravel()
    edges = np.flatnonzero(np.diff(padded))
    return (edges[1::2] - edges[::2]).tolist()
