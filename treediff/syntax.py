"""Source bytes -> tree-sitter tree -> tier of every byte, span of every node. One small table per language.

    tree = parse(b"if x:\\n    return 1\\n")
    byte_tiers(tree)        # uint8, one tier code per byte
    node_spans(tree)        # int32 (n, 3): start byte, end byte, tier code

The four tiers are the paper's (Algorithm 1, Table 3). Offsets are UTF-8 bytes throughout. A *tiered* node is one
whose type the language's table lists; its extent is the whole node, except that a definition (`headers`) reaches
only as far as its body. A byte's tier is that of its innermost tiered node, punctuation and constants being tiered
themselves. A tree-sitter ERROR counts as a node of the default tier, so that what still parses inside keeps its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from treediff.config import UserError

if TYPE_CHECKING:
    import tree_sitter

TIERS = ("default", "skeleton", "data", "condition", "control")
"""Tier names by code. `default` is code that no tier claims."""

DEFAULT, SKELETON, DATA, CONDITION, CONTROL = range(5)
TierOwner = Literal["innermost", "outermost", "keyword"]


@dataclass(frozen=True)
class Table:
    """How one language's node types map to tiers. Every name is checked against the grammar when it loads."""

    grammar: str  # module of the official tree-sitter wheel
    skeleton: str  # node types, space-separated: imports, definitions' headers, constants
    data: str  # assignments, calls
    condition: str  # if / elif / else, conditional expressions, match
    control: str  # for, while, return, and whatever else moves control
    headers: str  # skeleton nodes that own their bytes only up to their `body` field
    comments: str  # node types whose bytes are never punctuation
    punctuation: bytes = b"()[]{},:;."  # skeleton wherever it stands outside comments
    walrus: bool = False  # whether `:=` is an operator, so that its colon is no punctuation


LANGUAGES = {
    "python": Table(
        grammar="tree_sitter_python",
        skeleton="import_statement import_from_statement future_import_statement function_definition "
        "class_definition decorator integer float string concatenated_string true false none ellipsis",
        data="assignment augmented_assignment named_expression call",
        condition="if_statement elif_clause else_clause conditional_expression match_statement case_clause if_clause",
        # break, continue, yield, raise, try and with are not in the paper's list; they move control as return does.
        control="for_statement while_statement return_statement for_in_clause break_statement continue_statement "
        "yield raise_statement try_statement except_clause finally_clause with_statement",
        headers="function_definition class_definition",
        comments="comment",
        walrus=True,
    ),
}


@dataclass(frozen=True)
class Grammar:
    """A loaded language: parser, queries and the tier of each node type."""

    table: Table
    parser: tree_sitter.Parser
    tiered: tree_sitter.Query  # captures tiered nodes by tier name, `body` of headers, `comment`s
    named: tree_sitter.Query  # captures every named node as `node`
    tier_of_kind: np.ndarray  # uint8 by node kind id


@dataclass(frozen=True)
class Parsed:
    """A tree with its source."""

    source: bytes
    tree: tree_sitter.Tree
    grammar: Grammar


@cache
def grammar(language: str = "python") -> Grammar:
    """Load a language's grammar and check its table. Raises UserError for an unknown language, a grammar that is
    not installed, or a node type that the grammar does not know."""
    from tree_sitter import Language, Parser, Query

    if language not in LANGUAGES:
        raise UserError(f"language: there is no {language!r}; choose one of {', '.join(LANGUAGES)}.")
    table = LANGUAGES[language]
    try:
        module = importlib.import_module(table.grammar)
    except ModuleNotFoundError:
        package = table.grammar.replace("_", "-")
        raise UserError(f"language: {language} needs the package {package}: pip install {package}.") from None
    lang = Language(module.language())
    kinds = {lang.node_kind_for_id(i): i for i in range(lang.node_kind_count) if lang.node_kind_is_named(i)}
    tier_of_kind = np.zeros(lang.node_kind_count, np.uint8)
    patterns = ["(ERROR) @default"]
    for code, tier in enumerate(TIERS[1:], start=1):
        for name in getattr(table, tier).split():
            if name not in kinds:
                raise UserError(f"language: {language}'s table lists {name!r}, which its grammar does not know.")
            for i in range(lang.node_kind_count):  # aliases give one name several ids
                if lang.node_kind_is_named(i) and lang.node_kind_for_id(i) == name:
                    tier_of_kind[i] = code
            if name not in table.headers.split():
                patterns.append(f"({name}) @{tier}")
    patterns += [f"({name} body: (_) @body) @header" for name in table.headers.split()]
    patterns += [f"({name}) @comment" for name in table.comments.split()]
    return Grammar(table, Parser(lang), Query(lang, "\n".join(patterns)), Query(lang, "(_) @node"), tier_of_kind)


def grammar_version(language: str = "python") -> str:
    """Version of the wheel that a language's grammar comes from. Raises UserError as `grammar` does."""
    from importlib.metadata import version

    return version(grammar(language).table.grammar.replace("_", "-"))


def read_source(path: Path) -> bytes:
    """The bytes of a source file. Raises UserError if it is missing, no file, or not UTF-8."""
    try:
        source = Path(path).read_bytes()
        source.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not valid UTF-8; convert the file to UTF-8 first.") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}).") from None
    return source


def parse(source: bytes, language: str = "python") -> Parsed:
    """Parse UTF-8 `source`. Never fails on broken code: what does not parse becomes ERROR nodes."""
    g = grammar(language)
    return Parsed(source, g.parser.parse(source), g)


def byte_tiers(parsed: Parsed, owner: TierOwner = "innermost") -> np.ndarray:
    """Tier code of every byte of the source, uint8 (len(source),). Linear in the source, at any nesting depth."""
    from tree_sitter import QueryCursor

    if owner == "keyword":
        return _keyword_tiers(parsed)
    captures = QueryCursor(parsed.grammar.tiered).captures(parsed.tree.root_node)
    extents = [(n.start_byte, n.end_byte, code) for code, tier in enumerate(TIERS) for n in captures.get(tier, ())]
    bodies = {n.parent.id: n.start_byte for n in captures.get("body", ())}
    extents += [(n.start_byte, bodies[n.id], SKELETON) for n in captures.get("header", ())]
    tiers = _paint(extents, len(parsed.source), innermost=owner == "innermost")
    return _paint_punctuation(tiers, parsed, [(n.start_byte, n.end_byte) for n in captures.get("comment", ())])


def _paint(extents: list[tuple[int, int, int]], length: int, innermost: bool) -> np.ndarray:
    """Tier per byte of properly nested extents: at each byte that of the innermost (or outermost) one."""
    extents.sort(key=lambda e: (e[0], -e[1]))
    cuts, codes = [0], [DEFAULT]  # from cuts[i] on, bytes have codes[i]
    ends: list[int] = []  # of the extents that are open, outermost first
    tiers = [DEFAULT]  # tier in force inside each open extent
    for start, end, code in [*extents, (length, length, DEFAULT)]:
        while ends and ends[-1] <= start:
            cuts.append(ends.pop())
            tiers.pop()
            codes.append(tiers[-1])
        if not innermost and ends:
            code = tiers[-1]
        cuts.append(start)
        codes.append(code)
        ends.append(end)
        tiers.append(code)
    return np.repeat(np.array(codes, np.uint8), np.diff([*cuts, length]))


def _paint_punctuation(tiers: np.ndarray, parsed: Parsed, comments: Sequence[tuple[int, int]]) -> np.ndarray:
    """Punctuation is skeleton (A.2: `auxiliary syntax such as punctuation`). Inside strings it is so already."""
    raw = np.frombuffer(parsed.source, np.uint8)
    is_mark = np.zeros(256, bool)
    is_mark[list(parsed.grammar.table.punctuation)] = True
    mark = is_mark[raw]
    if parsed.grammar.table.walrus:
        mark[:-1] &= ~((raw[:-1] == ord(":")) & (raw[1:] == ord("=")))
    for start, end in comments:
        mark[start:end] = False
    tiers[mark] = SKELETON
    return tiers


def _keyword_tiers(parsed: Parsed) -> np.ndarray:
    """Only a tiered node's own anonymous tokens (`if`, `=`, `return`) and tiered leaves take its tier."""
    g, tiers = parsed.grammar, np.zeros(len(parsed.source), np.uint8)
    cursor = parsed.tree.walk()
    comments = []
    above = [DEFAULT]  # tier by type of each node on the path
    done = False
    while not done:
        node = cursor.node
        own = int(g.tier_of_kind[node.kind_id]) if node.is_named and not node.is_error else DEFAULT
        if node.child_count == 0:
            tiers[node.start_byte : node.end_byte] = own if node.is_named else above[-1]
            if node.type in g.table.comments.split():
                comments.append((node.start_byte, node.end_byte))
        if cursor.goto_first_child():
            above.append(own)
            continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                done = True
                break
            above.pop()
    return _paint_punctuation(tiers, parsed, comments)


def node_spans(parsed: Parsed, tiered_only: bool = False) -> np.ndarray:
    """Extent and tier of every named node but the root: int32 (n, 3) of start byte, end byte, tier code (S_x).

    In document order, outer nodes first. With `tiered_only`, nodes without a tier are left out.
    """
    from tree_sitter import QueryCursor

    root = parsed.tree.root_node
    nodes = QueryCursor(parsed.grammar.named).captures(root).get("node", [])
    flat = np.array([(n.start_byte, n.end_byte, n.kind_id) for n in nodes if n.id != root.id], np.int64).reshape(-1, 3)
    flat = flat[np.lexsort((flat[:, 2], -flat[:, 1], flat[:, 0]))]  # captures come in no promised order
    kind = np.minimum(flat[:, 2], len(parsed.grammar.tier_of_kind) - 1)  # ERROR has kind id 65535
    tier = np.where(flat[:, 2] == kind, parsed.grammar.tier_of_kind[kind], DEFAULT)
    spans = np.column_stack([flat[:, :2], tier]).astype(np.int32)
    return spans[tier > 0] if tiered_only else spans


def error_bytes(parsed: Parsed) -> int:
    """Bytes inside the outermost ERROR regions: 0 for code that parses."""
    total, stack = 0, [parsed.tree.root_node] if parsed.tree.root_node.has_error else []
    while stack:
        node = stack.pop()
        if node.is_error:
            total += node.end_byte - node.start_byte
        elif node.has_error:
            stack.extend(node.children)
    return total


def telling_function(parsed: Parsed) -> tuple[int, int]:
    """First and last row (0-based) of the shortest function that has most tiers; of the source if it has none."""
    tiers, best, stack = byte_tiers(parsed), None, [parsed.tree.root_node]
    while stack:
        node = stack.pop()
        if node.type in parsed.grammar.table.headers.split() and "class" not in node.type:
            distinct = len(np.unique(tiers[node.start_byte : node.end_byte]))
            rank = (-distinct, node.end_point.row - node.start_point.row)
            best = min(best or (rank, node), (rank, node), key=lambda b: b[0])
        stack.extend(reversed(node.children))
    node = best[1] if best else parsed.tree.root_node
    return node.start_point.row, node.end_point.row
