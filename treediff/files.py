"""Files: written whole or not at all; JSON and JSON Lines read with errors that name the file and the line.

with whole(path) as temporary: temporary.write_text(...)      # takes the place of `path` on success only
for row in read_jsonl(path): ...
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treediff.errors import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write a file or folder to; it takes the place of `path` on success only."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary / path.name
        if (temporary / path.name).is_file():
            with (temporary / path.name).open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON in `path`. Raises UserError that names the file if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e}); delete it and run the stage again.") from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. Raises UserError naming the file and line of anything else."""
    return (read_row(str(path), number, line) for number, line in numbered_lines(Path(path)))


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 0) and bytes of each line that is not blank."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file) if not line.isspace())
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}).") from None


def read_row(source: str, number: int, row: bytes | dict[str, Any]) -> dict[str, Any]:
    """What `raw_rows` gave, as a dictionary. Raises UserError naming the line that is no JSON object in UTF-8."""
    if isinstance(row, dict):
        return row
    try:
        value = json.loads(row.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"{source}, line {number + 1}: not valid UTF-8 ({e}).") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{source}, line {number + 1}: not valid JSON ({e}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}, line {number + 1}: not a JSON object.")
    return value
