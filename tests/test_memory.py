"""The memory model against the live tensors of a real step under DeepSpeed, and what follows from its formula."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treediff.config import resolve
from treediff.model import llada, lora
from treediff.training import launch, memory, plan

BASE = {"d_model": 256, "n_layers": 4, "n_heads": 4, "mlp_hidden": 768, "vocab_size": 2000, "max_length": 512}
BASE |= {"micro_batch": 1, "accumulation": 2, "zero_stage": 2, "precision": "bf16", "flash": True}
CASES = {
    "the paper's kind": {"lora_rank": 16, "lora_dropout": 0.1, "gradient_checkpointing": "all", "n_layers": 8},
    "without recomputation": {"lora_rank": 16, "lora_dropout": 0.1},
    "every second block": {"lora_rank": 16, "lora_dropout": 0.1, "gradient_checkpointing": "every_2", "n_layers": 8},
    "every third block": {"lora_rank": 16, "lora_dropout": 0.1, "gradient_checkpointing": "every_3", "n_layers": 8},
    "large vocabulary": {"lora_rank": 16, "lora_dropout": 0.1, "gradient_checkpointing": "all", "vocab_size": 20_000},
    "no dropout, scores materialised": {"lora_rank": 8, "lora_dropout": 0.0, "precision": "fp32", "flash": False},
    "all weights": {"lora_rank": 0, "zero_stage": 0, "precision": "fp32"},
    "all weights, ZeRO 2": {"lora_rank": 0, "gradient_checkpointing": "all", "micro_batch": 2},
    "more tokens than a chunk": {"lora_rank": 16, "lora_dropout": 0.1, "micro_batch": 6, "vocab_size": 3000},
}


@pytest.fixture(scope="module")
def measured():
    script, switches = Path(__file__).with_name("step_memory.py"), [BASE | case for case in CASES.values()]
    argv = [sys.executable, str(script), str(launch.free_port()), json.dumps(switches)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_within_15_percent_of_the_measured_peak(measured, case):
    switches = BASE | CASES[case]
    flash = switches.pop("flash")
    cfg = resolve("tiny", processes=1, **switches)
    items = memory.per_device(cfg, plan.shape(cfg), cuda=False, flash=flash)
    print(case, {k: round(v / 1e6, 1) for k, v in items.items()}, f"measured {measured[case] / 1e6:.1f} MB")
    assert sum(items.values()) == pytest.approx(measured[case], rel=0.15)


@pytest.mark.parametrize("rank", [0, 8])
def test_parameters_are_those_of_the_model(rank):
    cfg = resolve("tiny", lora_rank=rank)
    s = plan.shape(cfg)
    net = llada.new_backbone(cfg, cfg.vocab_size, 1, 2)
    assert s.parameters == sum(p.numel() for p in net.parameters())
    if rank:
        trained = [p.numel() for p in lora.add_lora(net, cfg).parameters() if p.requires_grad]
        assert s.lora(rank) == sum(trained)


@given(st.sampled_from(["micro_batch", "max_length", "processes"]), st.sampled_from(plan.WAYS), st.sampled_from([0, 2]))
def test_more_work_takes_more_memory_and_more_processes_no_more(switch, recompute, zero):
    cfg = resolve("paper", gradient_checkpointing=recompute, zero_stage=zero)
    more = cfg.but(**{switch: 2 * getattr(cfg, switch)})
    one, two = (sum(memory.per_device(c, plan.shape(c)).values()) for c in (cfg, more))
    assert (two <= one) if switch == "processes" else (two > one)
