"""Tokenizers, and tiers and spans carried from bytes to tokens.

    tok = load_tokenizer("GSAI-ML/LLaDA-8B-Instruct")      # or a folder, or train_tokenizer(texts, ...)
    ids, starts = encode(tok, text)                        # token ids and the byte at which each begins
    labels = token_labels(...)                             # one label per token: LABELS[i]

Tokens and syntax meet in bytes. In a byte-level BPE each token is a fixed run of bytes, so a table of byte lengths
by token id places every token exactly, whatever the characters (a token may hold half of an emoji), without asking
the tokenizer for offsets. That the tokens spell the text is checked on every text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from treediff.errors import UserError
from treediff.masking.tiers import DEFAULT, TIERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


LABELS = ("prompt", "reasoning", *TIERS)
"""What a token belongs to, by label code: never masked, masked at random, or code of one of five tiers."""

PROMPT, REASONING, CODE = 0, 1, 2  # CODE is the first code label: a label >= CODE is code

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
"""LLaDA's chat template: it always ends with an open assistant header."""

END_OF_TURN = "<|eot_id|>"
MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>", "<mask>", "[MASK]")


class ByteTable(NamedTuple):
    """What each token id spells. Arrays are indexed by token id."""

    spelling: list[bytes]
    length: np.ndarray  # int64, bytes
    lead: np.ndarray  # int64, blank bytes before the first other one; 0 if all are blank
    blank: np.ndarray  # bool, whether all are blank
    text: np.ndarray  # uint8, all spellings in a row
    place: np.ndarray  # int64, where a token's spelling begins in `text`


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or the hub, with a `mask_token`. Raises UserError if it cannot serve (see below)."""
    from transformers import AutoTokenizer, PreTrainedConfig

    # Texts are encoded one by one, so its threads would only be woken in vain, and complain when a process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        # Code that a folder brings along is never run; without that word transformers would ask and wait. The model's
        # own config.json says nothing about the tokenizer, and one of an unknown model makes transformers warn.
        own = {"config": PreTrainedConfig(), "trust_remote_code": False}
        tok: Any = AutoTokenizer.from_pretrained(name, revision=revision, **own)
    except (OSError, ValueError) as e:
        if "trust_remote_code" in str(e):
            raise UserError(
                f"tokenizer: {name} can be loaded by code of its own only, which is never run here; give a folder with "
                "a tokenizer.json that transformers reads without it."
            ) from None
        first = str(e).strip().splitlines()[0]
        raise UserError(f"tokenizer: {name} is neither a tokenizer folder nor a reachable hub id ({first}).") from None
    if not getattr(tok, "is_fast", False):
        raise UserError(f"tokenizer: {name} has no fast (tokenizer.json) form, which alignment needs.")
    if tok.mask_token is None:
        known = [t for t in MASK_TOKENS if t in tok.get_vocab()]
        if not known:
            raise UserError(f"tokenizer: {name} has no mask token; a diffusion model needs one ({MASK_TOKENS[0]}).")
        tok.add_special_tokens({"mask_token": known[0]})
    if tok.eos_token_id is None:
        raise UserError(f"tokenizer: {name} has no end-of-text token.")
    if not tok.chat_template:
        tok.chat_template = CHAT_TEMPLATE
    byte_table(tok)
    found: PreTrainedTokenizerFast = tok
    return found


# How a text is cut before the merges. The frame of an answer is one piece each. A number is a piece of its own whatever
# stands before it (the blank before it goes to the piece on its left), so that a constant is one token everywhere:
# copying it from the prompt is then a matter of attention alone.
_PIECES = (
    r"<think>\n|\n</think>\n\n```python\n|\n```|\n\n"
    r"| ?\p{L}+(?: (?=\p{N}))?|\p{N}+| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a lossless byte-level BPE with LLaDA's special tokens and chat template; save it to `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bos, eos, mask = SPECIAL_TOKENS[:3]
    tok = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        mask_token=mask,
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tok.save_pretrained(folder)


_TABLES: dict[int, tuple[object, ByteTable]] = {}


def byte_table(tok: PreTrainedTokenizerFast) -> ByteTable:
    """The byte table of a byte-level tokenizer (made once per tokenizer). Raises UserError if it is none."""
    kept = _TABLES.get(id(tok))
    if kept and kept[0] is tok:
        return kept[1]
    backend = tok.backend_tokenizer
    if '"ByteLevel"' not in json.dumps(json.loads(backend.to_str()).get("decoder")):
        raise UserError(f"tokenizer: {tok.name_or_path} is not a byte-level BPE, so tokens cannot be placed in bytes.")
    byte_of = _byte_alphabet()
    added = backend.get_added_tokens_decoder()
    spelling = [b""] * (max(tok.get_vocab().values()) + 1)
    for text, i in tok.get_vocab().items():
        spelling[i] = text.encode() if i in added else bytes(byte_of[c] for c in text)
    length = np.array([len(s) for s in spelling], np.int64)
    stripped = np.array([len(s.lstrip()) for s in spelling], np.int64)
    every = np.frombuffer(b"".join(spelling), np.uint8)
    lead, place = np.where(stripped > 0, length - stripped, 0), np.cumsum(length) - length
    table = ByteTable(spelling, length, lead, stripped == 0, every, place)
    _TABLES[id(tok)] = (tok, table)
    return table


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def endings(tok: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The tokens that end an answer: EOS and, where there is one, the end of a turn."""
    turn = tok.backend_tokenizer.token_to_id(END_OF_TURN)
    return (tok.eos_token_id,) if turn is None else (tok.eos_token_id, turn)


def tokenize(tok: PreTrainedTokenizerFast, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and the byte offset at which each token starts: int32 (n,), int64 (n,).

    A special token's text inside `text` is spelled out like any other text unless `special`. Raises UserError as
    `place` does.
    """
    backend = tok.backend_tokenizer
    backend.encode_special_tokens = not special
    try:
        # Without the offsets, which are in characters and cost a quarter of the time.
        ids = np.array(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)
    finally:
        backend.encode_special_tokens = False
    return ids, place(tok, ids, text.encode())


def place(tok: PreTrainedTokenizerFast, ids: np.ndarray, text: bytes) -> np.ndarray:
    """The byte of `text` at which each of its tokens starts, int64 (n,). Raises UserError if the tokens do not spell
    the text byte for byte (a tokenizer that normalises or loses characters)."""
    table = byte_table(tok)
    raw, length = np.frombuffer(text, np.uint8), table.length[ids]
    starts = np.cumsum(length) - length
    spelled = table.text[np.arange(int(length.sum())) + np.repeat(table.place[ids] - starts, length)]
    if not np.array_equal(spelled, raw):
        short = min(len(raw), len(spelled))
        at = next(iter(np.flatnonzero(raw[:short] != spelled[:short]).tolist()), short)
        raise UserError(
            f"tokenizer: {tok.name_or_path} does not keep the text: {raw[at : at + 8].tobytes()!r} at byte {at} "
            f"comes back as {spelled[at : at + 8].tobytes()!r}; a lossless tokenizer is needed."
        )
    return np.asarray(starts)


def anchors(tok: PreTrainedTokenizerFast, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The byte that decides a token's owner: its first non-blank one, or its first if all are blank. int64 (n,)."""
    return np.asarray(starts + byte_table(tok).lead[ids])


def token_tiers(
    tok: PreTrainedTokenizerFast,
    ids: np.ndarray,
    starts: np.ndarray,
    tiers: np.ndarray,
    weights: list[float] | None = None,
    blank_owner: str = "none",
) -> np.ndarray:
    """Tier code of each token, uint8 (n,), from the tier of each byte (`tiers`, uint8, the whole text).

    With `weights` (by tier code) a token takes the heaviest tier among its non-blank bytes (`token_owner =
    max_weight`), the first of them on a tie; otherwise the tier of its anchor (`first_byte`). A token of blanks alone
    has the default tier, or with `blank_owner = enclosing` that of the node around it.
    """
    at, table = anchors(tok, ids, starts), byte_table(tok)
    blank = table.blank[ids] if blank_owner == "none" else np.zeros(len(ids), bool)
    if weights is None or not len(ids):
        return np.where(blank, DEFAULT, tiers[at])
    ends = starts + table.length[ids]
    # Of each token's bytes the one with the largest key: heaviest first, then earliest.
    rank, n = np.unique(weights, return_inverse=True)[1], len(tiers) + 1
    key = np.append(rank[tiers] * n + np.arange(n - 1, 0, -1), 0)
    most = np.maximum.reduceat(key, np.column_stack([at, ends]).ravel())[::2]
    return np.where(blank, DEFAULT, tiers[n - 1 - most % n])


def token_spans(at: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Byte spans (n, 3) as token spans [start, end) + tier, int32: the tokens whose anchors (`at`) lie inside.

    Spans that hold no token's anchor are left out.
    """
    if not len(at) or not len(spans):
        return np.zeros((0, 3), np.int32)
    # Tokens whose anchors lie before a byte, by byte: reading this off is quicker than a search per span.
    gaps = np.empty(len(at) + 1, np.int64)
    gaps[0], gaps[-1] = at[0] + 1, max(0, spans[:, 1].max() - at[-1])
    np.subtract(at[1:], at[:-1], out=gaps[1:-1])
    before = np.repeat(np.arange(len(at) + 1, dtype=np.int32), gaps)
    out = np.array(spans, np.int32)
    out[:, :2] = before[spans[:, :2]]
    return out[out[:, 1] > out[:, 0]]
