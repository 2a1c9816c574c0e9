"""The loss and the training run. Runs under the deepspeed launcher, one process per device (see launch.py):

    deepspeed --num_gpus 8 --module treediff.train runs/paper/ast-seed0

A step is a pure function of (seed, step, weights): the rows of its global batch, their noise levels and masks are
computed alike on every rank, so that runs with one seed see the same rows in the same order at the same noise levels
whatever the masking, the number of processes or the micro-batch. The loss is a mean over the *global* batch (Eq. 1).
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from treediff import masking, model, tokens
from treediff.config import Config, UserError, provenance, read_json, resolve, whole, write_json

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

NOISE_BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""The loss depends so much on the noise level drawn that its curve says little unless it is split by it."""

_CHUNK = 2048  # masked positions whose logits exist at a time
_KEEP = 2  # checkpoints


# --- the batch -----------------------------------------------------------------------------------------------------


def total_steps(cfg: Config, rows: int) -> int:
    """Optimiser steps of the run: `max_steps`, or `epochs` passes over the rows, the last step filled up."""
    return cfg.max_steps or max(1, math.ceil(rows * cfg.epochs / cfg.rows_per_step))


def rows_of_step(cfg: Config, uids: np.ndarray, step: int) -> np.ndarray:
    """Row numbers of the global batch of `step`, int64 (rows_per_step,): each epoch is a permutation of all rows."""
    wanted = np.arange(step * cfg.rows_per_step, (step + 1) * cfg.rows_per_step)
    epoch = wanted // len(uids)
    order = {int(e): _permutation(cfg.seed, uids, int(e)) for e in np.unique(epoch)}
    return np.array([order[int(e)][i] for e, i in zip(epoch, wanted % len(uids), strict=True)], np.int64)


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(seed: int, uids: np.ndarray, epoch: int) -> np.ndarray:
    key = (seed, epoch, len(uids))
    if key not in _ORDERS:
        _ORDERS.clear() if len(_ORDERS) > 1 else None  # a batch can straddle two epochs, never three
        draws = masking.uniform(seed, torch.from_numpy(uids), -1 - epoch, masking.SHUFFLE, 1)[:, 0].numpy()
        _ORDERS[key] = np.lexsort((np.arange(len(uids)), draws))
    return _ORDERS[key]


class Batch:
    """The global batch of one step, padded to its longest answer. Arrays are (rows, length) unless said otherwise."""

    def __init__(
        self, cfg: Config, data: datasets.Dataset, uids: np.ndarray, step: int, total: int, eos: int, mask: int
    ):
        index = rows_of_step(cfg, uids, step)
        records = [data[int(i)] for i in index]
        # Every answer ends in at least one EOS, which is trained on. With `eos_padding = batch` so is all padding;
        # with `one` the rest is neither masked nor seen.
        length = max(len(r["input_ids"]) for r in records) + 1
        self.ids = torch.full((len(records), length), eos, dtype=torch.long)
        self.labels = torch.full((len(records), length), tokens.PROMPT, dtype=torch.uint8)
        self.seen = torch.ones((len(records), length), dtype=torch.bool)
        for i, r in enumerate(records):
            n = len(r["input_ids"])
            self.ids[i, :n] = torch.from_numpy(r["input_ids"])
            self.labels[i, :n] = torch.from_numpy(r["labels"])
            end = length if cfg.eos_padding == "batch" else n + 1
            self.labels[i, n:end] = tokens.REASONING
            self.seen[i, end:] = False
        self.uid = torch.from_numpy(uids[index])
        self.p = masking.noise_level(cfg, self.uid, step, total)
        spans = [r["spans"].reshape(-1, 3) for r in records] if cfg.masking == "ast_span" else None
        self.mask = masking.corrupt(cfg, self.labels, spans, self.uid, step, self.p)
        self.noisy = masking.apply_mask(self.ids, self.mask, mask)
        self.weight = loss_weights(cfg, self.labels, self.mask, self.p)

    def part(self, rank: int, cfg: Config, micro: int) -> slice:
        """The rows of micro-batch `micro` on `rank`."""
        start = (rank * cfg.accumulation + micro) * cfg.micro_batch
        return slice(start, start + cfg.micro_batch)


def loss_weights(cfg: Config, labels: torch.Tensor, mask: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What the cross-entropy of each position counts, float32 (B, L), so that their weighted sum is the loss.

    Eq. 1 (`loss_weight = none`, `normaliser = masked`): the mean over all masked tokens. LLaDA's SFT (`inverse_p`,
    `answer`): each over P and over its own answer's length, then the mean over the batch.
    """
    weight = mask.double()
    if cfg.loss_weight == "inverse_p":
        weight = weight / p[:, None]
    if cfg.normaliser == "masked":
        weight = weight / mask.sum().clamp(min=1)
    else:
        weight = weight / (labels != tokens.PROMPT).sum(1, keepdim=True).clamp(min=1) / len(labels)
    return weight.float()


# --- the loss ------------------------------------------------------------------------------------------------------


def masked_cross_entropy(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(x0 | x_t) at masked positions only: float32 (n,) from hidden (n, d) and targets int64 (n,).

    Chunk by chunk and recomputed in the backward pass, so that never more than _CHUNK rows of logits exist.
    """

    def chunk(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(h).float(), t, reduction="none")

    if len(targets) <= _CHUNK:
        return chunk(hidden, targets)
    parts = zip(hidden.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in parts])


class Denoiser(nn.Module):
    """Backbone (and adapter) with the loss, in one module, so that DeepSpeed sees one forward pass."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        noisy: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        weight: torch.Tensor,
        seen: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of the masked tokens' cross-entropies, and each of them: scalar, float32 (n,)."""
        hidden = model.encode(self.backbone, noisy, seen)
        ce = masked_cross_entropy(model.head(self.backbone), hidden[mask], ids[mask])
        return (ce * weight[mask]).sum(), ce.detach()


# --- the run -------------------------------------------------------------------------------------------------------


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon on the blocks' matrices and AdamW on all else (Muon is made for hidden matrices only)."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], cfg: Config):
        hidden = [p for n, p in named if p.dim() == 2 and ".layers." in n]
        rest = [p for n, p in named if not (p.dim() == 2 and ".layers." in n)]
        super().__init__([{"params": hidden, "lr": cfg.muon_lr}, {"params": rest, "lr": cfg.lr}], {})
        self.parts = [
            torch.optim.Muon(hidden, lr=cfg.muon_lr, weight_decay=cfg.weight_decay),
            torch.optim.AdamW(rest, lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=0.0),
        ]
        self.param_groups = [g for part in self.parts for g in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)
        self.param_groups = [g for part in self.parts for g in part.param_groups]


def optimiser(cfg: Config, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters (A.1), or Muon with AdamW."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    if cfg.optimiser == "muon":
        return MuonAdamW(named, cfg)
    return torch.optim.AdamW(
        [p for _, p in named],
        lr=cfg.lr,
        betas=tuple(cfg.betas),
        weight_decay=cfg.weight_decay,
        fused=torch.cuda.is_available(),
    )


def lr_factor(cfg: Config, step: int, total: int) -> float:
    """Learning rate at `step` as a share of its peak: linear warm-up, then a cosine down to `lr_floor` (A.1)."""
    warm = max(1, round(cfg.warmup * total))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return cfg.lr_floor + (1 - cfg.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))


def network(cfg: Config, tok: Any) -> nn.Module:
    """What is trained: a fresh backbone (`masking = base`), or the run's backbone with LoRA or with all weights."""
    if cfg.masking == "base":
        return model.new_backbone(cfg, len(tokens.byte_table(tok).spelling), tok.eos_token_id, tok.mask_token_id)
    backbone = model.load_backbone(
        backbone_folder(cfg), torch.float32 if cfg.precision == "fp32" else torch.bfloat16, revision=cfg.revision
    )
    return model.add_lora(backbone, cfg) if cfg.lora_rank else backbone


def recompute(net: nn.Module) -> None:
    """Keep no activations inside the blocks: they are computed again in the backward pass."""
    net.activation_checkpointing_enable({"use_reentrant": False})


def backbone_folder(cfg: Config) -> str:
    """Where the run's backbone lies: `cfg.backbone`, or the model that the run `base` of this seed made."""
    return str(cfg.with_masking("base").run_dir / "model") if cfg.backbone == "pretrain" else cfg.backbone


def deepspeed_config(cfg: Config) -> dict[str, Any]:
    """What DeepSpeed is told. The optimiser is torch's own: DeepSpeed's would be compiled on first use."""
    return {
        "train_micro_batch_size_per_gpu": cfg.micro_batch,
        "gradient_accumulation_steps": cfg.accumulation,
        "gradient_clipping": cfg.grad_clip,
        "bf16": {"enabled": cfg.precision == "bf16"},
        "zero_optimization": {"stage": cfg.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def train(cfg: Config) -> None:
    """Train the run of `cfg` from its last checkpoint to its end. Called once per process, under the launcher."""
    import deepspeed
    import deepspeed.ops

    from treediff import corpus, prepare

    # DeepSpeed would compile its shared-memory collectives on a CPU (30 s, needs g++); gloo gives the same bits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    tok = tokens.load_tokenizer(corpus.tokenizer_folder(cfg), cfg.revision)
    data = prepare.prepared(cfg)
    uids = np.asarray(data.with_format("numpy")["uid"][:], np.int64)
    total = total_steps(cfg, len(uids))
    net = network(cfg, tok)
    if cfg.gradient_checkpointing:
        recompute(net)
    denoiser = Denoiser(net.to(device)).train()
    engine, *_ = deepspeed.initialize(model=denoiser, optimizer=optimiser(cfg, denoiser), config=deepspeed_config(cfg))
    peaks = [g["lr"] for g in engine.optimizer.param_groups]
    checkpoints = cfg.run_dir / "checkpoints"
    first = _resume(engine, checkpoints)
    steps_log = StepLog(cfg, first) if rank == 0 else None
    eos, mask_id = tok.eos_token_id, tok.mask_token_id
    for step in range(first, total):
        started = time.perf_counter()
        factor = lr_factor(cfg, step, total)
        for group, peak in zip(engine.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch = Batch(cfg, data, uids, step, total, eos, mask_id)
        sums = torch.zeros(2, len(NOISE_BUCKETS) - 1 + len(tokens.LABELS) + 1, device=device, dtype=torch.float64)
        for micro in range(cfg.accumulation):
            torch.manual_seed(_dropout_seed(cfg.seed, step, rank, micro))
            part = batch.part(rank, cfg, micro)
            noisy, ids, mask, weight, seen = (
                t[part].to(device, non_blocking=True)
                for t in (batch.noisy, batch.ids, batch.mask, batch.weight, batch.seen)
            )
            loss, ce = engine(noisy, ids, mask, weight, None if batch.seen.all() else seen)
            # DeepSpeed divides by accumulation and averages over ranks; the weights sum over the global batch.
            engine.backward(loss * (cfg.accumulation * world))
            _tally(sums, loss, ce, batch, part, mask)
            engine.step()
        torch.distributed.all_reduce(sums)
        if steps_log:
            steps_log.add(step, sums, peaks[-1] * factor, masking.eps_at(cfg, step, total), engine, batch, started)
        if (step + 1) % cfg.checkpoint_every == 0 and step + 1 < total:
            _save(engine, checkpoints, step + 1, rank, steps_log)
    if steps_log:
        steps_log.flush()
        _publish(cfg, net)
        write_json(cfg.run_dir / "provenance.json", provenance(data=prepare.data_fingerprint(cfg), steps=total))
        shutil.rmtree(checkpoints, ignore_errors=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _dropout_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """Dropout's generator starts anew from this at every forward pass, so that a resumed run draws the same."""
    return hash((seed, step, rank, micro)) & 0x7FFFFFFF  # a hash of integers is the same in every process


def _tally(
    sums: torch.Tensor, loss: torch.Tensor, ce: torch.Tensor, batch: Batch, part: slice, mask: torch.Tensor
) -> None:
    """Add a micro-batch to the step's sums: row 0 cross-entropy, row 1 tokens; by noise bucket, label and in all."""
    p = batch.p[part].to(mask.device)
    edges = torch.tensor(NOISE_BUCKETS[1:-1], device=mask.device, dtype=p.dtype)
    bucket = torch.bucketize(p, edges)[:, None].expand(mask.shape)[mask]
    label = batch.labels[part].to(mask.device)[mask].long() + len(NOISE_BUCKETS) - 1
    for row, value in enumerate((ce.double(), torch.ones_like(ce, dtype=torch.float64))):
        sums[row].index_add_(0, bucket, value)
        sums[row].index_add_(0, label, value)
    sums[0, -1] += loss.detach().double()
    sums[1, -1] += len(ce)


class StepLog:
    """log.jsonl: one line per optimiser step. A resumed run first drops the lines of steps it will repeat."""

    def __init__(self, cfg: Config, first: int):
        self.path = cfg.run_dir / "log.jsonl"
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] < first]
        with whole(self.path) as spot:
            spot.write_text("".join(f"{x}\n" for x in kept))

    def add(
        self, step: int, sums: torch.Tensor, lr: float, eps: float, engine: Any, batch: Batch, started: float
    ) -> None:
        values = (sums[0] / sums[1].clamp(min=1)).tolist()
        count = sums[1].tolist()
        n = len(NOISE_BUCKETS) - 1
        norm = engine.get_global_grad_norm()
        loss = float(sums[0, -1])
        if not math.isfinite(loss):
            raise UserError(
                f"loss is {loss} at step {step} (samples {', '.join(str(u) for u in batch.uid.tolist()[:8])}); "
                "lower lr or raise precision, then start the run again: it resumes from its last checkpoint."
            )
        seconds = time.perf_counter() - started
        cuda = torch.cuda.is_available()
        record = {
            "step": step,
            "loss": round(loss, 6),
            "loss_by_noise": [round(v, 5) if c else None for v, c in zip(values[:n], count[:n], strict=True)],
            "loss_by_label": {
                label: round(v, 5) for label, v, c in zip(tokens.LABELS, values[n:-1], count[n:-1], strict=True) if c
            },
            "masked_by_label": {k: int(c) for k, c in zip(tokens.LABELS, count[n:-1], strict=True) if c},
            "masked": int(count[-1]),
            "lr": lr,
            "eps_t": round(eps, 6),
            "p": [round(float(p), 6) for p in batch.p],
            "uids": batch.uid.tolist(),
            "grad_norm": round(float(norm), 5) if norm is not None else None,
            "tokens_per_s": round(batch.ids.numel() / seconds, 1),
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else _peak_rss(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        with self.path.open("a") as file:
            file.flush()
            os.fsync(file.fileno())


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl."""
    from treediff.corpus import read_jsonl

    return list(read_jsonl(run_dir / "log.jsonl"))


def _peak_rss() -> int:
    """Peak resident memory of this process [bytes]."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _save(engine: Any, folder: Path, step: int, rank: int, steps_log: StepLog | None) -> None:
    """Write checkpoints/step-N: complete (it then holds the file `complete`) or worth nothing; keep the last two."""
    engine.save_checkpoint(
        str(folder),
        tag=f"step-{step}",
        client_state={"step": step},
        exclude_frozen_parameters=True,
        save_latest=False,
    )
    torch.distributed.barrier()
    if rank == 0:
        steps_log.flush()
        (folder / f"step-{step}" / "complete").touch()
        for old in _complete(folder)[:-_KEEP]:
            shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    torch.distributed.barrier()


def _complete(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    return sorted(int(p.parent.name.removeprefix("step-")) for p in folder.glob("step-*/complete"))


def _resume(engine: Any, folder: Path) -> int:
    """Load the last complete checkpoint, if there is one; the step to go on with."""
    found = _complete(folder)
    if not found:
        return 0
    _, state = engine.load_checkpoint(str(folder), tag=f"step-{found[-1]}", load_module_strict=False)
    if state is None:
        raise UserError(f"{folder}/step-{found[-1]}: DeepSpeed cannot load this checkpoint; delete it and start again.")
    return state["step"]


def _publish(cfg: Config, net: nn.Module) -> None:
    """Write the trained weights: adapter/ in PEFT's format, or model/ in LLaDA's if all weights were trained."""
    if hasattr(net, "peft_config"):
        with whole(cfg.run_dir / "adapter") as spot:
            net.save_pretrained(str(spot))
    else:
        model.save_backbone(net, cfg.run_dir / "model")


def _follow(starter: int) -> None:
    """End this process when the one that started the run is gone: a killed notebook must not leave ranks behind."""

    def watch() -> None:
        while Path(f"/proc/{starter}").exists():
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _alone(run_dir: Path) -> IO[str]:
    """The run's lock, held as long as the returned file is open. Raises UserError if another process holds it."""
    lock = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run_dir}: another process is training this run; wait for it, or end it.") from None
    return lock


def main() -> None:
    """Entry point of each process: `python -m treediff.train RUN_DIR` with the launcher's environment."""
    run_dir = Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))).resolve()
    saved = read_json(run_dir / "config.json")
    os.environ["TREEDIFF_RUNS"] = str(run_dir.parent.parent)
    logging.basicConfig(level=logging.WARNING)
    rank = os.environ.get("RANK", "0")
    failure = run_dir / f"failure-rank{rank}.txt"
    failure.unlink(missing_ok=True)
    if starter := os.environ.get("TREEDIFF_STARTER"):
        _follow(int(starter))
    lock = None
    try:
        lock = _alone(run_dir) if rank == "0" else None
        train(resolve(**saved))
    except BaseException as e:  # recorded and raised again: the launcher would hide which rank it was
        failure.write_text(str(e) if isinstance(e, UserError) else traceback.format_exc())
        raise
    finally:
        if lock:
            lock.close()


if __name__ == "__main__":
    main()
