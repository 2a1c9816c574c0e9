"""One prompt in the terminal: the answer as it is denoised, every token in its place as it is committed.

treediff sample --masking ast --prompt "Write solve(nums): the sum of the even numbers."
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, TextIO

from treediff.config import Config
from treediff.masking import tokens
from treediff.sampling import diffusion, prompts
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
    screen = Screen(out, model.tok, cfg) if out.isatty() and not cfg.model else None
    text = begin + model.answer([prompt], screen.draw if screen else lambda *_: None)[0]["text"]
    if screen:
        screen.wipe()
    out.write((harmless(text) if out.isatty() else text) + "\n")
    return text


class Screen:
    """A terminal on which an answer is drawn over and over at the same place."""

    def __init__(self, out: TextIO, tok: PreTrainedTokenizerFast, cfg: Config, frame: float = 1 / 15) -> None:
        self.out, self.tok, self.mask, self.frame = out, tok, tok.mask_token_id, frame
        self.lines, self.drawn, self.last = 0, 0.0, []
        self.size = shutil.get_terminal_size()

    def draw(self, state: torch.Tensor, behind: float) -> None:
        """Draw the first answer of `state` (B, T), at most 15 times a second."""
        if time.monotonic() - self.drawn < self.frame:
            return
        self.drawn, ids = time.monotonic(), state[0].tolist()
        self.wipe()
        text = frame(self.tok, ids, self.last, self.size.columns, self.size.lines - 2)
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
    table, ends = tokens.byte_table(tok), tokens.endings(tok)
    rows, width = [""], 0
    for place, i in enumerate(ids):
        if i in ends:
            break
        masked = i == tok.mask_token_id
        piece = HIDDEN if masked else harmless(b"".join(table.spelling[i : i + 1]).decode(errors="replace"))
        lit = DIM if masked else NEW if place < len(before) and before[place] == tok.mask_token_id else ""
        for number, part in enumerate(piece.split("\n")):
            if number or width + len(part) > columns - 1:
                rows.append("")
                width = 0
            rows[-1] += f"{lit}{part}{PLAIN}" if lit and part else part
            width += len(part)
    return "\n".join(rows[-max(1, lines) :]) + "\n"
