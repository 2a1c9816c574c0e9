"""Progress of what takes more than two seconds, told to whoever is there.

    with bar(total=100, desc="train ast", unit=" steps") as shown:
        shown.update()

A person at a notebook sees tqdm's widget, one at a terminal its line. Where nobody sits (papermill, a log file), one
line stays at the end, and one every ten minutes of what takes that long.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 600.0
"""Seconds between two lines where nobody sits."""


def bar(*args: Any, **how: Any) -> tqdm:
    """tqdm, as it suits the place; the arguments are tqdm's."""
    if somebody := attended():
        from tqdm.notebook import tqdm as widget

        return widget(*args, **how)
    if somebody is None and sys.stderr.isatty():
        return tqdm(*args, **how)
    return tqdm(*args, file=LastLine(sys.stderr), **how)


def attended() -> bool | None:
    """Whether somebody sits at the notebook that this runs in; None if it is none. Programs that execute notebooks do
    not let a cell ask for input, programs that show them do."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return None if kernel is None else bool(getattr(kernel, "_allow_stdin", False))


class LastLine:
    """A file that passes on what a bar shows last, and now and then what it shows meanwhile, as plain lines."""

    def __init__(self, to: TextIO) -> None:
        self.to, self.last, self.told = to, "", time.monotonic()

    def write(self, text: str) -> None:
        """Keep the bar's newest state; pass it on where it ends the line or the last one is old."""
        self.last = text.split("\r")[-1].strip() or self.last
        if "\n" in text or time.monotonic() - self.told > EVERY:
            self.to.write(f"{self.last}\n")
            self.told = time.monotonic()

    def flush(self) -> None:
        """As files have it."""
        self.to.flush()
