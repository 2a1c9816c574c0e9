"""Measures a training step under DeepSpeed: its peak memory, and that the host does not wait within it.

python tests/step_memory.py PORT '[{"precision": "bf16", "flash": true, ...}, ...]'      # a list of peaks [bytes]
"""

import gc
import json
import os
import sys

import torch
from modes import Live, NoSync

from treediff.config import resolve
from treediff.model import llada, lora
from treediff.training import batch, loss, plan, train


def step(cfg, flash: bool) -> int:
    """Peak of the second optimiser step (AdamW's moments are there) under DeepSpeed, every token masked [bytes]."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    with Live() as live:
        net = llada.new_backbone(cfg, cfg.vocab_size, 1, 2)
        net = net.to(torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
        net.config._attn_implementation = "sdpa" if flash else "eager"
        net = lora.add_lora(net, cfg) if cfg.lora_rank else net
        train.recompute(net, cfg.gradient_checkpointing)
        denoiser = loss.Denoiser(net).train()
        config = train.deepspeed_config(cfg, plan.Size.of(net).trained)
        engine, *_ = deepspeed.initialize(model=denoiser, optimizer=train.optimiser(cfg, denoiser), config=config)
        shape = (cfg.micro_batch, cfg.max_length)
        ids, all_ = torch.randint(3, cfg.vocab_size, shape), torch.ones(shape, dtype=torch.bool)
        sums = loss.no_sums(torch.device("cpu"))
        for number in range(2 * cfg.accumulation):
            if number % cfg.accumulation == 0:
                gc.collect()
                live.peak = live.now
            m = batch.micro(ids, ids, all_, all_ / ids.numel(), torch.zeros(shape[0]).long(), all_.byte(), all_)
            with NoSync():
                train.micro_step(engine, m, sums, cfg.accumulation)
            peak = live.peak  # before AdamW's step, whose temporaries a fused one does not have
            engine.step()
    return peak


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": sys.argv[1]}
    peaks = []
    for switches in json.loads(sys.argv[2]):
        flash = switches.pop("flash")
        peaks.append(step(resolve("tiny", processes=1, **switches), flash))
        gc.collect()
    print(json.dumps(peaks))
