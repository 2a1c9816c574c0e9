"""PEFT's LoRA layer with its scale on the narrow side: B (s A x) in place of s (B A x).

    for module in model.modules(): if type(module) is Linear: module.__class__ = NarrowLinear

The scale multiplies `rank` numbers a token instead of the matrix's width, forward and backward. For a scale that is a
power of two (the paper's 128 / 64) every bit is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear


class NarrowLinear(Linear):
    """A frozen matrix with one adapter in training."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output (..., out) of x (..., in)."""
        if self.disable_adapters or self.merged or self.active_adapters != ["default"] or self.lora_variant:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        a, b, dropout = (part["default"] for part in (self.lora_A, self.lora_B, self.lora_dropout))
        narrow = a(dropout(self._cast_input_dtype(x, a.weight.dtype))) * self.scaling["default"]
        return (result + b(narrow)).to(result.dtype)
