"""Rows of the standard library: what a row is, that no module is in both parts, and that duplicates are gone."""

import ast
import textwrap

import pytest

from treediff import pipeline
from treediff.config import resolve
from treediff.data import contamination, examples, sources, stdlib
from treediff.training import heldout

MODULE = b'''
import os

if os.name:
    class Stack:
        """Not a function."""

        def pop(self, at=-1):
            """Take one away.

            A second paragraph.
            """
            # A comment is no part of it.
            if at >= len(self.items):
                raise IndexError(f"{at} is too much")
            return self.items.pop(at)

        def bare(self):
            return self.items[0] + self.items[1] + self.items[2]

        def short(self):
            """Too short to learn from."""
            return 1

        def fence(self):
            """Holds a fence."""
            return "```" + self.items[0] + self.items[1] + self.items[2]

        def outer(self, items):
            """Holds another one."""
            def inner(x):
                """Not a row of its own."""
                return x + 1 + 2 + 3 + 4 + 5 + 6
            return str(items) + str(inner(1))

        def setter(self): "One line."; self.items = [1, 2, 3, 4]
'''


def test_a_row_is_a_head_with_its_docstring_and_the_body_without_it():
    found = {row["id"].rpartition(".")[2]: row for row in stdlib.functions("pack.mod", MODULE)}
    assert set(found) == {"pop", "outer", "setter"}
    assert found["outer"]["solution"].startswith("def inner(x):")
    assert found["setter"]["solution"] == "self.items = [1, 2, 3, 4]"
    row = found["pop"]
    assert row["id"] == "pack.mod.Stack.pop"
    assert row["input"] == 'def pop(self, at=-1):\n    """Take one away."""'
    ex = examples.example(row, empty_reasoning="keep")
    assert ex.reasoning == ""
    assert ex.code == row["solution"]
    assert ex.code == (
        "if at >= len(self.items):\n    raise IndexError(f'{at} is too much')\nreturn self.items.pop(at)"
    )
    with pytest.raises(examples.Dropped, match="empty reasoning"):
        examples.example(row)


@pytest.mark.parametrize("source", [b"def f(:", b"\xff = 1", b"x = '\\0'\0", b""])
def test_what_is_no_python_gives_nothing(source):
    assert list(stdlib.functions("m", source)) == []


def test_a_long_body_gives_several_rows_of_whole_statements():
    lines = "\n".join(f"    total += {i} * factor" for i in range(100))
    found = list(stdlib.functions("m", f'def f(total, factor):\n    """Add."""\n{lines}\n'.encode()))
    assert all(stdlib.LONGEST - 25 < len(row["solution"]) <= stdlib.LONGEST for row in found[:-1])
    assert "\n".join(row["solution"] for row in found) == textwrap.dedent(lines)
    assert [row["id"] for row in found] == ["m.f", *(f"m.f#{i}" for i in range(2, len(found) + 1))]
    assert len({row["input"] for row in found}) == 1


def test_of_a_statement_that_is_too_long_the_blocks_inside_are_cut():
    one, two, three = ("; ".join(f"{name} += {i}" for i in range(80)) for name in "abc")
    source = f"try:\n  x = 0\n  while x:\n    {one}\nexcept E:\n  {two}\nelse:\n  {three}\ny = '{'z' * 500}'\nlast = 1"
    found = list(stdlib.pieces(ast.parse(source).body))
    said = "\n".join(found).splitlines()
    assert said == ["x = 0", *one.split("; "), *three.split("; "), *two.split("; "), "last = 1"]
    assert all(len(piece) <= stdlib.LONGEST for piece in found)


def test_every_function_is_asked_for_by_name():
    names = {row["id"].rpartition(".")[2] for row in stdlib.functions("pack.mod", MODULE, every=True)}
    assert names == {"pop", "outer", "setter", "bare"}
    bare = next(row for row in stdlib.functions("m", MODULE, every=True) if row["id"].endswith("bare"))
    assert bare["input"] == "def bare(self):"


def test_the_parts_share_no_module_and_together_are_the_library_s_rows():
    train, held = stdlib.rows(), stdlib.rows(held_out=True)
    tops = [{row["id"].partition(".")[0].lstrip("_") for row in part} for part in (train, held)]
    assert not tops[0] & tops[1]
    assert 0.1 < len(held) / len(train + held) < 0.4
    assert len({row["id"] for row in train + held}) == len(train + held)
    for row in held[:200]:
        ast.parse(row["solution"])
        assert len(row["solution"]) <= stdlib.LONGEST
    assert stdlib.rows() == train
    every = {row["id"] for row in stdlib.rows(every=True)}
    assert every > {row["id"] for row in train}
    assert not any(stdlib.is_held_out(name) for name in every)
    train[0]["id"] = "changed"
    assert stdlib.rows()[0]["id"] != "changed"  # a caller's row is its own


def test_no_held_out_body_is_nearly_a_training_one():
    """By the true Jaccard similarity of the n-grams that MinHash estimates, with room for its error."""

    def grams(row):
        items = contamination.program_tokens(row["solution"])
        return set(contamination.ngrams([t for t, _ in items], [own for _, own in items], 5).tolist())

    train = [grams(row) for row in stdlib.rows()[:600]]
    for row in stdlib.rows(held_out=True)[:150]:
        mine = grams(row)
        assert all(len(mine & other) < 0.9 * len(mine | other) for other in train)


def test_a_renamed_copy_is_a_duplicate_and_another_body_is_none():
    bodies = [
        "total = 0\nfor x in nums:\n    if x > 3:\n        total += x * x\nreturn total",
        "count = 0\nfor item in many:\n    if item > 3:\n        count += item * item\nreturn count",
        "with open(path) as file:\n    return [line.split(',') for line in file if line.strip()]",
    ]
    found = [{"id": str(i), "solution": body} for i, body in enumerate(bodies)]
    assert [row["id"] for row in stdlib._without_duplicates(found)] == ["0", "2"]


def test_the_stamp_changes_with_the_library_and_names_the_python(monkeypatch, tmp_path):
    import platform

    before = stdlib.stamp()
    assert before["python"] == platform.python_version()
    assert sources.data_stamp(resolve("stdlib")) == before
    (tmp_path / "mod.py").write_text("x = 1\n")
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    stdlib.stamp.cache_clear()
    one = stdlib.stamp()
    (tmp_path / "mod.py").write_text("x = 12\n")
    stdlib.stamp.cache_clear()
    two = stdlib.stamp()
    stdlib.stamp.cache_clear()
    assert len({before["sha256"], one["sha256"], two["sha256"]}) == 3
    (tmp_path / "mod.py").unlink()
    with pytest.raises(stdlib.UserError, match="standard library"):
        stdlib.stamp()
    stdlib.stamp.cache_clear()


def test_the_data_set_and_its_held_out_rows_come_from_different_modules(runs):
    cfg = resolve("stdlib", eval_rows=20)
    data, more = pipeline.prepared(cfg), pipeline.prepared(cfg.with_masking("none"))
    stats = pipeline.statistics(cfg)
    assert len(more) > 1.5 * len(data)
    assert stats["source"] == stdlib.stamp()
    assert stats["rows"]["kept"] == len(data) > 1000
    assert stats["tokens"]["reasoning"] < 8 * len(data)  # the frame of an empty block, and nothing else
    assert all(not stdlib.is_held_out(name) for name in data["id"][:])
    known = {examples.uid(examples.example(r, empty_reasoning="keep")): r["id"] for r in stdlib.rows(held_out=True)}
    held = heldout.rows(cfg)
    assert len(held) == 20
    assert {int(r["uid"]) for r in held} <= set(known)
