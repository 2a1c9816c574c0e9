"""Code and answers as tokens with their tiers, as the figures draw them, and how often each tier is masked.

code_view = view(cfg, tok, code)
view_masks(cfg, code_view, level=0.5)         # bool (draws, tokens)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from treediff.config import Config
from treediff.data import examples
from treediff.errors import UserError
from treediff.masking import rules, tokens
from treediff.masking.tiers import byte_tiers, parse, read_source, telling_function
from treediff.masking.tokens import CODE, LABELS, REASONING
from treediff.strategies import STRATEGIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
    parsed = parse(read_source(path), language)
    first, last = telling_function(parsed)
    shown = parsed.source.decode().splitlines()[first : min(last + 1, first + lines)]
    if not any(x.strip() for x in shown):
        raise UserError(f"{path}: there is no code in this file.")
    return f"{path.name}, line {first + 1}", textwrap.dedent("\n".join(x.expandtabs(4) for x in shown))


def view(cfg: Config, tok: PreTrainedTokenizerFast, code: str) -> View:
    """Tokens, tiers and spans of a piece of code alone, as `prepare` would give them."""
    ids, starts = tokens.tokenize(tok, code)
    parsed = parse(code.encode(), cfg.language)
    tiers = byte_tiers(parsed, cfg.tier_owner)
    weights = cfg.weights()[CODE:] if cfg.token_owner == "max_weight" else None
    labels = (CODE + tokens.token_tiers(tok, ids, starts, tiers, weights, cfg.blank_owner)).astype(np.uint8)
    return View(ids, starts, labels, examples.groups(cfg, parsed, tokens.anchors(tok, ids, starts), 0))


def view_masks(cfg: Config, seen: View, level: float, draws: int = 1) -> np.ndarray:
    """The tokens of a view that `cfg.masking` masks at noise level `level`, bool (draws, tokens)."""
    import torch

    labels = torch.from_numpy(seen.labels).expand(draws, -1)
    p = torch.full((draws,), level, dtype=torch.float64)
    spans = [seen.groups[reads]] * draws if (reads := STRATEGIES[cfg.masking].reads) else None
    return rules.corrupt(cfg, labels, spans, torch.arange(draws), 0, p).numpy()


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
        tiers[begin:end] = byte_tiers(parse(raw[begin:end], cfg.language), cfg.tier_owner)
        at = np.minimum(tokens.anchors(tok, ids, starts), len(raw))
        inside = (at >= begin) & (at < end)
        labels[inside] = CODE + tiers[at[inside]]
        if cfg.blank_owner == "none":
            labels[inside & table.blank[ids]] = CODE
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


def expected_shares(cfg: Config, seen: View, levels: np.ndarray) -> dict[str, np.ndarray]:
    """What theory says of `inclusion`, by tier name; empty for rules that have no closed form."""

    there = [i for i in range(CODE, len(LABELS)) if (seen.labels == i).any()]
    if cfg.masking in ("none", "random"):
        return {LABELS[i]: levels for i in there}
    if cfg.masking != "ast" or cfg.budget != "exact":
        return {}
    weights = np.array(cfg.weights())[seen.labels]
    expected = np.array([rules.expected_inclusion(weights, int(p * len(weights))) for p in levels])
    return {LABELS[i]: expected[:, seen.labels == i].mean(1) for i in there}


def run_lengths(cfg: Config, seen: View, level: float, draws: int) -> list[int]:
    """Lengths of the runs of adjacent masked tokens over `draws` draws at one noise level."""
    padded = np.pad(view_masks(cfg, seen, level, draws).astype(np.int8), ((0, 0), (1, 1))).ravel()
    edges = np.flatnonzero(np.diff(padded))
    return (edges[1::2] - edges[::2]).tolist()
