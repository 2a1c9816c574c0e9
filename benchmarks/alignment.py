"""Tiers, spans and alignment against the tokenizer, on one core, in one run: python benchmarks/alignment.py

Files of the standard library go through each stage one after the other, so that a machine whose speed drifts slows all
stages alike; times are the process's own CPU time. `--growth` prints the same for one file of 10 kB up to 10 MB.
"""

from __future__ import annotations

import argparse
import os
import platform
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from treediff.masking import tokens
from treediff.masking.tiers import byte_tiers, error_bytes, node_spans, parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STANDIN = Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "llada_standin_8k"
TOKENIZER = ("tokenizer", "tokenizer without offsets")  # as everyone calls it, and as `tokens.encode` does
OURS = ("parse", "nodes", "tiers", "spans", "place", "align")


def sources(megabytes: float) -> list[bytes]:
    """Files of the standard library without its tests, by name, until there is so much of them."""
    root, found, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for path in sorted(root.rglob("*.py")):
        if size < megabytes * 1e6 and not {"test", "tests", "site-packages"} & set(path.relative_to(root).parts):
            raw = path.read_bytes()
            if raw.isascii() or b"coding" not in raw[:200]:  # a few are not UTF-8
                found.append(raw)
                size += len(raw)
    return found


def clocked(tok: PreTrainedTokenizerFast, files: list[bytes]) -> tuple[dict[str, float], int]:
    """CPU seconds of each stage over all files, and the number of tokens."""
    import numpy as np

    spent = dict.fromkeys((*TOKENIZER, *OURS), 0.0)
    count = 0
    for raw in files:
        text = raw.decode()
        clock = [time.process_time()]

        def lap(stage: str, clock: list[float] = clock) -> None:
            clock.append(time.process_time())
            spent[stage] += clock[-1] - clock[-2]

        backend = tok.backend_tokenizer
        for stage in TOKENIZER if count % 2 else reversed(TOKENIZER):  # the second one finds the words in its cache
            if stage == "tokenizer":
                ids = np.array(backend.encode(text, add_special_tokens=False).ids, np.int32)
            else:
                ids = np.array(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)
            lap(stage)
        parsed = parse(raw)
        lap("parse")
        assert len(parsed.nodes.kind)
        lap("nodes")
        tiers = byte_tiers(parsed)
        error_bytes(parsed)
        lap("tiers")
        spans = node_spans(parsed)
        lap("spans")
        starts = tokens.place(tok, ids, raw)
        lap("place")
        tokens.token_tiers(tok, ids, starts, tiers)
        tokens.token_spans(tokens.anchors(tok, ids, starts), spans)
        lap("align")
        count += len(ids)
    return spent, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", default=str(STANDIN), help="a folder; without one, a BPE of 8,192 is trained")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--growth", action="store_true", help="one file of 10 kB to 10 MB instead")
    args = parser.parse_args()
    files = sources(args.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        if not Path(args.tokenizer).is_dir():
            tokens.train_tokenizer((x.decode() for x in files), 8192, Path(folder))
            args.tokenizer = folder
        tok = tokens.load_tokenizer(args.tokenizer)
        tokens.place(tok, [], b"")
        name = Path(args.tokenizer).name if args.tokenizer != folder else "a BPE of 8,192 trained on these files"
        packages = ", ".join(f"{p} {version(p)}" for p in ("tree-sitter", "tree-sitter-python", "tokenizers", "numpy"))
        print(f"Python {platform.python_version()}, {packages}; {name}")
        if args.growth:
            grow(tok, b"\n".join(files))
        else:
            table(tok, files)


def table(tok: PreTrainedTokenizerFast, files: list[bytes]) -> None:
    spent, n = clocked(tok, files)
    size = sum(map(len, files))
    print(f"{len(files)} files, {size / 1e6:.1f} MB, {n} tokens; CPU time of one core\n")
    print("| stage | M tokens/s | ns/byte | of the tokenizer's time | of that without offsets |")
    print("| --- | --- | --- | --- | --- |")
    spent["parse + tiers + spans + alignment"] = sum(spent[stage] for stage in OURS)
    for stage, seconds in spent.items():
        shares = [f"{seconds / spent[of]:.1%}" for of in TOKENIZER]
        print(f"| {stage} | {n / seconds / 1e6:.2f} | {seconds / size * 1e9:.1f} | {' | '.join(shares)} |")


def grow(tok: PreTrainedTokenizerFast, source: bytes) -> None:
    print("\n| one file of | parse | parse + tiers + spans + alignment | tokenizer | (all in ns/byte)")
    print("| --- | --- | --- | --- |")
    for size in (10_000, 100_000, 1_000_000, 10_000_000):
        raw = (source * (1 + size // len(source)))[:size].decode(errors="ignore").encode()
        runs = max(1, 1_000_000 // size)
        spent, _ = clocked(tok, [raw] * runs)
        ours = sum(spent[stage] for stage in OURS)
        each = [f"{x / len(raw) / runs * 1e9:.0f}" for x in (spent["parse"], ours, spent["tokenizer"])]
        print(f"| {len(raw)} B | {' | '.join(each)} |")


if __name__ == "__main__":
    main()
