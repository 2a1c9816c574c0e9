"""Held-out denoising: how well the network in training restores rows it never sees, by tier and noise level.

    records = rows(cfg)                                   # the same rows for every masking and seed
    Evaluation(cfg, records, eos, mask).run(engine, rank, world, device)

Rows are masked uniformly at fixed levels, whatever the run's own masking and seed, so that runs can be set side by
side. Evaluating draws no random number and touches no state of the training: its bits are the same with and without.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from treediff.config import Config
from treediff.data import examples, prepare, sources, stdlib
from treediff.files import read_row, whole
from treediff.masking import rules, tokens
from treediff.training import batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


LEVELS = (0.25, 0.5, 0.75)
"""Noise levels: at each, exactly that share of a row's answer tokens is masked."""

_DATA_SEED = 77_001  # of problems made on the spot: one set for all runs of a preset
_MASK_SEED = 77_002
_MOST = 100_000  # rows of the source that are looked through


def rows(cfg: Config) -> list[dict[str, Any]]:
    """`eval_rows` encoded rows (fewer if there are no more) that neither this run nor its backbone is trained on.

    Those that come first in the source and were not chosen, found once and kept beside the training set.
    """
    if not (cfg.eval_every and cfg.eval_rows):
        return []
    runs = [cfg.with_masking("none"), cfg] if cfg.backbone == "pretrain" else [cfg]
    mark = sources.fingerprint([prepare.data_fingerprint(run) for run in runs], cfg.eval_rows, 1)
    path = cfg.preset_dir / "data" / f"heldout-{mark}.jsonl"
    if not path.exists():
        found = list(islice(_fresh(cfg, runs), cfg.eval_rows))
        with whole(path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in found))
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {"uid": r["uid"], "input_ids": np.array(r["input_ids"], np.int32), "labels": np.array(r["labels"], np.uint8)}
        for r in kept
    ]


def _fresh(cfg: Config, runs: list[Config]) -> Iterator[dict[str, Any]]:
    """Rows, encoded, that none of `runs` is trained on."""
    seen: set[int] = set()
    for run in runs:
        seen |= set(prepare.load(run)["uid"][:].tolist())
    if cfg.data not in ("tinycode", *stdlib.SOURCES) and not prepare.stats(cfg)["rows"]["not_chosen"]:
        return  # every row that can serve is trained on
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    # A problem set made on the spot is made anew; a file or a hub's data set is read from its beginning.
    source = sources.raw_rows(cfg.but(rows=4 * cfg.eval_rows, data_seed=_DATA_SEED))
    if cfg.data in stdlib.SOURCES:  # other modules
        source = enumerate(stdlib.rows(held_out=True))
    for number, row in islice(source, _MOST):
        try:
            row = {"id": str(number), **read_row(cfg.data, number, row)}
            example = examples.example(row, cfg.language, cfg.empty_reasoning)
            if examples.uid(example) in seen:
                continue
            record = examples.encode(cfg, tok, example)
        except examples.Dropped:
            continue
        seen.add(record["uid"])
        yield {"uid": record["uid"], **{k: record[k].tolist() for k in ("input_ids", "labels")}}


class Evaluation:
    """Fixed rows under fixed masks, in forward passes of the run's micro-batch."""

    def __init__(self, cfg: Config, records: list[dict[str, Any]], eos: int, mask: int):
        self.micros: list[tuple[int, batch.Micro]] = []  # level, forward pass
        records = sorted(records, key=lambda r: len(r["input_ids"]))  # less padding
        for start in range(0, len(records), cfg.micro_batch):
            some = records[start : start + cfg.micro_batch]
            ids, labels, attention_mask = batch.padded(some, eos, cfg.eos_padding, cfg.max_length)
            # Only what the rows hold is scored: no EOS.
            answer = labels != tokens.PROMPT
            for i, r in enumerate(some):
                answer[i, len(r["input_ids"]) :] = False
            uid = torch.tensor([int(r["uid"]) for r in some])
            draws = rules.uniform(_MASK_SEED, uid, 0, rules.TOKENS, ids.shape[1])
            keys = torch.where(answer, draws, torch.inf)
            for number, level in enumerate(LEVELS):
                chosen = rules.take(keys, torch.ceil(level * answer.sum(1)).long())
                weight = torch.zeros(ids.shape)
                bucket = torch.full((len(some),), number)
                noisy = rules.apply_mask(ids, chosen, mask)
                made = batch.micro(noisy, ids, chosen, weight, bucket, labels, attention_mask)
                self.micros.append((number, made))

    def run(
        self, net: nn.Module, rank: int, world: int, device: torch.device, beat: Callable[[], None]
    ) -> dict[str, Any]:
        """Accuracy and cross-entropy over all ranks' shares. Every rank makes as many forward passes as the others."""
        # [right, cross-entropy, tokens] by level and label.
        sums = torch.zeros(3, len(LEVELS), len(tokens.LABELS), dtype=torch.float64, device=device)
        was = net.training
        net.eval()
        with torch.no_grad():
            for start in range(0, len(self.micros), world):
                number, made = self.micros[min(start + rank, len(self.micros) - 1)]
                m = made.map(lambda t: t.to(device))
                right, ce = net(m.noisy, m.places, m.targets, None, m.attention_mask)
                if start + rank < len(self.micros):
                    for row, value in enumerate((right.double(), ce.double(), torch.ones_like(ce).double())):
                        sums[row, number].index_add_(0, m.label, value)
                beat()
        net.train(was)
        torch.distributed.all_reduce(sums)
        return _record(sums.cpu())


def _record(sums: torch.Tensor) -> dict[str, Any]:
    right, ce, n = sums

    def by_label(values: torch.Tensor) -> dict[str, float]:
        sums = [(label, values[:, i].sum(), n[:, i].sum()) for i, label in enumerate(tokens.LABELS)]
        return {label: round(float(v / count), 5) for label, v, count in sums if count}

    return {
        "accuracy": round(float(right.sum() / n.sum()), 5),
        "accuracy_by_label": by_label(right),
        "accuracy_by_level": {
            f"{level:g}": {
                label: round(float(right[row, i] / n[row, i]), 5) for i, label in enumerate(tokens.LABELS) if n[row, i]
            }
            for row, level in enumerate(LEVELS)
        },
        "loss": round(float(ce.sum() / n.sum()), 6),
        "loss_by_label": by_label(ce),
        "tokens": {label: int(n[:, i].sum()) for i, label in enumerate(tokens.LABELS) if n[:, i].sum()},
    }


def write(path: Path, step: int, record: dict[str, Any]) -> None:
    """Append the evaluation after `step` optimiser steps to evals.jsonl."""
    with path.open("a") as file:
        file.write(json.dumps({"step": step, **record}) + "\n")
