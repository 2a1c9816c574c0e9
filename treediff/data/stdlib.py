"""Real code that every machine has: functions of Python's own standard library, as training rows and held-out rows.

    rows()                  # the training part, in OpenCodeReasoning's columns; needs `empty_reasoning = keep`
    rows(held_out=True)     # functions of other modules
    rows(every=True)        # the training part with the functions that have no docstring
    stamp()                 # what decides about them: Python's version and the library's files

A row is a function or method with a docstring: its head and the docstring's first paragraph are the problem, its
body is the program as Python's unparser writes it (no comments, one statement a line), and there is no reasoning. A
long body gives several rows (`pieces`).
Top-level modules and packages lie wholly in one part (`is_held_out`), and of near duplicates the first is kept, over
both parts. Same Python, same rows.
`python -m treediff.data.stdlib` counts them.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from treediff.data import contamination
from treediff.errors import UserError

SOURCES = ("stdlib", "stdlib_all")
"""Values of the switch `data`: functions with a docstring, and all."""

HELD_OUT = 0.2
"""Share of the modules that are held out."""

SHORTEST = 8
"""Shorter bodies are left out: `return self.x` has no tree to speak of [contamination.program_tokens]."""

LONGEST = 400
"""Longer bodies become several rows of whole statements, each of at most so many characters: for small models."""

ALIKE = 0.7
"""Bodies are near duplicates from this Jaccard similarity on, estimated by MinHash (contamination.Features)."""

_FOLDERS = frozenset(
    # Tests, other people's packages and tables; and what distributions of Linux package apart, so that it may lack.
    {"test", "tests", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
    | {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"}
)


def files() -> list[tuple[str, Path]]:
    """Dotted module name and path of every source file that rows are taken from, by name. Raises UserError if the
    library's sources are not installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not _FOLDERS & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            found.append((".".join(parts).removesuffix(".py").removesuffix(".__init__"), path))
    if not found:
        raise UserError(f"data: stdlib needs the sources of Python's standard library, of which {root} has none.")
    return sorted(found)


@lru_cache(maxsize=1)
def stamp() -> dict[str, Any]:
    """Python's version, the number of files, and a hash of their names and sizes and of this module."""
    found = files()
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(repr([(name, path.stat().st_size) for name, path in found]).encode())
    return {"python": platform.python_version(), "files": len(found), "sha256": digest.hexdigest()}


def is_held_out(module: str) -> bool:
    """Whether a module is in the held-out part: a hash of its first name says so, without underscores before it."""
    top = module.partition(".")[0].lstrip("_")
    return int.from_bytes(hashlib.sha256(top.encode()).digest()[:8], "big") < HELD_OUT * 2**64


def rows(held_out: bool = False, every: bool = False) -> list[dict[str, Any]]:
    """The rows of one part: id (`module.Class.function`, its further rows `#2`, ...), input, output, solution; with
    `every` those of functions without a docstring, too. The order mixes the modules."""
    return [dict(row) for row in _rows(every) if is_held_out(row["id"]) == held_out]


@lru_cache(maxsize=2)
def _rows(every: bool) -> list[dict[str, Any]]:
    found = [row for name, path in files() for row in functions(name, path.read_bytes(), every)]
    found.sort(
        key=lambda row: '"""' not in row["input"]
    )  # of duplicates one with a docstring stays, as without `every`
    return sorted(_without_duplicates(found), key=lambda row: hashlib.sha256(row["id"].encode()).digest())


def functions(module: str, source: bytes, every: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of each function of a module that has a docstring (or of `every` one) and a body to learn from besides.

    Functions inside functions have none of their own. What is no Python source in UTF-8 gives nothing.
    """
    try:
        source.decode("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for name, node in _definitions(tree, module):
        said = ast.get_docstring(node)
        if not (said or every):
            continue
        bodies = [p for p in pieces(node.body[bool(said) :]) if len(contamination.program_tokens(p)) >= SHORTEST]
        node.body, node.decorator_list = [ast.Pass()], []
        problem = ast.unparse(node).removesuffix("pass").rstrip()
        if said:
            summary = inspect.cleandoc(said).partition("\n\n")[0]
            problem += "\n" + textwrap.indent(f'"""{summary}"""', "    ")
        for number, body in enumerate((p for p in bodies if "```" not in p), start=1):
            answer = f"<think>\n\n</think>\n\n```python\n{body}\n```"
            own = name if number == 1 else f"{name}#{number}"
            yield {"id": own, "input": problem, "output": answer, "solution": body}


def pieces(statements: list[ast.stmt]) -> Iterator[str]:
    """Statements as the unparser writes them, in runs of at most LONGEST characters. Of a statement that is longer, the
    blocks inside it are cut likewise; one that holds none is left out."""
    run = ""
    for statement in statements:
        text = ast.unparse(statement)
        if run and len(run) + 1 + len(text) > LONGEST:
            yield run
            run = ""
        if len(text) <= LONGEST:
            run = f"{run}\n{text}".lstrip("\n")
            continue
        for part in (statement, *getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            for name in ("body", "orelse", "finalbody"):
                if isinstance(block := getattr(part, name, None), list):
                    yield from pieces(block)
    if run:
        yield run


def _definitions(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method outside other functions, with its dotted name, also under `if` and `try`."""
    todo: list[tuple[str, ast.AST]] = [(module, tree)]
    while todo:
        name, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            own = f"{name}.{child.name}" if hasattr(child, "name") and isinstance(child.name, str) else name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield own, child
            elif isinstance(child, ast.stmt | ast.ExceptHandler):
                todo.append((own if isinstance(child, ast.ClassDef) else name, child))


def _without_duplicates(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows without those whose body is nearly that of an earlier one, or whose name is."""
    from datasketch import MinHashLSH

    table = MinHashLSH(threshold=ALIKE, num_perm=contamination.PERMUTATIONS)
    sketches: dict[str, Any] = {}
    for row in found:
        sketch = contamination.features("", row["solution"]).sketches[0]
        alike = (sketches[name].jaccard(sketch) for name in table.query(sketch))
        if row["id"] not in sketches and all(similarity < ALIKE for similarity in alike):
            sketches[row["id"]] = sketch
            table.insert(row["id"], sketch)
            yield row


def main() -> None:
    """Say how many rows each part has, and of which modules the held-out part is made."""
    for held_out in (False, True):
        found = rows(held_out)
        modules = sorted({row["id"].partition(".")[0] for row in found})
        title = "held out" if held_out else "training"
        print(f"{title}: {len(found)} functions of {len(modules)} modules: {', '.join(modules)}")


if __name__ == "__main__":
    main()
