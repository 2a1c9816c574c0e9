"""Python's own `ast` and `tokenize` as an oracle of the tiers, over the standard library of the running Python.

The oracle knows nothing of tree-sitter: it paints the extents of `ast` nodes over the tokens of `tokenize`. What the
two cannot agree on for a reason is an exception with a name, and counted; all else must agree, token by token.
"""

import ast
import io
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

import numpy as np
import oracles
import pytest

from treediff.masking.tiers import CONDITION, CONTROL, DATA, DEFAULT, SKELETON, byte_tiers, error_bytes, parse

ROOT = Path(sysconfig.get_paths()["stdlib"])
LIBRARY = [p for p in sorted(ROOT.rglob("*.py")) if "site-packages" not in p.relative_to(ROOT).parts]
SAMPLE = [p for p in LIBRARY if p.parent == ROOT and p.stat().st_size < 40_000][::3][:40]

EXTENT = {
    SKELETON: (ast.Import, ast.ImportFrom, ast.Constant, ast.JoinedStr, ast.MatchSingleton),
    DATA: (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr, ast.Call),
    CONDITION: (ast.If, ast.IfExp, ast.Match),
    CONTROL: (ast.For, ast.AsyncFor, ast.While, ast.Return, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom)
    + (ast.Raise, ast.Try, ast.ExceptHandler, ast.With, ast.AsyncWith)
    + ((ast.TryStar,) if hasattr(ast, "TryStar") else ()),
}
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Under the owner `keyword`: a node's own words, each with the tier of the construct that it introduces.
ASSIGNS = ["=", "+=", "-=", "*=", "/=", "//=", "%=", "@=", "&=", "|=", "^=", ">>=", "<<=", "**="]
MOVES = ["for", "in", "async", "while", "return", "break", "continue", "yield", "from", "raise", "try", "except", "*"]
MOVES += ["except*", "finally", "with"]
DEFINES, IMPORTS, CHOOSES = ["def", "async", "class", "->"], ["import", "from", "__future__"], ["if", "elif", "else"]
WORDS = {
    **dict.fromkeys(DEFINITION, dict.fromkeys(DEFINES, SKELETON)),
    **dict.fromkeys((ast.Import, ast.ImportFrom), dict.fromkeys(IMPORTS, SKELETON)),
    **dict.fromkeys((ast.Assign, ast.AnnAssign, ast.AugAssign), dict.fromkeys(ASSIGNS, DATA)),
    **dict.fromkeys(EXTENT[CONTROL], dict.fromkeys(MOVES, CONTROL) | {"else": CONDITION}),
    **dict.fromkeys(COMPREHENSION, dict.fromkeys(["for", "in", "async"], CONTROL) | {"if": CONDITION}),
    **dict.fromkeys(EXTENT[CONDITION], dict.fromkeys([*CHOOSES, "match", "case"], CONDITION)),
    ast.NamedExpr: {":=": DATA},
}
DECORATOR = "@ of a decorator"  # what stands for that token; `@` alone is the operator
TIER = {kind: tier for tier, kinds in EXTENT.items() for kind in kinds}


class Oracle:
    """The tier of each token of a file under the three owners."""

    def __init__(self, source: bytes):
        lines = source.splitlines(keepends=True)
        text = [line.decode() for line in lines]
        self.line_start = np.cumsum([0, *map(len, lines)]).tolist()

        def at(place: tuple[int, int]) -> int:
            row, column = place
            return self.line_start[row - 1] + (len(text[row - 1][:column].encode()) if row <= len(text) else 0)

        blank = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING)
        tokens = [t for t in tokenize.tokenize(io.BytesIO(source).readline) if t.type not in blank]
        self.words = [t.string for t in tokens]
        self.comment = np.array([t.type == tokenize.COMMENT for t in tokens], bool)
        self.text = np.array([t.type == tokenize.STRING for t in tokens], bool)
        self.start = np.array([at(t.start) for t in tokens], np.int64)
        self.end = np.array([at(t.end) for t in tokens], np.int64)
        self.innermost = np.zeros(len(tokens), np.uint8)
        self.outermost = np.zeros(len(tokens), np.uint8)
        self.claimed = np.zeros(len(tokens), bool)
        self.deepest = np.zeros(len(tokens), np.int64)
        self.fstring = np.zeros(len(tokens), bool)
        self.nodes: list[ast.AST] = []
        self.visit(ast.parse(source))
        self.keyword = np.array([self.own(i) for i in range(len(tokens))], np.uint8)
        for tiers in (self.innermost, self.outermost, self.keyword):
            tiers[self.comment] = DEFAULT

    def index(self, row: int, column: int) -> int:
        """The first token that begins at or after a place of `ast` (columns are bytes)."""
        return int(np.searchsorted(self.start, self.line_start[row - 1] + column))

    def range(self, node: ast.AST) -> tuple[int, int]:
        return self.index(node.lineno, node.col_offset), self.index(node.end_lineno, node.end_col_offset)

    def before(self, token: int, word: str) -> int:
        """The last token `word` before a token."""
        return next(i for i in range(token - 1, -1, -1) if self.words[i] == word and not self.comment[i])

    def paint(self, first: int, last: int, tier: int) -> None:
        self.innermost[first:last] = tier
        free = ~self.claimed[first:last]
        self.outermost[first:last][free] = tier
        self.claimed[first:last] = True

    def visit(self, root: ast.AST) -> None:
        stack: list = [root]
        while stack:
            node = stack.pop()
            if callable(node):
                node()
                continue
            if hasattr(node, "lineno"):
                first, last = self.range(node)
                self.nodes.append(node)
                self.deepest[first:last] = len(self.nodes)
                if isinstance(node, DEFINITION):
                    self.paint(first, self.body(node), SKELETON)
                elif type(node) in TIER:
                    self.paint(first, last, TIER[type(node)])
            if isinstance(node, ast.JoinedStr):  # places inside are wrong before Python 3.12
                self.fstring[first:last] = True
                continue
            stack += reversed([*self.clauses(node), *ast.iter_child_nodes(node)])

    def body(self, node: ast.AST) -> int:
        """The first token of a definition's body."""
        first = node.body[0]
        return self.decorated(first) if getattr(first, "decorator_list", []) else self.range(first)[0]

    def decorated(self, node: ast.AST) -> int:
        return self.before(self.range(node.decorator_list[0])[0], "@")

    def clauses(self, node: ast.AST) -> list:
        """What paints the parts of a node that are no nodes of `ast`: decorators, comprehension clauses, `else`."""
        found = []
        for x in getattr(node, "decorator_list", []):
            first, last = self.range(x)
            at = self.before(first, "@")
            self.words[at] = DECORATOR
            found.append(lambda at=at, last=last: self.paint(at, last, SKELETON))
        if isinstance(node, COMPREHENSION):
            for part in node.generators:
                at, last = (
                    self.before(self.range(part.target)[0], "for") - bool(part.is_async),
                    self.range(part.iter)[1],
                )
                found.append(lambda at=at, last=last: self.paint(at, last, CONTROL))
                for condition in part.ifs:
                    first, last = self.range(condition)
                    at = self.before(first, "if")
                    found.append(lambda at=at, last=last: self.paint(at, last, CONDITION))
        if type(node) in EXTENT[CONTROL] and getattr(node, "orelse", []):
            first, last = self.range(node.orelse[0])[0], self.range(node.orelse[-1])[1]
            at = self.before(first, "else")
            found.append(lambda at=at, last=last: self.paint(at, last, CONDITION))
        return found

    def own(self, i: int) -> int:
        """The tier of token `i` as its innermost node's own word, or as a constant."""
        word, node = self.words[i], self.nodes[self.deepest[i] - 1] if self.deepest[i] else None
        if isinstance(node, (ast.Constant, ast.MatchSingleton)):
            return DEFAULT if self.text[i] else SKELETON
        if word == DECORATOR:
            return SKELETON
        return WORDS.get(type(node), {}).get(word, DEFAULT)

    def excuse(self, i: int, got: set[int]) -> str | None:
        """Why the grammar's tree differs from Python's here, if that is known."""
        node = self.nodes[self.deepest[i] - 1] if self.deepest[i] else None
        if self.words[i] == "*" and isinstance(node, ast.Starred) and got == {DATA}:
            return STARRED
        if self.words[i] == "type" and isinstance(node, ast.Name) and got == {DATA}:
            return ALIAS
        return None


ALIAS = "`type` in `type(x).y = z`, which the grammar takes for the keyword of a type alias"
STARRED = "`*` before a call in parentheses, which the grammar takes for a part of the call"


def compare(path: Path) -> Counter:
    """Token counts of one file: agree, disagree (with where), and each exception."""
    found, source = Counter(), path.read_bytes()
    try:
        source.decode()
        tree_free = ast.parse(source) and not source.startswith(b"\xef\xbb\xbf") and b"\x0c" not in source
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return Counter({"files that are no Python source in UTF-8": 1})
    if not tree_free:
        return Counter({"files with a byte order mark or a form feed, which tokenize counts otherwise": 1})
    parsed = parse(source)
    if error_bytes(parsed):
        return Counter({"files that the grammar cannot parse whole": 1})
    oracle = Oracle(source)
    punctuation = np.frombuffer(source.translate(parsed.grammar.marks), bool)
    found["files"] += 1
    for owner in oracles.OWNERS:
        tiers, want = byte_tiers(parsed, owner), getattr(oracle, owner)
        for i, (start, end) in enumerate(zip(oracle.start.tolist(), oracle.end.tolist(), strict=True)):
            if oracle.fstring[i]:
                found["tokens of f-strings"] += 1
                continue
            got = set(tiers[start:end].tolist()) if oracle.comment[i] or oracle.words[i] == ":=" else set(
                tiers[start:end][~punctuation[start:end]].tolist()
            )  # fmt: skip
            if got <= {int(want[i])}:
                found["tokens that agree"] += 1
            elif reason := oracle.excuse(i, got):
                found[reason] += 1
            else:
                row = source.count(b"\n", 0, start) + 1
                found[f"DISAGREE {owner} {path.name}:{row} {oracle.words[i][:20]!r} {got} for {want[i]}"] += 1
    return found


def wrong(found: Counter) -> list[str]:
    return [name for name in found if name.startswith("DISAGREE")]


@pytest.mark.parametrize("path", SAMPLE, ids=lambda p: p.name)
def test_tiers_agree_with_ast_and_tokenize(path):
    found = compare(path)
    assert not wrong(found)
    assert found["tokens that agree"] > 0


@pytest.mark.slow
def test_the_whole_library_agrees():
    """Prints the counts: pytest -m slow -s tests/test_stdlib.py"""
    from tqdm import tqdm

    found = sum((compare(path) for path in tqdm(LIBRARY)), Counter())
    print("\n".join(f"{n:9} {name}" for name, n in found.most_common()))
    assert not wrong(found)
    assert found["files"] > 0.97 * len(LIBRARY)  # what is left out is the exception
    assert found["tokens of f-strings"] + found[STARRED] + found[ALIAS] < 0.002 * found["tokens that agree"]
