"""One table that renders Markdown, HTML, CSV and LaTeX.

    table = Table(["", "HE, T = 256"], [["Backbone", Cell("39.6 [32.4, 47.3] (65/164)", {"verdict": "pass"})]], "Ours")
    table.markdown()      # a notebook that ends a cell with the table shows the same

Rows hold texts and numbers as they are to be read; every rendering escapes them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup


class Cell(str):
    """A cell's text that, clicked on the page, sets the task explorer's `filters` (name: value)."""

    def __new__(cls, text: object, filters: Mapping[str, str]) -> Cell:
        """The text as a string that carries the filters."""
        cell = super().__new__(cls, text)
        cell.filters = dict(filters)
        return cell


@dataclass(frozen=True)
class Table:
    """Titles of the columns, rows of as many cells (anything that `str` takes; None is empty), a caption."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], names: Sequence[str], caption: str = "") -> Table:
        """A table with a row per record and a column per name; what a record lacks is empty."""
        return cls(names, [[r.get(n) for n in names] for r in records], caption)

    def markdown(self) -> str:
        """A pipe table, without the caption."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)

    def _repr_markdown_(self) -> str:
        return f"{self.caption}\n\n{self.markdown()}" if self.caption else self.markdown()

    def csv(self) -> str:
        """Comma-separated values under a line of titles."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.head, *self.rows])
        return out.getvalue()

    def html(self) -> Markup:
        """A table that can be sorted by a click on a title and scrolls within its own box."""
        from markupsafe import Markup

        head = Markup().join(
            Markup('<th scope="col"><button>{}</button></th>').format(x or "strategy") for x in self.head
        )
        body = Markup().join(Markup("<tr>{}</tr>").format(Markup().join(map(_td, row))) for row in self.rows)
        return Markup(
            '<div class="wide" tabindex="0" role="region" aria-label="{0}"><table><caption>{0}</caption>'
            "<thead><tr>{1}</tr></thead><tbody>{2}</tbody></table></div>"
        ).format(self.caption, head, body)

    __html__ = html  # what a template shows

    def latex(self) -> str:
        """A tabular for booktabs. Titles "HE, T = 256" are set in two lines, one over all columns of the same T."""
        upper = [x.partition(", ")[2] for x in self.head]
        spans, rules, at = [], [], 1
        for title, group in groupby(upper):
            width = len(list(group))
            spans.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(title)}}}" if title else " & " * (width - 1))
            rules += [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"] if title else []
            at += width
        titles = [_tex(x.partition(", ")[0]) for x in self.head]
        lines = [rf"\begin{{tabular}}{{l{'c' * (len(self.head) - 1)}}}", r"\toprule"]
        if any(upper):
            lines += [" & ".join(spans) + r" \\", "".join(rules)]
        lines += [" & ".join(titles) + r" \\", r"\midrule"]
        lines += [" & ".join(map(_tex, row)) + r" \\" for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def rate(r: Mapping[str, Any]) -> str:
    """A record of stats.rated in percent with its 95 % interval and the counts behind it; "not run" without.

    Where EvalPlus and we count otherwise, both counts stand there.
    """
    if "rate" not in r:
        return "not run"
    counts = f"{r['passed']}/{r['tasks']}" if r["samples"] == 1 else f"{r['passed']} of {r['tasks']} x {r['samples']}"
    counts += f"; {r['other_verdicts']}: {r['other']}" if "other" in r else ""
    return f"{estimate(r['rate'], r['low'], r['high'])} ({counts})"


def estimate(value: float, low: float, high: float, sign: str = "") -> str:
    """A value with its interval, to one decimal; `sign` "+" for differences."""
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _markdown(value: Any) -> str:
    return re.sub(r"([|<])", r"\\\1", " ".join(_text(value).split()))


def _td(value: Any) -> Markup:
    import json

    from markupsafe import Markup

    text = _text(value)
    if isinstance(value, Cell):
        show = json.dumps(value.filters)
        return Markup('<td><button class="cell" data-show="{}">{}</button></td>').format(show, text)
    return Markup("<td class=long>{}</td>" if len(text) > 45 else "<td>{}</td>").format(text)


_TEX = {c: "\\" + c for c in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _tex(value: Any) -> str:
    """A cell with LaTeX's special characters escaped, what stands in brackets small, and T as a variable."""
    text = "".join(_TEX.get(c, c) for c in _text(value))
    return re.sub(r"\bT = (\d+)", r"$T=\1$", re.sub(r" (\[[^\]]*\].*)", r" {\\scriptsize \1}", text))
