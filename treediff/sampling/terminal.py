"""One prompt or one hole in the terminal: what is denoised, every token in its place as it is committed.

treediff sample --masking ast --prompt "Write solve(nums): the sum of the even numbers."
treediff infill FILE --line 12 --masking ast
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from treediff.config import Config
from treediff.data.holes import Hole
from treediff.masking import tokens
from treediff.sampling import diffusion, infill, prompts
from treediff.sampling.autoregressive import Autoregressive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


HIDDEN = "░"
NEW, DIM, PLAIN = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"


def stream(cfg: Config, problem: str, out: TextIO) -> str:
    """Answer `problem` with the run's model (its longest T) on the stream `out`; the answer's text.

    On a terminal the denoising is drawn in place; anywhere else only the text is written, when it is done.
    """
    length = cfg.lengths[-1]
    model = Autoregressive(cfg, length) if cfg.model else diffusion.Diffusion(cfg, length)
    ids, begin = model.prompt(problem)
    prompt = prompts.Prompt("prompt", 0, problem, ids, begin)
    tok: Any = model.tok
    screen = Screen(out, tok, cfg) if out.isatty() and not cfg.model else None
    text: str = begin + model.answer([prompt], screen.draw if screen else lambda *_: None)[0]["text"]
    if screen:
        screen.wipe()
    out.write((harmless(text) if out.isatty() else text) + "\n")
    return text


def fill(cfg: Config, hole: Hole, out: TextIO) -> str:
    """Fill `hole` with the run's model on the stream `out`; the whole program's text.

    On a terminal the program is drawn around the hole while that is denoised; anywhere else it is only written.
    """
    model = infill.Infiller(cfg)
    gap = model.gap(hole, 0)
    screen = Screen(out, model.tok, cfg) if out.isatty() else None
    if screen:
        screen.frame_of = lambda ids, before: hole_frame(
            model.tok, hole, ids, before, screen.size.columns, screen.size.lines - 2
        )
    answer = model.answer([gap], screen.draw if screen else None)[0]
    text = hole.program(answer["text"])
    if screen:
        screen.wipe()
        parts = (hole.prefix, answer["text"], hole.suffix)
        before, filled, after = (harmless(part) for part in parts)
        out.write(f"{before}{NEW}{filled}{PLAIN}{after}".rstrip("\n") + "\n")
    else:
        out.write(text)
    return text


class Screen:
    """A terminal on which an answer is drawn over and over at the same place."""

    def __init__(self, out: TextIO, tok: PreTrainedTokenizerFast, cfg: Config, pause: float = 1 / 15) -> None:
        self.out, self.tok, self.mask, self.pause = out, tok, tok.mask_token_id, pause
        self.lines, self.drawn = 0, 0.0
        self.last: list[int] = []
        self.size = shutil.get_terminal_size()
        self.frame_of: Callable[..., str] = lambda ids, before: frame(
            tok, ids, before, self.size.columns, self.size.lines - 2
        )

    def draw(self, state: torch.Tensor, behind: float) -> None:
        """Draw the first answer of `state` (B, T), at most 15 times a second."""
        if time.monotonic() - self.drawn < self.pause:
            return
        self.drawn, ids = time.monotonic(), state[0].tolist()
        self.wipe()
        text = self.frame_of(ids, self.last)
        self.last, self.lines = ids, text.count("\n")
        self.out.write(text)
        self.out.flush()

    def wipe(self) -> None:
        """Back to where the drawing began, with nothing below."""
        self.out.write((f"\x1b[{self.lines}A" if self.lines else "") + "\r\x1b[J")
        self.lines = 0


def harmless(text: str) -> str:
    """`text` without what would steer a terminal: an answer is not to be trusted with one."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.expandtabs(4).replace("\r\n", "\n"))


def frame(tok: PreTrainedTokenizerFast, ids: list[int], before: list[int], columns: int, lines: int) -> str:
    """The answer as rows of at most `columns` cells, the last `lines` of them: masks as blocks, new tokens lit."""
    rows = _wrapped(_pieces(tok, ids, before), columns)
    return "\n".join(rows[-max(1, lines) :]) + "\n"


def hole_frame(
    tok: PreTrainedTokenizerFast, hole: Hole, ids: list[int], before: list[int], columns: int, lines: int
) -> str:
    """A program with its hole, as `frame` draws an answer: the `lines` rows that show the hole's beginning."""
    pieces = _pieces(tok, ids, before)
    prefix = hole.prefix.removesuffix(" ") if infill.joined(hole) else hole.prefix
    above = _wrapped(_split(prefix), columns)
    rows = _wrapped([*_split(prefix), *pieces, *_split(hole.suffix)], columns)
    first = max(0, min(len(above) - 1 - lines // 3, len(rows) - lines))
    return "\n".join(rows[first : first + max(1, lines)]) + "\n"


def _split(text: str) -> list[tuple[str, str]]:
    """Known text as pieces of a character, so that long lines are wrapped."""
    return [(c, "") for c in harmless(text)]


def _pieces(tok: PreTrainedTokenizerFast, ids: list[int], before: list[int]) -> list[tuple[str, str]]:
    """Text and ANSI colour of each token up to the first end of text."""
    table, ends = tokens.byte_table(tok), tokens.endings(tok)
    pieces = []
    for place, i in enumerate(ids):
        if i in ends:
            break
        masked = i == tok.mask_token_id
        piece = HIDDEN if masked else harmless(b"".join(table.spelling[i : i + 1]).decode(errors="replace"))
        new = place < len(before) and before[place] == tok.mask_token_id
        pieces.append((piece, DIM if masked else NEW if new else ""))
    return pieces


def _wrapped(pieces: list[tuple[str, str]], columns: int) -> list[str]:
    """Pieces as rows of at most `columns` cells."""
    rows, width = [""], 0
    for piece, lit in pieces:
        for number, part in enumerate(piece.split("\n")):
            if number or width + len(part) > columns - 1:
                rows.append("")
                width = 0
            rows[-1] += f"{lit}{part}{PLAIN}" if lit and part else part
            width += len(part)
    return rows
