"""Right programs that EvalPlus 0.3.1 fails and we pass on purpose, marked one by one; docs/sandbox.md says why.

    marked(ledger, programs)          # the ledger as it is written: such verdicts say what EvalPlus's would be
    counted(ledger, "evalplus")       # the same ledger as EvalPlus counts (`--verdicts evalplus`)

A task's number alone does not decide, for EvalPlus passes other right programs of Mbpp/566 and Mbpp/599. Those that are
marked it passes in some runs of its command and fails in others; they count as in the public verdicts that we are held
against: failed. The other departures are steady.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from treediff.errors import UserError
from treediff.scoring import stats
from treediff.scoring.verdicts import MIN_SECONDS


def _nodes(program: str) -> list[ast.AST]:
    """All nodes of a program's tree; none of one that Python cannot read here."""
    try:
        return list(ast.walk(ast.parse(program)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _recurses(program: str, _: Mapping[str, Any]) -> bool:
    """Whether a function calls itself by its name."""
    return any(
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == f.name
        for f in _nodes(program)
        if isinstance(f, ast.FunctionDef)
        for call in ast.walk(f)
    )


def _loops(program: str, verdict: Mapping[str, Any]) -> bool:
    """Whether it loops, for so long that a test could have met a limit: in less than the least limit, none can."""
    return verdict["seconds"] > MIN_SECONDS and any(isinstance(n, (ast.For, ast.While)) for n in _nodes(program))


def _any(_: str, __: Mapping[str, Any]) -> bool:
    return True


DEPARTURES: dict[str, tuple[tuple[str, ...], Callable[[str, Mapping[str, Any]], bool], str]] = {
    "HumanEval/32": (("base", "plus"), _any, "EvalPlus counts no test of find_zero as passed: it fails every program"),
    "Mbpp/255": (("plus",), _any, "1.7 million tuples meet the memory limit of EvalPlus's own process"),
    "Mbpp/566": (("plus",), _recurses, "nested calls die where EvalPlus's own process has grown to its memory limit"),
    "Mbpp/599": (("plus",), _loops, "EvalPlus's limit on time counts what other processes took of the core"),
}
"""By task: the parts that EvalPlus fails, the programs of which it does (program, verdict), and why."""


def marked(ledger: Mapping[str, Any], programs: Mapping[str, list[str]]) -> dict[str, Any]:
    """The ledger with `evalplus`, the parts that differ, in each verdict that EvalPlus would not give, and with
    `departures`, why, by task. `programs`: those that were judged, by task."""
    tasks, why = dict(ledger["tasks"]), {}
    for task in DEPARTURES.keys() & tasks.keys():
        parts, holds, reason = DEPARTURES[task]
        of = []
        for verdict, program in zip(stats.samples(tasks[task]), programs[task], strict=True):
            own = {k: v for k, v in verdict.items() if k != "evalplus"}
            fails = {part: "fail" for part in parts if own[part] == "pass"}
            of.append(own | {"evalplus": fails} if fails and holds(program, own) else own)
        tasks[task] = of[0] if isinstance(tasks[task], Mapping) else of
        if any("evalplus" in v for v in of):
            why[task] = reason
    return {**ledger, "departures": dict(sorted(why.items())), "tasks": tasks}


def counted(ledger: Mapping[str, Any], verdicts: str) -> dict[str, Any]:
    """The ledger as it is (`own`), or as EvalPlus 0.3.1 counts (`evalplus`), where each verdict that changed keeps ours
    as `own`. Raises UserError if it was written before its verdicts were marked."""
    if verdicts == "own":
        return dict(ledger)
    if "departures" not in ledger and DEPARTURES.keys() & ledger["tasks"].keys():
        raise UserError("verdicts: this ledger does not say where EvalPlus departs; score its samples again.")
    return _exchanged(ledger, "evalplus", "own") | {"settings": ledger["settings"] | {"verdicts": verdicts}}


def other(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """The ledger of `counted` as the other of the two counts it."""
    ours = ledger["settings"].get("verdicts", "own") == "own"
    return _exchanged(ledger, *(("evalplus", "own") if ours else ("own", "evalplus")))


def _exchanged(ledger: Mapping[str, Any], by: str, kept: str) -> dict[str, Any]:
    """The ledger with the parts under the name `by` in their verdicts, and what they replace under `kept`."""
    tasks = dict(ledger["tasks"])
    for task in ledger.get("departures", {}):
        of = [
            {k: v for k, v in one.items() if k != by} | one[by] | {kept: {part: one[part] for part in one[by]}}
            if by in one
            else one
            for one in stats.samples(tasks[task])
        ]
        tasks[task] = of[0] if isinstance(tasks[task], Mapping) else of
    return {**ledger, "tasks": tasks}
