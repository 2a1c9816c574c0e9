"""Rows -> Example(prompt, reasoning, code) -> an encoded sample.

    for row in sources.rows(cfg):
        record = encode(cfg, tok, example(row))     # or Dropped, whose text says why the row cannot serve

Rows have OpenCodeReasoning's columns: `id`, `input`, `output`, and `solution` where there is one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from treediff.config import Config
from treediff.masking import tokens
from treediff.masking.tiers import Parsed, byte_tiers, error_bytes, line_spans, name_spans, node_spans, parse, table_of
from treediff.masking.tokens import CODE, PROMPT, REASONING

if TYPE_CHECKING:
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
    names = ("", *table_of(language).fences.split())
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
    return str(tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def encode(cfg: Config, tok: PreTrainedTokenizerFast, ex: Example) -> dict[str, Any]:
    """One encoded sample: id, uid (int64), input_ids (int32), labels (uint8, tokens.LABELS), the columns of `groups`
    (int32, flat triples), code_bytes, error_bytes (those that do not parse). It ends with the end-of-turn token, if
    there is one, without EOS.

    Raises Dropped if it is longer than `max_length` (see `overlong`) or if the mask token stands in the prompt.
    """
    prompt, _ = tokens.tokenize(tok, prompt_text(tok, ex.prompt), special=True)
    if (prompt == tok.mask_token_id).any():
        raise Dropped("mask token in the prompt")
    ending = tokens.endings(tok)[1:]
    room = cfg.max_length - len(prompt) - len(ending) - 1  # one EOS
    text, start, end = ex.answer()
    if cfg.overlong == "drop" and surely_longer(tok, text, room):
        raise Dropped(TOO_LONG)
    ids, starts = tokens.tokenize(tok, text)
    if len(ids) > room and cfg.overlong == "trim_reasoning":
        ex = replace(ex, reasoning=_shorter(tok, ex.reasoning, len(ids) - room))
        text, start, end = ex.answer()
        ids, starts = tokens.tokenize(tok, text)
    if len(ids) > room:
        raise Dropped(TOO_LONG)
    parsed = parse(ex.code.encode(), cfg.language)
    tiers = np.zeros(len(text.encode()), np.uint8)
    tiers[start:end] = byte_tiers(parsed, cfg.tier_owner)
    weights = cfg.weights()[CODE:] if cfg.token_owner == "max_weight" else None
    at = tokens.anchors(tok, ids, starts)
    inner = np.full(len(ids), REASONING, np.uint8)
    inside = (at >= start) & (at < end)
    inner[inside] = CODE + tokens.token_tiers(tok, ids, starts, tiers, weights, cfg.blank_owner)[inside]
    found = groups(cfg, parsed, at[inside] - start, len(prompt) + int(np.searchsorted(at, start)))
    labels = [np.full(len(prompt), PROMPT, np.uint8), inner, np.full(len(ending), REASONING, np.uint8)]
    return {
        "id": ex.id,
        "uid": uid(ex),
        "input_ids": np.concatenate([prompt, ids, np.array(ending, np.int32)]),
        "labels": np.concatenate(labels),
        **{name: triples.reshape(-1) for name, triples in found.items()},
        "code_bytes": end - start,
        "error_bytes": error_bytes(parsed),
    }


COLUMNS: dict[str, Callable[[Parsed, Config], np.ndarray]] = {
    "spans": lambda parsed, cfg: node_spans(parsed, cfg.span_nodes == "tiered"),
    "names": lambda parsed, cfg: name_spans(parsed),
    "lines": lambda parsed, cfg: line_spans(parsed.source),
}
"""What masking rules may read besides labels, each int32 (n, 3) of start byte, end byte, and a number: AST nodes (their
tier), names (which name), lines (which line). A new column is an entry here."""


def groups(cfg: Config, parsed: Parsed, at: np.ndarray, shift: int) -> dict[str, np.ndarray]:
    """The columns in tokens, int32 (n, 3) each of first token, token after the last, and the number. `at`: the byte of
    the code that places each token; `shift` is added to the token numbers."""
    by_token = {name: tokens.token_spans(at, spans(parsed, cfg)) for name, spans in COLUMNS.items()}
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
    ids, starts = tokens.tokenize(tok, reasoning)
    keep = len(ids) - by - 2  # cutting can split a token in two
    if keep <= 0:
        raise Dropped(TOO_LONG)
    return reasoning.encode()[: starts[keep]].decode(errors="ignore").strip()


def uid(ex: Example) -> int:
    """A sample's number, int64: a hash of its id and code, the same wherever it stands in whatever data set."""
    digest = hashlib.blake2b(f"{ex.id}\0{ex.prompt}\0{ex.code}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
