"""Source bytes -> tree-sitter tree -> tier of every byte, span of every node. The tables are in languages.py.

    tree = parse(b"if x:\\n    return 1\\n")
    byte_tiers(tree)        # uint8, one tier code per byte
    node_spans(tree)        # int32 (n, 3): start byte, end byte, tier code

The four tiers are the paper's (Algorithm 1, Table 3). Offsets are UTF-8 bytes throughout. A *tiered* node is one
whose type the language's table lists; its extent is the whole node, except that a definition (`headers`) reaches
only as far as its body. A byte's tier is that of its innermost tiered node, punctuation and constants being tiered
themselves; comments have none. A tree-sitter ERROR counts as a node of the default tier, so that what still parses
inside keeps its own.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from treediff.errors import UserError
from treediff.masking.languages import LANGUAGES, Table

if TYPE_CHECKING:
    import tree_sitter


TIERS = ("default", "skeleton", "data", "condition", "control")
"""Tier names by code. `default` is code that no tier claims."""

DEFAULT, SKELETON, DATA, CONDITION, CONTROL = range(5)
TierOwner = Literal["innermost", "outermost", "keyword"]


@dataclass(frozen=True)
class Grammar:
    """A loaded language: its parser, and what its table says by node kind id."""

    table: Table
    parser: tree_sitter.Parser
    tier_of_kind: np.ndarray  # uint8, the last entry for ERROR nodes, which have no kind of their own
    paints: np.ndarray  # bool: the kinds whose nodes own bytes, tiered ones and ERROR
    comments: np.ndarray  # bool
    names: np.ndarray  # bool: some kind of identifier
    bodies: dict[int, int]  # id of the field up to which a header reaches
    marks: bytes  # by byte: 1 for punctuation

    def kind_name(self, kind: int) -> str:
        """What the grammar calls a kind of node."""
        return (self.parser.language and self.parser.language.node_kind_for_id(kind)) or ""


@dataclass(frozen=True)
class Parsed:
    """A tree with its source."""

    source: bytes
    tree: tree_sitter.Tree
    grammar: Grammar

    @cached_property
    def nodes(self) -> Nodes:
        """Every named node, in document order, outer ones first. Read once, because a node costs a Python object."""
        return _walk(self.tree, self.grammar)


class Nodes(NamedTuple):
    """Named nodes as columns, int32 (n,) each; the root is the first."""

    start: np.ndarray  # [byte]
    end: np.ndarray
    kind: np.ndarray  # kind id; ERROR has the one after the last
    reach: np.ndarray  # end of what the node owns: of a header the start of its body, else `end`


@cache
def grammar(language: str = "python") -> Grammar:
    """Load a language's grammar and check its table. Raises UserError for an unknown language, a grammar that is
    not installed, or a node type or field that the grammar does not know."""
    from tree_sitter import Language, Parser

    table = table_of(language)
    try:
        module = importlib.import_module(table.grammar)
    except ModuleNotFoundError:
        raise _missing(language) from None
    lang = Language(getattr(module, table.function)())
    kinds: dict[str, list[int]] = {}  # aliases give one name several ids
    for i in range(lang.node_kind_count):
        if lang.node_kind_is_named(i):
            kinds.setdefault(lang.node_kind_for_id(i) or "", []).append(i)

    def ids(name: str) -> list[int]:
        if name not in kinds:
            raise UserError(f"language: {language}'s table lists {name!r}, which its grammar does not know.")
        return kinds[name]

    tier_of_kind = np.zeros(lang.node_kind_count + 1, np.uint8)
    for code, tier in enumerate(TIERS[1:], start=1):
        for name in getattr(table, tier).split():
            tier_of_kind[ids(name)] = code
    paints = tier_of_kind > 0
    paints[-1] = True
    comments = np.zeros_like(paints)
    names = np.zeros_like(paints)
    names[[i for name, every in kinds.items() if name.endswith("identifier") for i in every]] = True
    for name in table.comments.split():
        comments[ids(name)] = True
    bodies: dict[int, int] = {}
    for entry in table.headers.split():
        name, _, field = entry.partition(":")
        number = lang.field_id_for_name(field or "body")
        if number is None:
            raise UserError(f"language: {language}'s table lists the field {entry!r}, which its grammar does not know.")
        bodies |= dict.fromkeys(ids(name), number)
    marks = bytes(byte in table.punctuation for byte in range(256))
    return Grammar(table, Parser(lang), tier_of_kind, paints, comments, names, bodies, marks)


def table_of(language: str) -> Table:
    """The table of a language. Raises UserError for a language that has none."""
    if language not in LANGUAGES:
        raise UserError(f"language: there is no {language!r}; choose one of {', '.join(LANGUAGES)}.")
    return LANGUAGES[language]


def _missing(language: str) -> UserError:
    package = LANGUAGES[language].grammar.replace("_", "-")
    return UserError(
        f"language: {language} needs the package {package}: pip install {package}, or all languages with "
        "pip install 'treediff[languages]'."
    )


def installed() -> list[str]:
    """The languages whose grammar is installed, in the order of the tables."""
    from importlib.util import find_spec

    return [language for language, table in LANGUAGES.items() if find_spec(table.grammar)]


def grammar_version(language: str = "python") -> str:
    """What decides a language's tiers, for fingerprints: the versions of tree-sitter and of the grammar, and a hash of
    the table. Raises UserError for a language that is unknown or not installed."""

    table = table_of(language)
    package = table.grammar.replace("_", "-")
    digest = hashlib.sha256(repr(table).encode()).hexdigest()[:12]
    try:
        return f"tree-sitter {version('tree-sitter')}, {package} {version(package)}, table {digest}"
    except PackageNotFoundError:
        raise _missing(language) from None


def language_of(path: Path) -> str:
    """The language of a file by its suffix. Raises UserError if no table has it."""
    for language, table in LANGUAGES.items():
        if Path(path).suffix.lower() in table.suffixes.split():
            return language
    known = " ".join(table.suffixes for table in LANGUAGES.values())
    raise UserError(f"{path}: its suffix is none of {known}; name the language with --language.")


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


def _walk(tree: tree_sitter.Tree, g: Grammar) -> Nodes:
    """One pass with a cursor, without recursion. Anything more per node is felt: this is most of the time that tiers
    and spans take."""
    starts: list[int] = []
    ends: list[int] = []
    kinds: list[int] = []
    cut: list[tuple[int, int]] = []  # index of a header, start of its body
    add_start, add_end, add_kind = starts.append, ends.append, kinds.append
    bodies = g.bodies
    cursor: Any = tree.walk()
    down, right, up = cursor.goto_first_child, cursor.goto_next_sibling, cursor.goto_parent
    while True:
        node = cursor.node
        if node.is_named:
            kind = node.kind_id
            add_start(node.start_byte)
            add_end(node.end_byte)
            add_kind(kind)
            if down():
                if kind in bodies and (body := node.child_by_field_id(bodies[kind])):
                    cut.append((len(kinds) - 1, body.start_byte))
                continue
        elif down():
            continue
        while not right():
            if not up():
                n = len(kinds)
                start, end, kind = (np.fromiter(x, np.int32, n) for x in (starts, ends, kinds))
                reach = end.copy()
                for at, to in cut:
                    reach[at] = to
                return Nodes(start, end, np.minimum(kind, len(g.tier_of_kind) - 1), reach)


def byte_tiers(parsed: Parsed, owner: TierOwner = "innermost") -> np.ndarray:
    """Tier code of every byte of the source, uint8 (len(source),). Linear in the source, at any nesting depth."""
    if owner == "keyword":
        return _keyword_tiers(parsed)
    g, nodes = parsed.grammar, parsed.nodes
    own = np.flatnonzero(g.paints[nodes.kind])
    tiers = _paint(
        nodes.start[own], nodes.reach[own], g.tier_of_kind[nodes.kind[own]], len(parsed.source), owner == "innermost"
    )
    return _paint_rest(tiers, parsed)


def _paint(start: np.ndarray, end: np.ndarray, tier: np.ndarray, length: int, innermost: bool) -> np.ndarray:
    """Tier per byte of properly nested extents in document order: at each byte that of the innermost (outermost)."""
    cuts, codes = [0], [DEFAULT]  # from cuts[i] on, bytes have codes[i]
    ends: list[int] = []  # of the extents that are open, outermost first
    tiers = [DEFAULT]  # tier in force inside each open extent
    for s, e, code in zip([*start.tolist(), length], [*end.tolist(), length], [*tier.tolist(), DEFAULT], strict=True):
        while ends and ends[-1] <= s:
            cuts.append(ends.pop())
            tiers.pop()
            codes.append(tiers[-1])
        if not innermost and ends:
            code = tiers[-1]
        cuts.append(s)
        codes.append(code)
        ends.append(e)
        tiers.append(code)
    cuts.append(length)
    at = np.fromiter(cuts, np.int64, len(cuts))
    return np.repeat(np.frombuffer(bytes(codes), np.uint8), at[1:] - at[:-1])


def _paint_rest(tiers: np.ndarray, parsed: Parsed) -> np.ndarray:
    """Punctuation is skeleton (A.2: `auxiliary syntax such as punctuation`), inside strings it is so already; comments
    are of no tier, wherever the tree hangs them."""
    g, nodes = parsed.grammar, parsed.nodes
    source = parsed.source.replace(b":=", b"  ") if g.table.walrus else parsed.source
    np.putmask(tiers, np.frombuffer(source.translate(g.marks), bool), SKELETON)
    at = np.flatnonzero(g.comments[nodes.kind])
    for start, end in zip(nodes.start[at].tolist(), nodes.end[at].tolist(), strict=True):
        tiers[start:end] = DEFAULT
    return tiers


def _keyword_tiers(parsed: Parsed) -> np.ndarray:
    """Only a tiered node's own anonymous tokens (`if`, `=`, `return`) and tiered leaves take its tier."""
    g, tiers = parsed.grammar, np.zeros(len(parsed.source), np.uint8)
    cursor: Any = parsed.tree.walk()
    above = [DEFAULT]  # tier by type of each node on the path
    done = False
    while not done:
        node = cursor.node
        own = int(g.tier_of_kind[node.kind_id]) if node.is_named and not node.is_error else DEFAULT
        if node.child_count == 0:
            tiers[node.start_byte : node.end_byte] = own if node.is_named else above[-1]
        if cursor.goto_first_child():
            above.append(own)
            continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                done = True
                break
            above.pop()
    return _paint_rest(tiers, parsed)


def node_spans(parsed: Parsed, tiered_only: bool = False) -> np.ndarray:
    """Extent and tier of every named node but the root: int32 (n, 3) of start byte, end byte, tier code (S_x).

    In document order, outer nodes first. With `tiered_only`, nodes without a tier are left out.
    """
    nodes = parsed.nodes
    spans = np.empty((len(nodes.kind), 3), np.int32)
    spans[:, 0], spans[:, 1], spans[:, 2] = nodes.start, nodes.end, parsed.grammar.tier_of_kind[nodes.kind]
    return spans[1:][spans[1:, 2] > 0] if tiered_only else spans[1:]


def name_spans(parsed: Parsed) -> np.ndarray:
    """Every occurrence of a name: int32 (n, 3) of start byte, end byte, the name's number in order of appearance.

    Names are the leaves that the grammar calls some kind of identifier; the same text is the same name.
    """
    g, nodes = parsed.grammar, parsed.nodes
    leaf = np.append(nodes.start[1:] >= nodes.end[:-1], True)
    at = np.flatnonzero(g.names[nodes.kind] & leaf & (nodes.end > nodes.start))
    start, end = nodes.start[at], nodes.end[at]
    texts = [parsed.source[a:b] for a, b in zip(start.tolist(), end.tolist(), strict=True)]
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return np.column_stack([start, end, np.array([number[text] for text in texts], np.int32)])


def line_spans(source: bytes) -> np.ndarray:
    """Every line: int32 (n, 3) of start byte, end byte (its newline included), line number from 0."""
    starts = np.flatnonzero(np.frombuffer(b"\n" + source, np.uint8) == ord("\n"))
    starts = starts[starts < len(source)]
    return np.column_stack([starts, np.append(starts, len(source))[1:], np.arange(len(starts))]).astype(np.int32)


def error_bytes(parsed: Parsed) -> int:
    """Bytes inside the outermost ERROR regions: 0 for code that parses."""
    if not parsed.tree.root_node.has_error:
        return 0
    nodes = parsed.nodes
    at = nodes.kind == len(parsed.grammar.tier_of_kind) - 1
    start, end = nodes.start[at], nodes.end[at]
    before = np.maximum.accumulate(np.concatenate([[0], end[:-1]])) if len(end) else end
    return int(np.maximum(end - np.maximum(start, before), 0).sum())


def missing_tokens(parsed: Parsed) -> list[tuple[int, str]]:
    """Line (from 1) and name of each token that the parser had to suppose: a source that lacks one has no ERROR region,
    and yet does not parse."""
    found, stack = [], [parsed.tree.root_node]
    while stack:
        node = stack.pop()
        if node.is_missing:
            found.append((node.start_point[0] + 1, node.type))
        stack.extend(child for child in reversed(node.children) if child.has_error or child.is_missing)
    return found


def telling_function(parsed: Parsed) -> tuple[int, int]:
    """First and last row (0-based) of the shortest function that has most tiers; of the source if it has none."""
    g, nodes, tiers = parsed.grammar, parsed.nodes, byte_tiers(parsed)
    newlines = np.flatnonzero(np.frombuffer(parsed.source, np.uint8) == ord("\n"))
    names = {kind: g.kind_name(kind) for kind in g.bodies}
    functions = [kind for kind, name in names.items() if "function" in name or "method" in name]
    at = np.flatnonzero(np.isin(nodes.kind, functions))
    start, end = (nodes.start[at], nodes.end[at]) if len(at) else (nodes.start[:1], nodes.end[:1])
    first, last = np.searchsorted(newlines, start), np.searchsorted(newlines, end)
    distinct = np.zeros(len(start), np.int64)
    for code in range(len(TIERS)):
        seen = np.concatenate([[0], np.cumsum(tiers == code)])
        distinct += seen[end] > seen[start]
    best = np.lexsort((last - first, -distinct))[0]
    return int(first[best]), int(last[best])
