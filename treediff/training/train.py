"""The training run. Runs under the deepspeed launcher, one process per device (see launch.py):

    deepspeed --num_gpus 8 --module treediff.training.train runs/paper/ast-seed0

A step is a pure function of (seed, step, weights): see batch.py. Its loss is a mean over the *global* batch (Eq. 1),
see loss.py. Within a step the host never waits for the device, and the next batch is made meanwhile.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from treediff.config import Config, resolve
from treediff.data import prepare, sources
from treediff.errors import Preempted, UserError
from treediff.files import read_json, write_json
from treediff.masking import rules, tokens
from treediff.model import checkpoint, forward, llada, lora
from treediff.runs import provenance
from treediff.training import batch, checkpoints, heartbeat, heldout, loss, memory, plan, steplog

log = logging.getLogger(__name__)

_LONG = 1800  # seconds that a rank may take to load the weights or to write them while another waits


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
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both, as torch's optimisers give them."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
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


def network(cfg: Config, tok: Any, device: torch.device, folder: str = "") -> nn.Module:
    """What is trained: a fresh backbone (`masking = none`), or the run's backbone with LoRA or with all weights.

    `folder` is where the backbone lies, if the starter has looked that up.
    """
    if cfg.masking == "none":
        fresh = llada.new_backbone(cfg, len(tokens.byte_table(tok).spelling), tok.eos_token_id, tok.mask_token_id)
        return fresh.to(device)
    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    if folder and not Path(folder).is_dir():
        raise UserError(
            f"backbone: {folder} is not on {socket.gethostname()}; set HF_HOME to a folder all machines share."
        )
    backbone = checkpoint.load_backbone(folder or backbone_folder(cfg), dtype, str(device), cfg.revision)
    checkpoint.check_tokenizer(backbone, tok)
    return lora.add_lora(backbone, cfg) if cfg.lora_rank else backbone


def recompute(net: nn.Module, how: str) -> None:
    """Let some blocks (`none`, `every_n`, `all`) keep no activations: they are computed again in the backward pass."""
    if how != "none":
        net.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=memory.every(how))


def backbone_folder(cfg: Config) -> str:
    """Where the run's backbone lies: `cfg.backbone`, or the model that the run `none` of this seed made."""
    return str(cfg.with_masking("none").run_dir / "model") if cfg.backbone == "pretrain" else cfg.backbone


def deepspeed_config(cfg: Config, trained: int) -> dict[str, Any]:
    """What DeepSpeed is told. The optimiser is torch's own: DeepSpeed's would be compiled on first use."""
    return {
        "train_micro_batch_size_per_gpu": cfg.micro_batch,
        "gradient_accumulation_steps": cfg.accumulation,
        "gradient_clipping": cfg.grad_clip,
        "bf16": {"enabled": cfg.precision == "bf16"},
        # Sixteen micro-batches' gradients would be added up in bf16. Without ZeRO DeepSpeed knows no such mix.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if cfg.precision == "bf16" and cfg.zero_stage else {}),
        "zero_optimization": {
            "stage": cfg.zero_stage,
            # The buffer is as large as the bucket: the default would take 1 GB for an adapter of 0.3 GB.
            "reduce_bucket_size": min(500_000_000, trained),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def train(cfg: Config, backbone: str = "") -> None:
    """Train the run of `cfg` from its last checkpoint to its end. Called once per process, under the launcher.

    `backbone` is the folder of a backbone that the starter downloaded. Raises Preempted after the checkpoint that
    SIGTERM asked the starter for.
    """
    import deepspeed

    cuda = torch.cuda.is_available()
    if not cuda:
        import deepspeed.ops

        # DeepSpeed would compile its shared-memory collectives (30 s, needs g++); gloo gives the same bits.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=max(_LONG, cfg.stall_timeout)))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if world != cfg.processes:
        raise UserError(f"processes: {cfg.processes} are set, the launcher started {world}; make them agree.")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    checkpoints.require_shared(cfg.run_dir, rank)
    room = torch.cuda.mem_get_info()[0] if cuda else 0
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    data = prepare.load(cfg)
    uids = np.asarray(data.with_format("numpy")["uid"][:], np.int64)
    eos, mask = tok.eos_token_id, tok.mask_token_id
    total = batch.total_steps(cfg, len(uids))
    net = network(cfg, tok, device, backbone)
    how = plan.recomputation(cfg, memory.Shape.of(net.config), cfg.gpu_memory * 1e9 or room)
    recompute(net, how)
    if cfg.compile:
        lora.compile_blocks(net)
    cudnn = forward.cudnn_serves(cfg)
    if rank == 0:
        log.warning("recomputed blocks: %s; cuDNN's attention: %s", how, "allowed" if cudnn else "off")
    size = plan.Size.of(net)
    denoiser = loss.Denoiser(net).train()
    engine, *_ = deepspeed.initialize(
        model=denoiser, optimizer=optimiser(cfg, denoiser), config=deepspeed_config(cfg, size.trained)
    )
    peaks = [g["lr"] for g in engine.optimizer.param_groups]
    folder = cfg.run_dir / "checkpoints"
    first = saved = checkpoints.resume(engine, folder, rank)
    held = heldout.Evaluation(cfg, heldout.rows(cfg), eos, mask)
    evals = cfg.run_dir / "evals.jsonl"
    lines = None
    if rank == 0:
        lines = steplog.StepLog(cfg, first, size.vocabulary, size.flops_per_token, plan.peak_flops(cfg, world))
        if held.micros:
            steplog.keep_before(evals, first + 1 if first else 0)

    def evaluate(done: int) -> None:
        """Held-out accuracy after `done` steps, if its turn has come."""
        if held.micros and (done % cfg.eval_every == 0 or done == total):
            with forward.cudnn(False):
                record = held.run(engine, rank, world, device, beat)
            if lines:
                heldout.write(evals, done, record)
                lines.drain()  # a tracker takes the steps in their order
                lines.track({"step": done, **{f"heldout_{k}": v for k, v in record.items()}})

    def beat() -> None:
        heartbeat.beat(cfg.run_dir, rank)

    def save(done: int) -> None:
        nonlocal saved
        heartbeat.beat(cfg.run_dir, rank, _LONG)
        if lines:
            lines.flush()  # first: a step that failed must not be saved
        checkpoints.save(engine, folder, done, rank)
        saved = done
        if lines:
            lines.last_checkpoint = done

    def make(step: int) -> batch.Batch:
        return batch.Batch(cfg, data, uids, step, total, eos, mask)

    stop = torch.zeros(1, device=device)  # 1 as soon as a rank's starter asks for it
    asked = threading.Event()
    heartbeat.begin(cfg.run_dir, rank, asked.set)
    if not first:  # a checkpoint is written after its evaluation
        evaluate(0)
    with batch.Loader(make, first, total, rank, device) as loader, forward.cudnn(cudnn):
        for step in range(first, total):
            if stop.item():  # that of the step before, which DeepSpeed has waited for
                if step > saved:
                    save(step)
                raise Preempted(f"stopped before step {step}")
            started = time.perf_counter()
            factor = lr_factor(cfg, step, total)
            for group, peak in zip(engine.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            now, parts, waited = loader.next()
            sums = loss.no_sums(device)
            for number, part in enumerate(parts):
                beat()
                torch.manual_seed(_dropout_seed(cfg.seed, step, rank, number))
                micro_step(engine, part.map(lambda t: t.to(device, non_blocking=True)), sums, world * cfg.accumulation)
                engine.step()
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(stop.fill_(float(asked.is_set())), torch.distributed.ReduceOp.MAX)
            if lines:
                norm = engine.get_global_grad_norm()
                facts = {"lr": peaks[-1] * factor, "eps_t": round(rules.eps_at(cfg, step, total), 6)}
                facts["data_wait_s"] = round(waited, 4)
                lines.add(now, sums, norm, started, **facts)
            evaluate(step + 1)
            if (step + 1) % cfg.checkpoint_every == 0 and step + 1 < total:
                save(step + 1)
    if lines:
        lines.flush()
        facts = {"attention": {"implementation": net.config._attn_implementation, "cudnn": cudnn}, "recomputed": how}
        facts = provenance(data=prepare.data_fingerprint(cfg), steps=total, **facts)
        write_json(cfg.run_dir / "provenance.json", facts)
    heartbeat.beat(cfg.run_dir, rank, _LONG)
    checkpoints.publish(cfg, net, rank)
    if lines:
        lines.close()
        shutil.rmtree(folder, ignore_errors=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def micro_step(engine: Any, m: batch.Micro, sums: torch.Tensor, parts: int) -> None:
    """Forward and backward pass of a micro-batch on the device; its share of the log is added to `sums`.

    DeepSpeed divides the loss by accumulation and averages over ranks, `parts` together; the weights already sum over
    the global batch.
    """
    value, ce = engine(m.noisy, m.places, m.targets, m.weight, m.attention_mask)
    engine.backward(value * parts)
    loss.tally(sums, value, ce, m)


def _dropout_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """Dropout's generator starts anew from this at every forward pass, so that a resumed run draws the same."""
    return hash((seed, step, rank, micro)) & 0x7FFFFFFF  # a hash of integers is the same in every process


def main() -> None:
    """Entry point of each process: `python -m treediff.training.train RUN_DIR` with the launcher's environment."""
    given = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    run_dir, backbone = Path(given[0]).resolve(), "".join(given[1:])
    saved = read_json(run_dir / "config.json")
    os.environ["TREEDIFF_RUNS"] = str(run_dir.parent.parent)
    logging.basicConfig(level=logging.WARNING)
    rank = os.environ.get("RANK", "0")
    failure = run_dir / f"failure-rank{rank}.txt"
    failure.unlink(missing_ok=True)
    if starter := os.environ.get("TREEDIFF_STARTER"):
        heartbeat.follow(starter)
    lock, code = None, 0
    try:
        lock = heartbeat.alone(run_dir) if rank == "0" else None
        train(resolve(**saved), backbone)
    except Preempted:
        code = Preempted.EXIT
    except BaseException as e:  # recorded and raised again: the launcher would hide which rank it was
        failure.write_text(str(e) if isinstance(e, UserError) else traceback.format_exc())
        raise
    finally:
        if lock:
            lock.release()
    # No tear-down of the interpreter: a thread that a library left behind would abort a process whose work is done.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
