"""log.jsonl: one line per optimiser step; the same, if asked, to TensorBoard or Weights & Biases.

    for record in read_log(run_dir): record["loss_by_noise"], record["data_wait_s"], ...

A step's sums are written when the next step has been issued, so that the host never waits for the step it has just
given to the device. A loss or gradient that says that training has failed stops the run there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from treediff.config import Config
from treediff.errors import UserError
from treediff.files import read_jsonl, whole
from treediff.masking import tokens
from treediff.training.batch import NOISE_BUCKETS, Batch
from treediff.training.loss import CELLS

if TYPE_CHECKING:
    from collections.abc import Callable


EXPLODED = 3.0
"""A mean cross-entropy above this many times that of a uniform guess, ln(vocabulary), is no training any more."""


def read_log(run_dir: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """The records of a run's log.jsonl (or evals.jsonl; none if there is no such file)."""

    return list(read_jsonl(run_dir / name)) if (run_dir / name).exists() else []


def keep_before(path: Path, step: int) -> None:
    """Drop the lines of `path` from `step` on, and a line cut short: a resumed run writes them again."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            if json.loads(line)["step"] < step:
                kept.append(line)
    with whole(path) as temporary:
        temporary.write_text("".join(f"{x}\n" for x in kept))


class StepLog:
    """Writes log.jsonl on rank 0. `flops` are those of a token, `peak` the devices' FLOP/s together (None: unknown)."""

    def __init__(self, cfg: Config, first: int, vocabulary: int, flops: float, peak: float | None):
        self.cfg, self.path = cfg, cfg.run_dir / "log.jsonl"
        self.most, self.flops, self.peak = EXPLODED * math.log(max(2, vocabulary)), flops, peak
        self.last_checkpoint: int | None = first or None
        self.track = tracker(cfg, first)
        self._waiting: tuple[dict[str, Any], torch.Tensor, torch.cuda.Event | None] | None = None
        keep_before(self.path, first)

    def add(self, batch: Batch, sums: torch.Tensor, norm: Any, started: float, **facts: Any) -> None:
        """Take a step's sums (loss.tally's, over all ranks) and gradient norm; write those of the step before.

        `started` is when the step began; waiting for the step before bounds how far the host runs ahead of the device,
        so that a step's time is the device's, one step late.
        """
        self.drain()
        seconds = time.perf_counter() - started
        record = {"step": batch.step, **facts, "p": [round(float(p), 6) for p in batch.p], "uids": batch.uid.tolist()}
        record |= {"seconds": round(seconds, 4), "tokens": batch.tokens, "row_tokens": batch.row_tokens}
        values = sums.flatten()
        if norm is not None:  # ZeRO 0 keeps it to itself
            values = torch.cat([values, torch.as_tensor(norm, dtype=torch.float64, device=sums.device).reshape(1)])
        if not values.is_cuda:
            self._waiting = record, values, None
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting = record, host, event

    def drain(self) -> None:
        """Write the step that is still held back. Raises UserError if its loss or gradient is beyond all bounds."""
        if self._waiting is None:
            return
        (record, values, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()
        flat = values.tolist()
        totals, counts, norm = flat[:CELLS], flat[CELLS : 2 * CELLS], (flat[2 * CELLS :] or [None])[0]
        n = len(NOISE_BUCKETS) - 1
        mean = sum(totals[:n]) / max(1.0, counts[-1])
        self._check(record, totals[-1], mean, norm)
        means = [t / c if c else None for t, c in zip(totals[:-1], counts[:-1], strict=True)]
        per_second, own = (record[k] / max(1e-4, record["seconds"]) for k in ("tokens", "row_tokens"))
        cuda = torch.cuda.is_available()
        line = {
            "step": record.pop("step"),
            "loss": round(totals[-1], 6),
            "loss_by_noise": [None if v is None else round(v, 5) for v in means[:n]],
            "loss_by_label": {k: round(v, 5) for k, v in zip(tokens.LABELS, means[n:], strict=True) if v is not None},
            "masked_by_label": {k: int(c) for k, c in zip(tokens.LABELS, counts[n:-1], strict=True) if c},
            "masked": int(counts[-1]),
            **record,
            "grad_norm": None if norm is None else round(norm, 5),
            "tokens_per_s": round(per_second, 1),
            "row_tokens_per_s": round(own, 1),
            "mfu": round(per_second * self.flops / self.peak, 4) if self.peak else None,
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else _peak_rss(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.track(line)

    def _check(self, record: dict[str, Any], loss: float, mean: float, norm: float | None) -> None:
        """Stop where going on would only burn time."""
        if not math.isfinite(loss):
            what = f"loss is {loss}"
        elif mean > self.most:
            guess = self.most / EXPLODED
            what = f"loss has exploded ({mean:.4g} nats per masked token, where a blind guess has {guess:.3g})"
        elif norm is not None and not math.isfinite(norm):
            what = f"gradient norm is {norm}"
        else:
            return
        samples = ", ".join(map(str, record["uids"][:8])) + (", ..." if len(record["uids"]) > 8 else "")
        last = f"checkpoints/step-{self.last_checkpoint}" if self.last_checkpoint else "none yet"
        raise UserError(
            f"{what} at step {record['step']} (samples {samples}; last good checkpoint: {last}); lower lr or raise "
            "precision, then start the run again under another TREEDIFF_RUNS, or as it is from that checkpoint."
        )

    def flush(self) -> None:
        """All lines so far on the disk."""
        self.drain()
        with self.path.open("a") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """The end of the run."""
        if self.cfg.tracker == "wandb":
            import wandb

            wandb.finish()


def _peak_rss() -> int:
    """Peak resident memory of this process [bytes]."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- trackers ------------------------------------------------------------------------------------------------------
def check_tracker(cfg: Config) -> None:
    """Raises UserError if the package that `tracker` needs is not here."""
    if cfg.tracker != "none" and find_spec(cfg.tracker) is None:
        raise UserError(f"tracker: {cfg.tracker} is not installed; pip install {cfg.tracker}, or set tracker to none.")


def tracker(cfg: Config, first: int) -> Callable[[dict[str, Any]], None]:
    """A function that hands a record of log.jsonl or evals.jsonl to what `cfg.tracker` names."""
    check_tracker(cfg)
    if cfg.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(cfg.run_dir / "tensorboard"), purge_step=first)

        def write(record: dict[str, Any]) -> None:
            for name, value in scalars(record).items():
                writer.add_scalar(name, value, record["step"])
            writer.flush()

        return write
    if cfg.tracker == "wandb":
        import wandb

        name = f"{cfg.preset}-{cfg.run_dir.name}"
        own = hashlib.sha256(str(cfg.run_dir.resolve()).encode()).hexdigest()[:8]  # another folder is another run
        run = wandb.init(
            project="treediff",
            name=name,
            id=f"{name}-{own}",
            resume="allow",
            dir=str(cfg.run_dir),
            config=cfg.as_dict(),
        )
        return lambda record: run.log(scalars(record), step=record["step"])
    return lambda record: None


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by path: loss, loss_by_label/control, loss_by_noise/0.2-0.4, ..."""
    edges = [f"{a:g}-{b:g}" for a, b in itertools.pairwise(NOISE_BUCKETS)]
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if name == "loss_by_noise":
            value = dict(zip(edges, value, strict=True))
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": v for key, v in value.items()}
        elif name not in ("step", "p", "uids"):
            flat[name] = value
    return {k: float(v) for k, v in flat.items() if isinstance(v, (int, float))}
