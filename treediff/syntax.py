"""Source bytes -> tree-sitter tree -> tier of every byte, span of every node. One small table per language.

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
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

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
    suffixes: str  # endings of its files; all lists are space-separated
    fences: str  # what a Markdown code fence calls it: the first is written, all are read
    skeleton: str  # node types: imports, definitions' headers, constants
    data: str  # assignments and declarations of variables, calls
    condition: str  # if / elif / else, conditional expressions, match, switch
    control: str  # for, while, return, and whatever else moves control
    headers: str  # skeleton nodes that own their bytes only up to their field `body`, or the one named as `node:field`
    comments: str  # node types whose bytes are of the default tier, punctuation included
    punctuation: bytes = b"()[]{},:;."  # skeleton wherever it stands outside comments
    walrus: bool = False  # whether `:=` is an operator, so that its colon is no punctuation
    function: str = "language"  # the wheel's function that gives the grammar


_PYTHON = Table(
    grammar="tree_sitter_python",
    suffixes=".py .pyi",
    fences="python py python3",
    skeleton="import_statement import_from_statement future_import_statement function_definition "
    "class_definition decorator integer float string concatenated_string true false none ellipsis",
    # `type(x).y = z` is a type alias to the grammar, too.
    data="assignment augmented_assignment named_expression type_alias_statement call",
    condition="if_statement elif_clause else_clause conditional_expression match_statement case_clause if_clause",
    # break, continue, yield, raise, try and with are not in the paper's list; they move control as return does.
    control="for_statement while_statement return_statement for_in_clause break_statement continue_statement "
    "yield raise_statement try_statement except_clause finally_clause with_statement",
    headers="function_definition class_definition",
    comments="comment",
    walrus=True,
)
_JAVASCRIPT = Table(
    grammar="tree_sitter_javascript",
    suffixes=".js .mjs .cjs .jsx",
    fences="javascript js jsx mjs node",
    # A function is an expression as often as a statement here, and as much a definition.
    skeleton="import_statement export_statement function_declaration generator_function_declaration "
    "function_expression generator_function arrow_function method_definition class_declaration class decorator "
    "number string template_string regex true false null undefined",
    data="lexical_declaration variable_declaration field_definition assignment_expression "
    "augmented_assignment_expression update_expression call_expression new_expression",
    condition="if_statement else_clause ternary_expression switch_statement switch_case switch_default",
    control="for_statement for_in_statement while_statement do_statement return_statement break_statement "
    "continue_statement throw_statement try_statement catch_clause finally_clause yield_expression "
    "labeled_statement with_statement",
    headers="export_statement:declaration function_declaration generator_function_declaration function_expression "
    "generator_function arrow_function method_definition class_declaration class",
    comments="comment html_comment hash_bang_line",
)
_C = Table(
    grammar="tree_sitter_c",
    suffixes=".c .h",
    fences="c",
    # A prototype is a `declaration` (data) of a `function_declarator` (skeleton). The lines of #if and #ifdef are
    # of no tier: their nodes hold all that they guard, often the whole file.
    skeleton="preproc_include preproc_def preproc_function_def preproc_call function_definition function_declarator "
    "struct_specifier union_specifier enum_specifier type_definition linkage_specification attribute_declaration "
    "attribute_specifier number_literal string_literal concatenated_string char_literal true false null",
    data="declaration field_declaration enumerator assignment_expression update_expression call_expression "
    "compound_literal_expression",
    condition="if_statement else_clause conditional_expression switch_statement case_statement",
    control="for_statement while_statement do_statement return_statement break_statement continue_statement "
    "goto_statement labeled_statement seh_try_statement seh_except_clause seh_finally_clause seh_leave_statement",
    headers="function_definition struct_specifier union_specifier enum_specifier linkage_specification",
    comments="comment",
)

LANGUAGES = {
    "python": _PYTHON,
    "javascript": _JAVASCRIPT,
    "typescript": replace(
        _JAVASCRIPT,
        grammar="tree_sitter_typescript",
        function="language_typescript",
        suffixes=".ts .mts .cts",
        fences="typescript ts",
        skeleton=_JAVASCRIPT.skeleton + " abstract_class_declaration interface_declaration enum_declaration "
        "type_alias_declaration ambient_declaration internal_module module import_alias function_signature "
        "method_signature abstract_method_signature call_signature construct_signature index_signature",
        data=_JAVASCRIPT.data.replace("field_definition", "public_field_definition") + " property_signature "
        "enum_assignment",
        condition=_JAVASCRIPT.condition + " conditional_type",
        headers=_JAVASCRIPT.headers + " abstract_class_declaration interface_declaration enum_declaration "
        "internal_module module",
        comments="comment html_comment hash_bang_line",
    ),
    "java": Table(
        grammar="tree_sitter_java",
        suffixes=".java",
        fences="java",
        skeleton="package_declaration import_declaration module_declaration class_declaration interface_declaration "
        "enum_declaration record_declaration annotation_type_declaration annotation_type_element_declaration "
        "method_declaration constructor_declaration compact_constructor_declaration lambda_expression annotation "
        "marker_annotation decimal_integer_literal hex_integer_literal octal_integer_literal binary_integer_literal "
        "decimal_floating_point_literal hex_floating_point_literal character_literal string_literal true false "
        "null_literal class_literal",
        data="local_variable_declaration field_declaration constant_declaration enum_constant assignment_expression "
        "update_expression method_invocation explicit_constructor_invocation object_creation_expression "
        "array_creation_expression resource",
        condition="if_statement ternary_expression switch_expression switch_block_statement_group switch_rule guard",
        control="for_statement enhanced_for_statement while_statement do_statement return_statement break_statement "
        "continue_statement throw_statement try_statement try_with_resources_statement catch_clause finally_clause "
        "yield_statement labeled_statement synchronized_statement",
        headers="module_declaration class_declaration interface_declaration enum_declaration record_declaration "
        "annotation_type_declaration method_declaration constructor_declaration compact_constructor_declaration "
        "lambda_expression",
        comments="line_comment block_comment",
    ),
    "c": _C,
    "cpp": replace(
        _C,
        grammar="tree_sitter_cpp",
        suffixes=".cpp .cc .cxx .hpp .hh .hxx",
        fences="cpp c++ cc cxx",
        skeleton=_C.skeleton + " class_specifier namespace_definition namespace_alias_definition using_declaration "
        "alias_declaration concept_definition friend_declaration access_specifier template_declaration "
        "template_parameter_list template_instantiation lambda_expression raw_string_literal user_defined_literal",
        data=_C.data + " field_initializer new_expression delete_expression",
        control=_C.control + " for_range_loop throw_statement try_statement catch_clause co_return_statement "
        "co_yield_statement",
        headers=_C.headers + " class_specifier namespace_definition template_declaration:parameters lambda_expression",
    ),
    "go": Table(
        grammar="tree_sitter_go",
        suffixes=".go",
        fences="go golang",
        skeleton="package_clause import_declaration function_declaration method_declaration func_literal "
        "type_declaration method_elem int_literal float_literal imaginary_literal rune_literal "
        "interpreted_string_literal raw_string_literal true false nil iota",
        data="var_declaration const_declaration short_var_declaration field_declaration assignment_statement "
        "inc_statement dec_statement send_statement receive_statement call_expression type_conversion_expression "
        "composite_literal",
        condition="if_statement expression_switch_statement type_switch_statement expression_case type_case "
        "default_case",
        control="for_statement return_statement break_statement continue_statement fallthrough_statement "
        "goto_statement labeled_statement go_statement defer_statement select_statement communication_case",
        headers="function_declaration method_declaration func_literal",
        comments="comment",
        walrus=True,
    ),
    "rust": Table(
        grammar="tree_sitter_rust",
        suffixes=".rs",
        fences="rust rs",
        skeleton="use_declaration extern_crate_declaration mod_item foreign_mod_item function_item "
        "function_signature_item struct_item enum_item union_item trait_item impl_item type_item associated_type "
        "macro_definition attribute_item inner_attribute_item closure_expression integer_literal float_literal "
        "negative_literal boolean_literal char_literal string_literal raw_string_literal",
        data="let_declaration const_item static_item field_declaration enum_variant assignment_expression "
        "compound_assignment_expr call_expression macro_invocation struct_expression",
        condition="if_expression else_clause match_expression match_arm let_condition let_chain",
        control="for_expression while_expression loop_expression return_expression break_expression "
        "continue_expression yield_expression try_expression",
        headers="mod_item foreign_mod_item function_item struct_item enum_item union_item trait_item impl_item "
        "closure_expression",
        comments="line_comment block_comment",
    ),
}


@dataclass(frozen=True)
class Grammar:
    """A loaded language: its parser, and what its table says by node kind id."""

    table: Table
    parser: tree_sitter.Parser
    tier_of_kind: np.ndarray  # uint8, the last entry for ERROR nodes, whose id is not theirs
    paints: np.ndarray  # bool: the kinds whose nodes own bytes, tiered ones and ERROR
    comments: np.ndarray  # bool
    names: np.ndarray  # bool: some kind of identifier
    bodies: dict[int, int]  # id of the field up to which a header reaches
    marks: bytes  # by byte: 1 for punctuation


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
            kinds.setdefault(lang.node_kind_for_id(i), []).append(i)

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
    bodies = {}
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
    from importlib.metadata import PackageNotFoundError, version

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
    cursor = tree.walk()
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
    cursor = parsed.tree.walk()
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
    spans = list(zip(nodes.start[at].tolist(), nodes.end[at].tolist(), strict=True))
    number: dict[bytes, int] = {}
    out = [(a, b, number.setdefault(parsed.source[a:b], len(number))) for a, b in spans]
    return np.array(out, np.int32).reshape(-1, 3)


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


def telling_function(parsed: Parsed) -> tuple[int, int]:
    """First and last row (0-based) of the shortest function that has most tiers; of the source if it has none."""
    g, nodes, tiers = parsed.grammar, parsed.nodes, byte_tiers(parsed)
    newlines = np.flatnonzero(np.frombuffer(parsed.source, np.uint8) == ord("\n"))
    names = {kind: g.parser.language.node_kind_for_id(kind) for kind in g.bodies}
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
