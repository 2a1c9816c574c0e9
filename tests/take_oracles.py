"""`make oracles FROM=FOLDER`: take the public files that some checks need from a folder of yours.

Files are known by their SHA-256 (oracles.sha256), whatever they are called and wherever below FOLDER they lie:
EvalPlus's data, HumanEval-Infilling, completions with their official verdicts, rows with reasoning, golden files,
tokenizers. What is found is copied to .oracles/, where the tests look; what is not is named, and its tests are skipped.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

TESTS = Path(__file__).parent
TARGET = TESTS.parent / ".oracles"


def main(folder: Path) -> None:
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder; name one that holds the files: make oracles FROM=FOLDER")
    wanted = [line.split(maxsplit=1) for line in (TESTS / "oracles.sha256").read_text().splitlines()]
    hashes = {digest for digest, _ in wanted}
    there: dict[str, Path] = {}
    for path in folder.rglob("*"):
        if path.is_file() and (digest := hashlib.sha256(path.read_bytes()).hexdigest()) in hashes:
            there.setdefault(digest, path)
    for digest, name in wanted:
        if digest in there:
            (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there[digest], TARGET / name)
        else:
            print(f"not found: {name} (SHA-256 {digest})")
    print(f"{sum(d in there for d, _ in wanted)} of {len(wanted)} files are in {TARGET}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ""))
