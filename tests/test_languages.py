"""Every language: its table, real files, and the tier of each construct."""

import re
from pathlib import Path

import numpy as np
import oracles
import pytest

from treediff.errors import UserError
from treediff.masking.languages import LANGUAGES
from treediff.masking.tiers import (
    DATA,
    DEFAULT,
    TIERS,
    byte_tiers,
    error_bytes,
    grammar,
    grammar_version,
    installed,
    language_of,
    node_spans,
    parse,
    read_source,
    telling_function,
)

SOURCES = sorted(p for p in (Path(__file__).parent / "sources").iterdir() if p.suffix != ".md")


@pytest.fixture(params=LANGUAGES)
def language(request) -> str:
    return with_grammar(request.param)


def with_grammar(language: str) -> str:
    if language not in installed():
        pytest.skip(f"the grammar of {language} is not installed (pip install 'treediff[languages]')")
    return language


def test_the_tables_do_not_contradict_themselves():
    for language, table in LANGUAGES.items():
        names = " ".join((table.skeleton, table.data, table.condition, table.control)).split()
        assert len(names) == len(set(names)), language
        assert {entry.partition(":")[0] for entry in table.headers.split()} <= set(table.skeleton.split()), language
        assert not set(table.comments.split()) & set(names), language
        assert table.fences.split()[0] == language  # what `prepare` writes
    for lists in ([t.suffixes for t in LANGUAGES.values()], [t.fences for t in LANGUAGES.values()]):
        every = " ".join(lists).split()
        assert len(every) == len(set(every))


def test_the_tables_hold_against_their_grammars(language):
    g = grammar(language)
    assert set(np.unique(g.tier_of_kind)) == set(range(len(TIERS)))
    wheel = LANGUAGES[language].grammar.replace("_", "-")
    assert re.fullmatch(rf"tree-sitter [\d.]+, {wheel} [\d.]+, table [0-9a-f]{{12}}", grammar_version(language))


def test_every_language_has_a_real_file():
    assert {language_of(p) for p in SOURCES} == LANGUAGES.keys() - {"python"}  # which has its standard library


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
class TestRealFiles:
    def test_parses_and_has_every_tier(self, path):
        parsed = parse(read_source(path), with_grammar(language_of(path)))
        assert error_bytes(parsed) == 0
        share = np.bincount(byte_tiers(parsed), minlength=5) / len(parsed.source)
        assert (share > 0.002).all(), dict(zip(TIERS, share.round(4), strict=True))

    @pytest.mark.parametrize("owner", oracles.OWNERS)
    def test_tiers_are_those_of_the_twin(self, path, owner):
        source, language = path.read_bytes(), with_grammar(language_of(path))
        got = byte_tiers(parse(source, language), owner)
        assert np.array_equal(got, oracles.byte_tiers(source, owner, language))

    def test_spans_are_those_of_the_twin(self, path):
        source, language = path.read_bytes(), with_grammar(language_of(path))
        spans = node_spans(parse(source, language))
        assert list(map(tuple, spans.tolist())) == oracles.spans(source, language)
        tiered = node_spans(parse(source, language), tiered_only=True)
        assert np.array_equal(tiered, spans[spans[:, 2] > 0])

    def test_broken_in_the_middle_it_keeps_what_still_parses(self, path):
        source, language = path.read_bytes(), with_grammar(language_of(path))
        at = re.compile(rb"[;{}]\n").search(source, len(source) // 2).end()  # not in a comment
        broken = source[:at] + b"@ ) = = ( ?? ]\n" + source[at:]
        parsed = parse(broken, language)
        whole, tiers = byte_tiers(parse(source, language)), byte_tiers(parsed)
        assert 0 < error_bytes(parsed) == oracles.error_bytes(broken, language)
        assert np.array_equal(tiers, oracles.byte_tiers(broken, "innermost", language))
        assert (tiers[: at // 2] == whole[: at // 2]).mean() > 0.9

    def test_the_telling_function_is_a_function_with_every_tier(self, path):
        parsed = parse(path.read_bytes(), with_grammar(language_of(path)))
        first, last = telling_function(parsed)
        assert 0 <= first <= last < parsed.source.count(b"\n") + 1
        lines = np.cumsum([0] + [len(x) for x in parsed.source.splitlines(keepends=True)])
        distinct = np.unique(byte_tiers(parsed)[lines[first] : lines[last + 1]])
        assert len(distinct) >= 4


# A construct, and the tier of words in it (each where it first stands as a word). `S` skeleton, `D` data,
# `C` condition, `K` control, `-` default.
CASES = {
    "python": [
        ("import os\nx = f(1)  # why, [not]\n", "import S, x D, f D, 1 S, why -, [ -"),
        ("@deco\nclass A(B):\n    def g(self, n=3):\n        a + b\n", "deco S, class S, B S, def S, self S, 3 S, a -"),
        ("if p: q\nelif r: s\nelse: t\n", "if C, p C, q C, elif C, r C, else C, t C, : S"),
        ("match p:\n    case 1: q\n", "match C, case C, q C, 1 S"),
        ("for i in xs:\n    break\nwhile w: continue\n", "for K, xs K, break K, while K, w K, continue K"),
        ("try: a\nexcept E: raise\nfinally: b\nwith c as d: yield e\n", "try K, except K, raise K, finally K, c K"),
        ("x = a if b else c\nif (n := 5): pass\n", "a C, if C, c C, n D, := D, 5 S"),
        ("def f():\n    return not [True, None, 'str, (1)']\n", "return K, not K, True S, None S, str S"),
    ],
    "javascript": [
        ("import { a } from 'b';\nexport default c;\n", "import S, a S, 'b' S, export S, c S"),
        ("export class A extends B { m(p) { q; } }\n", "export S, class S, B S, m S, p S, q -"),
        ("const x = f(1), y = [null, /r+/, `t${u}`];\n", "const D, x D, f D, 1 S, null S, r S, `t S, u S"),
        ("x += 1; i++; new T(u);\n", "x D, i D, new D, T D, u D"),
        ("if (p) { q; } else r;\nz = b ? c : d;\n", "if C, p C, q C, else C, r C, z D, b C, ? C, d C, { S"),
        ("switch (p) { case 1: q; break; default: r; }\n", "switch C, case C, 1 S, q C, break K, default C, r C"),
        ("for (const k of xs) u;\ndo { v; } while (w);\n", "for K, xs K, u K, do K, v K, while K, w K"),
        ("try { throw e; } catch (g) { h; } finally { l; }\n", "try K, throw K, e K, catch K, h K, finally K, l K"),
        ("const fn = (p) => { a; };\nfunction* g(q) { yield b; }\n", "fn D, p S, a D, function S, q S, yield K, b K"),
        ("a; // no, [marks] here;\n/* (b) */ 'lit, eral';\n", "a -, no -, [ -, (b) -, lit S"),
    ],
    "typescript": [
        ("import type { A } from './a';\nlet x: Map<string> = f();\n", "import S, A S, let D, Map D, f D"),
        ("export interface I<T> { p: T; m(q: number): U; }\n", "export S, I S, p D, m S, q S, U S"),
        ("enum E { P = 1 }\ntype U = V | W;\n", "enum S, P D, 1 S, type S, V S, W S"),
        ("abstract class A implements I { private n = 2; abstract m(): B; }\n", "abstract S, I S, n D, 2 S, m S, B S"),
        ("type T = A extends B ? C : D;\n", "type S, A C, ? C, D C"),
        ("namespace N { if (p as Q) return r!; }\n", "namespace S, N S, if C, p C, return K, r K"),
        ("function f(this: A, b?: C): asserts b is C { while (g) { h; } }\n", "function S, b S, C S, while K, h K"),
        ("// a: b, (c)\nconst d = <T>(e: T) => e;\n", "a -, ( -, const D, T S, => S"),
    ],
    "java": [
        ("package p.q;\nimport a.B;\n", "package S, q S, import S, B S"),
        ("@Ann(1) public class A<T> extends B { private int n = 2; }\n", "Ann S, public S, T S, B S, int D, n D, 2 S"),
        ("class A { A(int p) { super(q); this.r = p; } }\n", "int S, super D, q D, this D"),
        ("class A { void f() { int x = g(null); x++; new H(); } }\n", "void S, x D, g D, null S, new D"),
        (
            "class A { int f() { if (p) return q; else r(); return b ? 1 : c; } }\n",
            "if C, p C, return K, q K, b C, 1 S",
        ),
        (
            "class A { void f() { switch (p) { case X: q(); break; default: throw e; } } }\n",
            "switch C, case C, X C, q D, break K, default C, throw K",
        ),
        ("class A { int f(P p) { return switch (p) { case X -> 1; }; } }\n", "return K, switch C, case C, -> C, 1 S"),
        (
            "class A { void f() { for (var v : w) { continue; } while (z) {} } }\n",
            "for K, w K, continue K, while K, z K",
        ),
        (
            "class A { void f() { try (R r = s) { t(); } catch (E e) { } finally { } } }\n",
            "try K, R D, t D, catch K, E K, finally K",
        ),
        ("interface I { int m(int p); }\nenum E { ONE, TWO }\nrecord P(int x) {}\n", "m S, p S, ONE D, enum S, x S"),
        ("class A { Runnable r = () -> { a(); }; // b: (c)\n }\n", "r D, -> S, a D, b -, c -"),
        ("class A { String s = \"lit, eral\" + 'c' + 1.5f; /* (x) */ }\n", "lit S, + D, 'c' S, 1.5f S, (x) -"),
    ],
    "c": [
        ("#include <a.h>\n#define N (1 + 2)\n#pragma once\n", "include S, a S, define S, + S, pragma S"),
        ("static int f(int a, char *b) { q; }\n", "static S, int S, char S, q -"),
        ("int g(void);\nint x = h(1), y[3];\n", "int D, g S, void S, h D, 1 S, y D"),
        ("struct S { int m; };\nenum E { P = 1, Q };\ntypedef unsigned T;\n", "struct S, int D, enum S, P D, T S"),
        ("void f() { if (p) { q; } else r; x = b ? c : d; }\n", "if C, p C, q C, else C, r C, x D, b C, ? C"),
        (
            "void f() { switch (p) { case 1: q; break; default: r; } }\n",
            "switch C, case C, 1 S, q C, break K, default C, r C",
        ),
        (
            "void f() { for (i = 0; i < n; i++) u; while (w) v; do { z; } while (y); }\n",
            "for K, i D, < K, u K, w K, z K",
        ),
        ("void f() { x += 1; y--; g(&z); goto out; out: return h; }\n", "x D, y D, g D, z D, goto K, return K, h K"),
        ("/* a, (b) */\nchar *s = \"lit, eral\"; // c: d\nint c = 'e';\n", "a -, ( -, char D, lit S, d -, 'e' S"),
        ("#ifdef X\nint a = 1;\n#else\nint b;\n#endif\n", "ifdef -, X -, int D, a D, 1 S, else -, endif -"),
    ],
    "cpp": [
        (
            "#include <a>\nusing namespace std;\nnamespace n { int x = 1; }\n",
            "include S, using S, namespace S, x D, 1 S",
        ),
        (
            "template <typename T> class A : public B { public: A(int p) : q(p) {} int r; };\n",
            "template S, T S, class S, B S, public S, p S, q D, r D",
        ),
        ("auto f(const V& v) -> int { q; }\n", "auto S, V S, -> S, q -"),
        (
            "void f() { auto g = [&](int p) { h; }; auto* k = new T(u); delete k; }\n",
            "auto D, p S, h D, new D, u D, delete D",
        ),
        ("void f() { if (auto it = m(); it) { q; } else r; }\n", "if C, auto D, m D, q C, else C, r C"),
        ("void f() { for (auto& e : xs) { continue; } while (w) {} }\n", "for K, xs K, continue K, while K, w K"),
        ("void f() { try { throw E(1); } catch (const E& e) { return; } }\n", "try K, throw K, E D, catch K, return K"),
        (
            "int f() { switch (p) { case A::B: return x ? y : nullptr; } }\n",
            "switch C, case C, A C, return K, x C, nullptr S",
        ),
        ('// a::b, (c)\nauto s = R"(raw, (text))"; auto u = 1.5_km;\n', "a -, ( -, auto D, raw S, 1.5_km S"),
        ("enum class E { P };\nusing T = std::vector<int>;\nstruct S final { bool b{true}; };\n", "E S, P D, T S, b D"),
    ],
    "go": [
        ('package p\nimport (\n\t"fmt"\n)\n', "package S, p S, import S, fmt S"),
        ("package p\nfunc (r *R) F(a int) (b error) { a + b }\n", "func S, R S, int S, error S, + -"),
        (
            "package p\ntype T struct { n int }\ntype I interface { M(x int) }\n",
            "type S, T S, n D, interface S, M S, x S",
        ),
        ("package p\nvar x = f(1)\nconst K = `r, aw`\n", "var D, x D, f D, 1 S, const D, K D, `r S"),
        ("package p\nfunc f() { a := g(); a += 2; a++; c <- d; T{e: 1} }\n", "a D, := D, g D, 2 S, c D, d D, T D, e D"),
        ("package p\nfunc f() { if a := g(); a > 1 { q } else { r } }\n", "if C, a D, > C, q C, else C, r C"),
        (
            "package p\nfunc f() { switch x { case 1: q; fallthrough; default: r } }\n",
            "switch C, x C, case C, 1 S, q C, fallthrough K, default C, r C",
        ),
        ("package p\nfunc f() { switch t := x.(type) { case int: return t } }\n", "switch C, t C, int C, return K"),
        ("package p\nfunc f() { for i, v := range xs { continue } }\n", "for K, v K, range K, xs K, continue K"),
        (
            "package p\nfunc f() { go g(); defer h(); select { case m := <-c: n } }\n",
            "go K, g D, defer K, h D, select K, case K, m D, c D, n K",
        ),
        ("package p\nfunc f() { g(func(a int) { b }) // c: (d)\n}\n", "g D, func S, b D, c -, d -"),
        ("package p\n/* (x), */ var s = \"lit, eral\" + 'r'\n", "x -, ( -, s D, lit S, + D, 'r' S"),
    ],
    "rust": [
        (
            "use a::{b, c};\nmod d;\n#[derive(E)]\nstruct F { g: H }\n",
            "use S, b S, mod S, derive S, struct S, g D, H D",
        ),
        ("pub fn f<T: U>(a: &T) -> V { q; }\n", "pub S, fn S, U S, -> S, V S, q -"),
        (
            "impl<T> A for B<T> { fn m(&self); type N = O; }\ntrait W { fn x(&self) {} }\n",
            "impl S, for S, m S, N S, x S",
        ),
        ("fn f() { let mut x: T = g(1); x += 2; h!(y); S { z: 3 }; }\n", "let D, T D, g D, 1 S, 2 S, h D, y D, z D"),
        ("fn f() { if p { q } else { r } }\n", "if C, p C, q C, else C, r C"),
        (
            "fn f() { match p { A::B(x) if y => 1, _ => return z } }\n",
            "match C, p C, A C, if C, y C, => C, 1 S, return K",
        ),
        (
            "fn f() { for i in xs { continue; } while w { break } loop { u } }\n",
            "for K, xs K, continue K, w K, loop K, u K",
        ),
        ("fn f() { let a = g()?; if let Some(b) = c { } }\n", "a D, g D, ? K, if C, let D, Some C, c C"),
        ('const K: u8 = 0xff;\nstatic S: &str = "lit, eral";\n', "const D, K D, 0xff S, static D, lit S"),
        ("// a: (b)\n/* c, d */\nfn f() { let e = |p| { q }; 'r'; }\n", "a -, (b) -, c -, e D, p S, q D, 'r' S"),
        ("enum E { A, B(u8) }\nmacro_rules! m { () => { x } }\n", "enum S, A D, macro_rules S, x S"),
    ],
}
CODE = dict(zip("-SDCK", range(5), strict=True))


@pytest.mark.parametrize(("name", "code", "said"), [(n, *case) for n, cases in CASES.items() for case in cases])
def test_each_construct_has_its_tier(name, code, said):
    raw = code.encode()
    parsed = parse(raw, with_grammar(name))
    tiers, wrong = byte_tiers(parsed), []
    for expectation in said.split(", "):
        word, tier = expectation.rsplit(maxsplit=1)
        place = re.search(rf"(?<!\w){re.escape(word)}(?!\w)" if word[0].isalnum() else re.escape(word), code).span()
        wrong += [(expectation, TIERS[got]) for got in set(tiers[slice(*place)].tolist()) - {CODE[tier]}]
    assert not wrong
    assert error_bytes(parsed) == 0


@pytest.mark.parametrize(("name", "code"), [(n, case[0]) for n, cases in CASES.items() for case in cases])
def test_constructs_whole_and_cut_short_are_those_of_the_twin(name, code):
    with_grammar(name)
    for end in (len(code), 2 * len(code) // 3, len(code) // 3):
        raw = code[:end].encode()
        for owner in oracles.OWNERS:
            got = byte_tiers(parse(raw, name), owner)
            assert np.array_equal(got, oracles.byte_tiers(raw, owner, name)), (raw, owner)
        assert list(map(tuple, node_spans(parse(raw, name)).tolist())) == oracles.spans(raw, name)
        assert error_bytes(parse(raw, name)) == oracles.error_bytes(raw, name)


def test_half_a_program_keeps_its_tiers(language):
    half = {
        "python": "def f(x):\n    y = g(x)\n    return (\n",
        "rust": "fn f(x: T) {\n    let y = g(x);\n    return (\n",
        "go": "package p\nfunc f(x T) {\n\ty := g(x)\n\treturn (\n",
        "java": "class A { void f(T x) {\n    y = g(x);\n    return (\n",
        "javascript": "function f(x) {\n    y = g(x);\n    return (\n",
        "typescript": "function f(x: T) {\n    y = g(x);\n    return (\n",
        "c": "void f(T x) {\n    y = g(x);\n    return (\n",
        "cpp": "void f(T x) {\n    y = g(x);\n    return (\n",
    }[language].encode()
    parsed = parse(half, language)
    assert parsed.tree.root_node.has_error
    assert byte_tiers(parsed)[half.index(b"y")] in (DATA, DEFAULT)
    assert byte_tiers(parsed)[half.index(b"g(")] == DATA


# Where an expression, and where statements may stand.
EXPRESSION = {"java": "class A {{ int f() {{ return {}; }} }}", "go": "package p\nvar y = {}\n"}
EXPRESSION |= {"c": "int y = {};", "cpp": "int y = {};", "rust": "fn f() {{ {} }}"}
STATEMENT = {"java": "class A {{ void f() {{ {} }} }}", "go": "package p\nfunc f() {{ {} }}\n"}
STATEMENT |= {"c": "void f() {{ {} }}", "cpp": "void f() {{ {} }}", "rust": "fn f() {{ {} }}"}
IF = {"go": "if x {", "rust": "if x {", "python": ""}


@pytest.mark.parametrize("what", ["parentheses", "blocks"])
def test_deep_nesting_is_no_problem(language, what):
    n = 10_000
    if what == "parentheses":
        source = EXPRESSION.get(language, "{}").format("(" * n + "x" + ")" * n)
    elif language == "python":
        source = "".join(" " * i + "if x:\n" for i in range(1000)) + " " * 1000 + "x\n"  # indented: 500 kB
    else:
        source = STATEMENT.get(language, "{}").format(IF.get(language, "if (x) {") * n + "}" * n)
    raw = source.encode()
    parsed = parse(raw, language)
    for owner in oracles.OWNERS:
        assert len(byte_tiers(parsed, owner)) == len(raw)
    node_spans(parsed)
    assert error_bytes(parsed) in range(len(raw) + 1)
    assert telling_function(parsed)[0] >= 0


def test_a_grammar_that_is_not_installed_is_named_with_what_to_do(monkeypatch):
    import dataclasses

    for language in ("go", "python"):
        absent = dataclasses.replace(LANGUAGES[language], grammar="tree_sitter_absent")
        monkeypatch.setitem(LANGUAGES, "absent", absent)
        for call in (grammar, grammar_version):
            with pytest.raises(
                UserError, match=r"absent needs the package tree-sitter-absent: pip install tree-sitter-"
            ):
                call("absent")
    monkeypatch.setitem(LANGUAGES, "odd", dataclasses.replace(LANGUAGES["python"], headers="class_definition:bodie"))
    with pytest.raises(UserError, match="field 'class_definition:bodie'"):
        grammar("odd")


def test_the_version_of_a_language_follows_its_table(monkeypatch):
    import dataclasses

    before = grammar_version("python")
    monkeypatch.setitem(LANGUAGES, "python", dataclasses.replace(LANGUAGES["python"], data="call"))
    assert grammar_version("python") != before


def test_the_language_of_a_file():
    assert language_of(Path("a/b.RS")) == "rust"
    assert language_of(Path("x.hpp")) == "cpp"
    with pytest.raises(UserError, match=r"Makefile: its suffix is none of \.py .*--language"):
        language_of(Path("Makefile"))
