"""Training speed at LLaDA-8B's exact shape, random weights: python benchmarks/gpu_train.py --out docs/results/gpu.json

LoRA r 64 on all seven matrices, 4,096 tokens, DeepSpeed on one device, the code of train.py. Tokens/s, model FLOP
utilisation (4N a token, recomputation apart) against the matrix rate measured in the same run, peak memory beside the
plan's, and the same with each optimisation switched off in turn, every one in a process of its own. `--scale tiny` runs
the same on a CPU in seconds; its figures mean nothing but that the code runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from treediff.config import Config, resolve
from treediff.files import write_json
from treediff.model import llada, lora
from treediff.model.forward import hidden_states, lm_head
from treediff.runs import provenance
from treediff.training import batch, launch, loss, memory, plan, train

MASK, EOS = 126336, 126081
VARIANTS = {
    "all": "every optimisation on",
    "all_logits": "logits of every position, transformers' loss",
    "attention_mask": "attention with a materialised mask",
    "boolean_index": "masked positions found on the device (the host waits)",
    "compile": "each block's elementwise work fused by torch.compile",
    "plain_adamw": "AdamW not fused",
    "recomputation": "activations of every block computed again",
    "trainer": "transformers' Trainer, PEFT's LoRA and LLaDA's published loss on the same model",
    "trainer_recomputation": "the same with gradient_checkpointing, as it is usually run",
}
SCALES: dict[str, dict[str, Any]] = {
    "8b": {"accumulation": 4},
    "1b": {"accumulation": 4},
    "tiny": {"max_length": 128, "accumulation": 2, "lora_rank": 8},
}
SHAPES = {
    "8b": plan.LLADA_8B,
    "1b": {**plan.LLADA_8B, "d_model": 2048, "n_layers": 8, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": 6144},
    "tiny": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "mlp_hidden_size": 192,
        "embedding_size": 500,
    },
}


def config(scale: str, variant: str) -> Config:
    """The paper's switches, on one device."""
    cfg = resolve("paper", processes=1, **SCALES[scale])
    return cfg.but(gradient_checkpointing="all" if variant == "recomputation" else "none")


def backbone(scale: str, device: torch.device) -> nn.Module:
    """Random weights of the scale's shape, made on the device in bf16."""
    torch.manual_seed(0)
    shape = {**SHAPES[scale], "vocab_size": SHAPES[scale]["embedding_size"], "eos_token_id": EOS}
    return llada.random_backbone(shape, torch.bfloat16, str(device))


class Obvious(loss.Denoiser):
    """The loss as one would write it first."""

    def __init__(self, net: nn.Module, variant: str):
        super().__init__(net)
        self.variant = variant

    def forward(self, noisy, places, targets, weight, seen):
        from transformers.loss.loss_utils import ForMaskedLMLoss

        mask = torch.zeros_like(noisy, dtype=torch.bool).flatten().index_fill(0, places, True).view(noisy.shape)
        hidden = hidden_states(self.backbone, noisy, seen)
        head = lm_head(self.backbone)
        if self.variant == "boolean_index":
            ce = loss.masked_cross_entropy(head, hidden[mask], targets)
            return (ce * weight).sum(), ce.detach()
        labels = torch.full_like(noisy, -100).flatten().index_copy(0, places, targets).view(noisy.shape)
        value = ForMaskedLMLoss(head(hidden), labels, head.weight.shape[0])
        return value, value.detach().expand(len(targets))


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a square bf16 matrix product, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(scale: str, variant: str, steps: int) -> dict[str, Any]:
    """One variant: tokens/s, MFU, peak memory. A process of its own."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(verbose=False)
    cfg = config(scale, variant)
    rate = matrix_rate(device, 8192 if cuda else 256)
    net = lora.add_lora(backbone(scale, device), cfg)
    train.recompute(net, cfg.gradient_checkpointing)
    if variant == "compile":
        lora.compile_blocks(net)
    size = plan.Size.of(net)
    own = variant in ("all_logits", "boolean_index")
    denoiser = (Obvious(net, variant) if own else loss.Denoiser(net)).train()
    optimiser = train.optimiser(cfg, denoiser)
    if variant == "plain_adamw":
        for group in optimiser.param_groups:
            group["fused"] = False
        optimiser.defaults["fused"] = False
    settings = train.deepspeed_config(cfg, size.trained)
    engine, *_ = deepspeed.initialize(model=denoiser, optimizer=optimiser, config=settings)
    draw = torch.Generator().manual_seed(1)
    shape = (cfg.micro_batch, cfg.max_length)
    sums = loss.no_sums(device)
    began = 0.0
    for step in range(steps + 2):  # the first two warm up
        if step == 2:
            _wait(device)
            began = time.perf_counter()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        for _ in range(cfg.accumulation):  # one length, as it is without a mask: cuDNN may serve
            ids = torch.randint(0, SHAPES[scale]["embedding_size"] - 1, shape, generator=draw)
            mask = torch.rand(shape, generator=draw) < torch.rand((), generator=draw)
            seen = torch.ones(shape, dtype=torch.bool)
            m = batch.micro(ids, ids, mask, mask / mask.sum(), torch.zeros(shape[0]).long(), mask.byte(), seen)
            m = m._replace(attention_mask=seen if variant == "attention_mask" else None)
            train.micro_step(engine, m.map(lambda t: t.to(device)), sums, cfg.accumulation)
            engine.step()
    _wait(device)
    seconds = time.perf_counter() - began
    tokens = steps * cfg.accumulation * shape[0] * shape[1] / seconds
    planned = memory.per_device(cfg, memory_shape(scale), cuda=cuda, flash=cuda)
    context = next((v for k, v in planned.items() if k.startswith("CUDA")), 0.0)
    return {
        "tokens_per_s": round(tokens, 1),
        "matrix_flops": rate,
        "mfu": round(tokens * size.flops_per_token / rate, 4),
        "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
        "planned_memory": sum(planned.values()) - context,  # what the allocator of torch does not see is left out
        "loss_is_finite": bool(torch.isfinite(sums[0, -1])),
    }


def trainer(scale: str, variant: str, steps: int) -> dict[str, Any]:
    """The reference: the same model, rows and noise through transformers' Trainer with PEFT. A process of its own."""
    from peft.tuners.lora.layer import Linear
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from treediff.model.narrow import NarrowLinear

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    cfg = config(scale, variant)
    rate = matrix_rate(device, 8192 if cuda else 256)
    net = lora.add_lora(backbone(scale, device), cfg)
    for module in net.modules():
        if isinstance(module, NarrowLinear):
            module.__class__ = Linear  # PEFT's own
    size = plan.Size.of(net)
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(
        0, SHAPES[scale]["embedding_size"] - 1, (steps * cfg.accumulation * 2 + 64, cfg.max_length), generator=draw
    )
    marks: list[float] = []

    class Diffusion(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], **_: Any) -> torch.Tensor:
            ids = inputs["input_ids"]
            p = (1 - 1e-3) * torch.rand(len(ids), 1, device=ids.device).expand(ids.shape) + 1e-3
            masked = torch.rand(ids.shape, device=ids.device) < p
            logits = model(input_ids=torch.where(masked, SHAPES[scale]["embedding_size"] - 1, ids)).logits
            each = nn.functional.cross_entropy(logits[masked], ids[masked], reduction="none") / p[masked]
            return each.sum() / ids.numel()

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (2, steps + 2):  # the first two warm up
                _wait(device)
                marks.append(time.perf_counter())
                if cuda and len(marks) == 1:
                    torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as scratch:
        how = TrainingArguments(
            scratch,
            per_device_train_batch_size=cfg.micro_batch,
            gradient_accumulation_steps=cfg.accumulation,
            max_steps=steps + 2,
            bf16=cuda,
            gradient_checkpointing=variant == "trainer_recomputation",
            use_cpu=not cuda,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        runner = Diffusion(net, how, train_dataset=[{"input_ids": row} for row in rows], callbacks=[Clock()])
        runner.train()
    losses = [r["loss"] for r in runner.state.log_history if "loss" in r]
    tokens = steps * cfg.accumulation * cfg.micro_batch * cfg.max_length / (marks[1] - marks[0])
    return {
        "tokens_per_s": round(tokens, 1),
        "matrix_flops": rate,
        "mfu": round(tokens * size.flops_per_token / rate, 4),
        "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
        "planned_memory": None,
        "loss_is_finite": all(math.isfinite(value) for value in losses),
    }


def memory_shape(scale: str) -> memory.Shape:
    """The scale's shape as the plan knows it."""
    c = SHAPES[scale]
    heads = (c["n_heads"], c["n_kv_heads"])
    return memory.Shape(c["d_model"], c["n_layers"], *heads, c["mlp_hidden_size"], c["embedding_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", choices=[*SCALES], default="8b")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of " + ", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps measured")
    parser.add_argument("--out", type=Path, help="JSON file of the figures and their provenance")
    parser.add_argument("--one", choices=[*VARIANTS], help="only measure this one here (used by this script)")
    args = parser.parse_args()
    if args.one:
        work = trainer if args.one.startswith("trainer") else measure
        print(json.dumps(work(args.scale, args.one, args.steps)))
        return
    found: dict[str, Any] = {}
    for variant in args.variants.split(","):
        argv = [sys.executable, __file__, "--scale", args.scale, "--steps", str(args.steps), "--one", variant]
        env = dict(os.environ)
        if not variant.startswith("trainer"):
            env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            env["MASTER_PORT"] = str(launch.free_port())
        if not torch.cuda.is_available():
            env |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
        if done.returncode:
            words = [line for line in done.stderr.strip().splitlines() if line.strip()]
            found[variant] = {"failed": next((w for w in reversed(words) if "Error" in w), words[-1])}
            print(f"{variant:17} failed: {found[variant]['failed']}")
            continue
        found[variant] = r = json.loads(done.stdout.strip().splitlines()[-1])
        peak = f"{r['peak_memory'] / 1e9:.2f} GB" if r["peak_memory"] else "not measured"
        planned = f" (planned {r['planned_memory'] / 1e9:.2f})" if r["planned_memory"] else ""
        print(
            f"{variant:17} {r['tokens_per_s']:10.1f} tokens/s  MFU {r['mfu']:6.1%} of {r['matrix_flops'] / 1e12:.1f} "
            f"TFLOP/s  peak {peak}{planned}  {VARIANTS[variant]}",
            flush=True,
        )
    if args.out:
        facts = provenance(scale=args.scale, steps=args.steps, shape=SHAPES[args.scale], variants=found)
        write_json(args.out, facts)


if __name__ == "__main__":
    main()
