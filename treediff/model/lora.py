"""LoRA on the 7 matrices of each block (A.1): added for training, merged for sampling."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from treediff.config import Config
from treediff.errors import UserError

if TYPE_CHECKING:
    from treediff.model.backbones import Model


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The 7 matrices of each block, never the head (A.1)."""


def add_lora(model: Model, cfg: Config) -> nn.Module:
    """`model` with trainable LoRA matrices on the 7 matrices of each block, everything else frozen (A.1).

    Raises UserError if one of the targets matches nothing.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import Linear

    from treediff.model.narrow import NarrowLinear

    torch.manual_seed(cfg.seed)  # the matrices' initialisation: the same for every masking
    lora = LoraConfig(
        r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, target_modules=list(LORA_TARGETS)
    )
    wrapped = get_peft_model(model, lora)
    matched = {n.split(".")[-4] for n, p in wrapped.named_parameters() if ".lora_A." in n and p.requires_grad}
    if matched != set(LORA_TARGETS):
        raise UserError(f"lora: no module matches {', '.join(sorted(set(LORA_TARGETS) - matched))}.")
    for module in wrapped.modules():
        if type(module) is Linear:
            module.__class__ = NarrowLinear
    return wrapped


def compile_blocks(model: nn.Module) -> None:
    """Have torch.compile fuse each block's elementwise work. Its bits differ from those without, not between runs."""
    llama = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in llama.model.layers:
        layer.compile(dynamic=True)


def load_adapter(model: Model, folder: Path) -> Model:
    """`model` with the PEFT adapter in `folder` merged into its weights."""
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: there is no PEFT adapter here.")
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is on its way out
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
