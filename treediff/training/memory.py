"""The memory of a training step on one device, item by item.

    per_device(cfg, shape)                                # {"weights": bytes, "activations kept": bytes, ...}

It counts the tensors that autograd, DeepSpeed and AdamW hold at the fullest moment; tests/test_memory.py holds it to
measurements. What a CUDA device takes besides is an estimate and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treediff.config import Config

LOGIT_ROWS = 2048
"""Masked positions whose logits exist at a time."""

_CONTEXT = 2.5e9  # CUDA context, NCCL's buffers, fragmentation [bytes]: an estimate
_LIVE = 1_000_000_000  # parameters that ZeRO 3 has gathered at a time, at most (DeepSpeed's default)


@dataclass(frozen=True)
class Shape:
    """A backbone's shape."""

    d: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False
    biases: bool = False  # of queries, keys and values

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a model in transformers, from its config; or what `backbones.shape` gives."""
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
            config.vocab_size,
            config.tie_word_embeddings,
            getattr(config, "biases", getattr(config, "model_type", "") == "qwen2"),
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of the 7 matrices of a block."""
        kv = self.d // self.heads * self.kv_heads
        return [
            (self.d, self.d),
            (self.d, kv),
            (self.d, kv),
            (self.d, self.d),
            (self.d, self.mlp),
            (self.d, self.mlp),
            (self.mlp, self.d),
        ]

    @property
    def parameters(self) -> int:
        """All parameters of the backbone."""
        block = sum(a * b for a, b in self.matrices) + 2 * self.d
        block += sum(b for _, b in self.matrices[:3]) if self.biases else 0
        return self.layers * block + self.d + self.vocabulary * self.d * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        """Parameters of an adapter of this rank."""
        return self.layers * rank * sum(a + b for a, b in self.matrices)


def every(how: str) -> int:
    """Each how many-th block `gradient_checkpointing` recomputes: 0 for `none`; `auto` counts as `all`, its least."""
    return 0 if how == "none" else 1 if how in ("all", "auto") else int(how.removeprefix("every_"))


def per_device(cfg: Config, s: Shape, cuda: bool = True, flash: bool = True) -> dict[str, float]:
    """Bytes on each device at the fullest moment of a step, by item; the worst batch: every token of it masked.

    Counted per block and token, e bytes an element: both norms in float32 (8 d), queries, keys, values and output, the
    MLP's gate, up and activation, what the trained matrices read (for an adapter the input after dropout, and the
    dropout's mask), and the attention's scores where they are materialised (`flash = False`).
    """
    e = 2 if cfg.precision == "bf16" else 4
    trained = s.lora(cfg.lora_rank) if cfg.lora_rank else s.parameters
    split = cfg.processes
    zero = cfg.zero_stage
    weights = s.parameters * e
    if zero == 3:
        weights = weights / split + min(s.parameters, _LIVE) * e
    tokens = cfg.micro_batch * cfg.max_length
    drop = bool(cfg.lora_rank and cfg.lora_dropout)
    mask = 1 if cuda else e  # bytes of an element of a dropout's mask
    block = 8 * s.d + 4 * s.d * e + 3 * s.mlp * e  # norms; q, k, v, output; gate, activation, up
    if drop:
        block += (6 * s.d + s.mlp) * (e + mask)
    elif cfg.lora_rank:
        block += (2 * s.d + s.mlp) * e
    else:
        block += (4 * s.d + s.mlp) * e
    block += 7 * cfg.lora_rank * e
    if flash:
        block += 4 * s.heads
    else:
        block += s.heads * cfg.max_length * (e if e == 4 else e + 4)
    block *= tokens
    logits = min(tokens, LOGIT_ROWS) * s.vocabulary * 4.0
    at_the_loss = 3 * logits  # log-probabilities, and the gradient before and after the softmax
    if tokens > LOGIT_ROWS:  # recomputed chunk by chunk: the others' do not exist
        at_the_loss += tokens * s.d * e
    recomputed = range(0, s.layers, n) if (n := every(cfg.gradient_checkpointing)) else range(0)
    kept, fullest = len(recomputed) * tokens * s.d * e + (s.layers - len(recomputed)) * block, at_the_loss
    if recomputed:
        # The last such block's, with the gradients that its backward pass makes; by then the logits are gone, and so
        # are the blocks behind it.
        behind = s.layers - 1 - recomputed[-1]
        fullest = max(at_the_loss, (1 - behind) * block + tokens * (3 * s.mlp * e + 8 * s.d))
    kept += tokens * s.d * (8 + 2 * e)  # the last norm and what the head reads
    items = {
        "weights": weights,
        "adapter": trained * e / (split if zero == 3 else 1) if cfg.lora_rank else 0.0,
        "gradients": _gradients(trained, e, zero, split),
        "optimiser (float32 copy, two moments)": _states(cfg, trained, e, zero, split),
        "activations kept": kept,
        "logits, or a block's recomputation": fullest,
        "CUDA context, NCCL, fragmentation (estimate)": _CONTEXT if cuda else 0.0,
    }
    return {k: float(v) for k, v in items.items() if v}


def _gradients(trained: int, e: int, zero: int, split: int) -> float:
    bucket = min(500_000_000, trained) * e if zero in (1, 2) else 0
    held = trained * e / (split if zero >= 2 else 1)
    return held + bucket


def _states(cfg: Config, trained: int, e: int, zero: int, split: int) -> float:
    """AdamW's two moments and, under ZeRO or bf16, its float32 copy of the weights."""
    if cfg.optimiser == "muon":
        return 4.0 * trained  # one moment for the matrices, which are nearly all
    copy = 4 if zero or e == 2 else 0
    return (8 + copy) * trained / (split if zero else 1)
