"""Loads a checkpoint in a process of its own and prints its tensors' bytes and by how much its memory rose at most."""

import re
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM  # noqa: F401

from treediff.model import checkpoint


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) [bytes]; getrusage's would be the parent's if that was larger."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


before = resident("VmRSS")
net = checkpoint.load_backbone(sys.argv[1], getattr(torch, sys.argv[2]))
for p in net.parameters():
    p.detach().flatten()[::1024].clone()  # a mapped page counts when it is touched
print(sum(p.nbytes for p in net.parameters()), resident("VmHWM") - before)
