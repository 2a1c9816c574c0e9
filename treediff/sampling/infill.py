"""Infilling: the text around a hole on the model's canvas, how long the hole is, and what fills it. Not the paper's.

    out = fill(net, [Gapped([before, between, after], [4, 7])], how)    # two holes of 4 and 7 tokens, token ids around
    out[0].holes                                                        # the ids in each

    model = Infiller(cfg)
    answers = model.answer([model.gap(hole, 0)], watch)                  # of a holes.Hole, under `hole_length`

The canvas is prompt, prefix, hole, suffix: blocks run over the hole, and all else is given. In a program the prompt and
what frames an answer stand around it as in training: the reasoning (TinyCode's own; of other benchmarks nobody knows
it: an empty one), then the code (`hole_context`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from treediff.config import Config
from treediff.data import examples, sources
from treediff.data.holes import Hole
from treediff.errors import UserError
from treediff.masking import tokens
from treediff.sampling import decode, diffusion
from treediff.sampling.prompts import answer_text, message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Gapped(NamedTuple):
    """A text with n holes: the token ids of its n + 1 known pieces, and the number of tokens in each hole."""

    known: Sequence[Sequence[int]]
    lengths: Sequence[int]


class Filled(NamedTuple):
    """What stands in each hole: token ids, the step that committed each, its confidence; as in decode.Decoded."""

    holes: list[list[int]]
    committed_at: list[list[int]]
    confidence: list[list[float]]
    margin: float
    margin_at: int


def fill(
    net: nn.Module,
    texts: Sequence[Gapped],
    how: decode.Decoding,
    uids: Sequence[int] | None = None,
    watch: decode.Watch | None = None,
) -> list[Filled]:
    """Decode the holes of each text; `how.gen_length` follows from them. Texts together give what each gives alone.

    Holes of one text are decoded together, in blocks that run over all their tokens from left to right. Nothing outside
    them changes, and where there is no token to decode the model is not asked. What `cache` keeps are the known text,
    on both sides, and the hole's tokens before the block (prefix) or outside it (dual).
    """
    prompts = [list(itertools.chain(*t.known)) for t in texts]
    places = []
    for known, lengths in texts:
        given: list[int] = []
        asked: list[int] = []
        at = 0
        for piece, length in zip(known, [*lengths, 0], strict=True):
            given += range(at, at + len(piece))
            asked += range(at + len(piece), at + len(piece) + length)
            at += len(piece) + length
        places.append(given + asked)
    longest = max((sum(t.lengths) for t in texts), default=0)
    how = dataclasses.replace(how, gen_length=longest, steps=longest)
    if not longest:
        empty: list[list[list[Any]]] = [[[] for _ in t.lengths] for t in texts]
        return [Filled(e, e, e, math.inf, decode.NEVER) for e in empty]
    out = decode.decode(net, prompts, how, uids, watch, places)
    found = []
    for row, text in enumerate(texts):
        ends = list(itertools.accumulate(text.lengths, initial=0))
        columns = (out.ids[row].tolist(), out.committed_at[row].tolist(), out.confidence[row].tolist())
        ids, at_steps, confidence = ([column[a:b] for a, b in itertools.pairwise(ends)] for column in columns)
        found.append(Filled(ids, at_steps, confidence, float(out.margin[row]), int(out.margin_at[row])))
    return found


@dataclass
class Gap:
    """A hole to be filled: number `sample` of its program; `ids` are the known tokens, `before` of them before it."""

    hole: Hole
    sample: int
    ids: list[int]
    before: int
    size: int | None  # tokens of what stood in it

    @property
    def task(self) -> str:
        """The program that the hole is cut from."""
        return self.hole.task

    @property
    def key(self) -> tuple[str, int]:
        """What names its line in the samples' file."""
        return self.hole.task, self.sample

    @property
    def uid(self) -> int:
        """What names it to the random numbers, below 2**32."""
        return zlib.crc32(self.hole.id.encode())

    def text(self, length: int) -> Gapped:
        """The canvas with a hole of `length` tokens."""
        return Gapped([self.ids[: self.before], self.ids[self.before :]], [length])


class Infiller:
    """The run's diffusion model as it fills holes."""

    def __init__(self, cfg: Config) -> None:
        if cfg.model:
            raise UserError("model: an autoregressive model fills no holes; leave it out.")
        self.cfg, self.tok = cfg, tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
        self.how = diffusion.decoding(cfg, self.tok, 0, holes=cfg.tokens_per_step, early_exit=False)
        self.net = diffusion.load_run(cfg)
        config: Any = self.net.config
        self.limit = int(config.max_position_embeddings)

    def gap(self, hole: Hole, sample: int) -> Gap:
        """The hole on the canvas. Raises UserError if it, or what stands around it, does not fit."""
        gap = place(self.cfg, self.tok, hole, sample)
        most = max(self.lengths(gap))
        if len(gap.ids) + most > self.limit:
            raise UserError(
                f"{hole.id}: the text around the hole takes {len(gap.ids)} tokens ({len(gap.ids) - gap.before} of them "
                f"after it) and the hole {most}, but the model's canvas holds {self.limit}; take a shorter one."
            )
        return gap

    def lengths(self, gap: Gap) -> list[int]:
        """The lengths that `hole_length` has this hole decoded at."""
        if self.cfg.hole_length == "search":
            return sorted(set(self.cfg.hole_lengths))
        if self.cfg.hole_length == "oracle" and gap.size is None:
            raise UserError(
                f"hole_length: nobody knows the true length of the hole in {gap.hole.id}; give a number of tokens, or "
                "search."
            )
        return [gap.size or 0 if self.cfg.hole_length == "oracle" else int(self.cfg.hole_length)]

    def answer(self, batch: Sequence[Gap], watch: decode.Watch | None) -> list[dict[str, Any]]:
        """Per hole: its completion, the ids in it and how they came about, and under `search` each length's score.

        The score of a length is the mean confidence of its tokens; of equal scores the shorter length is taken.
        """
        tried: list[list[tuple[int, Filled]]] = [[] for _ in batch]
        uids = [g.uid for g in batch]
        rounds = list(zip(*map(self.lengths, batch), strict=True))
        for number, lengths in enumerate(rounds):
            texts = [g.text(n) for g, n in zip(batch, lengths, strict=True)]

            def part(state: torch.Tensor, behind: float, number: int = number) -> None:
                if watch:
                    watch(state, (number + behind) / len(rounds))

            for of, n, found in zip(tried, lengths, fill(self.net, texts, self.how, uids, part), strict=True):
                of.append((n, found))
        return [self._answer(gap, of) for gap, of in zip(batch, tried, strict=True)]

    def _answer(self, gap: Gap, tried: list[tuple[int, Filled]]) -> dict[str, Any]:
        scores = [sum(f.confidence[0]) / n if n else 0.0 for n, f in tried]
        best = max(range(len(tried)), key=lambda i: (scores[i], -i))
        length, found = tried[best]
        answer = {
            "text": completion(self.tok, gap, found.holes[0]),
            "length": length,
            "ids": found.holes[0],
            "committed_at": found.committed_at[0],
            "confidence": [round(c, 5) for c in found.confidence[0]],
            "margin": round(found.margin, 6) if math.isfinite(found.margin) else None,
            "margin_at": found.margin_at,
        }
        if len(tried) > 1:
            answer["tried"] = {str(n): round(s, 5) for (n, _), s in zip(tried, scores, strict=True)}
        return answer

    def rows(self, longest: int) -> int:
        """Holes whose known text has at most `longest` tokens that fit into the GPU's free memory together."""
        if not torch.cuda.is_available():
            return sys.maxsize
        most = max(self.cfg.hole_lengths) if self.cfg.hole_length == "search" else 256
        most = int(self.cfg.hole_length) if self.cfg.hole_length.isdigit() else most
        how = dataclasses.replace(self.how, gen_length=most)
        free = torch.cuda.mem_get_info(diffusion.device())[0]
        return diffusion.rows_that_fit(self.net.config, how, longest, free)


def place(cfg: Config, tok: PreTrainedTokenizerFast, hole: Hole, sample: int = 0) -> Gap:
    """A hole between the tokens of what stands around it.

    Both sides are tokenized by themselves, so that nothing of the hole shows in them. One blank before the hole goes
    into it: tokenizers join a blank to the word after it, and the kit counts such a token to that word's node.
    """
    prefix, suffix = hole.prefix, hole.suffix
    blank = " " if joined(hole) else ""
    prefix = prefix.removesuffix(blank)
    before, after = [], []
    if cfg.hole_context == "answer":
        said = message(cfg, hole.problem)[0] if hole.problem else examples.INSTRUCTION
        head, _ = tokens.tokenize(tok, examples.prompt_text(tok, said), special=True)
        before = head.tolist()
        framed, start, _ = examples.Example("", "", hole.reasoning, "", cfg.language).answer()
        prefix = framed.encode()[:start].decode() + prefix
        suffix = suffix.rstrip("\n") + "\n```"
        after = list(tokens.endings(tok)[1:])
    elif tok.bos_token_id is not None:
        before = [tok.bos_token_id]
    before += tokens.tokenize(tok, prefix)[0].tolist()
    after = [*tokens.tokenize(tok, suffix)[0].tolist(), *after]
    size = None if hole.text is None else len(tokens.tokenize(tok, blank + hole.text)[0])
    if hole.text == "":
        size = 0
    return Gap(hole, sample, [*before, *after], len(before), size)


def joined(hole: Hole) -> bool:
    """Whether the hole on the canvas begins with the blank before it."""
    return hole.prefix.endswith(" ")


def completion(tok: PreTrainedTokenizerFast, gap: Gap, ids: Sequence[int]) -> str:
    """The text of a hole's tokens up to the first end of text, without the blank that was put before it."""
    text = answer_text(tok, ids)
    return text.removeprefix(" ") if joined(gap.hole) else text


def exact(hole: Hole, text: str) -> bool:
    """Whether a completion is what stood in the hole, blanks at its ends aside."""
    return text.strip() == (hole.text or "").strip()
