"""Rows -> Example(prompt, reasoning, code) -> an encoded Arrow data set.

    data = prepared(cfg)             # a datasets.Dataset under runs/<preset>/data/, made if it is missing
    data[0]["input_ids"], data[0]["labels"], data[0]["spans"]

Sources: TinyCode (made on the spot), a local JSONL or Parquet file, or a hub data set, all in OpenCodeReasoning's
columns (`id`, `input`, `output`, and `solution` where there is one). Every row that cannot serve is counted under
its reason. Command: treediff prepare --data FILE --tokenizer FOLDER --out DIR
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from treediff import syntax, tokens
from treediff.config import Config, UserError, read_json, whole, write_json
from treediff.tokens import CODE, LABELS, PROMPT, REASONING

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
"""EvalPlus's instruction, put before a benchmark's problem."""

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

    def answer(self) -> tuple[str, int, int]:
        """The assistant's answer, and the bytes of it between which the code lies."""
        head = f"<think>\n{self.reasoning}\n</think>\n\n```python\n"
        start = len(head.encode())
        return f"{head}{self.code}\n```", start, start + len(self.code.encode())


def example(row: dict[str, Any]) -> Example:
    """Split a row into its three regions (3.2, A.3). Raises Dropped with the reason if it has not all of them."""
    output, problem = row.get("output"), row.get("input")
    if not isinstance(output, str) or not isinstance(problem, str):
        raise Dropped("no input or output column")
    if not problem.strip() or problem.strip() == "-":
        raise Dropped("no problem text")
    before, opened, rest = output.partition("<think>")
    if not opened or before.strip():
        raise Dropped("no <think>")
    reasoning, closed, rest = rest.rpartition("</think>")
    if not closed:
        raise Dropped("<think> never closed")
    if not reasoning.strip():
        raise Dropped("empty reasoning")
    blocks = [m["code"] for m in _FENCE.finditer(rest) if m["language"].lower() in ("python", "py", "python3", "")]
    if not blocks:
        raise Dropped("no code block")
    # Several blocks: `solution` says which one is the program; without it, the last one is.
    solution = (row.get("solution") or "").strip()
    code = next((b for b in blocks if b.strip() == solution), blocks[-1]).strip("\r\n")
    if not code.strip():
        raise Dropped("empty code block")
    return Example(str(row.get("id", "")), problem.strip(), reasoning.strip(), code)


def prompt_text(tok: PreTrainedTokenizerFast, message: str) -> str:
    """The user's message in the model's chat template, up to the open assistant header."""
    turn = [{"role": "user", "content": message}]
    return tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def encode(cfg: Config, tok: PreTrainedTokenizerFast, ex: Example) -> dict[str, Any]:
    """One encoded sample: id, uid (int64), input_ids (int32), labels (uint8, tokens.LABELS), spans (int32, flat
    triples of token start, end, tier), error_bytes. It ends with the end-of-turn token, if there is one, without EOS.

    Raises Dropped if it is longer than `max_length` (see the switch `overlong`) or speaks the mask token.
    """
    prompt, _ = tokens.encode(tok, prompt_text(tok, ex.prompt), special=True)
    if (prompt == tok.mask_token_id).any():
        raise Dropped("mask token in the prompt")
    ids, labels, spans, errors = _encode_answer(cfg, tok, ex)
    room = cfg.max_length - len(prompt) - 1  # one EOS
    over = len(ids) - room
    if over > 0 and cfg.overlong == "trim_reasoning":
        ex = Example(ex.id, ex.prompt, _shorter(tok, ex.reasoning, over), ex.code)
        ids, labels, spans, errors = _encode_answer(cfg, tok, ex)
        over = len(ids) - room
    if over > 0:
        raise Dropped("longer than max_length")
    spans[:, :2] += len(prompt)
    return {
        "id": ex.id,
        "uid": uid(ex),
        "input_ids": np.concatenate([prompt, ids]),
        "labels": np.concatenate([np.full(len(prompt), PROMPT, np.uint8), labels]),
        "spans": spans.reshape(-1),
        "error_bytes": errors,
    }


def _encode_answer(
    cfg: Config, tok: PreTrainedTokenizerFast, ex: Example
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    text, start, end = ex.answer()
    ids, starts = tokens.encode(tok, text)
    parsed = syntax.parse(ex.code.encode(), cfg.language)
    tiers = np.zeros(len(text.encode()), np.uint8)
    tiers[start:end] = syntax.byte_tiers(parsed, cfg.tier_owner)
    weights = cfg.weights()[CODE:] if cfg.token_owner == "max_weight" else None
    at = tokens.anchors(tok, ids, starts)
    labels = np.full(len(ids), REASONING, np.uint8)
    inside = (at >= start) & (at < end)
    labels[inside] = CODE + tokens.token_tiers(tok, ids, starts, tiers, weights)[inside]
    spans = syntax.node_spans(parsed, cfg.span_nodes == "tiered")
    spans[:, :2] += start
    ending = tokens.endings(tok)[1:]
    ids = np.concatenate([ids, np.array(ending, np.int32)])
    labels = np.concatenate([labels, np.full(len(ending), REASONING, np.uint8)])
    return ids, labels, tokens.token_spans(at, spans), syntax.error_bytes(parsed)


def _shorter(tok: PreTrainedTokenizerFast, reasoning: str, by: int) -> str:
    """`reasoning` without its last `by` tokens or a few more. Raises Dropped if nothing would be left."""
    ids, starts = tokens.encode(tok, reasoning)
    keep = len(ids) - by - 2  # cutting can split a token in two
    if keep <= 0:
        raise Dropped("longer than max_length")
    return reasoning.encode()[: starts[keep]].decode(errors="ignore").strip()


def uid(ex: Example) -> int:
    """A sample's number, int64: a hash of its id and code, the same wherever it stands in whatever data set."""
    digest = hashlib.blake2b(f"{ex.id}\0{ex.prompt}\0{ex.code}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# --- rows ----------------------------------------------------------------------------------------------------------


def rows(cfg: Config) -> Iterator[dict[str, Any]]:
    """The raw rows of `cfg.data`, streamed. Raises UserError naming the file and row that cannot be read."""
    if cfg.data == "tinycode":
        from treediff import tinycode

        yield from tinycode.training(cfg.rows, cfg.data_seed)
    elif Path(cfg.data).suffix in (".jsonl", ".json"):
        yield from read_jsonl(Path(cfg.data))
    elif Path(cfg.data).suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            for batch in pq.ParquetFile(cfg.data).iter_batches(1000):
                yield from batch.to_pylist()
        except (OSError, ValueError) as e:
            raise UserError(f"{cfg.data}: cannot be read as Parquet ({e}).") from None
    else:
        import datasets

        try:
            yield from datasets.load_dataset(cfg.data, cfg.data_split, split=cfg.data_split, streaming=True)
        except Exception as e:  # the hub's errors have no common base; all mean that the data is out of reach
            reason = str(e).strip().splitlines()[0]
            raise UserError(
                f"data: {cfg.data} is no `tinycode`, no .jsonl or .parquet file and no reachable data set ({reason})."
            ) from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises UserError naming the file and line of anything else."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: not a JSON object.")
                    yield row
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {number}: not valid JSON ({e}).") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not valid UTF-8 ({e}).") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}).") from None


def fingerprint(*parts: Any) -> str:
    """12 hex digits of a hash of JSON-able `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def tokenizer_folder(cfg: Config) -> str:
    """`cfg.tokenizer`, or the folder of the BPE trained on the backbone's training rows (made if it is missing)."""
    if cfg.tokenizer != "train":
        return cfg.tokenizer
    base = cfg.with_masking("base")
    made_of = base.as_dict("data")
    folder = cfg.preset_dir / f"tokenizer-{fingerprint({k: made_of[k] for k in _TOKENIZER_SWITCHES})}"
    if not folder.is_dir():
        log.info("training a BPE tokenizer of %d entries", cfg.vocab_size)
        examples = [example(row) for row in rows(base)]
        with whole(folder) as spot:
            # With the words of the chat template, which stand in every sample.
            texts = [f"user\n\n{e.prompt}\nassistant\n\n{e.answer()[0]}" for e in examples]
            tokens.train_tokenizer(texts, cfg.vocab_size, spot)
    return str(folder)


_TOKENIZER_SWITCHES = ("data", "data_split", "rows", "data_seed", "vocab_size")


def prepared(cfg: Config, out: Path | None = None) -> datasets.Dataset:
    """The encoded data set of `cfg`, made first if it is missing. Its statistics lie beside it in stats.json."""
    import datasets

    folder = out or data_folder(cfg)
    if not (folder / "stats.json").exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty, and no data set of ours; name another folder.")
        _prepare(cfg, folder)
    elif read_json(folder / "stats.json")["fingerprint"] != data_fingerprint(cfg):
        raise UserError(f"{folder}: holds a data set made from other data or switches; name another folder.")
    return datasets.load_from_disk(str(folder)).with_format("numpy")


def data_folder(cfg: Config) -> Path:
    """runs/<preset>/data/<fingerprint of every switch that the encoding depends on>."""
    return cfg.preset_dir / "data" / data_fingerprint(cfg)


def data_fingerprint(cfg: Config) -> str:
    """Changes with the data file's size and time, any data switch, and the weights where they decide an owner."""
    from importlib.metadata import version

    import tree_sitter_python

    source = Path(cfg.data)
    stamp = [source.stat().st_size, source.stat().st_mtime_ns] if source.is_file() else []
    weights = cfg.weights() if cfg.token_owner == "max_weight" else []
    grammar = version(tree_sitter_python.__name__.replace("_", "-"))
    switches = {k: v for k, v in cfg.as_dict("data").items() if k != "tokenizer"}
    return fingerprint(switches, _tokenizer_stamp(cfg), stamp, weights, grammar, 1)


def _tokenizer_stamp(cfg: Config) -> str:
    """What stands for the tokenizer in a fingerprint: a hash of its file, or its name and revision on the hub."""
    folder = tokenizer_folder(cfg)
    file = Path(folder) / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else f"{folder}@{cfg.revision}"


def stats(cfg: Config, out: Path | None = None) -> dict[str, Any]:
    """Counts of the prepared data set: rows kept, rows dropped by reason, tokens by label, shares."""
    prepared(cfg, out)
    return read_json((out or data_folder(cfg)) / "stats.json")


def _prepare(cfg: Config, folder: Path) -> None:
    import datasets
    from datasets import Features, Sequence, Value
    from tqdm import tqdm

    tok = tokens.load_tokenizer(tokenizer_folder(cfg), cfg.revision)
    dropped: Counter[str] = Counter()
    label_tokens = np.zeros(len(LABELS), np.int64)
    counts = Counter()

    def encoded() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(tqdm(rows(cfg), desc="prepare", unit=" rows", mininterval=2)):
            counts["read"] += 1
            try:
                ex = example({"id": str(number), **row})
                record = encode(cfg, tok, ex)
            except Dropped as reason:
                dropped[str(reason)] += 1
                continue
            label_tokens[:] += np.bincount(record["labels"], minlength=len(LABELS))
            counts["code_bytes"] += len(ex.code.encode())
            counts["error_bytes"] += record["error_bytes"]
            counts["with_errors"] += record.pop("error_bytes") > 0
            counts["kept"] += 1
            counts["longest"] = max(counts["longest"], len(record["input_ids"]))
            yield record
            if cfg.rows and counts["kept"] >= cfg.rows:
                return

    features = Features(
        {
            "id": Value("string"),
            "uid": Value("int64"),
            "input_ids": Sequence(Value("int32")),
            "labels": Sequence(Value("uint8")),
            "spans": Sequence(Value("int32")),
        }
    )
    with whole(folder) as spot:
        batches = datasets.arrow_writer.ArrowWriter(path=str(spot.with_suffix(".arrow")), features=features)
        for record in encoded():
            batches.write(record)
        if not counts["kept"]:
            why = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common()) or "it has no rows"
            raise UserError(f"{cfg.data}: no row can be used ({why}).")
        batches.finalize()
        batches.close()
        datasets.Dataset.from_file(str(spot.with_suffix(".arrow"))).save_to_disk(str(spot))
        code = int(label_tokens[CODE:].sum())
        write_json(
            spot / "stats.json",
            {
                "fingerprint": data_fingerprint(cfg),
                "data": cfg.data,
                "tokenizer": tokenizer_folder(cfg),
                "rows": {"read": counts["read"], "kept": counts["kept"], "dropped": dict(dropped.most_common())},
                "tokens": dict(zip(LABELS, label_tokens.tolist(), strict=True)),
                "longest": counts["longest"],
                "default_share": round(int(label_tokens[CODE]) / max(1, code), 4),
                "rows_with_parse_errors": int(counts["with_errors"]),
                "parse_error_byte_share": round(counts["error_bytes"] / max(1, counts["code_bytes"]), 5),
                "switches": cfg.as_dict("data"),
            },
        )


# --- benchmarks ----------------------------------------------------------------------------------------------------


def benchmark_file(cfg: Config, benchmark: str) -> Path | None:
    """The file of a benchmark's problems: TinyCode's is made on the spot, others' as `benchmark_files` says; None is
    EvalPlus's own download."""
    if benchmark != "tinycode":
        path = cfg.benchmark_files.get(benchmark)
        return Path(path) if path else None
    from treediff import tinycode

    path = cfg.preset_dir / "tinycode.jsonl"
    if not path.exists():
        with whole(path) as spot:
            spot.write_text("".join(json.dumps(p) + "\n" for p in tinycode.benchmark()))
    return path


# --- views: code and answers as tokens, for pictures -----------------------------------------------------------------


class View(NamedTuple):
    """A piece of code as tokens: ids int32, starts int64 [byte], labels uint8, spans int32 (n, 3), all per token."""

    ids: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    spans: np.ndarray


def example_code(source: str, lines: int, language: str = "python") -> tuple[str, str]:
    """A name and up to `lines` lines of code to look at, from the file `source` (or a module of the standard library):
    its shortest telling function, without the indentation it has there. Raises UserError for an unreadable file."""
    import heapq
    import textwrap

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
    spans = tokens.token_spans(tokens.anchors(tok, ids, starts), syntax.node_spans(parsed, cfg.span_nodes == "tiered"))
    return View(ids, starts, labels, spans)


def view_masks(cfg: Config, seen: View, level: float, draws: int = 1) -> np.ndarray:
    """The tokens of a view that `cfg.masking` masks at noise level `level`, bool (draws, tokens)."""
    import torch

    from treediff import masking

    labels = torch.from_numpy(seen.labels).expand(draws, -1)
    p = torch.full((draws,), level, dtype=torch.float64)
    return masking.corrupt(cfg, labels, [seen.spans] * draws, torch.arange(draws), 0, p).numpy()


def answer_tokens(
    cfg: Config, tok: PreTrainedTokenizerFast, ids: np.ndarray, committed_at: np.ndarray
) -> tuple[str, list[tuple[int, int]], np.ndarray, np.ndarray]:
    """A sampled answer up to its end: text, each token's characters, its step of commitment and its label.

    The code is what stands in the first fence after the reasoning; everything else is labelled reasoning.
    """
    table = tokens.byte_table(tok)
    ends = np.flatnonzero(np.isin(ids, tokens.endings(tok)))
    ids = ids[: ends[0]] if len(ends) else ids
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
    return text, list(zip(first.tolist(), last.tolist(), strict=True)), committed_at[: len(ids)], labels


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
    if cfg.masking != "ast":
        return {}
    weights = np.array(cfg.weights())[seen.labels]
    expected = np.array([masking.expected_inclusion(weights, int(p * len(weights))) for p in levels])
    return {LABELS[i]: expected[:, seen.labels == i].mean(1) for i in there}


def run_lengths(cfg: Config, seen: View, level: float, draws: int) -> list[int]:
    """Lengths of the runs of adjacent masked tokens over `draws` draws at one noise level."""
    padded = np.pad(view_masks(cfg, seen, level, draws).astype(np.int8), ((0, 0), (1, 1))).ravel()
    edges = np.flatnonzero(np.diff(padded))
    return (edges[1::2] - edges[::2]).tolist()
