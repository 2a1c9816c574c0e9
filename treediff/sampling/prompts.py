"""What a model is asked, and the program in what it answers: prompts, the text of an answer, extraction.

    ids, begin = prompt_ids(cfg, tok, problem)
    program = extract(begin + answer_text(tok, answer), entry_point, cfg.extract)

Prompt style, thinking and extraction are switches, recorded with every sample.
"""

from __future__ import annotations

import re
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treediff.config import Config
from treediff.data import examples
from treediff.masking import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
"""What EvalPlus's chat mode lets the assistant begin with."""


def message(cfg: Config, problem: str) -> tuple[str, str]:
    """What the user says under `prompt_style`, and how the answer is made to begin under that and `think`."""
    said = problem.strip()
    if cfg.prompt_style != "bare":
        said = f"{examples.INSTRUCTION}\n```\n{said}\n```"
    begin = {"free": "", "open": "<think>\n", "closed": "<think>\n\n</think>\n\n"}[cfg.think]
    if cfg.prompt_style == "prefill":
        begin += f"{RESPONSE}\n```python\n"
    return said, begin


def prompt_ids(cfg: Config, tok: PreTrainedTokenizerFast, problem: str) -> tuple[list[int], str]:
    """The prompt of a benchmark problem as tokens, and how the answer is made to begin (in the prompt already)."""
    said, begin = message(cfg, problem)
    ids, _ = tokens.tokenize(tok, examples.prompt_text(tok, said), special=True)
    start, _ = tokens.tokenize(tok, begin)
    return [*ids.tolist(), *start.tolist()], begin


def answer_text(tok: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of an answer up to its first EOS or end of turn."""
    table = tokens.byte_table(tok)
    ends = tokens.endings(tok)
    out = []
    for i in ids:
        if i in ends:
            break
        out.append(table.spelling[i] if i < len(table.spelling) else b"")
    return b"".join(out).decode("utf-8", errors="replace")


def extract(text: str, entry_point: str, rule: str) -> str:
    """The program in an answer: by EvalPlus's `sanitize`, or the `first_fence` after the reasoning."""
    if rule == "sanitize":
        from evalplus.sanitize import sanitize

        return str(sanitize(text, entry_point))
    return first_fence(text)


def first_fence(text: str) -> str:
    """The content of the first code fence after the last </think>, of backticks or tildes, in any language.

    A fence begins a line; only where none does, one inside a line counts. One that is never closed runs to the end;
    an indented one is dedented. Without any fence, the answer after </think> is the program.
    """
    rest = text.rpartition("</think>")[2]
    opening = re.search(r"^[ \t]*(`{3,}|~{3,})[^`\n]*(?:\n|$)", rest, re.M) or re.search(
        r"(`{3,})[^`\n]*(?:\n|$)", rest
    )
    if not opening:
        return rest.strip("\n")
    body, mark = rest[opening.end() :], opening[1]
    closing = re.search(rf"^[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*$", body, re.M) or re.search(re.escape(mark), body)
    program = body[: closing.start()] if closing else body
    return textwrap.dedent(program).strip("\n") if opening[0][:1] in " \t" else program.strip("\n")


@dataclass
class Prompt:
    """One sample to be made: sample number `sample` of a task; `uid` names it to the random numbers."""

    task: str
    sample: int
    text: str
    ids: list[int]
    begin: str  # how the answer is made to begin

    @property
    def key(self) -> tuple[str, int]:
        """Task and number of the sample: what it is found by in a file."""
        return self.task, self.sample

    @property
    def uid(self) -> int:
        """The number that random draws depend on: the same whoever else is in the batch."""
        return (zlib.crc32(self.task.encode()) >> 4 << 8) + self.sample
