"""What a training run will take, before anything is downloaded: steps, tokens, FLOPs, hours, memory per GPU, disk.

    treediff train --preset paper --plan                  # works without a GPU and without a network
    print(text(plan(cfg)))

The memory is memory.py's. The hours rest on a stated share of the data sheets' FLOP/s: that of measured
steps on an H100 (docs/results/gpu.md), taken for its kin, too; for an A100 measured times of kernels, added up.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from treediff.config import Config, runs_root
from treediff.data.prepare import HELD_BACK
from treediff.errors import UserError
from treediff.files import read_json
from treediff.model import backbones
from treediff.training import memory
from treediff.training.batch import total_steps
from treediff.training.memory import Shape

if TYPE_CHECKING:
    from torch import nn


log = logging.getLogger(__name__)

LLADA_8B, KNOWN = backbones.LLADA_8B, backbones.KNOWN


class Device(NamedTuple):
    """A GPU by its maker's data sheet, and what the hours assume of it."""

    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # of its memory [bytes/s]
    memory: float  # [bytes]
    plain: float  # share of `flops` that model FLOPs reach in training without recomputation
    recomputed: float  # the same with all blocks recomputed, which is no model FLOP


DEVICES = {
    "A100": Device(312e12, 2.04e12, 80e9, 0.43, 0.30),
    "H100 PCIe": Device(756e12, 2.0e12, 80e9, 0.28, 0.21),
    "H100 NVL": Device(835e12, 3.9e12, 94e9, 0.28, 0.21),
    "H100": Device(989e12, 3.35e12, 80e9, 0.28, 0.21),
    "H200 NVL": Device(835e12, 4.8e12, 141e9, 0.28, 0.21),
    "H200": Device(989e12, 4.8e12, 141e9, 0.28, 0.21),
}
"""By a part of the name that CUDA gives them, the special ones before the general (SXM)."""
COMPILED = 1.4
"""How many times faster `compile` makes a step without recomputation, measured on an H100 (docs/results/gpu.md)."""

MARGIN = 1.1
"""`auto` keeps activations as long as this many times the planned memory is free."""
WAYS = ("none", "every_4", "every_3", "every_2", "all")
"""What `auto` chooses from, the quickest first."""

_KEEP = 3  # checkpoints on the disk while one is written
_PER_TOKEN = 14  # bytes of an encoded token: id, label, its share of the spans
_SOURCE_ROWS = {"nvidia/OpenCodeReasoning": 567_850}
_PROMPT = 200  # tokens of a benchmark's prompt, about
_PROBLEMS = {"humaneval": 164, "mbpp": 378, "tinycode": 600}
_SCORING = {"humaneval": 0.22, "mbpp": 0.50, "tinycode": 0.22}  # core-seconds a program (docs/results/scoring.md)


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
    return Shape.of(backbones.shape(c))


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
    known = device(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    return known.flops * world if known else None


def device(name: str) -> Device | None:
    """What is known of the GPU that CUDA calls so."""
    return next((known for key, known in DEVICES.items() if key in name), None)


def recomputation(cfg: Config, s: Shape, room: float) -> str:
    """Which blocks are recomputed: `gradient_checkpointing`; for `auto` as few as `room` bytes allow (0: no limit)."""
    if cfg.gradient_checkpointing != "auto":
        return cfg.gradient_checkpointing
    need = {how: sum(memory.per_device(cfg.but(gradient_checkpointing=how), s).values()) for how in WAYS}
    return next((how for how in WAYS if not room or MARGIN * need[how] <= room), WAYS[-1])


# --- the plan ------------------------------------------------------------------------------------------------------
def plan(cfg: Config) -> dict[str, Any]:
    """Steps, tokens, FLOPs, hours, memory and disk of the run, and why it cannot be, if it cannot (`refused`)."""
    s = shape(cfg)
    steps = _steps(cfg)
    tokens = steps * cfg.rows_per_step * cfg.max_length
    per_token = flops_per_token(s.parameters, bool(cfg.lora_rank))
    hours = {name: _hours(cfg, s, device, tokens * per_token) for name, device in DEVICES.items()}
    how = recomputation(cfg, s, cfg.gpu_memory * 1e9 or min(free_memory(), default=DEVICES["H100"].memory))
    items = memory.per_device(cfg.but(gradient_checkpointing=how), s)
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
        "recomputed": how,
        "recomputation": tokens * 2.0 * s.parameters * _share(how, s),
        "processes": cfg.processes,
        "hours": hours,
        "sampling_hours": {name: _sampling_hours(cfg, s, device) for name, device in DEVICES.items()},
        "answers": sum(_answers(cfg)[benchmark] for benchmark, _ in cfg.jobs),
        "scoring_hours": _scoring_hours(cfg),
        "memory": items,
        "memory_total": sum(items.values()),
        "disk": disk(cfg, s),
    }


def _share(how: str, s: Shape) -> float:
    """The share of the blocks that is recomputed."""
    n = memory.every(how)
    return len(range(0, s.layers, n)) / s.layers if n else 0.0


def _hours(cfg: Config, s: Shape, device: Device, flops: float) -> float:
    """Of training, with the recomputation that the device's memory asks for."""
    again = _share(recomputation(cfg, s, device.memory), s)
    plain = device.plain * (COMPILED if cfg.compile else 1)
    return flops / (cfg.processes * device.flops) * ((1 - again) / plain + again / device.recomputed) / 3600


def _answers(cfg: Config) -> dict[str, int]:
    """Answers of a run at one length, by benchmark."""
    return {b: min(cfg.limit or 10**9, _PROBLEMS[b]) * cfg.samples_per_task for b in cfg.benchmarks}


def _sampling_hours(cfg: Config, s: Shape, device: Device) -> float:
    """Of sampling one run's answers: a pass reads all weights once and computes 2N a token; no answer ends early."""
    seconds, answers = 0.0, _answers(cfg)
    guided = 2 if cfg.guidance else 1
    for benchmark, length in cfg.jobs:
        whole, block = _PROMPT + length, cfg.of(benchmark).block_length
        kept = {"none": whole, "prefix": (length + block) / 2, "dual": block}[cfg.cache]
        blocks = length // block
        for tokens, passes in ((whole, blocks), (kept, length / cfg.tokens_per_step - blocks)):
            work = 2.0 * s.parameters * guided * cfg.sample_batch * tokens / (device.flops * device.plain)
            seconds += max(work, 2.0 * s.parameters / device.bandwidth) * passes * answers[benchmark] / cfg.sample_batch
    return seconds / (cfg.sample_processes or cfg.processes) / 3600


def _scoring_hours(cfg: Config) -> float:
    """Of running one run's programs on this machine's cores, those that time out left out."""
    answers = _answers(cfg)
    seconds = sum(answers[benchmark] * _SCORING[benchmark] for benchmark, _ in cfg.jobs)
    return seconds / (cfg.workers or os.cpu_count() or 1) / 3600


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
        "every row that can serve, encoded, of which those are chosen (at most)": _parts(cfg),
        f"checkpoints ({_KEEP} while one is written)": float(_KEEP * trained * (e + 12)),
        "trained weights": float(trained * e),
    }


def _parts(cfg: Config) -> float:
    """Bytes of the parts that prepare leaves: of what it read."""
    if cfg.choice == "first":
        rows = cfg.rows + HELD_BACK
    elif cfg.data == "tinycode":
        rows = cfg.rows
    elif Path(cfg.data).is_file():
        return Path(cfg.data).stat().st_size / 3 * _PER_TOKEN  # a token of three bytes or more
    else:
        rows = max(cfg.rows, _SOURCE_ROWS.get(cfg.data, 0))
    return float(rows * cfg.max_length * _PER_TOKEN)


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
        f"hours of training on {p['processes']} GPUs: {_each(p['hours'])}",
        f"hours of sampling {p['answers']:,} answers, none ending early: {_each(p['sampling_hours'])}",
        f"hours of scoring them on this machine's cores: {_hour(p['scoring_hours'])}",
        "(model FLOPs at 28 % of an H100's data sheet, 21 % with all blocks recomputed: measured steps, taken for its "
        "kin, too; at 43 and 30 % of an A100's: sums of measured kernels)",
        "",
        f"memory per GPU, worst batch, recomputed blocks: {p['recomputed']}",
        *(f"  {_size(value)}  {name}" for name, value in p["memory"].items()),
        f"  {_size(p['memory_total'])}  in all",
        "",
        "disk",
        *(f"  {_size(value)}  {name}" for name, value in p["disk"].items() if value),
    ]
    return "\n".join(lines)


def _hour(h: float) -> str:
    return f"{h:.1f}" if h >= 0.05 else "< 0.1"


def _each(hours: dict[str, float]) -> str:
    return ", ".join(f"{name} {_hour(h)}" for name, h in hours.items())


def _size(value: float) -> str:
    return f"{value / 1e9:8.2f} GB" if value >= 1e8 else f"{value / 1e6:8.2f} MB"


def free_memory() -> list[float]:
    """Free bytes of each GPU that is visible, as the driver says: asking CUDA would take half a gigabyte of each."""
    import torch

    if not torch.cuda.is_available():
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    ask = [
        "nvidia-smi",
        "--query-gpu=memory.free",
        "--format=csv,noheader,nounits",
        *(["-i", chosen] if chosen else []),
    ]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=60).stdout
        if free := [float(line) * 2**20 for line in said.splitlines()]:
            return free
    return [float(torch.cuda.get_device_properties(i).total_memory) for i in range(torch.cuda.device_count())]


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
    room = cfg.gpu_memory * 1e9 or min(free_memory(), default=0)
    if room and (need := sum(memory.per_device(cfg, s).values())) > room:
        has = "has" if cfg.gpu_memory else "has free"
        raise UserError(
            f"memory: the run needs {need / 1e9:.1f} GB on each GPU, which {has} {room / 1e9:.1f} GB; "
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
    ways: list[dict[str, Any]] = [{"gradient_checkpointing": "auto"}]
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
