"""The house: data flows one way, so imports do, too; and every public definition says what it is."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "treediff"
ROOMS = "cli verify doctor jobs pipeline report figures scoring sampling training data model masking sandbox"
ORDER = tuple(ROOMS.split())
"""Rooms from the last to the first: each may import those behind it, and the ground floor, which knows no room."""
GROUND = ("cards", "usage", "runs", "config", "files", "strategies", "protocols", "progress", "errors")
FILES = sorted(PACKAGE.rglob("*.py"))


def room(name: str) -> str:
    """The room of `treediff.room.module`, or the module itself where it stands beside the rooms."""
    return name.split(".")[1]


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module of the package that a file imports, at its top or anywhere inside."""
    known = {module(p) for p in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports by dots hide where a thing comes from"
            names = [f"{node.module}.{a.name}" for a in node.names] + [node.module]
            found |= {n for n in names if n in known and n != "treediff"}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name in known}
    return found


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_room_imports_only_from_those_behind_it(path):
    here = module(path)
    if here == "treediff":
        assert not imports(path)
        return
    behind = ORDER[ORDER.index(room(here)) :] if room(here) in ORDER else []
    ground = GROUND if room(here) in ORDER else GROUND[GROUND.index(room(here)) + 1 :]
    wrong = {n for n in imports(path) if room(n) not in (*behind, *ground) and n != here}
    assert not wrong, f"{here} imports {sorted(wrong)}"


def test_there_is_no_circle():
    graph = {module(p): {n for n in imports(p) if len(n.split(".")) > 2 or room(n) not in ORDER} for p in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_work_at_import():
    """Only the launcher's entry points and the settings of OpenMP happen when a module is loaded."""
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                assert path.name == "__init__.py", f"{module(path)}, line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_every_public_definition_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module(path)} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            inner = [
                n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and node in ast.walk(n) and n is not node
            ]
            methods = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and node in c.body]
            if not inner and not any(c.name.startswith("_") for c in methods):
                assert ast.get_docstring(node), f"{module(path)}.{node.name}, line {node.lineno}, says nothing"
