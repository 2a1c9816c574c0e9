"""Holes in programs: HumanEval-Infilling's, AST nodes of any benchmark's programs, and the one a user points at.

    holes = load(cfg, "ast-tinycode")             # whole nodes, some of each tier, of each program
    holes = load(cfg, "single-line")              # HumanEval-Infilling, from --problems or the network
    hole = at_node("f.py", source, "12:5")        # or at_line, or marked

Prefix + text + suffix is the program, character for character.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
import re
import textwrap
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from treediff.config import HOLE_SETS, Config, runs_root
from treediff.data import benchmarks, tinycode
from treediff.errors import UserError
from treediff.files import whole
from treediff.masking.tiers import TIERS, Parsed, parse

log = logging.getLogger(__name__)

MARKER = "<fill>"
_URL = "https://github.com/openai/human-eval-infilling/raw/88062ff/data/"
_FILES = {  # by hole set: the public file, and the SHA-256 of its unpacked content
    "single-line": ("SingleLineInfilling", "6fffc71ec2f1674372fcc177511f92312f1a27a9eacd8e43255c9f5ee9eca8c8"),
    "multi-line": ("MultiLineInfilling", "5b49f312f0a781420a4ae54f5e73176009b9cfc52731e3a0b9be726b451032d1"),
    "random-span": ("RandomSpanInfilling", "4f15be2d4a479b504072c64e79702df184010f13bdf75f8b67ce08e054c48e26"),
    "random-span-light": (
        "RandomSpanInfillingLight",
        "cbb2b36f90311a3a7d844b6361852bb33e3ab11ab3bca2b7e85bfb9bf78c5891",
    ),
}
_FIELDS = ("task_id", "entry_point", "prompt", "suffix", "canonical_solution", "test")


@dataclass(frozen=True)
class Hole:
    """A hole in a program."""

    id: str
    task: str  # the program that it is cut from: what intervals resample
    prefix: str
    text: str | None  # what stood in it; None if nobody knows
    suffix: str
    problem: str  # what the user asks for, if it is known
    node: str = ""  # the type of the node that it is; empty if it is not exactly one
    tier: str = ""  # of that node; `default` if it has none
    test: str = ""  # a program that calls the check, where the benchmark has no inputs and outputs
    reasoning: str = ""  # what would stand before the program in a training row, where the benchmark has it

    def program(self, completion: str) -> str:
        """The program with `completion` in the hole."""
        return self.prefix + completion + self.suffix


def load(cfg: Config, name: str) -> list[Hole]:
    """The holes of a set: one of HumanEval-Infilling, or `ast-<benchmark>`; of `limit` programs, spread evenly.

    Raises UserError for a set that there is not, a file that is none, or a tier that leaves no hole.
    """
    if name in _FILES:
        holes = infilling(name, cfg.benchmark_files.get(name))
        tasks = benchmarks.spread(list(dict.fromkeys(h.task for h in holes)), cfg.limit)
        return [h for h in holes if h.task in set(tasks)]
    benchmark = name.removeprefix("ast-")
    if not name.startswith("ast-"):
        raise UserError(f"holes: there is no {name!r}; choose one of {', '.join(HOLE_SETS)}.")
    wanted = TIERS[1:] if cfg.tier == "any" else (cfg.tier,)
    holes = []
    for task, problem in benchmarks.benchmark_problems(cfg, benchmark).items():
        program = without_docstring(problem["prompt"] + problem["canonical_solution"], problem["entry_point"])
        holes += cut(program, wanted, cfg.holes_per_program, cfg.hole_seed, task, problem["prompt"])
    if benchmark == "tinycode":
        known = tinycode.reasonings()
        holes = [dataclasses.replace(h, reasoning=known.get(h.task, "")) for h in holes]
    if not holes:
        raise UserError(f"tier: no program of {benchmark} has a node of the tier {cfg.tier}; choose another.")
    return holes


def sets(cfg: Config) -> list[str]:
    """The hole sets that the switches `holes` and `benchmarks` name."""
    return [f"ast-{b}" for b in cfg.benchmarks] if cfg.holes == "ast" else [cfg.holes]


# --- AST nodes ----------------------------------------------------------------------------------------------------
class Node(NamedTuple):
    """A node that may be a hole: bytes [start, end), type, tier name."""

    start: int
    end: int
    type: str
    tier: str


def nodes(parsed: Parsed) -> list[Node]:
    """The named nodes that are less than the whole source, one per extent, in document order.

    Of nodes of one extent the outermost that has a tier is taken, or the outermost.
    """
    g, columns = parsed.grammar, parsed.nodes
    blank = len(parsed.source) - len(parsed.source.lstrip())
    everything = (blank, len(parsed.source.rstrip()))
    found: dict[tuple[int, int], Node] = {}
    kinds = columns.kind.tolist()
    for start, end, kind in zip(columns.start.tolist(), columns.end.tolist(), kinds, strict=True):
        inside = (start, len(parsed.source[:end].rstrip()))
        if inside[1] <= start or inside == everything or kind == len(g.tier_of_kind) - 1:
            continue
        node = Node(*inside, g.kind_name(kind), TIERS[g.tier_of_kind[kind]])
        if node.type == "block":  # a run of statements rather than a thing of the language
            continue
        if inside not in found or (found[inside].tier == "default" != node.tier):
            found[inside] = node
    return list(found.values())


def cut(program: str, tiers: tuple[str, ...], number: int, seed: int, task: str, problem: str) -> list[Hole]:
    """Up to `number` nodes of each of `tiers` as holes, none twice: a function of seed, task and tier."""
    source = program.encode()
    parsed = parse(source)
    found, out = nodes(parsed), []
    for tier in tiers:
        mine = [n for n in found if n.tier == tier]
        chosen = random.Random(f"holes {seed} {task} {tier}").sample(mine, min(number, len(mine)))
        for n in sorted(chosen):
            text = [source[a:b].decode() for a, b in ((0, n.start), (n.start, n.end), (n.end, len(source)))]
            out.append(Hole(f"{task}/{tier}/{n.start}-{n.end}", task, *text, problem, n.type, tier))  # type: ignore[call-arg]
    return out


def _function(parsed: Parsed, name: str) -> Any:
    """The tree's last function of this name, or None."""
    found: Any = None
    todo = [parsed.tree.root_node]
    while todo:
        node = todo.pop()
        named = node.child_by_field_name("name") if node.type == "function_definition" else None
        if named is not None and parsed.source[named.start_byte : named.end_byte] == name.encode():
            found = node if found is None or node.start_byte > found.start_byte else found
        todo.extend(node.children)
    return found


def _docstring(block: Any) -> Any:
    """The statement that is the docstring of a module or function body, or None."""
    first = next((c for c in block.named_children if c.type != "comment"), None) if block is not None else None
    is_text = first is not None and first.type == "expression_statement" and first.named_child_count == 1
    return first if first and is_text and first.named_children[0].type in ("string", "concatenated_string") else None


def without_docstring(program: str, entry_point: str) -> str:
    """A benchmark's program without the docstrings of the module and of `entry_point`: they state the problem, which
    stands in the user's turn already."""
    source = program.encode()
    parsed = parse(source)
    function = _function(parsed, entry_point)
    blocks = [parsed.tree.root_node, function and function.child_by_field_name("body")]
    cuts = []
    for block in blocks:
        doc = _docstring(block)
        if doc is not None and block.named_child_count > 1:
            begin, end = source.rfind(b"\n", 0, doc.start_byte) + 1, source.find(b"\n", doc.end_byte) + 1
            if end and not source[begin : doc.start_byte].strip() and not source[doc.end_byte : end].strip():
                cuts.append((begin, end))
    for begin, end in sorted(cuts, reverse=True):
        source = source[:begin] + source[end:]
    return source.decode()


def stated(program: str, entry_point: str) -> str:
    """The problem that a program states: everything up to the end of `entry_point`'s docstring, or of its header."""
    parsed = parse(program.encode())
    function = _function(parsed, entry_point)
    body = function and function.child_by_field_name("body")
    if body is None:
        return ""
    doc = _docstring(body)
    return parsed.source[: doc.end_byte if doc is not None else body.start_byte].decode().strip() + "\n"


# --- HumanEval-Infilling --------------------------------------------------------------------------------------------
def infilling(name: str, data: str | Path | None = None) -> list[Hole]:
    """A set of HumanEval-Infilling, from its public file (.jsonl.gz or .jsonl) or downloaded once.

    A hole that is exactly one node (outer blanks aside) carries its type and tier. Raises UserError naming the row
    that is not of this format, or the download that failed.
    """
    path = Path(data) if data else _download(name)
    raw = benchmarks.unpack(path)
    if hashlib.sha256(raw).hexdigest() != _FILES[name][1]:
        log.warning("%s: not the public file of %s: figures are not comparable with published ones.", path, name)
    holes: dict[str, Hole] = {}
    trees: dict[str, tuple[dict[tuple[int, int], Node], str]] = {}
    for row, record in benchmarks.rows(path, raw):
        wrong = [k for k in _FIELDS if not isinstance(record.get(k), str)]
        parts = str(record.get("task_id")).split("/")
        if wrong or len(parts) != 4:
            raise UserError(
                f"{path}, row {row}: {(wrong or ['task_id'])[0]} is missing or not HumanEval-Infilling's; give a file "
                "of its format."
            )
        if record["task_id"] in holes:
            raise UserError(f"{path}, row {row}: task {record['task_id']} is there twice; delete one.")
        prefix, text, suffix = record["prompt"], record["canonical_solution"], record["suffix"]
        program = prefix + text + suffix
        if program not in trees:
            parsed = parse(program.encode())
            by_extent = {(n.start, n.end): n for n in nodes(parsed)}
            trees[program] = by_extent, stated(program, record["entry_point"])
        by_extent, problem = trees[program]
        start = len(prefix.encode()) + len(text.encode()) - len(text.encode().lstrip())
        node = by_extent.get((start, start + len(text.strip().encode())), Node(0, 0, "", ""))
        check = f"\n{record['test']}\ndef {CHECK}():\n    check({record['entry_point']})\n    return True\n"
        holes[record["task_id"]] = Hole(
            record["task_id"], "/".join(parts[1:3]), prefix, text, suffix, problem, node.type, node.tier, check
        )
    if not holes:
        raise UserError(f"{path}: there is no hole in it; give a file of HumanEval-Infilling.")
    return list(holes.values())


CHECK = "check_that_nothing_is_raised"
"""What calls the benchmark's own check(entry_point): it comes after the completion, which cannot replace it."""


def _download(name: str) -> Path:
    """The public file, kept under runs/cache."""
    stem, digest = _FILES[name]
    file = f"HumanEval-{stem}.jsonl.gz"
    path = runs_root() / "cache" / file
    if not path.exists():
        try:
            with urllib.request.urlopen(_URL + file, timeout=60) as response:
                raw = response.read()
        except OSError as e:
            raise UserError(f"problems: {file} cannot be downloaded ({e}); give the file with --problems.") from None
        with whole(path) as temporary:
            temporary.write_bytes(raw)
            if hashlib.sha256(benchmarks.unpack(temporary)).hexdigest() != digest:
                raise UserError(f"problems: {file} came damaged or changed; give the file with --problems.")
    return path


# --- the hole that a user points at -----------------------------------------------------------------------------------
def marked(name: str, source: bytes) -> Hole:
    """The hole at the marker `<fill>`. Raises UserError unless it stands in the file once."""
    text = source.decode()
    parts = text.split(MARKER)
    if len(parts) == 1:
        raise UserError(f"{name}: no hole is given; point at one with --line, --node or the marker {MARKER}.")
    if len(parts) > 2:
        lines = [str("".join(parts[: i + 1]).count("\n") + 1) for i in range(len(parts) - 1)]
        raise UserError(f"{name}: {MARKER} stands there {len(parts) - 1} times (lines {', '.join(lines)}); leave one.")
    return _of_file(name, parts[0], None, parts[1], "", "")


def at_line(name: str, source: bytes, line: int) -> Hole:
    """Line number `line` (from 1) as the hole, its indentation and its end left in place."""
    lines = source.decode().splitlines(keepends=True)
    if not 1 <= line <= len(lines):
        raise UserError(f"{name}: there is no line {line}; the file has {len(lines)}.")
    whole_line = lines[line - 1]
    text = whole_line.strip()
    indent = whole_line[: len(whole_line.rstrip("\r\n")) - len(whole_line.rstrip("\r\n").lstrip())]
    if len("".join(lines).strip()) == len(text):
        raise UserError(f"{name}: line {line} is the whole file; point at a part of it.")
    before = "".join(lines[: line - 1]) + indent
    return _of_file(name, before, text, "".join(lines)[len(before) + len(text) :], "", "")


def at_node(name: str, source: bytes, position: str, language: str = "python") -> Hole:
    """The node at `line:column` (from 1, in characters): the largest that begins there, or else the smallest around.

    Raises UserError if the file does not parse, or the position is outside it, in no node, or that of the whole file.
    """
    line, _, column = position.partition(":")
    if not (line.isdigit() and column.isdigit() and int(line) and int(column)):
        raise UserError(f"node: {position!r} is no position; give line:column, both counted from 1.")
    parsed = parse(source, language)
    if parsed.tree.root_node.has_error:
        columns = parsed.nodes
        bad = columns.start[columns.kind == len(parsed.grammar.tier_of_kind) - 1].tolist() or [0]
        raise UserError(
            f"{name}: line {source[: bad[0]].count(10) + 1} does not parse; mend it, or mark the hole with {MARKER}."
        )
    lines = source.decode().splitlines(keepends=True)
    if int(line) > len(lines) or int(column) > max(1, len(lines[int(line) - 1].rstrip("\r\n"))):
        raise UserError(f"{name}: there is no {position}; the file has {len(lines)} lines.")
    at = len("".join(lines[: int(line) - 1]).encode()) + len(lines[int(line) - 1][: int(column) - 1].encode())
    columns = parsed.nodes
    root = (len(source) - len(source.lstrip()), len(source.rstrip()))
    begin = columns.start == at
    if begin.any() and (int(columns.start[begin][0]), len(source[: int(columns.end[begin][0])].rstrip())) == root:
        raise UserError(f"{name}: the node at {position} contains the whole file; point at one inside it.")
    found = nodes(parsed)
    starting = [n for n in found if n.start == at]
    around = [n for n in found if n.start < at < n.end]
    if not starting and not around:
        raise UserError(f"{name}: no node smaller than the whole file is at {position}; point at some code.")
    node = max(starting, key=lambda n: n.end) if starting else min(around, key=lambda n: n.end - n.start)
    text = [source[a:b].decode() for a, b in ((0, node.start), (node.start, node.end), (node.end, len(source)))]
    return _of_file(name, *text, node.type, node.tier)  # type: ignore[call-arg]


def _of_file(name: str, prefix: str, text: str | None, suffix: str, node: str, tier: str) -> Hole:
    """A hole in a user's file; the problem is what the header and docstring of the function around it say."""
    # By text, because what stands before a hole need not parse.
    last = list(re.finditer(r"^[ \t]*(async )?def ", prefix, re.M))
    found = re.match(r'''.*?:\s*\n\s*[rRuU]?("""|\'\'\').*?\1''', prefix[last[-1].start() :], re.S) if last else None
    problem = textwrap.dedent(found[0]) + "\n" if found else ""
    return Hole(name, name, prefix, text, suffix, problem, node, tier)
