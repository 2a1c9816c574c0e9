"""What a training run will take, before anything is downloaded: steps, tokens, FLOPs, hours, memory per GPU, disk.

    treediff train --preset paper --plan                  # works without a GPU and without a network
    print(text(plan(cfg)))

The memory is memory.py's. The hours rest on a stated share of the data sheets' FLOP/s, which is no measurement.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treediff.config import Config, runs_root
from treediff.errors import UserError
from treediff.files import read_json
from treediff.training import memory
from treediff.training.batch import total_steps
from treediff.training.memory import Shape

if TYPE_CHECKING:
    from torch import nn


log = logging.getLogger(__name__)

LLADA_8B = {
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "embedding_size": 126464,
    "weight_tying": False,
}
"""The shape of GSAI-ML's 8B checkpoints (8,015,581,184 parameters), as their config.json has it."""
KNOWN = {f"GSAI-ML/{name}": LLADA_8B for name in ("LLaDA-8B-Instruct", "LLaDA-8B-Base", "LLaDA-1.5")}

DEVICES = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bf16 FLOP/s by the makers' data sheets (SXM)."""
MFU = 0.4
"""Share of those that the hours assume: model FLOPs, recomputation not counted."""

_KEEP = 3  # checkpoints on the disk while one is written
_PER_TOKEN = 14  # bytes of an encoded token: id, label, its share of the spans


@dataclass(frozen=True)
class Size:
    """What the step log needs to know of a network."""

    total: int
    trained: int
    vocabulary: int

    @classmethod
    def of(cls, net: nn.Module) -> Size:
        """Counted on a network, adapter included."""
        count = [(p.numel(), p.requires_grad) for p in net.parameters()]
        return cls(sum(n for n, _ in count), sum(n for n, t in count if t), net.config.vocab_size)

    @property
    def flops_per_token(self) -> float:
        """By `flops_per_token`, the adapter's parameters left out."""
        return flops_per_token(self.total - self.trained, True) if self.trained < self.total else 6.0 * self.total


def shape(cfg: Config) -> Shape:
    """The shape of the run's backbone, from the switches, a folder's config.json or what is known of the hub id.

    Raises UserError if it cannot be known without a download.
    """
    if cfg.backbone == "pretrain":
        return Shape(cfg.d_model, cfg.n_layers, cfg.n_heads, cfg.n_heads, cfg.mlp_hidden, cfg.vocab_size)
    if Path(cfg.backbone).is_dir():
        c = read_json(Path(cfg.backbone) / "config.json")
    elif cfg.backbone in KNOWN:
        c = KNOWN[cfg.backbone]
    else:
        raise UserError(f"backbone: the shape of {cfg.backbone} is not known here; name a folder with its config.json.")
    try:
        return Shape(
            c["d_model"],
            c["n_layers"],
            c["n_heads"],
            c.get("n_kv_heads") or c["n_heads"],
            c["mlp_hidden_size"],
            c.get("embedding_size") or c["vocab_size"],
            bool(c.get("weight_tying")),
        )
    except KeyError as e:
        raise UserError(f"{cfg.backbone}/config.json: {e.args[0]} is missing.") from None


def flops_per_token(parameters: int, lora: bool) -> float:
    """Model FLOPs of a training token by the usual count of N parameters: 2N forward, 2N for the gradients of the
    activations, and 2N more for those of the weights where all are trained: 4N with an adapter, 6N without.

    Attention's own and the adapter's are left out, the embedding table is left in; recomputing activations takes
    another 2N that is no model FLOP.
    """
    return (4.0 if lora else 6.0) * parameters


def peak_flops(cfg: Config, world: int) -> float | None:
    """FLOP/s of all devices together: `peak_flops`, or the data sheet's of the GPU that is here; None if unknown."""
    import torch

    if cfg.peak_flops:
        return cfg.peak_flops * world
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops * world for key, flops in DEVICES.items() if key in name), None)


# --- the plan ------------------------------------------------------------------------------------------------------
def plan(cfg: Config) -> dict[str, Any]:
    """Steps, tokens, FLOPs, hours, memory and disk of the run, and why it cannot be, if it cannot (`refused`)."""
    s = shape(cfg)
    steps = _steps(cfg)
    tokens = steps * cfg.rows_per_step * cfg.max_length
    per_token = flops_per_token(s.parameters, bool(cfg.lora_rank))
    items = memory.per_device(cfg, s)
    hours = {name: tokens * per_token / (cfg.processes * peak * MFU) / 3600 for name, peak in DEVICES.items()}
    return {
        "backbone": cfg.backbone,
        "parameters": s.parameters,
        "trained": s.lora(cfg.lora_rank) if cfg.lora_rank else s.parameters,
        "steps": steps,
        "backbone_steps": 0
        if cfg.masking == "none" or cfg.backbone != "pretrain"
        else _steps(cfg.with_masking("none")),
        "rows_per_step": cfg.rows_per_step,
        "tokens": tokens,
        "flops_per_token": per_token,
        "flops": tokens * per_token,
        "recomputation": tokens * 2.0 * s.parameters if cfg.gradient_checkpointing else 0.0,
        "processes": cfg.processes,
        "hours": hours,
        "memory": items,
        "memory_total": sum(items.values()),
        "disk": disk(cfg, s),
    }


def _steps(cfg: Config) -> int:

    if not (cfg.rows or cfg.max_steps):
        raise UserError("rows: 0 keeps all, whose number is not known before they are read; give rows or max_steps.")
    return total_steps(cfg, cfg.rows)


def disk(cfg: Config, s: Shape) -> dict[str, float]:
    """Bytes on the disk, by item."""
    e = 2 if cfg.precision == "bf16" else 4
    trained = s.lora(cfg.lora_rank) if cfg.lora_rank else s.parameters
    here = cfg.backbone == "pretrain" or Path(cfg.backbone).is_dir()
    return {
        "backbone, downloaded once": 0.0 if here else 2.0 * s.parameters,
        "encoded data (at most)": float(cfg.rows * cfg.max_length * _PER_TOKEN),
        f"checkpoints ({_KEEP} while one is written)": float(_KEEP * trained * (e + 12)),
        "trained weights": float(trained * e),
    }


def text(p: dict[str, Any]) -> str:
    """A plan to read."""
    kind = "4N" if p["trained"] < p["parameters"] else "6N"
    more = f", and {p['recomputation']:.2e} of recomputation" if p["recomputation"] else ""
    first = [f"first the backbone, made on the spot: {p['backbone_steps']:,} optimiser steps (not planned below)"]
    lines = [
        *(first if p["backbone_steps"] else []),
        f"{p['backbone']}: {p['parameters']:,} parameters, {p['trained']:,} trained",
        f"{p['steps']:,} optimiser steps of {p['rows_per_step']} rows, at most {p['tokens']:,} tokens",
        f"{p['flops']:.2e} model FLOPs ({kind} = {p['flops_per_token']:.2e} a token){more}",
        f"hours on {p['processes']} GPUs at {MFU:.0%} of the data sheet's FLOP/s (MFU): "
        + ", ".join(f"{name} {h:.1f}" if h >= 0.05 else f"{name} < 0.1" for name, h in p["hours"].items()),
        "",
        "memory per GPU, worst batch",
        *(f"  {_size(value)}  {name}" for name, value in p["memory"].items()),
        f"  {_size(p['memory_total'])}  in all",
        "",
        "disk",
        *(f"  {_size(value)}  {name}" for name, value in p["disk"].items() if value),
    ]
    return "\n".join(lines)


def _size(value: float) -> str:
    return f"{value / 1e9:8.2f} GB" if value >= 1e8 else f"{value / 1e6:8.2f} MB"


def require_room(cfg: Config) -> None:
    """Refuse a run that cannot fit the GPUs (those here, or of `gpu_memory`) or the disk, before anything is fetched.

    Raises UserError that says what is lacking and which switch would help.
    """
    import torch

    try:
        s = shape(cfg)
    except UserError as e:
        log.warning("%s Its memory cannot be planned.", e)
        return
    here = torch.cuda.device_count()
    if here and here < cfg.processes // cfg.nodes and not cfg.hostfile:
        raise UserError(
            f"processes: {cfg.processes // cfg.nodes} on this node, which has {here} GPUs; lower processes."
        )
    smallest = min((torch.cuda.get_device_properties(i).total_memory for i in range(here)), default=0)
    room = cfg.gpu_memory * 1e9 or smallest
    if room and (need := sum(memory.per_device(cfg, s).values())) > room:
        raise UserError(
            f"memory: the run needs {need / 1e9:.1f} GB on each GPU, which has {room / 1e9:.1f} GB; "
            f"{_advice(cfg, s, room)}"
        )
    where = runs_root()
    while not where.exists():
        where = where.parent
    items = disk(cfg, s)
    need = sum(items.values()) - items["backbone, downloaded once"]
    free = shutil.disk_usage(where).free
    if need > free:
        raise UserError(
            f"disk: the run needs {need / 1e9:.1f} GB in {where}, {free / 1e9:.1f} GB are free; "
            "make room, or set TREEDIFF_RUNS to another disk."
        )


def _advice(cfg: Config, s: Shape, room: float) -> str:
    """The first switch, or few switches, with which the run fits."""
    ways: list[dict[str, Any]] = [{"gradient_checkpointing": True}]
    if cfg.micro_batch > 1:
        ways.append({"micro_batch": 1, "accumulation": cfg.accumulation * cfg.micro_batch})
    ways += [{"zero_stage": 2}] if cfg.optimiser != "muon" else []
    ways += [{"lora_rank": 64}] if not cfg.lora_rank else []
    ways += [{"zero_stage": 3}] if cfg.optimiser != "muon" and cfg.processes > 1 else []
    ways += [{"max_length": cfg.max_length // 2}]
    tries = [*ways, *({k: v for w in ways[:i] for k, v in w.items()} for i in range(2, len(ways) + 1))]
    for way in tries:
        need = sum(memory.per_device(cfg.but(**way), s).values())
        if need <= room:
            switches = " ".join(f"--{k} {str(v).lower()}" for k, v in way.items())
            return f"{switches} would bring it to {need / 1e9:.1f} GB."
    return "no switch of this kit brings it down far enough; take larger GPUs, or a smaller backbone."
