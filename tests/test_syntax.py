"""Tiers and spans against a walk over the tree that shares no code with the module."""

import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treediff import syntax
from treediff.config import UserError
from treediff.syntax import CONDITION, CONTROL, DATA, DEFAULT, SKELETON

STANDARD_LIBRARY = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
SOURCES = [
    "x = 1\n",
    "def f(a, b=2):\n    '''doc'''\n    return a if a else b(a)\n",
    "class A(B):\n    def g(self): yield\n",
    "for i in range(3):\n    if i and (y := i): break\n    elif i: pass\n    else: continue\n",
    "with open(x) as f:\n    try: f()\n    except E as e: raise\n    finally: pass\n",
    "match x:\n    case 1: pass\n    case _: return\n",
    "print(f'{a(b)} {c!r:>{w}}', *[i for i in z if i], sep=':')  # a: comment, with (marks)\n",
    "@deco(1)\nasync def f(): await x\nlambda q: q\nd = {1: 2, 'a': b[1:2]}\n",
    "def f(:\n  x = = 3\n if",
    "if x:\n\tdef g(): pass\n\tz\n",
    "\ufeffimport os, sys\r\nx = 'é😀'  # ü\r\n",
    "",
    "\n\n",
]


def twin(source: bytes, owner: str) -> np.ndarray:
    """Byte by byte: every node that covers the byte, from the root down; then the rule, read off the definitions."""
    table = syntax.LANGUAGES["python"]
    tier_of = {
        n: t
        for t, names in enumerate([table.skeleton, table.data, table.condition, table.control], 1)
        for n in names.split()
    }
    root = syntax.parse(source).tree.root_node
    out = np.zeros(len(source), np.uint8)

    def visit(node, above, parent_tier):
        tier = DEFAULT if node.type == "ERROR" else tier_of.get(node.type) if node.is_named else None
        path = above if tier is None else [*above, (tier, node)]
        for at in range(node.start_byte, node.end_byte):
            here = [
                t
                for t, n in path
                if n.type not in table.headers.split() or at < n.child_by_field_name("body").start_byte
            ]
            if owner == "keyword":
                leaf = node.child_count == 0
                out[at] = (tier or 0) if leaf and node.is_named else parent_tier if leaf else out[at]
            else:
                out[at] = (here[-1] if owner == "innermost" else here[0]) if here else DEFAULT
        for child in node.children:
            visit(child, path, tier or 0)

    visit(root, [], 0)
    comments = np.zeros(len(source), bool)

    def find(node):
        if node.type == "comment":
            comments[node.start_byte : node.end_byte] = True
        for child in node.children:
            find(child)

    find(root)
    for at, byte in enumerate(source):
        walrus = source[at : at + 2] == b":="
        if comments[at]:
            out[at] = DEFAULT
        elif byte in b"()[]{},:;." and not walrus:
            out[at] = SKELETON
    return out


@pytest.mark.parametrize("owner", ["innermost", "outermost", "keyword"])
@pytest.mark.parametrize("source", SOURCES)
def test_tiers_are_those_of_the_twin(source, owner):
    raw = source.encode()
    assert syntax.byte_tiers(syntax.parse(raw), owner).tolist() == twin(raw, owner).tolist()


@pytest.mark.parametrize("owner", ["innermost", "outermost", "keyword"])
def test_tiers_of_real_files_are_those_of_the_twin(owner):
    for path in [p for p in STANDARD_LIBRARY if p.stat().st_size < 12_000][:12]:
        raw = path.read_bytes()
        assert np.array_equal(syntax.byte_tiers(syntax.parse(raw), owner), twin(raw, owner)), path.name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(SOURCES[:10]), max_size=4), st.integers(0, 200))
def test_broken_code_has_a_tier_for_every_byte(parts, cut):
    raw = "".join(parts).encode()[: -cut or None]
    for owner in ("innermost", "outermost"):
        assert np.array_equal(syntax.byte_tiers(syntax.parse(raw), owner), twin(raw, owner))


def test_the_paper_s_example():
    raw = b"import os\nwhile x:\n    y = f(x)\n    if y > 0:\n        return 1\n"
    tiers = syntax.byte_tiers(syntax.parse(raw))

    def tier(word):
        return tiers[raw.index(word)]

    assert tier(b"import") == tier(b"os") == tier(b"0") == tier(b"1") == SKELETON
    assert tier(b"y =") == tier(b"f(x)") == DATA
    assert tier(b"if") == tier(b"y >") == CONDITION
    assert tier(b"while") == tier(b"return") == CONTROL


def test_names_are_those_of_python_s_own_tokenizer():
    """Every NAME that is no keyword, f-strings' interiors aside, whose expressions `tokenize` sees only since 3.12."""
    import keyword
    import tokenize

    compared = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
        source = path.read_bytes()
        if b'f"' in source or b"f'" in source or b"\r" in source:
            continue
        lines = source.splitlines(keepends=True)
        starts = np.cumsum([0, *map(len, lines)])
        want = {
            (int(starts[t.start[0] - 1]) + len(t.line[: t.start[1]].encode()), t.string.encode())
            for t in tokenize.tokenize(iter(lines).__next__)
            if t.type == tokenize.NAME and not keyword.iskeyword(t.string) and t.string not in ("print", "exec")
        }
        names = syntax.name_spans(syntax.parse(source))
        compared += len(names)
        got = {(int(a), source[a:b]) for a, b, _ in names if source[a:b] not in (b"print", b"exec")}
        assert got ^ want == {g for g in got ^ want if g[1] in (b"match", b"case", b"type", b"_")}, path
        texts = [source[a:b] for a, b, _ in names]
        assert (
            len(set(texts))
            == len({int(n) for n in names[:, 2]})
            == len({*zip(texts, names[:, 2].tolist(), strict=True)})
        )


@given(st.binary(max_size=40))
def test_lines_cover_the_source(source):
    lines = syntax.line_spans(source)
    assert b"".join(source[a:b] for a, b, _ in lines) == source
    assert [source[a:b] for a, b, _ in lines] == [x + b"\n" for x in source.split(b"\n")[:-1]] + [
        x for x in source.split(b"\n")[-1:] if x
    ]


def test_what_still_parses_keeps_its_tier():
    raw = b"def f(x):\n    return g(x)\n\ndef h(:\n    for ) in\n"
    parsed = syntax.parse(raw)
    assert 0 < syntax.error_bytes(parsed) < len(raw)
    assert syntax.byte_tiers(parsed)[raw.index(b"return")] == CONTROL


def test_spans_are_every_named_node_but_the_root():
    raw = SOURCES[3].encode()
    parsed = syntax.parse(raw)
    want, stack = [], list(parsed.tree.root_node.children)
    while stack:
        node = stack.pop()
        if node.is_named:
            want.append((node.start_byte, node.end_byte))
        stack.extend(node.children)
    spans = syntax.node_spans(parsed)
    assert sorted(map(tuple, spans[:, :2].tolist())) == sorted(want)
    assert (syntax.node_spans(parsed, tiered_only=True)[:, 2] > 0).all()
    assert np.array_equal(np.lexsort((-spans[:, 1], spans[:, 0])), np.arange(len(spans)))


@pytest.mark.parametrize(
    "deep", ["(" * 10_000 + ")" * 10_000, "f(" * 5_000, "".join(" " * i + "if x:\n" for i in range(1500))]
)
def test_deep_nesting_is_no_problem(deep):
    parsed = syntax.parse(deep.encode())
    assert len(syntax.byte_tiers(parsed)) == len(deep)
    syntax.node_spans(parsed)
    syntax.error_bytes(parsed)
    assert sys.getrecursionlimit() < 10_000  # nothing here may lean on recursion


def test_bad_files_and_languages_are_named(tmp_path):
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(UserError, match=r"bad\.py: byte 5 is not valid UTF-8"):
        syntax.read_source(tmp_path / "bad.py")
    with pytest.raises(UserError, match=r"none\.py: cannot be read"):
        syntax.read_source(tmp_path / "none.py")
    with pytest.raises(UserError, match="there is no 'cobol'"):
        syntax.grammar("cobol")


def test_a_name_that_the_grammar_does_not_know_is_an_error(monkeypatch):
    import dataclasses

    wrong = dataclasses.replace(syntax.LANGUAGES["python"], data="assignment no_such_node")
    monkeypatch.setitem(syntax.LANGUAGES, "broken", wrong)
    with pytest.raises(UserError, match="no_such_node"):
        syntax.grammar("broken")
