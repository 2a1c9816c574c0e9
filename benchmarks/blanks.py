"""How much of the code's sampling weight the switch `blank_owner` moves from blank tokens to others.

    python benchmarks/blanks.py [--tokenizer FOLDER] [--data ROWS.jsonl]      # without --data: the standard library

A token of blanks alone has the weight of the node around it (`enclosing`) or the default weight (`none`).
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from treediff.config import resolve
from treediff.data import examples
from treediff.errors import UserError
from treediff.files import read_jsonl
from treediff.masking import tiers, tokens

STANDIN = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "llada_standin_8k"


def programs(data: Path | None) -> Iterator[str]:
    """The code of the rows of a file, or the files of the standard library that are valid UTF-8."""
    if data:
        for row in read_jsonl(data):
            try:
                yield examples.example(row).code
            except examples.Dropped:
                continue
        return
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                yield tiers.read_source(path).decode()
            except (UserError, UnicodeDecodeError):
                continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", default=str(STANDIN))
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    tok, weight = tokens.load_tokenizer(args.tokenizer), np.array(resolve("paper").weights()[tokens.CODE :])
    sums, blank, count, files = dict.fromkeys(("none", "enclosing"), 0.0), 0, 0, 0
    for code in tqdm(programs(args.data), unit=" programs"):
        ids, starts = tokens.tokenize(tok, code)
        by_byte = tiers.byte_tiers(tiers.parse(code.encode()))
        for owner in sums:
            sums[owner] += weight[tokens.token_tiers(tok, ids, starts, by_byte, None, owner)].sum()
        blank += int(tokens.byte_table(tok).blank[ids].sum())
        count += len(ids)
        files += 1
    moved = 1 - sums["none"] / sums["enclosing"]
    share = f"{blank:,} of blanks alone ({blank / count:.1%})"
    print(f"{files} programs, {count:,} tokens, {share}; weight moved {moved:.1%}")


if __name__ == "__main__":
    main()
