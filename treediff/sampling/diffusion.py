"""A run's diffusion model as it answers prompts: loading it, its decoding switches, how many rows fit a GPU."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from treediff.config import Config
from treediff.data import sources
from treediff.masking import tokens
from treediff.model import checkpoint, lora
from treediff.sampling import decode
from treediff.sampling.prompts import Prompt, answer_text, prompt_ids
from treediff.training import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def device() -> str:
    """This process's GPU, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def load_run(cfg: Config) -> nn.Module:
    """The run's model, ready to sample from: its backbone with its adapter merged, or its own weights."""

    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    own = cfg.run_dir / "model"
    given = cfg.masking == "none" and cfg.backbone != "pretrain"  # whatever else was trained under this name
    folder = str(own) if own.is_dir() and not given else train.backbone_folder(cfg)
    net = checkpoint.load_backbone(folder, dtype, device(), cfg.revision)
    if not own.is_dir() and cfg.masking != "none":
        net = lora.load_adapter(net, cfg.run_dir / "adapter")
    if cfg.sample_compile:
        lora.compile_blocks(net)
    return net


def decoding(cfg: Config, tok: PreTrainedTokenizerFast, length: int, **changes: Any) -> decode.Decoding:
    """The decoding switches, for answers of `length` tokens, with some fields of `Decoding` changed."""
    same = ("block_length", "temperature", "guidance", "remasking", "eos_suppression", "threshold", "cache")
    values = {name: getattr(cfg, name) for name in (*same, "schedule", "top_p", "top_k", "early_exit", "seed")}
    values |= {"gen_length": length, "steps": length // cfg.tokens_per_step}
    return decode.Decoding(mask_id=tok.mask_token_id, ends=tokens.endings(tok), **{**values, **changes})


class Diffusion:
    """The run's model as it answers prompts."""

    def __init__(self, cfg: Config, length: int) -> None:
        self.cfg, self.tok = cfg, tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
        self.of_length(length)
        self.net = load_run(cfg)

    def of_length(self, length: int) -> None:
        """Answer with `length` tokens from now on."""
        self.how = decoding(self.cfg, self.tok, length)

    def prompt(self, problem: str) -> tuple[list[int], str]:
        """A problem as token ids, and how the answer is made to begin."""
        return prompt_ids(self.cfg, self.tok, problem)

    def answer(self, batch: Sequence[Prompt], watch: decode.Watch) -> list[dict[str, Any]]:
        """Per prompt: the answer's text (without what it was made to begin with), ids and how they came about."""
        out = decode.decode(self.net, [p.ids for p in batch], self.how, [p.uid for p in batch], watch)
        return [
            {
                "text": answer_text(self.tok, out.ids[i].tolist()),
                "ids": out.ids[i].tolist(),
                "committed_at": out.committed_at[i].tolist(),
                "confidence": [round(c, 5) for c in out.confidence[i].tolist()],
                "margin": round(m, 6) if math.isfinite(m := out.margin[i].item()) else None,
                "margin_at": out.margin_at[i].item(),
            }
            for i in range(len(batch))
        ]

    def rows(self, longest: int) -> int:
        """Prompts of at most `longest` tokens that fit into the GPU's free memory together; no limit on a CPU."""
        if not torch.cuda.is_available():
            return sys.maxsize
        return rows_that_fit(self.net.config, self.how, longest, torch.cuda.mem_get_info(device())[0])


def rows_that_fit(shape: Any, how: decode.Decoding, longest: int, free: int) -> int:
    """How many prompts of at most `longest` tokens can be decoded together in `free` bytes, at least 1; an estimate.

    `shape` is the model's transformers configuration. Counted in bf16: the widest moment of a block (the residual, its
    copies and three feed-forward activations), the keys and values that a cache keeps, and once the logits of a chunk.
    """
    width = longest + how.gen_length
    d_kv = shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
    row = 2 * width * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    row += 0 if how.cache == "none" else 4 * width * shape.num_hidden_layers * d_kv
    row *= 2 if how.guidance > 0 else 1
    logits = decode.LOGIT_ROWS * shape.vocab_size * (12 if how.temperature == 0 else 44)
    return max(1, int((0.85 * free - logits) // row))
