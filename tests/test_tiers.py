"""Tiers and spans against walks over the tree that share no code with the module (tests/oracles.py)."""

import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treediff.errors import UserError
from treediff.masking.languages import LANGUAGES
from treediff.masking.tiers import (
    CONDITION,
    CONTROL,
    DATA,
    DEFAULT,
    SKELETON,
    byte_tiers,
    error_bytes,
    grammar,
    line_spans,
    name_spans,
    node_spans,
    parse,
    read_source,
    telling_function,
)

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


@pytest.mark.parametrize("owner", oracles.OWNERS)
@pytest.mark.parametrize("source", SOURCES)
def test_tiers_are_those_of_the_twin(source, owner):
    raw = source.encode()
    assert byte_tiers(parse(raw), owner).tolist() == oracles.byte_tiers(raw, owner).tolist()


@pytest.mark.parametrize("owner", oracles.OWNERS)
def test_tiers_of_real_files_are_those_of_the_twin(owner):
    for path in [p for p in STANDARD_LIBRARY if p.stat().st_size < 12_000][:12]:
        raw = path.read_bytes()
        assert np.array_equal(byte_tiers(parse(raw), owner), oracles.byte_tiers(raw, owner)), path.name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(SOURCES[:10]), max_size=4), st.integers(0, 200))
def test_broken_code_has_a_tier_for_every_byte(parts, cut):
    raw = "".join(parts).encode()[: -cut or None]
    parsed = parse(raw)
    for owner in oracles.OWNERS:
        assert np.array_equal(byte_tiers(parsed, owner), oracles.byte_tiers(raw, owner))
    assert list(map(tuple, node_spans(parsed).tolist())) == oracles.spans(raw)
    assert error_bytes(parsed) == oracles.error_bytes(raw)


def test_the_paper_s_example():
    raw = b"import os\nwhile x:\n    y = f(x)\n    if y > 0:\n        return 1\n"
    tiers = byte_tiers(parse(raw))

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
        names = name_spans(parse(source))
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
    lines = line_spans(source)
    assert b"".join(source[a:b] for a, b, _ in lines) == source
    assert [source[a:b] for a, b, _ in lines] == [x + b"\n" for x in source.split(b"\n")[:-1]] + [
        x for x in source.split(b"\n")[-1:] if x
    ]


def test_what_still_parses_keeps_its_tier():
    raw = b"def f(x):\n    return g(x)\n\ndef h(:\n    for ) in\n"
    parsed = parse(raw)
    assert 0 < error_bytes(parsed) < len(raw)
    assert byte_tiers(parsed)[raw.index(b"return")] == CONTROL


@pytest.mark.parametrize("source", SOURCES)
def test_spans_are_every_named_node_but_the_root(source):
    raw = source.encode()
    spans = node_spans(parse(raw))
    assert list(map(tuple, spans.tolist())) == oracles.spans(raw)
    tiered = node_spans(parse(raw), tiered_only=True)
    assert np.array_equal(tiered, spans[spans[:, 2] > 0])
    assert np.array_equal(np.lexsort((-spans[:, 1], spans[:, 0])), np.arange(len(spans)))  # outer nodes first


def test_spans_of_real_files_are_those_of_the_twin():
    for path in [p for p in STANDARD_LIBRARY if p.stat().st_size < 60_000][::5]:
        raw = path.read_bytes()
        assert list(map(tuple, node_spans(parse(raw)).tolist())) == oracles.spans(raw), path.name


def test_a_comment_is_of_no_tier_wherever_it_stands():
    raw = b"# a, b\nif x:  # c: d\n    # (e)\n    f(  # g = h\n        1)\n# i\n"
    parsed = parse(raw)
    inside = np.zeros(len(raw), bool)
    for comment in (b"# a, b", b"# c: d", b"# (e)", b"# g = h", b"# i"):
        inside[raw.index(comment) : raw.index(comment) + len(comment)] = True
    for owner in oracles.OWNERS:
        tiers = byte_tiers(parsed, owner)
        assert (tiers[inside] == DEFAULT).all()
        assert tiers[raw.index(b"1")] == (CONDITION if owner == "outermost" else SKELETON)


DEEP = {
    "parentheses": lambda n: "(" * n + ")" * n,
    "calls never closed": lambda n: "f(" * n,
    "nested blocks": lambda n: "".join(" " * i + "if x:\n" for i in range(n)) + " " * n + "a\n",
    "nested functions": lambda n: "".join(" " * i + "def f(x):\n" for i in range(n)) + " " * n + "return 1\n",
    "else if": lambda n: "if a: b\n" + "elif c: d\n" * n,
    "one expression": lambda n: "x = " + " + ".join(["f(1)"] * n),
    "lists": lambda n: "[" * n + "]" * n,
    "lambdas": lambda n: "lambda: " * n + "1",
}


@pytest.mark.parametrize("shape", DEEP)
def test_deep_nesting_is_no_problem(shape):
    raw = DEEP[shape](1000 if shape.startswith("nested") else 10_000).encode()
    parsed = parse(raw)
    for owner in oracles.OWNERS:
        assert len(byte_tiers(parsed, owner)) == len(raw)
    node_spans(parsed)
    assert 0 <= error_bytes(parsed) <= len(raw)
    first, last = telling_function(parsed)
    assert 0 <= first <= last <= raw.count(b"\n")
    assert sys.getrecursionlimit() < 10_000  # nothing here may lean on recursion


def seconds(raw: bytes) -> float:
    """Time of everything but tree-sitter's parse."""
    parsed = parse(raw)
    begin = time.process_time()
    for owner in oracles.OWNERS:
        byte_tiers(parsed, owner)
    node_spans(parsed)
    error_bytes(parsed)
    telling_function(parsed)
    return time.process_time() - begin


@pytest.mark.slow
@pytest.mark.parametrize("shape", DEEP)
def test_nesting_costs_no_more_than_its_length(shape):
    """Four times as deep is at most ten times as dear for each byte that is there."""
    raw = [DEEP[shape](n).encode() for n in ((2500, 10_000) if shape.startswith("nested") else (10_000, 40_000))]
    small, large = (seconds(x) for x in raw)
    assert large / small < 2.5 * len(raw[1]) / len(raw[0])


@pytest.mark.slow
def test_work_is_linear_in_the_source():
    source = b"".join(p.read_bytes() for p in STANDARD_LIBRARY if b"coding" not in p.read_bytes()[:200])
    source = b"\n".join([source] * (1 + 10_000_000 // len(source)))
    small, large = (seconds(source[:size].decode(errors="ignore").encode()) for size in (1_000_000, 10_000_000))
    assert large / small < 20


def test_bad_files_and_languages_are_named(tmp_path):
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    with pytest.raises(UserError, match=r"bad\.py: byte 5 is not valid UTF-8"):
        read_source(tmp_path / "bad.py")
    with pytest.raises(UserError, match=r"none\.py: cannot be read"):
        read_source(tmp_path / "none.py")
    with pytest.raises(UserError, match="there is no 'cobol'"):
        grammar("cobol")


def test_a_name_that_the_grammar_does_not_know_is_an_error(monkeypatch):
    import dataclasses

    wrong = dataclasses.replace(LANGUAGES["python"], data="assignment no_such_node")
    monkeypatch.setitem(LANGUAGES, "broken", wrong)
    with pytest.raises(UserError, match="no_such_node"):
        grammar("broken")
