"""The global batch of an optimiser step: which rows, their noise, their masks, and what each token's loss counts.

    with Loader(make, first, total, rank, device) as loader:      # make(step) returns a Batch
        batch, parts, waited = loader.next()              # made in the background while the last step was computed
        parts[number]                                     # all that the device needs, indices of masked tokens included

A batch is a pure function of (seed, step): computed alike on every rank, so that runs with one seed see the same rows
in the same order at the same noise levels whatever the masking, the number of processes or the micro-batch.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.signal import lfilter

from treediff.config import Config
from treediff.masking import rules, tokens
from treediff.strategies import STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Callable

    import datasets


NOISE_BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""The loss depends so much on the noise level drawn that its curve says little unless it is split by it."""


def total_steps(cfg: Config, rows: int) -> int:
    """Optimiser steps of the run: `max_steps`, or `epochs` passes over the rows, the last step filled up."""
    return cfg.max_steps or max(1, math.ceil(rows * cfg.epochs / cfg.rows_per_step))


def rows_of_step(cfg: Config, uids: np.ndarray, step: int) -> np.ndarray:
    """Row numbers of the global batch of `step`, int64 (rows_per_step,): each epoch is a permutation of all rows."""
    wanted = np.arange(step * cfg.rows_per_step, (step + 1) * cfg.rows_per_step)
    epoch = wanted // len(uids)
    order = {int(e): _permutation(cfg.seed, uids, int(e)) for e in np.unique(epoch)}
    return np.array([order[int(e)][i] for e, i in zip(epoch, wanted % len(uids), strict=True)], np.int64)


def _by_length(cfg: Config, lengths: list[int]) -> np.ndarray:
    """An order of the step's rows, int64 (rows_per_step,), in which each micro-batch holds rows of like length and the
    ranks' micro-batches of the same number do, too, so that no rank waits long for another."""
    groups = np.argsort(lengths, kind="stable").reshape(cfg.accumulation, cfg.processes, cfg.micro_batch)
    return groups.swapaxes(0, 1).reshape(-1)


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(seed: int, uids: np.ndarray, epoch: int) -> np.ndarray:
    key = (seed, epoch, len(uids))
    if key not in _ORDERS:
        _ORDERS.clear() if len(_ORDERS) > 1 else None  # a batch can straddle two epochs, never three
        draws = rules.uniform(seed, torch.from_numpy(uids), -1 - epoch, rules.SHUFFLE, 1)[:, 0].numpy()
        _ORDERS[key] = np.lexsort((np.arange(len(uids)), draws))
    return _ORDERS[key]


class Micro(NamedTuple):
    """What one forward pass needs. (B, L) is the micro-batch's shape, n its masked tokens, in row-major order."""

    noisy: torch.Tensor  # int64 (B, L): ids with the mask token
    places: torch.Tensor  # int64 (n,): masked positions in the flattened (B L)
    targets: torch.Tensor  # int64 (n,): the ids there
    weight: torch.Tensor  # float32 (n,): what each counts in the loss
    bucket: torch.Tensor  # int64 (n,): noise bucket of its sample
    label: torch.Tensor  # int64 (n,): tokens.LABELS by code
    attention_mask: torch.Tensor | None  # bool (B, L), False at padding that nobody may look at; None if there is none

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Micro:
        """The same with `function` applied to each tensor."""
        return Micro(*(t if t is None else function(t) for t in self))


class Batch:
    """The global batch of one step, padded to its longest row; a micro-batch is cut to its own longest.

    Arrays are (rows, length) unless said otherwise.
    """

    def __init__(
        self, cfg: Config, data: datasets.Dataset, uids: np.ndarray, step: int, total: int, eos: int, mask: int
    ):
        self.cfg, self.step = cfg, step
        index = rows_of_step(cfg, uids, step)
        if cfg.eos_padding == "one":  # padding costs time and teaches nothing: rows of like length go together
            index = index[_by_length(cfg, [len(data[int(i)]["input_ids"]) for i in index])]
        records = [data[int(i)] for i in index]
        self.ids, self.labels, self.attention_mask = padded(records, eos, cfg.eos_padding, cfg.max_length)
        longest = self.attention_mask.sum(1).view(-1, cfg.micro_batch).max(1).values
        self.tokens = int(longest.sum()) * cfg.micro_batch  # that the devices read, padding included
        self.row_tokens = sum(len(r["input_ids"]) for r in records)  # the rows' own, without any EOS
        self.uid = torch.from_numpy(uids[index])
        self.p = rules.noise_level(cfg, self.uid, step, total)
        column = STRATEGIES[cfg.masking].reads
        spans = [r[column].reshape(-1, 3) for r in records] if column else None
        self.mask = rules.corrupt(cfg, self.labels, spans, self.uid, step, self.p)
        self.noisy = rules.apply_mask(self.ids, self.mask, mask)
        self.weight = loss_weights(cfg, self.labels, self.mask, self.p, self.attention_mask)

    def part(self, rank: int, number: int) -> slice:
        """The rows of micro-batch `number` on `rank`."""
        start = (rank * self.cfg.accumulation + number) * self.cfg.micro_batch
        return slice(start, start + self.cfg.micro_batch)

    def micro(self, rank: int, number: int) -> Micro:
        """Micro-batch `number` on `rank`, all indices worked out here, on the host."""
        part = self.part(rank, number)
        edges = torch.tensor(NOISE_BUCKETS[1:-1], dtype=self.p.dtype)
        longest = int(self.attention_mask[part].any(0).sum())  # padding stands at the end
        parts = (self.noisy, self.ids, self.mask, self.weight, self.labels, self.attention_mask)
        noisy, ids, mask, weight, labels, attention_mask = (x[part, :longest] for x in parts)
        return micro(noisy, ids, mask, weight, torch.bucketize(self.p[part], edges), labels, attention_mask)


MULTIPLE = 128
"""Rows end at a multiple of this under `eos_padding = multiple`: few shapes, which every attention kernel takes."""


def padded(
    records: list[dict[str, Any]], eos: int, padding: str, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids int64, labels uint8, attention mask bool, each (rows, length of the longest).

    Every answer ends in at least one EOS, which is trained on. With `padding = multiple` so are those up to the next
    multiple of MULTIPLE or to `most` tokens: a function of the row alone, so that it does not matter what it stands
    beside. With `batch` so are all up to the longest row's. What lies behind is neither masked nor attended to.
    """
    ends = [len(r["input_ids"]) + 1 for r in records]
    if padding == "multiple":
        ends = [max(n, min(most, -n % MULTIPLE + n)) for n in ends]
    length = max(ends)
    if padding == "batch":
        ends = [length] * len(ends)
    ids = torch.full((len(records), length), eos, dtype=torch.long)
    labels = torch.full((len(records), length), tokens.PROMPT, dtype=torch.uint8)
    attention_mask = torch.ones((len(records), length), dtype=torch.bool)
    for i, r in enumerate(records):
        n = len(r["input_ids"])
        ids[i, :n] = torch.from_numpy(r["input_ids"])
        labels[i, :n] = torch.from_numpy(r["labels"])
        labels[i, n : ends[i]] = tokens.REASONING
        attention_mask[i, ends[i] :] = False
    return ids, labels, attention_mask


def micro(
    noisy: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    bucket: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor,
) -> Micro:
    """A Micro of tensors (B, L), cut to its longest row; `bucket` int64 (B,). What a mask picks is picked here."""
    longest = int(attention_mask.sum(1).max())
    tensors = (noisy, ids, mask, weight, labels, attention_mask)
    noisy, ids, mask, weight, labels, attention_mask = (t[:, :longest] for t in tensors)
    return Micro(
        noisy,
        mask.flatten().nonzero()[:, 0],
        ids[mask],
        weight[mask],
        bucket[:, None].expand(mask.shape)[mask],
        labels[mask].long(),
        None if attention_mask.all() else attention_mask,
    )


def loss_weights(
    cfg: Config, labels: torch.Tensor, mask: torch.Tensor, p: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """What the cross-entropy of each position counts, float32 (B, L), so that their weighted sum is the loss.

    Eq. 1 (`loss_weight = none`, `normaliser = masked`): the mean over all masked tokens. LLaDA's SFT (`inverse_p`,
    `answer`): each over P and over its own answer's length, then the mean over the batch. Dream's `original` is
    `inverse_p` with `masked`; its `cart` weighs a token by the known ones around it (`nearness`), of those `seen`.
    """
    weight = mask.double()
    if cfg.loss_weight == "inverse_p":
        weight = weight / p[:, None]
    elif cfg.loss_weight == "cart":
        weight = weight * nearness(seen & ~mask, cfg.cart_p)
    if cfg.normaliser == "masked":
        weight = weight / mask.sum().clamp(min=1)
    else:
        weight = weight / (labels != tokens.PROMPT).sum(1, keepdim=True).clamp(min=1) / len(labels)
    return weight.float()


def nearness(known: torch.Tensor, p: float) -> torch.Tensor:
    """Of each position i the sum over known tokens j != i of p (1 - p)^(|i - j| - 1) / 2: float64 (B, L) from bool.

    Two running sums, one from each side: that of i + 1 is (1 - p) times that of i, and p if i is known.
    """
    values = known.double().numpy()
    ahead = lfilter([0.0, p], [1.0, p - 1.0], values, axis=1)
    behind = lfilter([0.0, p], [1.0, p - 1.0], values[:, ::-1], axis=1)[:, ::-1]
    return torch.from_numpy((ahead + behind) / 2)


class Loader:
    """Makes the next step's batch, and this rank's part of it, in a thread while the device computes the last one."""

    def __init__(self, make: Callable[[int], Batch], first: int, total: int, rank: int, device: torch.device):
        self._make, self._step, self._total, self._rank = make, first, total, rank
        self._pin = device.type == "cuda"
        # A thread begins on the first device, where pinning memory would open a context of this process.
        own = (torch.cuda.set_device, (device,)) if self._pin else (None, ())
        self._pool = ThreadPoolExecutor(1, "batch", *own)
        self._pending = self._pool.submit(self._ready, first) if first < total else None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ready(self, step: int) -> tuple[Batch, list[Micro]]:
        batch = self._make(step)
        parts = [batch.micro(self._rank, number) for number in range(batch.cfg.accumulation)]
        # Only from pinned memory does a copy to the device run beside the computation.
        return batch, [m.map(torch.Tensor.pin_memory) for m in parts] if self._pin else parts

    def next(self) -> tuple[Batch, list[Micro], float]:
        """The next step's batch, this rank's micro-batches of it, and how long they were waited for [s]."""
        began = time.perf_counter()
        batch, parts = self._pending.result()
        waited = time.perf_counter() - began
        self._step += 1
        self._pending = self._pool.submit(self._ready, self._step) if self._step < self._total else None
        return batch, parts, waited
